"""Memory that one call of attention after another uses, so that it need not be cleared by the
operating system each time."""

from __future__ import annotations

import threading
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from .codec import address
from .simd import CACHE_LINE

MOST_KEPT = 1 << 26  # bytes


class Memory(threading.local):
    """A piece of memory for each thread."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Let later calls have another piece."""
        self.kept, self.size, self.base = np.empty(0, np.uint8), 0, 0

    def take(self, *sizes: int) -> tuple[npt.NDArray[Any], list[int]]:
        """What owns the memory, and addresses on cache lines with room for `sizes` bytes."""
        ends = list(accumulate(-(-size // CACHE_LINE) * CACHE_LINE for size in sizes))
        kept, base = self.kept, self.base
        if ends[-1] > self.size:
            kept = np.empty(ends[-1] + CACHE_LINE, np.uint8)
            base = address(kept) + -address(kept) % CACHE_LINE
            if ends[-1] <= MOST_KEPT:
                self.kept, self.size, self.base = kept, ends[-1], base
        return kept, [base, *(base + end for end in ends[:-1])]
