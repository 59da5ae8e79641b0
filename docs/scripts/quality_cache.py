"""What a `PagedKVCache` does to attention over a whole text, computed at once.

Token by token, a cache answers each query from packed pages and from the two windows of
full-precision pages.  Which page is which depends on the query's position alone, so all queries of
a text can be answered together: scores with the decoded keys, scores with the exact ones, and each
query takes from each page what the cache would have given it.  `tests/test_quality.py` holds this
against the cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_np import PagedKVCache, TurboQuant

Ints = npt.NDArray[np.int64]

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64  # of SmolLM2-135M

Setting = dict[str, Any]
"""What is measured: arguments of `make_cache`, and beside them

========================== =================================================================
layer_bits                 (key bits, value bits) of each layer
exact                      "keys" or "values", which are left as they are
step                       tokens that come at a time, 1 where nothing is said
renew, value_offset_tokens of `quality_beyond.MoreOffsets`
========================== =================================================================
"""
FEW_BITS = "unbiased to 2 bits"  # a scale: from 3 bits on "mse"
BESIDE = ("layer_bits", "exact", "step", "renew", "value_offset_tokens")


def make_cache(num_blocks: int = 1, num_layers: int = 1, **setting: Any) -> PagedKVCache:
    """A cache by the settings of a measurement.

    Parameters
    ----------
    num_blocks, num_layers : int
    **setting
        Arguments of `PagedKVCache`, and ``key_scale``, ``value_scale``, ``rotation``, ``seed`` of
        its quantisers.  Where nothing is said the scale of keys is the cache's own choice, that of
        values "mse", which was its choice when that was measured; now it is `FEW_BITS`.
    """
    codec = {name: setting.pop(name) for name in ("rotation", "seed") if name in setting}
    scales = {
        "key": setting.pop("key_scale", None),
        "value": setting.pop("value_scale", "mse"),
    }
    sizes = dict(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, num_full_blocks=0, max_sequences=1)
    arguments = {**sizes, **setting, "num_layers": num_layers, "num_blocks": num_blocks}
    cache = PagedKVCache(**arguments)
    for side, scale in scales.items():
        own = {
            quantizer: TurboQuant(
                head_dim=cache.head_dim,
                bits=quantizer.bits,
                scale=scale_of(scale or quantizer.config.scale, quantizer.bits),
                **codec,
            )
            for quantizer in set(getattr(cache, f"{side}_quantizers"))
        }
        arguments[f"{side}_quantizer"] = [own[q] for q in getattr(cache, f"{side}_quantizers")]
    return PagedKVCache(**arguments)


def scale_of(kind: str, bits: int) -> Any:
    """A scale of `TurboQuant`, by the bits if it depends on them."""
    if kind != FEW_BITS:
        return kind
    return "unbiased" if bits <= 2 else "mse"


def layer_caches(setting: Setting) -> list[PagedKVCache]:
    """A cache for each layer, by a setting; only good for its settings."""
    known = {name: value for name, value in setting.items() if name not in BESIDE}
    if "layer_bits" not in setting:
        return [make_cache(**known)] * LAYERS
    return [make_cache(**known, key_bits=k, value_bits=v) for k, v in setting["layer_bits"]]


def cache_bytes(caches: Sequence[PagedKVCache], tokens: int) -> int:
    """Bytes of the pages and key offsets that one sequence of `tokens` tokens takes.

    Parameters
    ----------
    caches : sequence of PagedKVCache
        One for each layer.
    """
    total = 0
    for cache in caches:
        windows, heads = cache._windows, cache.num_kv_heads
        packed = len(windows.packed_pages(tokens))
        full = -(-tokens // windows.block_size) - packed
        quantizers = cache.key_quantizer, cache.value_quantizer
        packed_token = sum(quantizer.packed_dim + 4 for quantizer in quantizers)
        full_token = 2 * cache.head_dim * cache.dtype.itemsize
        total += heads * windows.block_size * (packed * packed_token + full * full_token)
        if packed and windows.key_offset_tokens:
            total += heads * cache.head_dim * 4
    return total


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch are: a trunk, and branches that each continue it by themselves.

    Attributes
    ----------
    positions : [tokens]
    branches : [tokens], 0 for the trunk
    lengths : [tokens], length of the sequence after the step that brought the token
    """

    positions: Ints
    branches: Ints
    lengths: Ints

    @classmethod
    def make(cls, trunk: int, branches: Sequence[int] = (), step: int = 1) -> Layout:
        """A trunk that came `step` tokens at a time, and branches one token at a time."""
        positions, of_branch = [np.arange(trunk)], [np.zeros(trunk, int)]
        for i, count in enumerate(branches, start=1):
            positions.append(trunk + np.arange(count))
            of_branch.append(np.full(count, i))
        position, branch = np.concatenate(positions), np.concatenate(of_branch)
        in_steps = np.minimum(-(-(position + 1) // step) * step, trunk)
        return cls(position, branch, np.where(branch, position + 1, in_steps))

    @property
    def trunk(self) -> int:
        """Tokens of the trunk, which come first."""
        return int((self.branches == 0).sum())


class FloatCache:
    """Causal attention with keys and values as they are.

    Parameters
    ----------
    layout : Layout
    xp : numpy or cupy
    rows : int
        Queries that are answered at a time, which bounds the memory of their scores.
    """

    def __init__(self, layout: Layout, xp: Any, rows: int = 1024) -> None:
        self.layout, self.xp = layout, xp
        trunk, tokens = layout.trunk, len(layout.positions)
        starts = [*range(0, trunk, rows), trunk]
        if tokens > trunk:
            starts.append(tokens)
        self.blocks = [slice(a, b) for a, b in pairwise(starts)]
        self._hidden = [xp.asarray(self._penalty(block)) for block in self.blocks]

    def _penalty(self, block: slice) -> npt.NDArray[np.float32]:
        """[queries, tokens of the block] -inf where a query must not look."""
        position, branch = self.layout.positions[block], self.layout.branches[block]
        seen = (position <= position[:, None]) & ((branch == 0) | (branch == branch[:, None]))
        return np.where(seen, 0, -np.inf).astype(np.float32)

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        """Attention of all tokens: [tokens, heads, head_dim] from that shape, by layer."""
        out = self.xp.empty_like(q)
        context = self.stored(layer, by_head(k), by_head(v))
        group = q.shape[1] // k.shape[1]
        for number, block in enumerate(self.blocks):
            rows = block.stop - block.start
            queries = by_head(q[block].reshape(rows, -1, group, q.shape[2]))
            queries = queries * np.float32(q.shape[2] ** -0.5)
            scores = self.scores(number, queries, context)  # [kv_heads, group, rows, tokens]
            scores[..., block] += self._hidden[number]
            scores -= scores.max(axis=-1, keepdims=True)
            self.xp.exp(scores, out=scores)
            mixed = self.mix(number, scores, context) / scores.sum(axis=-1, keepdims=True)
            out[block] = mixed.transpose(2, 0, 1, 3).reshape(out[block].shape)
        return out

    def stored(self, layer: int, k: Any, v: Any) -> tuple[Any, ...]:
        """What `scores` and `mix` read: [kv_heads, tokens, head_dim] each."""
        return k, v

    def scores(self, number: int, queries: Any, context: tuple[Any, ...]) -> Any:
        """Products of the block's queries with the keys up to its end."""
        return inner(queries, context[0][:, : self.blocks[number].stop])

    def mix(self, number: int, weights: Any, context: tuple[Any, ...]) -> Any:
        """Sums of the values up to the block's end, by weight."""
        return weighted(weights, context[1][:, : self.blocks[number].stop])


class SimulatedCache(FloatCache):
    """Attention as `PagedKVCache` gives it, for all tokens of a text together.

    Parameters
    ----------
    caches : sequence of PagedKVCache
        One for each layer; only their settings are used.
    layout, xp, rows
        As for `FloatCache`.
    exact : {"", "keys", "values"}
        What is left as it is.
    """

    def __init__(
        self,
        caches: Sequence[PagedKVCache],
        layout: Layout,
        xp: Any,
        rows: int = 1024,
        exact: str = "",
    ) -> None:
        super().__init__(layout, xp, rows)
        self.caches, self.exact = caches, exact
        windows = {cache._windows for cache in caches}
        if len(windows) > 1:
            raise ValueError(f"the layers' caches must have the same windows, got {windows}")
        self.windows = windows.pop()
        self.offset_tokens = self._offset_tokens()
        self._full = [self._full_precision(block) for block in self.blocks]

    def _offset_tokens(self) -> int:
        """First keys whose mean is removed: those that are there when the first page is packed."""
        for length in np.unique(self.layout.lengths):
            if self.windows.packed_pages(int(length)):
                return min(int(length), self.windows.key_offset_tokens)
        return 0

    def _full_precision(self, block: slice) -> list[tuple[slice, Any]]:
        """Where some query of the block reads full precision, and which: [queries, tokens] 0, 1."""
        size, sink = self.windows.block_size, self.windows.sink_pages
        stop = [self.windows.packed_pages(int(n)).stop for n in self.layout.lengths[block]]
        first_recent = min(stop) * size
        page = self.layout.positions // size
        parts = []
        for part in (slice(0, sink * size), slice(first_recent, block.stop)):
            part = slice(min(part.start, block.stop), min(part.stop, block.stop))
            if part.stop > part.start:
                full = (page[part] < sink) | (page[part] >= np.array(stop)[:, None])
                parts.append((part, self.xp.asarray(full.astype(np.float32))))
        return parts

    def stored(self, layer: int, k: Any, v: Any) -> tuple[Any, ...]:
        """Decoded keys and values, and how far the full-precision ones are from them."""
        cache = self.caches[layer]
        k, v = (x.astype(cache.dtype).astype(np.float32) for x in (k, v))
        restored_k, restored_v = k, v
        if self.exact != "keys":
            offset = self.key_offset(k)
            restored_k = restore(cache.key_quantizer, k - offset) + offset
        if self.exact != "values":
            offset = self.value_offset(v)
            restored_v = restore(cache.value_quantizer, v - offset) + offset
        return restored_k, restored_v, k - restored_k, v - restored_v

    def key_offset(self, k: Any) -> Any:
        """What is removed from the keys, all of them given: [kv_heads, 1 or tokens, head_dim]."""
        if not self.offset_tokens:
            return np.float32(0)
        return k[:, : self.offset_tokens].mean(axis=1, keepdims=True)

    def value_offset(self, v: Any) -> Any:
        """Likewise for the values."""
        return np.float32(0)

    def scores(self, number: int, queries: Any, context: tuple[Any, ...]) -> Any:
        scores = super().scores(number, queries, context)
        for part, full in self._full[number]:
            scores[..., part] += inner(queries, context[2][:, part]) * full
        return scores

    def mix(self, number: int, weights: Any, context: tuple[Any, ...]) -> Any:
        mixed = super().mix(number, weights, context)
        for part, full in self._full[number]:
            mixed += weighted(weights[..., part] * full, context[3][:, part])
        return mixed


def restore(quantizer: TurboQuant, x: Any) -> Any:
    """Encode and decode."""
    return quantizer.decode(*quantizer.encode(x), dtype=np.float32)


def by_head(x: Any) -> Any:
    """[tokens, kv_heads, ..., head_dim] -> [kv_heads, ..., tokens, head_dim]."""
    axes = (*range(1, x.ndim - 1), 0, x.ndim - 1)
    return x.transpose(axes)


def inner(queries: Any, keys: Any) -> Any:
    """[kv_heads, group, rows, d], [kv_heads, tokens, d] -> [kv_heads, group, rows, tokens]."""
    heads, group, rows, d = queries.shape
    products = queries.reshape(heads, group * rows, d) @ keys.swapaxes(1, 2)
    return products.reshape(heads, group, rows, -1)


def weighted(weights: Any, values: Any) -> Any:
    """[kv_heads, group, rows, tokens], [kv_heads, tokens, d] -> [kv_heads, group, rows, d]."""
    heads, group, rows, tokens = weights.shape
    sums = weights.reshape(heads, group * rows, tokens) @ values
    return sums.reshape(heads, group, rows, -1)
