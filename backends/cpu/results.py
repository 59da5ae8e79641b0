"""Memory for results.

A fresh block of many megabytes costs about as much as the kernel that fills it, because the system
zeroes each page when it is first written.  Large blocks are therefore used again once the array
that lay in them, and every view of it, is gone.  Meanwhile the system may take their pages for
whoever needs memory (MADV_FREE); it is asked for huge pages, of which a block needs few.
"""

from __future__ import annotations

import math
import mmap
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from .codec import aligned_empty

LARGE = 4 << 20  # bytes of a result from which its memory is kept
MOST_KEPT = 256 << 20  # bytes, of all blocks that wait for their next use

_kept: list[mmap.mmap] = []  # oldest first; changed by atomic methods only, so it needs no lock


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> npt.NDArray[Any]:
    """An uninitialised array for a result; a large one lies at a multiple of a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE:
        return np.empty(shape, dtype)
    block = _take(size)
    if block is None:
        return aligned_empty(shape, dtype)
    memory = np.frombuffer(block, np.uint8)
    weakref.finalize(memory, _give_back, block).atexit = False
    array: npt.NDArray[Any] = memory[:size].view(dtype).reshape(shape)
    return array


def _take(size: int) -> mmap.mmap | None:
    """A block of at least `size` bytes that nothing uses; None where the system gives none."""
    for block in reversed(_kept.copy()):
        if size <= len(block) <= 2 * size:
            try:
                _kept.remove(block)
            except ValueError:  # another thread has taken it
                continue
            return block
    if not hasattr(mmap, "MADV_FREE"):
        return None
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # NumPy will say how much memory was asked for
        return None
    with suppress(AttributeError, OSError):  # a system without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    """Keep the block of an array that is gone, if there is room beside younger ones."""
    if len(block) > MOST_KEPT:
        return
    try:
        block.madvise(mmap.MADV_FREE)
    except OSError:  # an old system
        return
    _kept.append(block)
    while sum(map(len, _kept.copy())) > MOST_KEPT:
        try:
            del _kept[0]
        except IndexError:  # another thread has made room
            return
