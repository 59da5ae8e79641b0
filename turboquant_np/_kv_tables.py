"""Where the tokens are that a step of a cache attends to, as arrays in the cache's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ._pages import Sequence
    from .kv_cache import PagedKVCache

__all__ = ["Tables", "WindowPart"]


class WindowPart(NamedTuple):
    """Sequences with the same number L of query tokens: S of them, F full-precision slots each."""

    tokens: Any  # int [S * L] rows of the query
    slots: Any  # int [S, F] slots of the full-precision pool
    key_positions: Any  # int [S, F], -1 where there is none
    query_positions: Any  # int [S, L]


class Tables:
    """Page tables of a step's sequences.

    lens : query tokens of each sequence
    """

    def __init__(self, cache: PagedKVCache, states: list[Sequence], lens: list[int]) -> None:
        self.lens = lens
        xp, size = cache._xp, cache._windows.block_size
        blocks = [[page.number for page in s.pages if not page.full] for s in states]
        first = [next((i for i, page in enumerate(s.pages) if not page.full), 0) for s in states]
        held = [
            min(len(b) * size, s.length - f * size)
            for b, f, s in zip(blocks, first, states, strict=True)
        ]
        starts = np.cumsum([0, *lens])
        positions = [s.length - n for s, n in zip(states, lens, strict=True)]
        self.has_packed = any(blocks)
        table = np.zeros((len(states), max(map(len, blocks), default=0)), np.int32)
        for row, numbers in zip(table, blocks, strict=True):
            row[: len(numbers)] = numbers
        self.packed_blocks = xp.asarray(table)
        self.packed_lens = xp.asarray(np.array(held, np.int32))
        self.query_start_loc = xp.asarray(starts.astype(np.int32))
        self.packed_query_positions = xp.asarray(
            np.array([p - f * size for p, f in zip(positions, first, strict=True)], np.int32)
        )
        none = len(cache._offsets.references)  # the slot that stays zero
        offsets = [none if s.offset is None else s.offset for s in states]
        self.offsets = xp.asarray(np.array(offsets, np.int64))
        self.windows: list[WindowPart] = []
        self.tiles: dict[int, tuple[Any, int]] = {}  # of the query, for each group size
        if cache.device == "cuda":
            self._list_full_pages(xp, size, states, positions, offsets)
        else:
            self.windows = [
                self._window(xp, size, states, lens, starts, length)
                for length in sorted(set(lens) - {0})
            ]

    def _list_full_pages(
        self, xp: Any, size: int, states: list[Sequence], positions: list[int], offsets: list[int]
    ) -> None:
        """The full-precision pages as backends.cuda.attention.FullPages wants them."""
        full = [
            [(page.number, i * size) for i, page in enumerate(s.pages) if page.full] for s in states
        ]
        table = np.full((2, len(states), max(map(len, full), default=0)), -1, np.int32)
        for row, pages in enumerate(full):
            table[:, row, : len(pages)] = np.array(pages, np.int32).reshape(-1, 2).T
        self.full_pages, self.full_positions = xp.asarray(table)
        self.query_positions = xp.asarray(np.array(positions, np.int32))
        self.offset_slots = xp.asarray(np.array(offsets, np.int32))

    @staticmethod
    def _window(
        xp: Any, size: int, states: list[Sequence], lens: list[int], starts: Any, length: int
    ) -> WindowPart:
        chosen = [i for i, n in enumerate(lens) if n == length]
        full = [[i for i, page in enumerate(states[s].pages) if page.full] for s in chosen]
        width = max(map(len, full)) * size
        slots = np.zeros((len(chosen), width), np.int64)
        key_positions = np.full((len(chosen), width), -1, np.int64)
        inside = np.arange(size)
        for row, s in enumerate(chosen):
            for at, i in enumerate(full[row]):
                part = slice(at * size, (at + 1) * size)
                slots[row, part] = states[s].pages[i].number * size + inside
                position = i * size + inside
                key_positions[row, part] = np.where(position < states[s].length, position, -1)
        last = np.array([states[s].length for s in chosen])
        query_positions = last[:, None] - length + np.arange(length)
        tokens = starts[chosen][:, None] + np.arange(length)
        return WindowPart(
            *(xp.asarray(x) for x in (tokens.reshape(-1), slots, key_positions, query_positions))
        )
