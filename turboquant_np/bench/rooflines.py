"""What the machine can do at best: read memory, copy memory, multiply float64 matrices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from .timing import Call

__all__ = ["CudaRooflines", "HostRooflines", "Rooflines", "matrix_product"]


class Rooflines(Protocol):
    """Calls to be timed, and the bytes that each moves."""

    read_bytes: int
    copy_bytes: int

    def read(self) -> None: ...

    def copy(self) -> None: ...


class HostRooflines:
    """Reading and copying host memory with a number of threads.

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
        self._parts = list(
            zip(
                np.array_split(source, threads),
                np.array_split(np.zeros_like(source), threads),
                strict=True,
            )
        )
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.read_bytes = source.nbytes
        self.copy_bytes = 2 * source.nbytes

    def read(self) -> None:
        self._run(lambda source, _: source.max())

    def copy(self) -> None:
        self._run(lambda source, target: np.copyto(target, source))

    def _run(self, work: Callable[[Any, Any], Any]) -> None:
        if self._pool is None:
            work(*self._parts[0])
        else:
            list(self._pool.map(work, *zip(*self._parts, strict=True)))


class CudaRooflines:
    """Copying device memory; reading is compared with the copy too, as on GPUs both run alike."""

    def __init__(self, num_bytes: int) -> None:
        import cupy

        self._source = cupy.ones(num_bytes // 4, cupy.float32)
        self._target = cupy.zeros_like(self._source)
        self.read_bytes = self.copy_bytes = 2 * self._source.nbytes

    def copy(self) -> None:
        self._target[...] = self._source

    read = copy


def matrix_product(rows: int, d: int, like: Any) -> Call:
    """A float64 product [rows, d] @ [d, d], 2 rows d^2 operations, where the array `like` lives."""
    xp: Any = np if isinstance(like, np.ndarray) else sys.modules["cupy"]
    left, right, out = xp.ones((rows, d)), xp.ones((d, d)), xp.empty((rows, d))
    return lambda: xp.matmul(left, right, out=out)
