"""Encode and decode: which kernel takes an array, and its launch."""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import DenseRotation, HadamardRotation

from . import dense
from .blocks import block_launch
from .compile import Kernel, kernel, max_shared_bytes
from .constants import constants
from .launch import Target, dense_target, pair, side
from .layout import (
    LANES,
    THREADS,
    TYPE_NAMES,
    WARPS,
    Rows,
    block_factor,
    decode_blocks,
    decode_shared_bytes,
    encode_blocks,
    encode_macros,
    encode_shared_bytes,
    in_registers,
    rows_of,
    width_of,
)


def encode(spec: CodecSpec, vectors: Any, packed: Any, scales: Any) -> None:
    with vectors.device:
        if scales.size == 0:
            return
        rows = rows_of(vectors, alignment_of(spec, vectors))
        encode_rows([(spec, rows, dense_target(spec, rows, packed, scales))])


def alignment_of(spec: CodecSpec, vectors: Any) -> int:
    """Bytes that vectors must start at a multiple of."""
    return 16 if in_registers(spec) else vectors.itemsize


def encode_rows(sides: list[tuple[CodecSpec, Rows, Target]]) -> None:
    """Encode one array, or keys and values: in one launch where they fit one kernel."""
    dtypes = {rows.array.dtype for _, rows, _ in sides}
    dims = {spec.head_dim for spec, _, _ in sides}
    if len(dtypes) == len(dims) == 1 and all(in_registers(spec) for spec, _, _ in sides):
        itemsize = dtypes.pop().itemsize
        shared = max(encode_shared_bytes(spec, itemsize) for spec, _, _ in sides)
        if shared <= max_shared_bytes():
            _encode_in_registers(sides, shared)
            return
    for spec, rows, target in sides:
        if isinstance(spec.rotation, DenseRotation):
            dense.encode(spec, rows, target)
        elif len(sides) > 1:
            encode_rows([(spec, rows, target)])
        else:
            _encode_any(spec, rows, target)


def _encode_in_registers(sides: list[tuple[CodecSpec, Rows, Target]], shared: int) -> None:
    first, last = sides[0], sides[-1]
    head_dim = first[0].head_dim
    macros: dict[str, str | int] = {
        "INPUT": TYPE_NAMES[first[1].array.dtype.name],
        "HEAD_DIM": head_dim,
        "LANES": LANES[head_dim],
        "CONTIGUOUS": int(all(target.contiguous(rows) for _, rows, target in sides)),
        "BLOCKS": encode_blocks(head_dim, any(spec.scale != "norm" for spec, _, _ in sides)),
    }
    for i, (spec, _, target) in enumerate((first, last)):
        macros |= encode_macros(spec, i, target.store_width(spec.packed_dim))
    compiled = kernel("encode.cu", "encode", macros, THREADS, shared)
    count = max(rows.count for _, rows, _ in sides)
    compiled(
        (_tile_blocks(compiled, count, head_dim, len(sides)), len(sides)),
        (pair(side(*first), side(*last)),),
    )


def _tile_blocks(compiled: Kernel, rows: int, head_dim: int, sides: int = 1) -> int:
    """Blocks that share `rows`: as many as run at once, or fewer."""
    rows_a_block = WARPS * 32 // LANES[head_dim]
    return min(-(-rows // rows_a_block), max(1, compiled.resident_blocks // sides))


def _encode_any(spec: CodecSpec, rows: Rows, target: Target) -> None:
    block_launch(
        "encode_any",
        TYPE_NAMES[rows.array.dtype.name],
        spec.head_dim,
        rows.count,
        side(spec, rows, target),
        np.int32(spec.head_dim),
        np.int32(spec.bits),
        np.int32(SCALE_KINDS.index(spec.scale)),
    )


def decode(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
    import cupy

    with packed.device:
        if scales.size == 0:
            return
        if isinstance(spec.rotation, DenseRotation):
            dense.decode(spec, packed, scales, out)
            return
        shared = decode_shared_bytes(spec, out.itemsize) if in_registers(spec) else 0
        if not in_registers(spec) or shared > max_shared_bytes():
            _decode_any(spec, packed, scales, out)
        elif out.data.ptr % 16:  # a view into other memory: rare enough for a second pass
            aligned = cupy.empty(out.shape, out.dtype)
            _decode_in_registers(spec, packed, scales, aligned, shared)
            out[...] = aligned
        else:
            _decode_in_registers(spec, packed, scales, out, shared)


def _decode_in_registers(spec: CodecSpec, packed: Any, scales: Any, out: Any, shared: int) -> None:
    assert isinstance(spec.rotation, HadamardRotation)
    macros: dict[str, str | int] = {
        "OUTPUT": TYPE_NAMES[out.dtype.name],
        "HEAD_DIM": spec.head_dim,
        "LANES": LANES[spec.head_dim],
        "BITS": spec.bits,
        "LOAD": width_of(packed.data.ptr, spec.packed_dim),
        "BLOCKS": decode_blocks(spec.head_dim),
    }
    compiled = kernel("decode.cu", "decode", macros, THREADS, shared)
    c = constants(spec)
    compiled(
        (_tile_blocks(compiled, scales.size, spec.head_dim),),
        (
            packed,
            scales,
            out,
            np.int64(scales.size),
            c.decode_table,
            c.signs,
            np.int32(spec.rotation.rounds),
            np.float32(block_factor(spec.rotation)),
        ),
    )


def _decode_any(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
    assert isinstance(spec.rotation, HadamardRotation)
    c = constants(spec)
    block_launch(
        "decode_any",
        TYPE_NAMES[out.dtype.name],
        spec.head_dim,
        scales.size,
        packed,
        scales,
        out,
        np.int64(scales.size),
        c.decode_table,
        c.signs,
        np.int32(spec.rotation.rounds),
        np.float32(block_factor(spec.rotation)),
        np.int32(spec.head_dim),
        np.int32(spec.bits),
    )
