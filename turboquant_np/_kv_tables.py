"""Where the tokens are that a step of a cache attends to, as arrays in the cache's memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ._pages import Sequence
    from .kv_cache import PagedKVCache

__all__ = ["PackedTables", "to_device"]

Int32s = npt.NDArray[np.int32]


class PackedTables:
    """Page tables of the packed pages of S sequences, in host memory.

    Parameters
    ----------
    cache : PagedKVCache
    states : list of Sequence
    lens : list of int, query tokens of each
    dtype : int32 or int64, what a backend works with

    Attributes
    ----------
    block_tables : [S, most packed pages of a sequence]
    context_lens : [S], packed tokens
    query_start_loc : [S + 1]
    query_positions : [S], of the first query tokens, counted from the first packed token
    positions : [S], of the first query tokens in the sequences
    offset_slots : [S], slots of the key offsets
    any_packed, any_offset : bool
    """

    def __init__(
        self, cache: PagedKVCache, states: list[Sequence], lens: list[int], dtype: Any
    ) -> None:
        size = cache._windows.block_size
        blocks = [[page.number for page in s.pages if not page.full] for s in states]
        first = [next((i for i, page in enumerate(s.pages) if not page.full), 0) for s in states]
        packed = [
            min(len(b) * size, s.length - f * size)
            for b, f, s in zip(blocks, first, states, strict=True)
        ]
        none = len(cache._offsets.references)  # the slot that stays zero
        slots = [none if s.offset is None else s.offset for s in states]
        self.any_packed, self.any_offset = any(blocks), any(slot != none for slot in slots)
        self.block_tables = np.zeros((len(states), max(map(len, blocks), default=0)), dtype)
        for row, numbers in zip(self.block_tables, blocks, strict=True):
            row[: len(numbers)] = numbers
        self.context_lens = np.array(packed, dtype)
        self.query_start_loc = np.cumsum([0, *lens], dtype=dtype)
        self.positions = np.array([s.length for s in states], dtype) - np.array(lens, dtype)
        self.query_positions = self.positions - np.array(first, dtype) * size
        self.offset_slots = np.array(slots, dtype)


def to_device(xp: Any, tables: Iterable[Int32s]) -> list[Any]:
    """Copies where numpy or cupy keeps arrays, in one transfer."""
    tables = list(tables)
    flat = xp.asarray(np.concatenate([table.reshape(-1) for table in tables]))
    ends = np.cumsum([table.size for table in tables]).tolist()
    return [
        flat[end - table.size : end].reshape(table.shape)
        for table, end in zip(tables, ends, strict=True)
    ]
