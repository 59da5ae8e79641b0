"""Pages leaving the cache for host memory, and coming back."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._kv_memory import FULL_ARRAYS, PACKED_ARRAYS, LayerMemory
from ._pages import Page, Sequence

if TYPE_CHECKING:
    from ._kv_sequences import SequenceStore

__all__ = ["Arrays", "SwappedSequence", "copy_pages", "place_pages", "swap_in", "swap_out"]

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class SwappedSequence:
    """A sequence in host memory.

    Attributes
    ----------
    length : int, tokens
    full : which of its pages are in full precision
    groups : arrays of each group of layers, [layers, pages, ...], the key offset among them
    """

    length: int
    full: list[bool]
    groups: list[Arrays]

    @property
    def has_offset(self) -> bool:
        return bool(self.groups[0]["key_offsets"].size)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.groups for array in arrays.values())


def swap_out(cache: SequenceStore, state: Sequence) -> SwappedSequence:
    """Copy a sequence to host memory."""
    numbers = _numbers(state.pages)
    offsets = [] if state.offset is None else [state.offset]
    groups = [copy_pages(m, numbers[True], numbers[False], offsets) for m in cache._groups]
    return SwappedSequence(state.length, [page.full for page in state.pages], groups)


def swap_in(cache: SequenceStore, swapped: SwappedSequence) -> Sequence:
    """Put a sequence into free pages.

    Raises
    ------
    OutOfPagesError
        If there are not enough; nothing is changed.
    """
    cache._full.require(sum(swapped.full))
    cache._packed.require(len(swapped.full) - sum(swapped.full))
    cache._offsets.require(int(swapped.has_offset))
    pages = [Page(f, (cache._full if f else cache._packed).take()) for f in swapped.full]
    numbers = _numbers(pages)
    offset = cache._offsets.take() if swapped.has_offset else None
    offsets = [] if offset is None else [offset]
    for memory, arrays in zip(cache._groups, swapped.groups, strict=True):
        place_pages(memory, numbers[True], numbers[False], offsets, arrays)
    return Sequence(swapped.length, pages, offset)


def _numbers(pages: list[Page]) -> dict[bool, list[int]]:
    return {full: [p.number for p in pages if p.full == full] for full in (True, False)}


def copy_pages(
    memory: LayerMemory, full: Sized[int], packed: Sized[int], offsets: Sized[int]
) -> Arrays:
    """Some pages of each pool, and key offsets, in host memory: [layers, pages, ...]."""
    return {
        name: _to_host(getattr(memory, name)[:, memory.indices(numbers)])
        for name, numbers in _places(full, packed, offsets)
    }


def place_pages(
    memory: LayerMemory,
    full: Sized[int],
    packed: Sized[int],
    offsets: Sized[int],
    arrays: Arrays,
) -> None:
    """What `copy_pages` has copied becomes these pages."""
    for name, numbers in _places(full, packed, offsets):
        if len(numbers):
            pool = getattr(memory, name)
            pool[:, memory.indices(numbers)] = memory.xp.asarray(arrays[name])


def _places(
    full: Sized[int], packed: Sized[int], offsets: Sized[int]
) -> list[tuple[str, Sized[int]]]:
    """Which pages of which array."""
    return [
        *((name, packed) for name in PACKED_ARRAYS),
        *((name, full) for name in FULL_ARRAYS),
        ("key_offsets", offsets),
    ]


def _to_host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else np.array(array)
