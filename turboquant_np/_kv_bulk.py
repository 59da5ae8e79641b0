"""Tokens of a cache outside of steps, where nothing attends: prompts in, decoded tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays

if TYPE_CHECKING:
    from .kv_cache import PagedKVCache

__all__ = ["append_tokens", "read_tokens"]


def append_tokens(
    cache: PagedKVCache, sequences: int | Sequence[int], keys: Any, values: Any
) -> None:
    """See `PagedKVCache.append`."""
    k, v = _arrays.take_in(keys, "keys")[0], _arrays.take_in(values, "values")[0]
    if cache.num_layers == 1 and k.ndim == 3 and v.ndim == 3:
        k, v = k[None], v[None]
    for name, x in (("keys", k), ("values", v)):
        if x.ndim != 4 or len(x) != cache.num_layers:
            raise ValueError(
                f"{name} must have shape [{cache.num_layers} layers, tokens, "
                f"{cache.num_kv_heads}, {cache.head_dim}], got {tuple(x.shape)}"
            )
    tokens = int(k.shape[1])
    of_token = [sequences] * tokens if isinstance(sequences, (int, np.integer)) else sequences
    if len(of_token) != tokens:
        raise ValueError(f"got {len(of_token)} sequences for {tokens} tokens")
    rows: dict[int, list[int]] = {}
    for row, sequence in enumerate(of_token):
        rows.setdefault(int(sequence), []).append(row)
    order = cache._xp.asarray(np.array([r for part in rows.values() for r in part], np.int64))
    counts = [len(part) for part in rows.values()]
    step = cache.begin_step(list(rows), counts, pack_first=True)  # nothing attends to it
    try:
        for layer in range(cache.num_layers) if tokens else ():
            step.append(layer, k[layer][order], v[layer][order])
    except BaseException:
        step.cancel()
        raise


def read_tokens(cache: PagedKVCache, sequence: int, layer: int) -> tuple[Any, Any]:
    """See `PagedKVCache.read`."""
    state, memory = cache._get(sequence), cache._layers[layer]
    shape = (len(state.pages) * cache._windows.block_size, cache.num_kv_heads, cache.head_dim)
    keys, values = cache._xp.empty((2, *shape), np.float32)
    for i, page in enumerate(state.pages):
        part = slice(i * cache._windows.block_size, (i + 1) * cache._windows.block_size)
        if page.full:
            keys[part], values[part] = memory.k_full[page.number], memory.v_full[page.number]
        else:
            offset = -1 if state.offset is None else state.offset
            keys[part], values[part] = memory.decode_page(page.number, offset)
    return keys[: state.length], values[: state.length]
