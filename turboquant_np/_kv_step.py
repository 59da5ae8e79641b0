"""One step of a cache: every layer appends its new tokens and attends to all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays
from ._attention_checks import check_options
from ._checks import check_same_place
from ._kv_attend_cpu import CpuAttention
from ._kv_attend_cuda import CudaAttention
from ._kv_moves import index_packing, token_moves
from ._kv_plan import Packing, Plan

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
        self._shape = (sum(plan.counts), cache.num_kv_heads, cache.head_dim)
        self._write = token_moves(cache._xp, plan.write)
        self._first = index_packing(cache._xp, plan.first) if plan.first.needs_new_tokens else None
        self._attention: CpuAttention | CudaAttention | None = None
        self._lens: list[int] = []  # that it was prepared for
        self._cancelled = False
        self._version = cache._version

    def prepare(self) -> None:
        """Do for all layers at once what needs none of the new tokens.

        It writes to pages that the plan took, so the step can still be cancelled.
        """
        plan = self._plan
        for memory in self.cache._groups:
            for to, source in plan.copies:
                memory.copy_page(to, source)
            for to, source, offset in plan.thaws:
                memory.thaw_page(to, source, offset)
        if not plan.first.needs_new_tokens:
            self._pack_all_layers(plan.first)

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
        k, v = self._take_in(keys, "keys"), self._take_in(values, "values")
        memory = self.cache._layers[layer]
        if self._first is not None:
            memory.pack(self._first, k, v)
        memory.write(self._write, k, v)
        self.missing.discard(layer)
        if not self.missing:
            self.finish()

    def _take_in(self, x: Any, name: str) -> Any:
        """New tokens as the cache's full-precision pages hold them."""
        c = self.cache
        array, _ = _arrays.take_in(x, name)
        check_same_place(array, name, c._groups[0].k_full, "the cache")
        if _arrays.dtype_name(array.dtype) not in _arrays.FLOAT_NAMES:
            raise TypeError(f"{name} must be {', '.join(_arrays.FLOAT_NAMES)}, got {array.dtype}")
        if array.shape != self._shape:
            raise ValueError(
                f"{name} must have shape {self._shape} (the {self._shape[0]} new tokens of this "
                f"step), got {array.shape}"
            )
        # Pages that are packed at once get the bits of those that were in full precision before.
        if c.device != "cpu":
            return _arrays.native(array).astype(c.dtype, copy=False)
        with np.errstate(over="ignore"):
            tokens = array.astype(c.dtype, copy=False)
        finite = np.isfinite(tokens)
        if not finite.all():
            at = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(f"{name}{list(at)} is {array[at]}, which {c.dtype} cannot hold")
        return tokens

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
        self._pack_all_layers(self._plan.behind)
        self._give_back()

    def _pack_all_layers(self, packing: Packing) -> None:
        if packing.packs:
            indices = index_packing(self.cache._xp, packing)
            for memory in self.cache._groups:
                for part in memory.parts(len(packing.from_full.to)):
                    part.pack(indices)

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
        c = self.cache
        if layer in self.missing or self._cancelled or not 0 <= layer < c.num_layers:
            raise RuntimeError(f"layer {layer} has not been appended to in this step")
        if self._version != c._version:
            raise RuntimeError("the cache has changed since this step; begin another one")
        q, give_back = _arrays.take_in(query, "query")
        attention = self._attention_of(self.counts if query_lens is None else list(query_lens))
        self._check_query(q)
        if sinks is not None:
            sinks = self._take_in_sinks(sinks, q)
        options = check_options(c.head_dim, scale, logits_soft_cap, sliding_window)
        return give_back(attention(c._layers[layer], q, options, sinks))

    def _attention_of(self, lens: list[int]) -> CpuAttention | CudaAttention:
        """Attention of the last `lens` tokens of the sequences, prepared once for all layers."""
        if self._attention is not None and self._lens == lens:
            return self._attention
        states = self._plan.during
        if len(lens) != len(states) or any(
            not 0 <= n <= s.length for n, s in zip(lens, states, strict=False)
        ):
            raise ValueError(
                f"query_lens must name 0 to all tokens of each of {len(states)} sequences, "
                f"got {lens}"
            )
        kind = CudaAttention if self.cache.device == "cuda" else CpuAttention
        self._attention, self._lens = kind(self.cache, states, lens), lens
        return self._attention

    def _check_query(self, q: Any) -> None:
        c, tokens = self.cache, sum(self._lens)
        check_same_place(q, "query", c._groups[0].k_full, "the cache")
        if _arrays.dtype_name(q.dtype) not in _arrays.FLOAT_NAMES:
            raise TypeError(f"query must be {', '.join(_arrays.FLOAT_NAMES)}, got {q.dtype}")
        if q.ndim != 3 or q.shape[0] != tokens or q.shape[2] != c.head_dim:
            raise ValueError(
                f"query must have shape ({tokens}, num_query_heads, {c.head_dim}), got {q.shape}"
            )
        if not q.shape[1] or q.shape[1] % c.num_kv_heads:
            raise ValueError(
                f"num_query_heads ({q.shape[1]}) must be a multiple of num_kv_heads "
                f"({c.num_kv_heads})"
            )

    @staticmethod
    def _take_in_sinks(sinks: Any, q: Any) -> Any:
        """float32 [num_query_heads]"""
        array, _ = _arrays.take_in(sinks, "sinks")
        check_same_place(array, "sinks", q, "query")
        if array.shape != (q.shape[1],):
            raise ValueError(f"sinks must have shape ({q.shape[1]},), got {array.shape}")
        return array.astype(np.float32, copy=False)
