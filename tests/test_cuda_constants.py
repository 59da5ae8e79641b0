"""Tables that kernels read are made once, whatever the number of threads; needs no GPU."""

from __future__ import annotations

import importlib
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant

constants_module = importlib.import_module("turboquant_np.backends.cuda.constants")
attention_module = importlib.import_module("turboquant_np.backends.cuda.attention_constants")
THREADS = 4


def at_once(work: Any) -> list[Any]:
    """What `work` returns in each of several threads that start together."""
    barrier = threading.Barrier(THREADS)

    def run(_: int) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def slow_copy(array: Any) -> Any:
    """Gives other threads time to begin the same."""
    time.sleep(0.02)
    return np.array(array)


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("cupy")
    stream = types.SimpleNamespace(synchronize=lambda: None)
    fake.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda: stream
    )
    fake.asarray = slow_copy
    monkeypatch.setitem(sys.modules, "cupy", fake)


@pytest.mark.parametrize("name", ["signs", "thresholds", "centroids", "decode_table", "buckets"])
@pytest.mark.usefixtures("fake_cupy")
def test_threads_get_the_same_array(name: str) -> None:
    spec = TurboQuant(head_dim=64, bits=3)._spec
    found = at_once(lambda: getattr(constants_module.constants(spec), name))
    assert all(array is found[0] for array in found)


@pytest.mark.usefixtures("fake_cupy")
def test_threads_get_the_same_tables_for_attention() -> None:
    spec = TurboQuant(head_dim=64, bits=3)._spec
    found = at_once(lambda: attention_module.constants_of(spec, 0)["signs"])
    assert all(array is found[0] for array in found)
