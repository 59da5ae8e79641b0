"""How much memory a cache takes, and how well it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._pages import Page
    from .kv_cache import PagedKVCache

__all__ = ["cache_stats"]


def cache_stats(cache: PagedKVCache) -> dict[str, Any]:
    """See `PagedKVCache.stats`."""
    size = cache._windows.block_size
    held: dict[Page, int] = {}  # tokens of each page in use
    for state in cache._sequences.values():
        for i, page in enumerate(state.pages):
            held[page] = max(held.get(page, 0), min(size, state.length - i * size))
    stored, slots = sum(held.values()), len(held) * size
    packed, full, offsets = (
        len(pool.used) for pool in (cache._packed, cache._full, cache._offsets)
    )
    by_layer = [
        packed * memory.page_bytes(full=False)
        + full * memory.page_bytes(full=True)
        + offsets * memory.offset_bytes
        for memory in cache._layers
    ]
    used = sum(by_layer)
    fp16 = 4 * stored * cache.num_layers * cache.num_kv_heads * cache.head_dim
    return {
        "tokens": sum(state.length for state in cache._sequences.values()),
        "stored_tokens": stored,
        "packed_pages": (packed, len(cache._packed.references)),
        "full_pages": (full, len(cache._full.references)),
        "allocated_bytes": sum(memory.nbytes for memory in cache._groups),
        "used_bytes": used,
        "layer_bytes": by_layer,
        "swapped_bytes": sum(s.nbytes for s in cache._swapped.values()),
        "fp16_bytes": fp16,
        "ratio_vs_fp16": fp16 / used if used else 1.0,
        "fragmentation": 1 - stored / slots if slots else 0.0,
    }
