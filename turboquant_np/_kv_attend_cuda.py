"""Attention of a step on a GPU: packed and full-precision pages in as few launches as it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays
from ._attention_checks import AttentionBatch
from ._kv_tables import Int32s, PackedTables, to_device

if TYPE_CHECKING:
    from ._kv_memory import LayerMemory
    from ._pages import Sequence
    from .kv_cache import PagedKVCache

__all__ = ["CudaAttention"]


class CudaAttention:
    """Attention of the sequences of a step, prepared once for all layers.

    Parameters and calls are those of `CpuAttention`.
    """

    def __init__(self, cache: PagedKVCache, states: list[Sequence], lens: list[int]) -> None:
        host = PackedTables(cache, states, lens, np.int32)
        self.xp, self.lens = cache._xp, lens
        (
            self.block_tables,
            self.context_lens,
            self.query_start_loc,
            self.packed_query_positions,
            self.query_positions,
            self.offset_slots,
            self.full_pages,
            self.full_positions,
        ) = to_device(
            cache._xp,
            [
                host.block_tables,
                host.context_lens,
                host.query_start_loc,
                host.query_positions,
                host.positions,
                host.offset_slots,
                *_full_pages(cache._windows.block_size, states),
            ],
        )
        self._tiles: dict[int, tuple[Any, int]] = {}  # of the query, by group size

    def __call__(self, memory: LayerMemory, query: Any, options: dict[str, Any], sinks: Any) -> Any:
        """Attend in one layer."""
        from .backends.cuda import empty
        from .backends.cuda.attention import attention_beside
        from .backends.cuda.attention_launches import FullPages, window_tiles

        q = _arrays.native(query)
        group = q.shape[1] // memory.k_full.shape[2]
        if group not in self._tiles:
            tiles, rows = window_tiles(self.lens, group)
            self._tiles[group] = self.xp.asarray(tiles), rows
        tiles, rows = self._tiles[group]
        batch = AttentionBatch(
            query=q,
            query_start_loc=self.query_start_loc,
            query_len=0,
            query_positions=self.packed_query_positions,
            **memory.packed_pages,
            block_tables=self.block_tables,
            context_lens=self.context_lens,
            **options,
            sinks=sinks,
            key_offset=memory.key_offsets,
            out=empty(q.shape, q.dtype, q),
            lse=empty(q.shape[:2], np.float32, q),
        )
        full = FullPages(
            keys=memory.k_full,
            values=memory.v_full,
            pages=self.full_pages,
            positions=self.full_positions,
            query_positions=self.query_positions,
            tiles=tiles,
            rows=rows,
            offset_slots=self.offset_slots,
        )
        attention_beside(memory.key_quantizer._spec, memory.value_quantizer._spec, batch, full)
        return batch.out


def _full_pages(size: int, states: list[Sequence]) -> Int32s:
    """[2, S, W] numbers of the full-precision pages, and positions of their first tokens."""
    full = [
        [(page.number, i * size) for i, page in enumerate(s.pages) if page.full] for s in states
    ]
    table = np.full((2, len(states), max(map(len, full), default=0)), -1, np.int32)
    for row, pages in enumerate(full):
        table[:, row, : len(pages)] = np.array(pages, np.int32).reshape(-1, 2).T
    return table
