"""PagedKVCache with its pages on a GPU: the state machine, and the same output as on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from turboquant_np.kv_cache import PagedKVCache
from turboquant_np.testing import assert_bits_equal
from turboquant_np.testing.stateful import PagedCacheMachine

pytestmark = pytest.mark.cuda


class OnGpu(PagedCacheMachine):
    device = "cuda"


TestOnGpu = OnGpu.TestCase
TestOnGpu.settings = settings(stateful_step_count=20, max_examples=20, deadline=None)
pytest.mark.cuda(TestOnGpu)


def run(device: str, keys: Any, values: Any, query: Any) -> tuple[Any, Any]:
    """Prefill of two sequences, then some tokens one by one: last output, and what is stored."""
    cache = PagedKVCache(2, 2, 64, num_blocks=64, key_bits=3, value_bits=4, device=device)
    xp = cache._xp
    sequences = [cache.allocate(), cache.allocate()]
    counts, at = [200, 33], 0
    for _ in range(20):
        step = cache.begin_step(sequences, counts)
        tokens = slice(at, at + sum(counts))
        for layer in range(2):
            step.append(layer, *(xp.asarray(x[layer, tokens]) for x in (keys, values)))
            out = step.attend(layer, xp.asarray(query[tokens]))
        at, counts = tokens.stop, [1, 1]
    stored = [cache.read(s, 1)[0] for s in sequences]
    return to_host(out), [to_host(x) for x in stored]


def to_host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else array


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gpu_equals_cpu(dtype: Any) -> None:
    rng = np.random.Generator(np.random.PCG64(6))
    keys, values = (rng.integers(-64, 65, (2, 2, 300, 2, 64)) / 16).astype(np.float32)
    query = (rng.standard_normal((300, 8, 64)) / 4).astype(dtype)
    (out, stored), (want, want_stored) = (
        run(device, keys, values, query) for device in ("cuda", "cpu")
    )
    for one, other in zip(stored, want_stored, strict=True):
        assert_bits_equal(one, other)
    error = np.linalg.norm(out.astype(np.float64) - want.astype(np.float64))
    assert error < 1e-3 * np.linalg.norm(want.astype(np.float64))
