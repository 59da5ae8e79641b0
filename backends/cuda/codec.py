"""Encode and decode: which kernel takes an array, and its launch."""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import DenseRotation, HadamardRotation

from . import dense
from .blocks import block_launch
from .compile import kernel, max_shared_bytes
from .constants import constants
from .launch import Target, dense_target, pair, side
from .layout import (
    TYPE_NAMES,
    Rows,
    block_factor,
    decode_shape,
    decode_shared_bytes,
    encode_macros,
    encode_shape,
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
    if not _encode_in_registers(sides):
        for spec, rows, target in sides:
            if isinstance(spec.rotation, DenseRotation):
                dense.encode(spec, rows, target)
            elif len(sides) == 1 or not _encode_in_registers([(spec, rows, target)]):
                _encode_any(spec, rows, target)


def _encode_in_registers(sides: list[tuple[CodecSpec, Rows, Target]]) -> bool:
    """Launch kernels/encode.cu if it takes all sides in one launch."""
    specs = [spec for spec, _, _ in sides]
    dtypes = {rows.array.dtype for _, rows, _ in sides}
    dims = {spec.head_dim for spec in specs}
    if len(dtypes) > 1 or len(dims) > 1 or not all(map(in_registers, specs)):
        return False
    dtype, head_dim = dtypes.pop(), dims.pop()
    corrected = any(spec.scale != "norm" for spec in specs)
    shape = encode_shape(head_dim, dtype.itemsize, corrected)
    shared = max(encode_shared_bytes(spec, dtype.itemsize, shape) for spec in specs)
    if shared > max_shared_bytes():
        return False
    macros = {
        "INPUT": TYPE_NAMES[dtype.name],
        "HEAD_DIM": head_dim,
        "CONTIGUOUS": int(all(target.contiguous(rows) for _, rows, target in sides)),
        **shape.macros,
    }
    first, last = sides[0], sides[-1]
    for i, (spec, _, target) in enumerate((first, last)):
        macros |= encode_macros(spec, i, target.store_width(spec.packed_dim))
    compiled = kernel("encode.cu", "encode", macros, shape.threads, shared)
    blocks = -(-max(rows.count for _, rows, _ in sides) // shape.rows)
    grid = (min(blocks, max(1, compiled.resident_blocks // len(sides))), len(sides))
    compiled(grid, (pair(side(*first, shape.lanes), side(*last, shape.lanes)),))
    return True


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
        if not in_registers(spec):
            _decode_any(spec, packed, scales, out)
        elif out.data.ptr % 16:  # a view into other memory: rare enough for a second pass
            aligned = cupy.empty(out.shape, out.dtype)
            decode(spec, packed, scales, aligned)
            out[...] = aligned
        else:
            _decode_in_registers(spec, packed, scales, out)


def _decode_in_registers(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
    assert isinstance(spec.rotation, HadamardRotation)
    shape = decode_shape(spec.head_dim, out.itemsize)
    shared = decode_shared_bytes(spec, out.itemsize, shape)
    if shared > max_shared_bytes():
        _decode_any(spec, packed, scales, out)
        return
    macros = {
        "OUTPUT": TYPE_NAMES[out.dtype.name],
        "HEAD_DIM": spec.head_dim,
        "BITS": spec.bits,
        "LOAD": width_of(packed.data.ptr, spec.packed_dim),
        **shape.macros,
    }
    compiled = kernel("decode.cu", "decode", macros, shape.threads, shared)
    c = constants(spec)
    compiled(
        (min(-(-scales.size // shape.rows), compiled.resident_blocks),),
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
