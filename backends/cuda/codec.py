"""Encode and decode: which kernel takes an array, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import DenseRotation, HadamardRotation

from . import dense, tensor_cores
from .compile import Kernel, kernel, max_shared_bytes
from .constants import constants
from .launch import SIDES, Target, dense_target, of_launch, of_quantizer, side
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
    on_tensor_cores,
    row_width,
    rows_of,
    width_of,
)
from .teams import team_launch


def encode(spec: CodecSpec, vectors: Any, packed: Any, scales: Any) -> None:
    with vectors.device:
        if scales.size == 0:
            return
        rows = rows_of(vectors, alignment_of(spec, vectors))
        encode_rows([(spec, rows, dense_target(spec, rows, packed, scales))])


def alignment_of(spec: CodecSpec, vectors: Any) -> int:
    """Bytes that vectors must start at a multiple of."""
    if in_registers(spec) or on_tensor_cores(spec):
        return row_width(spec.head_dim, vectors.itemsize)
    return int(vectors.itemsize)


def encode_rows(sides: list[tuple[CodecSpec, Rows, Target]]) -> None:
    """Encode one array, or keys and values: in one launch where they fit one kernel."""
    if not _encode_in_registers(sides):
        for spec, rows, target in sides:
            if isinstance(spec.rotation, DenseRotation):
                if not (on_tensor_cores(spec) and tensor_cores.encode(spec, rows, target)):
                    dense.encode(spec, rows, target)
            elif len(sides) == 1 or not _encode_in_registers([(spec, rows, target)]):
                _encode_any(spec, rows, target)


def _encode_in_registers(sides: list[tuple[CodecSpec, Rows, Target]]) -> bool:
    """Launch kernels/encode.cu if it takes all sides in one launch."""
    import cupy

    (first, rows, target), (last, last_rows, last_target) = sides[0], sides[-1]
    if rows.array.dtype != last_rows.array.dtype or first.head_dim != last.head_dim:
        return False
    plan = _encode_plan(
        cupy.cuda.runtime.getDevice(),
        (first, last),
        rows.array.dtype,
        target.contiguous(rows) and last_target.contiguous(last_rows),
        (target.store_width(first.packed_dim), last_target.store_width(last.packed_dim)),
    )
    if plan is None:
        return False
    told = of_launch(rows, target) + plan.constants[0]
    told += told if len(sides) == 1 else of_launch(last_rows, last_target) + plan.constants[1]
    blocks = -(-max(rows.count, last_rows.count) // plan.rows)
    grid = (min(blocks, max(1, plan.kernel.resident_blocks // len(sides))), len(sides))
    plan.kernel(grid, (np.frombuffer(told, SIDES),))
    return True


@dataclass(frozen=True)
class EncodePlan:
    """What launches of kernels/encode.cu for the same quantisers and kinds of arrays share."""

    kernel: Kernel
    rows: int
    constants: tuple[bytes, bytes]


@lru_cache(maxsize=512)
def _encode_plan(
    device: int,
    specs: tuple[CodecSpec, CodecSpec],
    dtype: np.dtype[Any],
    contiguous: bool,
    stores: tuple[int, int],
) -> EncodePlan | None:
    """For `device`, which is the current one; None where another kernel is needed."""
    if not all(map(in_registers, specs)):
        return None
    head_dim = specs[0].head_dim
    shape = encode_shape(head_dim, dtype.itemsize, any(spec.scale != "norm" for spec in specs))
    shared = max(encode_shared_bytes(spec, dtype.itemsize, shape) for spec in specs)
    if shared > max_shared_bytes():
        return None
    macros: dict[str, str | int] = {
        "INPUT": TYPE_NAMES[dtype.name],
        "HEAD_DIM": head_dim,
        "LOAD": row_width(head_dim, dtype.itemsize),
        "CONTIGUOUS": int(contiguous),
        **shape.macros,
        **encode_macros(specs[0], 0, stores[0]),
        **encode_macros(specs[1], 1, stores[1]),
    }
    compiled = kernel("encode.cu", "encode", macros, shape.threads, shared)
    return EncodePlan(compiled, shape.rows, (of_quantizer(specs[0]), of_quantizer(specs[1])))


def _encode_any(spec: CodecSpec, rows: Rows, target: Target) -> None:
    team_launch(
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
        specialised = in_registers(spec) or on_tensor_cores(spec)
        if specialised and out.data.ptr % row_width(spec.head_dim, out.itemsize):
            aligned = cupy.empty(out.shape, out.dtype)  # rare enough for a second pass
            decode(spec, packed, scales, aligned)
            out[...] = aligned
        elif isinstance(spec.rotation, DenseRotation):
            if not (specialised and tensor_cores.decode(spec, packed, scales, out)):
                dense.decode(spec, packed, scales, out)
        elif not (specialised and _decode_in_registers(spec, packed, scales, out)):
            _decode_any(spec, packed, scales, out)


def _decode_in_registers(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> bool:
    """Launch kernels/decode.cu; False if this device has too little shared memory."""
    import cupy

    load = width_of(packed.data.ptr, spec.packed_dim)
    plan = _decode_plan(cupy.cuda.runtime.getDevice(), spec, out.dtype, load)
    if plan is None:
        return False
    blocks = min(-(-scales.size // plan.rows), plan.kernel.resident_blocks)
    plan.kernel((blocks,), (packed, scales, out, np.int64(scales.size), *plan.constants))
    return True


@dataclass(frozen=True)
class DecodePlan:
    """As `EncodePlan`, for kernels/decode.cu."""

    kernel: Kernel
    rows: int
    constants: tuple[Any, ...]


@lru_cache(maxsize=512)
def _decode_plan(
    device: int, spec: CodecSpec, dtype: np.dtype[Any], load: int
) -> DecodePlan | None:
    assert isinstance(spec.rotation, HadamardRotation)
    shape = decode_shape(spec.head_dim, dtype.itemsize)
    shared = decode_shared_bytes(spec, dtype.itemsize, shape)
    if shared > max_shared_bytes():
        return None
    macros: dict[str, str | int] = {
        "OUTPUT": TYPE_NAMES[dtype.name],
        "HEAD_DIM": spec.head_dim,
        "BITS": spec.bits,
        "LOAD": load,
        "STORE": row_width(spec.head_dim, dtype.itemsize),
        **shape.macros,
    }
    compiled = kernel("decode.cu", "decode", macros, shape.threads, shared)
    c = constants(spec)
    rounds, factor = np.int32(spec.rotation.rounds), np.float32(block_factor(spec.rotation))
    return DecodePlan(compiled, shape.rows, (c.decode_table, c.signs, rounds, factor))


def _decode_any(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
    assert isinstance(spec.rotation, HadamardRotation)
    c = constants(spec)
    team_launch(
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
