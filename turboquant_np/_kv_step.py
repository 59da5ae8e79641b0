"""One step of a cache: every layer appends its new tokens and attends to all tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays
from ._attention_checks import check_attention
from ._checks import check_same_place
from ._kv_plan import Moves, Packing, Plan
from ._kv_tables import Tables
from ._window_attention import window_attention
from .fused_attention import TQPagedAttention, merge_attention

if TYPE_CHECKING:
    from ._pages import Sequence
    from .kv_cache import PagedKVCache

__all__ = ["Step"]


class Step:
    """New tokens of some sequences, layer by layer; made by `PagedKVCache.begin_step`.

    Its tokens see their window of recent tokens in full precision, however many they are: pages
    that leave the window of a later one are packed when the cache is used next.

    Attributes
    ----------
    sequences : list of int
    counts : list of int
        New tokens of each sequence; arrays hold them one sequence after the other.
    missing : set of int
        Layers that have not been appended to yet.
    """

    def __init__(self, cache: PagedKVCache, sequences: list[int], plan: Plan) -> None:
        self.cache, self.sequences, self._plan = cache, sequences, plan
        self.counts = plan.counts
        self.missing = set(range(cache.num_layers))
        self._moves: dict[str, Any] = {}
        self._tables: Tables | None = None
        self._cancelled = False
        self._version = cache._version

    # -- appending ---------------------------------------------------------------------------------

    def append(self, layer: int, keys: Any, values: Any) -> None:
        """Store the new tokens of one layer; after the last layer the step is finished.

        Parameters
        ----------
        layer : int
            Each layer once, in any order.
        keys, values : array, float, shape [tokens, num_kv_heads, head_dim]
            The sequences' new tokens, one sequence after the other.

        Raises
        ------
        TypeError, ValueError
            If shape, dtype or place do not fit, or a value is NaN or infinite (looked at on a CPU
            only); nothing is stored.
        RuntimeError
            If the layer has been appended to already.
        """
        if layer not in self.missing:
            what = "was cancelled" if self._cancelled else f"has no layer {layer} left to append to"
            raise RuntimeError(f"this step {what}")
        k, v = (self._take_in(x, name) for x, name in ((keys, "keys"), (values, "values")))
        c, plan = self.cache, self._plan
        # Pages that are packed at once get the bits of those that were in full precision before.
        k, v = k.astype(c.dtype, copy=False), v.astype(c.dtype, copy=False)
        for to, source in plan.copies:
            for pool in (c._k_full[layer], c._v_full[layer]):
                pool[to] = pool[source]
        for to, source, offset in plan.thaws:
            c._k_full[layer, to] = c._unpack_keys(layer, source, offset)
            c._v_full[layer, to] = c._unpack_values(layer, source)
        self._pack(layer, plan.first, "first", k, v)
        self._move(c._k_full[layer], k, plan.write, "write")
        self._move(c._v_full[layer], v, plan.write, "write")
        self.missing.discard(layer)
        if not self.missing:
            self.finish()

    def _pack(self, layer: int, packing: Packing, name: str, k: Any = None, v: Any = None) -> None:
        """Pack pages of a layer, whose tokens are in full precision or new."""
        c, xp = self.cache, self.cache._xp
        if not packing.packs:
            return
        size, heads = c._windows.block_size, (c.num_kv_heads, c.head_dim)
        k_full, v_full = c._k_full[layer], c._v_full[layer]
        for i, new in enumerate(packing.new_offsets):
            count = len(new.from_full.to) + len(new.from_new.to)
            tokens = xp.empty((count, *heads), np.float32)
            self._move(tokens, k_full, new.from_full, f"{name} mean full {i}")
            self._move(tokens, k, new.from_new, f"{name} mean new {i}")
            c._key_offsets[layer, new.slot] = tokens.mean(axis=0)
        pages = self._index(f"{name} pages", [page for page, _ in packing.packs])
        offsets = self._index(f"{name} offsets", [offset for _, offset in packing.packs])
        paged = xp.empty((2, len(packing.packs), size, *heads), np.float32)
        for target, full, fresh in ((paged[0], k_full, k), (paged[1], v_full, v)):
            self._move(target, full, packing.from_full, f"{name} full")
            self._move(target, fresh, packing.from_new, f"{name} new")
        paged[0] -= c._key_offsets[layer][offsets][:, None]
        finite = c.device == "cpu"
        packed, norms = c.key_quantizer.encode(paged[0], check_finite=finite)
        c._k_packed[layer, pages], c._k_norms[layer, pages] = packed, norms
        packed, norms = c.value_quantizer.encode(paged[1], check_finite=finite)
        c._v_packed[layer, pages], c._v_norms[layer, pages] = packed, norms

    def _move(self, target: Any, source: Any, moves: Moves, name: str) -> None:
        """Copy tokens between pools, [pages, block_size, ...], and arrays, [tokens, ...]."""
        if moves.to:
            heads = (-1, self.cache.num_kv_heads, self.cache.head_dim)
            to, at = (
                self._index(f"{name} to", moves.to),
                self._index(f"{name} source", moves.source),
            )
            target.reshape(heads)[to] = source.reshape(heads)[at].astype(target.dtype)

    def _index(self, name: str, values: list[int]) -> Any:
        """An index array where the cache lives, made once for all layers."""
        if name not in self._moves:
            self._moves[name] = self.cache._xp.asarray(np.array(values, np.int64))
        return self._moves[name]

    def _take_in(self, x: Any, name: str) -> Any:
        c = self.cache
        array, _ = _arrays.take_in(x, name)
        check_same_place(array, name, c._k_full, "the cache")
        shape = (sum(self.counts), c.num_kv_heads, c.head_dim)
        if array.dtype.name not in _arrays.FLOAT_NAMES:
            raise TypeError(f"{name} must be {', '.join(_arrays.FLOAT_NAMES)}, got {array.dtype}")
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} (the {shape[0]} new tokens of this step), "
                f"got {array.shape}"
            )
        if c.device == "cpu":
            with np.errstate(over="ignore"):
                bad = ~np.isfinite(array.astype(c.dtype))
            if bad.any():
                at = tuple(int(i) for i in np.argwhere(bad)[0])
                raise ValueError(f"{name}{list(at)} is {array[at]}, which {c.dtype} cannot hold")
        return _arrays.native(array)

    def finish(self) -> None:
        """Carry out the plan on the page tables; called by the last `append`."""
        cache, plan = self.cache, self._plan
        cache._open_step = None
        self._set_states(plan.during)
        if plan.behind.packs:
            cache._attended_step = self
        else:
            self._give_back()

    def pack(self) -> None:
        """Pack what leaves the window of recent tokens, behind the attention of all layers."""
        for layer in range(self.cache.num_layers):
            self._pack(layer, self._plan.behind, "behind")
        self._give_back()

    def _give_back(self) -> None:
        """The pages that the step replaced are free from here on; what they hold stays for now."""
        self.cache._planner.finish(self._plan)
        self._set_states(self._plan.after)

    def _set_states(self, states: list[Sequence]) -> None:
        for sequence, state in zip(self.sequences, states, strict=True):
            self.cache._sequences[sequence] = state

    def cancel(self) -> None:
        """Give the step up: sequences are as before it.  Harmless if it is finished."""
        if self.cache._open_step is self:
            self.cache._planner.cancel(self._plan)
            self.cache._open_step = None
            self.missing, self._cancelled = set(), True

    # -- attending ---------------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        query: Any,
        *,
        query_lens: list[int] | None = None,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        sliding_window: int | None = None,
        sinks: Any = None,
    ) -> Any:
        """Attention of the last tokens of each sequence to all of its tokens, causal.

        Parameters
        ----------
        layer : int
            One that has been appended to.
        query : array, float, shape [tokens, num_query_heads, head_dim]
            One sequence after the other.
        query_lens : list of int, optional
            Query tokens of each sequence, its last ones; by default its new tokens.
        scale, logits_soft_cap, sliding_window, sinks
            As in `TQPagedAttention.forward`.

        Returns
        -------
        array, shape and dtype of `query`

        Raises
        ------
        TypeError, ValueError
            As `TQPagedAttention.forward`.
        RuntimeError
            If the layer has not been appended to, the step was cancelled, or the cache has changed
            since.
        """
        if layer in self.missing or self._cancelled or not 0 <= layer < self.cache.num_layers:
            raise RuntimeError(f"layer {layer} has not been appended to in this step")
        if self._version != self.cache._version:
            raise RuntimeError("the cache has changed since this step; begin another one")
        c = self.cache
        q, give_back = _arrays.take_in(query, "query")
        lens = self.counts if query_lens is None else list(query_lens)
        states = self._plan.during
        if len(lens) != len(states) or any(
            not 0 <= n <= s.length for n, s in zip(lens, states, strict=False)
        ):
            raise ValueError(
                f"query_lens must name 0 to all tokens of each of {len(states)} sequences, "
                f"got {lens}"
            )
        check_same_place(q, "query", c._k_full, "the cache")
        if q.ndim != 3 or q.shape[0] != sum(lens) or q.shape[2] != c.head_dim:
            raise ValueError(
                f"query must have shape ({sum(lens)}, num_query_heads, {c.head_dim}), got {q.shape}"
            )
        heads = int(q.shape[1])
        if self._tables is None or self._tables.lens != lens:
            self._tables = Tables(c, states, lens)
        if c.device == "cuda":
            return give_back(
                self._attend_on_gpu(layer, q, sinks, scale, logits_soft_cap, sliding_window)
            )
        attention = TQPagedAttention(c.key_quantizer, heads, value_quantizer=c.value_quantizer)
        if heads % c.num_kv_heads:
            raise ValueError(
                f"num_query_heads ({heads}) must be a multiple of num_kv_heads ({c.num_kv_heads})"
            )
        options: dict[str, Any] = dict(
            scale=1 / math.sqrt(c.head_dim) if scale is None else scale,
            logits_soft_cap=logits_soft_cap,
            sliding_window=sliding_window,
        )
        tables = self._tables
        outs, lses = [], []
        if tables.has_packed:
            out, lse = attention(
                _arrays.native(q),
                c._k_packed[layer],
                c._k_norms[layer],
                c._v_packed[layer],
                c._v_norms[layer],
                tables.packed_blocks,
                tables.packed_lens,
                query_start_loc=tables.query_start_loc,
                query_positions=tables.packed_query_positions,
                key_offset=c._key_offsets[layer][tables.offsets],
                return_lse=True,
                **options,
            )
            outs.append(out.astype(np.float32))
            lses.append(lse)
        out, lse = self._attend_window(layer, q, tables, sinks, options)
        outs.append(out)
        lses.append(lse)
        merged = outs[0] if len(outs) == 1 else merge_attention(outs, lses)[0]
        return give_back(merged.astype(q.dtype.newbyteorder("=")))

    def _attend_on_gpu(
        self,
        layer: int,
        q: Any,
        sinks: Any,
        scale: float | None,
        logits_soft_cap: float | None,
        sliding_window: int | None,
    ) -> Any:
        """Packed and full-precision pages together, in as few launches as the backend can."""
        from .backends.cuda.attention import FullPages, attention_beside, window_tiles

        c, tables = self.cache, self._tables
        assert tables is not None
        if sinks is not None:
            sinks = _arrays.take_in(sinks, "sinks")[0].astype(np.float32, copy=False)
        batch, _ = check_attention(
            c.key_quantizer,
            c.value_quantizer,
            int(q.shape[1]),
            query=q,
            k_packed=c._k_packed[layer],
            k_norms=c._k_norms[layer],
            v_packed=c._v_packed[layer],
            v_norms=c._v_norms[layer],
            block_tables=tables.packed_blocks,
            context_lens=tables.packed_lens,
            block_size=None,
            num_kv_heads=None,
            query_start_loc=tables.query_start_loc,
            query_positions=tables.packed_query_positions,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            sliding_window=sliding_window,
            sinks=sinks,
            key_offset=None,
            out=None,
            check=None,
        )
        if batch.group not in tables.tiles:
            tiles, rows = window_tiles(tables.lens, batch.group)
            tables.tiles[batch.group] = c._xp.asarray(tiles), rows
        tiles, rows = tables.tiles[batch.group]
        full = FullPages(
            keys=c._k_full[layer],
            values=c._v_full[layer],
            pages=tables.full_pages,
            positions=tables.full_positions,
            query_positions=tables.query_positions,
            tiles=tiles,
            rows=rows,
            offset_slots=tables.offset_slots,
        )
        batch = replace(batch, key_offset=c._key_offsets[layer])
        attention_beside(c.key_quantizer._spec, c.value_quantizer._spec, batch, full)
        return batch.out

    def _attend_window(
        self, layer: int, q: Any, tables: Tables, sinks: Any, options: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Full-precision pages, for sequences with equally many query tokens at a time."""
        c, xp = self.cache, self.cache._xp
        tokens, heads, d = q.shape
        group = heads // c.num_kv_heads
        out = xp.empty(q.shape, np.float32)
        lse = xp.empty((tokens, heads), np.float32)
        if sinks is not None:
            sinks = _arrays.take_in(sinks, "sinks")[0]
            if sinks.shape != (heads,):
                raise ValueError(f"sinks must have shape ({heads},), got {sinks.shape}")
            sinks = sinks.astype(np.float32).reshape(c.num_kv_heads, group)
        slots = (-1, c.num_kv_heads, d)
        k_pool, v_pool = c._k_full[layer].reshape(slots), c._v_full[layer].reshape(slots)
        for part in tables.windows:
            rows = q[part.tokens].astype(np.float32)
            shape = (*part.query_positions.shape, c.num_kv_heads, group, d)
            part_out, part_lse = window_attention(
                xp,
                rows.reshape(shape),
                k_pool[part.slots],
                v_pool[part.slots],
                part.key_positions,
                part.query_positions,
                scale=options["scale"],
                logits_soft_cap=options["logits_soft_cap"] or 0.0,
                sliding_window=options["sliding_window"] or 0,
                sinks=sinks,
            )
            out[part.tokens] = part_out.reshape(-1, heads, d)
            lse[part.tokens] = part_lse.reshape(-1, heads)
        return out, lse
