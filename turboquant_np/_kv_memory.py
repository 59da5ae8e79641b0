"""The memory of a cache: packed pages, full-precision pages and key offsets of its layers.

Layers with the same quantisers lie in the same arrays, so that what a step does to all layers at
once takes one call for each such group, not one for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays
from ._backend import array_module

if TYPE_CHECKING:
    from ._kv_moves import PackingIndices, TokenMoves
    from .quantizer import TurboQuant

__all__ = ["FULL_ARRAYS", "PACKED_ARRAYS", "LayerMemory", "allocate_groups"]

PACKED_ARRAYS = ("k_packed", "k_norms", "v_packed", "v_norms")
FULL_ARRAYS = ("k_full", "v_full")
ARRAYS = (*PACKED_ARRAYS, *FULL_ARRAYS, "key_offsets")

PART_ELEMENTS = 1 << 20  # of keys in float32, of the layers that are packed at a time

LARGEST = {  # finite values; what is decoded may lie a little beyond them
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": 3.4028234663852886e38,
}


@dataclass(frozen=True, eq=False)
class LayerMemory:
    """Pages and key offsets of L layers with the same quantisers; of one layer without axis L.

    Attributes
    ----------
    layers : tuple of int, their numbers
    key_quantizer, value_quantizer : TurboQuant
    k_packed, v_packed : uint8 [L, packed pages, block_size, kv_heads, packed_dim]
    k_norms, v_norms : float32 [L, packed pages, block_size, kv_heads]
    k_full, v_full : float [L, full-precision pages, block_size, kv_heads, head_dim]
    key_offsets : float32 [L, slots + 1, kv_heads, head_dim]; the last one stays zero: no offset
    """

    layers: tuple[int, ...]
    key_quantizer: TurboQuant
    value_quantizer: TurboQuant
    k_packed: Any
    k_norms: Any
    v_packed: Any
    v_norms: Any
    k_full: Any
    v_full: Any
    key_offsets: Any

    def page_bytes(self, full: bool) -> int:
        """Bytes of a page, for a single layer."""
        arrays = [getattr(self, name) for name in (FULL_ARRAYS if full else PACKED_ARRAYS)]
        return int(sum(math.prod(a.shape[1:]) * a.itemsize for a in arrays))

    @property
    def offset_bytes(self) -> int:
        """Bytes of a key offset, for a single layer."""
        return int(math.prod(self.key_offsets.shape[1:]) * self.key_offsets.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(sum(getattr(self, name).nbytes for name in ARRAYS))

    @property
    def packed_pages(self) -> dict[str, Any]:
        """Codes and norms by name, as attention takes them."""
        return {name: getattr(self, name) for name in PACKED_ARRAYS}

    @cached_property
    def k_slots(self) -> Any:
        """[L, tokens of full-precision pages, kv_heads, head_dim], a view."""
        return _as_tokens(self.k_full)

    @cached_property
    def v_slots(self) -> Any:
        return _as_tokens(self.v_full)

    @property
    def xp(self) -> Any:
        """numpy or cupy."""
        return array_module(self.k_full)

    def indices(self, numbers: Sequence[int]) -> Any:
        """An index array in the same memory."""
        return self.xp.asarray(np.array(numbers, np.int64))

    def part(self, rows: slice) -> LayerMemory:
        """Views of some of the layers."""
        arrays = {name: getattr(self, name)[rows] for name in ARRAYS}
        return replace(self, layers=self.layers[rows], **arrays)

    def single(self, row: int) -> LayerMemory:
        """Views of one layer, without axis L."""
        arrays = {name: getattr(self, name)[row] for name in ARRAYS}
        return replace(self, layers=(self.layers[row],), **arrays)

    def parts(self, tokens: int) -> Iterator[LayerMemory]:
        """Parts of the layers, of which `tokens` tokens can be packed at a time."""
        elements = tokens * math.prod(self.k_full.shape[-2:])
        rows = max(1, PART_ELEMENTS // max(1, elements))
        for start in range(0, len(self.layers), rows):
            yield self.part(slice(start, start + rows))

    # -- full-precision pages ----------------------------------------------------------------------

    def write(self, moves: TokenMoves, k: Any, v: Any) -> None:
        """Put new tokens of one layer, [tokens, kv_heads, head_dim], into full-precision pages."""
        self.k_slots[moves.to], self.v_slots[moves.to] = k[moves.source], v[moves.source]

    def copy_page(self, to: int, source: int) -> None:
        """Copy a full-precision page."""
        for pool in (self.k_full, self.v_full):
            pool[..., to, :, :, :] = pool[..., source, :, :, :]

    def thaw_page(self, to: int, source: int, offset: int) -> None:
        """Decode a packed page into a full-precision one."""
        largest = LARGEST[self.k_full.dtype.name]
        keys, values = self.decode_page(source, offset)
        self.k_full[..., to, :, :, :] = keys.clip(-largest, largest)
        self.v_full[..., to, :, :, :] = values.clip(-largest, largest)

    # -- packed pages ------------------------------------------------------------------------------

    def decode_page(self, page: int, offset: int) -> tuple[Any, Any]:
        """Keys, their offset added, and values of a packed page.

        Returns
        -------
        keys, values : float32 [L, block_size, kv_heads, head_dim]
        """
        keys, values = (
            quantizer.decode(packed[..., page, :, :, :], norms[..., page, :, :], dtype=np.float32)
            for quantizer, packed, norms in self._packed_sides
        )
        return keys + self.key_offsets[..., offset, :, :][..., None, :, :], values

    def pack(self, packing: PackingIndices, k: Any = None, v: Any = None) -> None:
        """Encode pages whose tokens are in full precision or, of one layer, among new ones.

        Raises
        ------
        OverflowError
            If a scale exceeds the largest float32 (looked at on a CPU only).
        """
        for new in packing.new_offsets:
            first = _gather(self.k_slots, k, new.from_full, new.from_new)
            # In float64 the sum of float16 numbers is exact, whatever their order.
            self.key_offsets[..., new.slot, :, :] = first.mean(axis=-3, dtype=np.float64)
        if not packing.size:
            return
        shape = (*self.k_full.shape[:-4], packing.size, *self.k_full.shape[-3:])
        keys, values = (
            _gather(slots, new, packing.from_full, packing.from_new).reshape(shape)
            for slots, new in ((self.k_slots, k), (self.v_slots, v))
        )
        keys -= self.key_offsets[..., packing.offsets, :, :][..., None, :, :]
        finite = isinstance(keys, np.ndarray)  # looking at the result would wait for a GPU
        for tokens, (quantizer, packed, norms) in zip(
            (keys, values), self._packed_sides, strict=True
        ):
            codes, scales = quantizer.encode(tokens, check_finite=finite)
            packed[..., packing.pages, :, :, :] = codes
            norms[..., packing.pages, :, :] = scales

    @property
    def _packed_sides(self) -> tuple[tuple[TurboQuant, Any, Any], ...]:
        """Quantiser, codes and norms of keys and of values."""
        return (
            (self.key_quantizer, self.k_packed, self.k_norms),
            (self.value_quantizer, self.v_packed, self.v_norms),
        )


def _as_tokens(pool: Any) -> Any:
    """[..., pages, block_size, kv_heads, head_dim] -> [..., tokens, kv_heads, head_dim], a view."""
    pages, block_size, *vectors = pool.shape[-4:]
    return pool.reshape(*pool.shape[:-4], pages * block_size, *vectors)


def _gather(slots: Any, new: Any, from_full: TokenMoves, from_new: TokenMoves) -> Any:
    """float32 [L, tokens, kv_heads, head_dim] out of full-precision pages and new tokens."""
    old = _take(slots, from_full.source)
    if not from_new.size and from_full.in_order:
        return _arrays.widen(old) if old.dtype != np.float32 else old.copy()
    shape = (*slots.shape[:-3], from_full.size + from_new.size, *slots.shape[-2:])
    tokens = array_module(slots).empty(shape, np.float32)
    tokens[..., from_full.to, :, :] = old
    if from_new.size:
        tokens[from_new.to] = new[from_new.source]
    return tokens


def _take(tokens: Any, index: Any) -> Any:
    """Some of [..., tokens, kv_heads, head_dim]; an index array at that place turns axes around."""
    if isinstance(index, slice):
        return tokens[..., index, :, :]
    return tokens.take(index, axis=tokens.ndim - 3)


def allocate_groups(
    xp: Any,
    key_quantizers: Sequence[TurboQuant],
    value_quantizers: Sequence[TurboQuant],
    *,
    packed_pages: int,
    full_pages: int,
    offset_slots: int,
    block_size: int,
    num_kv_heads: int,
    dtype: Any,
) -> list[LayerMemory]:
    """Zeroed memory of the layers, a group for each pair of quantisers.

    On a GPU packed pages lie [head][token] in memory behind their shape [token][head]: attention
    reads them faster so, and its kernels for several query tokens read no others.
    """

    def packed_pool(layers: int, dtype: Any, *vector: int) -> Any:
        if xp is np:
            return xp.zeros((layers, packed_pages, block_size, num_kv_heads, *vector), dtype)
        pool = xp.zeros((layers, packed_pages, num_kv_heads, block_size, *vector), dtype)
        return pool.swapaxes(2, 3)

    members: dict[tuple[TurboQuant, TurboQuant], list[int]] = {}
    for layer, pair in enumerate(zip(key_quantizers, value_quantizers, strict=True)):
        members.setdefault(pair, []).append(layer)
    groups = []
    for (key, value), layers in members.items():
        full = (len(layers), full_pages, block_size, num_kv_heads, key.head_dim)
        offsets = (len(layers), offset_slots + 1, num_kv_heads, key.head_dim)
        groups.append(
            LayerMemory(
                layers=tuple(layers),
                key_quantizer=key,
                value_quantizer=value,
                k_packed=packed_pool(len(layers), np.uint8, key.packed_dim),
                k_norms=packed_pool(len(layers), np.float32),
                v_packed=packed_pool(len(layers), np.uint8, value.packed_dim),
                v_norms=packed_pool(len(layers), np.float32),
                k_full=xp.zeros(full, dtype),
                v_full=xp.zeros(full, dtype),
                key_offsets=xp.zeros(offsets, np.float32),
            )
        )
    return groups
