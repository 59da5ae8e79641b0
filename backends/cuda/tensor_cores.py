"""Dense rotations in the same kernel as the rest of the codec, on 8-bit integer tensor cores.

The prescribed product is one of whole numbers (docs/format.md).  Cut into signed bytes (limbs.py)
it is exact in int32, and nothing but input, codes and scales passes through memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import MATRIX_FRACTION_BITS

from .compile import Kernel, kernel, max_shared_bytes
from .constants import CENTROID_FRACTION_BITS, constants
from .launch import SIDE, Target, of_launch, of_quantizer
from .layout import (
    TYPE_NAMES,
    Rows,
    dense_decode_shape,
    dense_encode_shape,
    row_width,
    width_of,
)


@dataclass(frozen=True)
class Plan:
    """What launches for the same quantiser and kinds of arrays share."""

    kernel: Kernel
    rows: int
    constants: tuple[Any, ...]

    def grid(self, count: int) -> tuple[int]:
        return (min(-(-count // self.rows), self.kernel.resident_blocks),)


def encode(spec: CodecSpec, rows: Rows, target: Target) -> bool:
    """Launch kernels/encode_dense.cu; False if this device has too little shared memory."""
    import cupy

    plan = _encode_plan(
        cupy.cuda.runtime.getDevice(),
        spec,
        rows.array.dtype,
        target.contiguous(rows),
        target.store_width(spec.packed_dim),
    )
    if plan is None:
        return False
    quantizer, fragments = plan.constants
    told = np.frombuffer(of_launch(rows, target) + quantizer, SIDE)
    plan.kernel(plan.grid(rows.count), (told, fragments))
    return True


@lru_cache(maxsize=512)
def _encode_plan(
    device: int, spec: CodecSpec, dtype: np.dtype[Any], contiguous: bool, store: int
) -> Plan | None:
    """For `device`, which is the current one."""
    c = constants(spec)
    shape = dense_encode_shape(spec, dtype.itemsize, c.limbs, max_shared_bytes())
    if shape is None:
        return None
    macros: dict[str, str | int] = {
        "INPUT": TYPE_NAMES[dtype.name],
        "HEAD_DIM": spec.head_dim,
        "LOAD": row_width(spec.head_dim, dtype.itemsize),
        "CONTIGUOUS": int(contiguous),
        "BITS": spec.bits,
        "SCALE": SCALE_KINDS.index(spec.scale),
        "STORE": store,
        "LIMBS": c.limbs,
        **shape.macros,
    }
    compiled = kernel("encode_dense.cu", "encode_dense", macros, shape.threads, shape.shared_bytes)
    return Plan(compiled, shape.rows, (of_quantizer(spec), c.fragments))


def decode(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> bool:
    """Launch kernels/decode_dense.cu; False if this device has too little shared memory."""
    import cupy

    load = width_of(packed.data.ptr, spec.packed_dim)
    plan = _decode_plan(cupy.cuda.runtime.getDevice(), spec, out.dtype, load)
    if plan is None:
        return False
    count = scales.size
    plan.kernel(plan.grid(count), (packed, scales, out, np.int64(count), *plan.constants))
    return True


@lru_cache(maxsize=512)
def _decode_plan(device: int, spec: CodecSpec, dtype: np.dtype[Any], load: int) -> Plan | None:
    c = constants(spec)
    shape = dense_decode_shape(spec, c.limbs, max_shared_bytes())
    if shape is None:
        return None
    macros: dict[str, str | int] = {
        "OUTPUT": TYPE_NAMES[dtype.name],
        "HEAD_DIM": spec.head_dim,
        "BITS": spec.bits,
        "LOAD": load,
        "LIMBS": c.limbs,
        **shape.macros,
    }
    compiled = kernel("decode_dense.cu", "decode_dense", macros, shape.threads, shape.shared_bytes)
    gain = np.float64(np.ldexp(spec.decode_gain, -CENTROID_FRACTION_BITS - MATRIX_FRACTION_BITS))
    return Plan(compiled, shape.rows, (c.centroid_words, c.fragments_back, gain))
