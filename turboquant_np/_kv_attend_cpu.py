"""Attention of a step in host memory: packed pages by a backend, full-precision ones by NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays, _backend
from ._attention_checks import AttentionBatch
from ._attention_compute import attention_in
from ._kv_tables import PackedTables
from ._window_attention import hidden_keys, window_attention

if TYPE_CHECKING:
    from ._kv_memory import LayerMemory
    from ._pages import Sequence
    from .kv_cache import PagedKVCache

__all__ = ["CpuAttention"]


class Window(NamedTuple):
    """Sequences with the same number L of query tokens: S of them, W full-precision pages each."""

    tokens: Any  # int [S * L] rows of the query; a slice if these are all
    pages: Any  # int [S, W]
    key_positions: Any  # int [S, W * block_size], -1 where there is none
    query_positions: Any  # int [S, L]


class CpuAttention:
    """Attention of the sequences of a step, prepared once for all layers.

    Parameters
    ----------
    cache : PagedKVCache
    states : list of Sequence
    lens : list of int
        Query tokens of each.
    """

    def __init__(self, cache: PagedKVCache, states: list[Sequence], lens: list[int]) -> None:
        self.compute = cache.compute
        self.tables = PackedTables(cache, states, lens, np.int64)
        size = cache._windows.block_size
        self.windows = [
            _window(size, states, lens, self.tables, length) for length in sorted(set(lens) - {0})
        ]
        self._hidden: dict[int, list[Any]] = {}  # of each window, by sliding window

    def __call__(self, memory: LayerMemory, query: Any, options: dict[str, Any], sinks: Any) -> Any:
        """Attend in one layer.

        Parameters
        ----------
        memory : LayerMemory
            Of this layer.
        query : float [T, num_query_heads, head_dim]
        options : dict
            From `check_options`.
        sinks : float32 [num_query_heads] or None

        Returns
        -------
        array, shape and dtype of `query`
        """
        q = _arrays.native(query).astype(np.float32, copy=False)
        heads, d = q.shape[1:]
        kv_heads = memory.k_full.shape[2]
        split = (kv_heads, heads // kv_heads)
        beside = self._attend_to_packed(memory, q, options) if self.tables.any_packed else None
        window = options["sliding_window"]
        if window not in self._hidden:
            self._hidden[window] = [
                hidden_keys(w.key_positions, w.query_positions, window) for w in self.windows
            ]
        out = np.empty_like(q)
        for w, hidden in zip(self.windows, self._hidden[window], strict=True):
            shape = (*w.query_positions.shape, *split)
            num_seqs, tokens = w.key_positions.shape
            keys, values = (
                pool[w.pages].reshape(num_seqs, tokens, kv_heads, d)
                for pool in (memory.k_full, memory.v_full)
            )
            part = window_attention(
                q[w.tokens].reshape(*shape, d),
                keys,
                values,
                hidden,
                scale=options["scale"],
                logits_soft_cap=options["logits_soft_cap"],
                sinks=None if sinks is None else sinks.reshape(split),
                beside=beside
                and (beside[0][w.tokens].reshape(*shape, d), beside[1][w.tokens].reshape(shape)),
            )
            out[w.tokens] = part.reshape(-1, heads, d)
        return out.astype(query.dtype.newbyteorder("="), copy=False)

    def _attend_to_packed(
        self, memory: LayerMemory, q: Any, options: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Output and log-sum-exp, float32."""
        tables, key, value = self.tables, memory.key_quantizer, memory.value_quantizer
        batch = AttentionBatch(
            query=q,
            query_start_loc=tables.query_start_loc,
            query_len=0,
            query_positions=tables.query_positions,
            **memory.packed_pages,
            block_tables=tables.block_tables,
            context_lens=tables.context_lens,
            **options,
            sinks=None,  # they count once, in the window
            key_offset=memory.key_offsets[tables.offset_slots] if tables.any_offset else None,
            out=np.empty_like(q),
            lse=np.empty(q.shape[:2], np.float32),
        )
        backend = _backend.backend_for(q, key.config.backend)
        attention_in(self.compute, backend)(key._spec, value._spec, batch)
        return batch.out, batch.lse


def _window(
    size: int, states: list[Sequence], lens: list[int], tables: PackedTables, length: int
) -> Window:
    """The full-precision pages of those sequences that have `length` query tokens."""
    chosen = [i for i, n in enumerate(lens) if n == length]
    full = [[i for i, page in enumerate(states[s].pages) if page.full] for s in chosen]
    width = max(map(len, full))
    pages = np.zeros((len(chosen), width), np.int64)
    key_positions = np.full((len(chosen), width, size), -1, np.int64)
    for row, s in enumerate(chosen):
        count = len(full[row])
        pages[row, :count] = [states[s].pages[i].number for i in full[row]]
        position = np.array(full[row], np.int64)[:, None] * size + np.arange(size)
        key_positions[row, :count] = np.where(position < states[s].length, position, -1)
    inside = np.arange(length)
    tokens: Any = slice(None)
    if len(chosen) < sum(n > 0 for n in lens):
        tokens = (tables.query_start_loc[chosen][:, None] + inside).reshape(-1)
    return Window(
        tokens,
        pages,
        key_positions.reshape(len(chosen), width * size),
        tables.positions[chosen][:, None] + inside,
    )
