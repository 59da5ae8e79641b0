"""What a machine can do at best: read and copy memory, multiply and add, multiply matrices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from .timing import Call

__all__ = ["CudaRooflines", "HostRooflines", "Roofline", "Rooflines"]

ROUNDS = 1_000_000  # of multiply-adds: some milliseconds, long against waking threads
TENSOR_SIDE = 8192  # of square matrices that tensor cores multiply: about as long


@dataclass(frozen=True)
class Roofline:
    """A call to be timed, and the bytes it moves or the operations it does."""

    call: Call
    amount: int
    unit: str = "GB/s"


class Rooflines(Protocol):
    """By name; None where a machine has no such limit that could be measured."""

    def read(self) -> Roofline: ...

    def copy(self) -> Roofline: ...

    def multiply_add(self) -> Roofline | None: ...

    def tensor_cores(self) -> Roofline | None: ...

    def float64_product(self, rows: int, d: int) -> Roofline: ...


class HostRooflines:
    """Of host memory and CPU cores.

    Parameters
    ----------
    num_bytes : int
        Size of the array that is read; as large as the data it is compared with, so that caches
        help or hinder both.
    threads : int
        Each works on a contiguous part; NumPy releases the interpreter lock meanwhile.
    """

    def __init__(self, num_bytes: int, threads: int) -> None:
        source = np.ones(num_bytes // 4, np.float32)
        self._threads = threads
        self._parts = list(
            zip(
                np.array_split(source, threads),
                np.array_split(np.zeros_like(source), threads),
                strict=True,
            )
        )
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._bytes = source.nbytes

    def read(self) -> Roofline:
        """The largest of all numbers: NumPy reads as fast as one core can, unlike with `sum`."""
        return Roofline(lambda: self._run(lambda source, _: source.max()), self._bytes)

    def copy(self) -> Roofline:
        """Bytes read and bytes written."""
        call: Call = lambda: self._run(lambda source, target: np.copyto(target, source))  # noqa: E731
        return Roofline(call, 2 * self._bytes)

    def multiply_add(self) -> Roofline | None:
        """Fused multiply-adds of float32, on all threads."""
        from .multiply_add import OPERATIONS_PER_ROUND, multiply_add, vector_width

        operations = ROUNDS * OPERATIONS_PER_ROUND * vector_width() * self._threads
        call: Call = lambda: self._run(lambda *_: multiply_add(ROUNDS))  # noqa: E731
        return Roofline(call, operations, "G/s")

    def tensor_cores(self) -> Roofline | None:
        return None

    def float64_product(self, rows: int, d: int) -> Roofline:
        """A product [rows, d] @ [d, d] by the BLAS of NumPy."""
        return _matrix_product(np, rows, d)

    def _run(self, work: Callable[[Any, Any], Any]) -> None:
        if self._pool is None:
            work(*self._parts[0])
        else:
            list(self._pool.map(work, *zip(*self._parts, strict=True)))


READ = r"""
extern "C" __global__ void read_all(const uint4* source, long long count, unsigned* out) {
  unsigned found = 0;
  const long long stride = (long long)gridDim.x * blockDim.x;
  #pragma unroll 8
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint4 q = source[i];
    found |= q.x & q.y & q.z & q.w;
  }
  if (found == 0xffffffffu) *out = 1;  // never: no float is negative; the compiler cannot know that
}
"""


class CudaRooflines:
    """Of device memory, with random numbers.

    A copy reads as much as it writes, and memory that changes direction all the time is slower than
    memory that is only read: what mostly reads can be faster than `copy`.
    """

    def __init__(self, num_bytes: int) -> None:
        import cupy

        self._cupy = cupy
        random = cupy.random.default_rng(0)
        self._source = random.random(max(1, num_bytes // 4), dtype=np.float32)
        self._target = cupy.empty_like(self._source)
        self._read = cupy.RawKernel(READ, "read_all")

    def read(self) -> Roofline:
        count, threads = self._source.nbytes // 16, 512
        blocks = 4 * self._cupy.cuda.Device().attributes["MultiProcessorCount"]
        found = self._cupy.zeros(1, np.uint32)
        arguments = self._source, np.int64(count), found
        return Roofline(lambda: self._read((blocks,), (threads,), arguments), 16 * count)

    def copy(self) -> Roofline:
        """Bytes read and bytes written, in equal parts."""
        call: Call = lambda: self._cupy.copyto(self._target, self._source)  # noqa: E731
        return Roofline(call, 2 * self._source.nbytes)

    def multiply_add(self) -> Roofline | None:
        return None

    def tensor_cores(self) -> Roofline | None:
        """A product of square float16 matrices by cuBLAS, which adds in float32.

        Of random numbers: with zeros the chip needs less power, and is faster than it ever is with
        data.
        """
        left, right, out = self._halves
        call: Call = lambda: self._cupy.matmul(left, right, out=out)  # noqa: E731
        return Roofline(call, TENSOR_SIDE**3, "G/s")

    @cached_property
    def _halves(self) -> tuple[Any, Any, Any]:
        random, shape = self._cupy.random.default_rng(1), (TENSOR_SIDE, TENSOR_SIDE)
        left, right = (
            random.standard_normal(shape, dtype=np.float32).astype(np.float16) for _ in range(2)
        )
        return left, right, self._cupy.empty_like(left)

    def float64_product(self, rows: int, d: int) -> Roofline:
        """By cuBLAS."""
        return _matrix_product(self._cupy, rows, d)


def _matrix_product(xp: Any, rows: int, d: int) -> Roofline:
    left, right, out = xp.ones((rows, d)), xp.ones((d, d)), xp.empty((rows, d))
    return Roofline(lambda: xp.matmul(left, right, out=out), rows * d * d, "G/s")
