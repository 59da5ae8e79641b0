"""Results of many megabytes: whose memory they lie in, and the bits written past the caches."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import TurboQuant
from turboquant_np.testing import assert_bits_equal

ROWS = 37
# (dim, rounds, dtype): by batches, in registers, in memory, and rows that cannot be streamed
STREAMS = [
    (128, 3, "f4"),
    (64, 2, "f8"),
    (128, 1, "f4"),
    (256, 1, "f4"),
    (96, 3, "f4"),
    (64, 2, "f2"),
    (4, 3, "f4"),
]
LARGE = 5 << 20


@pytest.fixture
def results() -> Iterator[Any]:
    """The module that keeps blocks, with none kept."""
    if not hasattr(mmap, "MADV_FREE"):
        pytest.skip("this system cannot be told that memory is free")
    module = import_module("turboquant_np.backends.cpu.results")
    module._kept.clear()
    yield module
    module._kept.clear()


def check_streams(dim: int, rounds: int, dtype: str) -> bool:
    """Decode small results as if they were large; whether they could be streamed."""
    kernels: Any = import_module("turboquant_np.backends.cpu.kernels")
    codec = import_module("turboquant_np.backends.cpu.codec")
    x = np.random.default_rng(dim).standard_normal((ROWS, dim))
    settings: dict[str, Any] = {"head_dim": dim, "bits": 4, "hadamard_rounds": rounds}
    packed = TurboQuant(**settings, backend="reference").encode(x)
    expected = TurboQuant(**settings, backend="reference").decode(*packed, dtype=dtype)
    out = codec.aligned_empty(expected.shape, dtype)
    usual, kernels.STREAMED = kernels.STREAMED, 0
    try:
        TurboQuant(**settings, backend="cpu").decode(*packed, out=out)
        streams: bool = kernels.can_stream(dim, out.nbytes, codec.address(out), out.strides[0])
    finally:
        kernels.STREAMED = usual
    assert_bits_equal(out, expected)
    return streams


@pytest.mark.parametrize(("dim", "rounds", "dtype"), STREAMS)
def test_streamed_bits_equal_the_reference(dim: int, rounds: int, dtype: str) -> None:
    level = import_module("turboquant_np.backends.cpu.simd").target().level
    possible = level == "avx512" and dim > 4 and dtype != "f2"
    assert check_streams(dim, rounds, dtype) == possible


def test_only_large_aligned_rows_are_streamed() -> None:
    kernels: Any = import_module("turboquant_np.backends.cpu.kernels")
    size = kernels.STREAMED
    if not kernels.can_stream(128, size, 4096, 512):
        pytest.skip("this CPU does not stream")
    assert not kernels.can_stream(128, size - 1, 4096, 512)
    assert not kernels.can_stream(128, size, 4096 + 16, 512)
    assert not kernels.can_stream(100, size, 4096, 400)
    assert not kernels.can_stream(128, size, 4096, 256)


def block_of(array: npt.NDArray[Any]) -> range:
    start = array.__array_interface__["data"][0]
    return range(start, start + array.nbytes)


def test_a_large_result_is_aligned_and_writable(results: Any) -> None:
    array = results.empty((LARGE // 4, 4), np.float32, None)
    assert array.shape == (LARGE // 4, 4)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert block_of(array).start % 64 == 0
    array[:] = 7
    assert (array == 7).all()


def test_memory_is_used_again_only_when_no_view_is_left(results: Any) -> None:
    first = results.empty((LARGE,), np.uint8, None)
    where, view = block_of(first), first[100:].reshape(-1, 2)[3:5]
    view[:] = 42
    del first
    other = results.empty((LARGE,), np.uint8, None)
    other[:] = 1
    assert block_of(other).start != where.start
    assert (view == 42).all()
    del view
    again = results.empty((LARGE - 1000,), np.uint8, None)
    assert block_of(again).start == where.start
    assert not results._kept


def test_memory_in_a_reference_cycle_is_not_used_before_the_cycle_is_gone(results: Any) -> None:
    """A finaliser in the cycle can bring the array back to life."""
    rescued = []

    class Holder:
        def __init__(self) -> None:
            self.array = results.empty((LARGE,), np.uint8, None)
            self.itself = self

        def __del__(self) -> None:
            rescued.append(self.array)

    holder = Holder()
    holder.array[:] = 9
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None
    other = results.empty((LARGE,), np.uint8, None)
    other[:] = 1
    assert (rescued[0] == 9).all()


def test_what_is_kept_is_bounded(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MOST_KEPT", 2 * LARGE)
    arrays = [results.empty((LARGE,), np.uint8, None) for _ in range(5)]
    arrays.append(results.empty((3 * LARGE,), np.uint8, None))
    del arrays
    assert [len(block) for block in results._kept] == [LARGE, LARGE]
    array = results.empty((LARGE // 4,), np.float32, None)
    assert [len(block) for block in results._kept] == [LARGE]
    del array
    assert [len(block) for block in results._kept] == [LARGE, LARGE]


def test_threads_never_get_the_same_memory(results: Any) -> None:
    errors = []

    def work(number: int) -> None:
        for _ in range(60):
            array = results.empty((results.LARGE,), np.uint8, None)
            array[:: 1 << 12] = number
            if not (array[:: 1 << 12] == number).all():
                errors.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_without_madv_free_memory_comes_from_numpy(
    results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(mmap, "MADV_FREE")
    array = results.empty((LARGE,), np.uint8, None)
    assert block_of(array).start % 64 == 0
    del array
    assert not results._kept


def test_results_of_a_quantiser_do_not_share_memory(results: Any) -> None:
    tq = TurboQuant(head_dim=64, bits=2, backend="cpu")
    x = np.random.default_rng(8).standard_normal((LARGE // 256, 64), dtype=np.float32)
    packed = tq.encode(x)
    first = tq.decode(*packed, dtype="float32")
    kept = first.copy()
    second = tq.decode(packed[0], -packed[1], dtype="float32")
    assert not np.shares_memory(first, second)
    assert_bits_equal(first, kept)
    assert_bits_equal(second, -kept)
