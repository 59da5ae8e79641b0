"""Dense rotations of any head_dim: whole numbers in float64, multiplied by cuBLAS.

Every partial sum is an integer below 2**53, so the order in which cuBLAS adds does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import MATRIX_FRACTION_BITS

from .compile import kernel
from .constants import CENTROID_FRACTION_BITS, constants
from .launch import Target, side
from .layout import TYPE_NAMES, Rows
from .teams import team_launch

WORKSPACE_BYTES = 1 << 27  # for each factor and each product
_KEPT_BYTES = 16  # DenseRow of kernels/any.cu
_THREADS = 256


def encode(spec: CodecSpec, rows: Rows, target: Target) -> None:
    import cupy

    d = spec.head_dim
    type_name = TYPE_NAMES[rows.array.dtype.name]
    told = side(spec, rows, target)
    matrix = constants(spec).matrix_transposed
    for first, count, fixed, product in _parts(rows.count, d):
        kept = cupy.empty(count * _KEPT_BYTES, np.uint8)
        place = (np.uint32(first), np.uint32(count), np.int32(d))
        team_launch("encode_dense_before", type_name, d, count, told, *place, fixed, kept)
        cupy.matmul(fixed, matrix, out=product)
        codec = (np.int32(spec.bits), np.int32(SCALE_KINDS.index(spec.scale)))
        team_launch("encode_dense_behind", type_name, d, count, told, *place, *codec, product, kept)


def decode(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
    import cupy

    d = spec.head_dim
    c = constants(spec)
    macros = {"TYPE": TYPE_NAMES[out.dtype.name], "TEAM": "Block"}
    before = kernel("any.cu", "decode_dense_before", macros, _THREADS, 0)
    behind = kernel("any.cu", "decode_dense_behind", macros, _THREADS, 0)
    factor = np.ldexp(spec.decode_gain, -CENTROID_FRACTION_BITS - MATRIX_FRACTION_BITS)
    packed_rows, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    out_rows = out.reshape(-1, d)
    for first, count, fixed, product in _parts(scales.size, d):
        part = slice(first, first + count)
        n = np.int64(count)
        blocks = -(-count * d // _THREADS)
        shape = (np.int32(d), np.int32(spec.bits))
        before(
            (min(blocks, before.resident_blocks),),
            (packed_rows[part], fixed, n, c.centroids, *shape),
        )
        cupy.matmul(fixed, c.matrix, out=product)
        behind(
            (min(blocks, behind.resident_blocks),),
            (product, flat_scales[part], out_rows[part], n, np.float64(factor), np.int32(d)),
        )


def _parts(count: int, d: int) -> Iterator[tuple[int, int, Any, Any]]:
    """(first, count, factor, product) of parts of the rows; the float64 arrays are used again."""
    import cupy

    at_once = min(count, max(1, WORKSPACE_BYTES // (8 * d)))
    fixed = cupy.empty((at_once, d), np.float64)
    product = cupy.empty((at_once, d), np.float64)
    for first in range(0, count, at_once):
        n = min(at_once, count - first)
        yield first, n, fixed[:n], product[:n]
