"""Scores of queries against packed vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import MATRIX_FRACTION_BITS, HadamardRotation

from .compile import kernel, max_shared_bytes
from .constants import constants
from .layout import TYPE_NAMES, block_factor, lookup_bytes, width_of

THREADS = 128
MAX_GRID_Y = 65535


def inner_products(spec: CodecSpec, query: Any, packed: Any, scales: Any, scores: Any) -> None:
    import cupy

    with packed.device:
        if scores.size == 0:
            return
        queries = cupy.ascontiguousarray(query.reshape(-1, spec.head_dim))
        c = constants(spec)
        gain = 1.0
        hadamard = spec.rotation if isinstance(spec.rotation, HadamardRotation) else None
        if hadamard is None:
            queries = queries.astype(np.float64) @ c.matrix_transposed
            gain = float(np.ldexp(spec.decode_gain, -MATRIX_FRACTION_BITS))
        flat_scores = scores.reshape(len(queries), -1)
        at_once = 1 if len(queries) == 1 else 8
        d = spec.head_dim
        shared = shared_bytes(d, spec.bits, at_once)
        if shared > max_shared_bytes():
            at_once = 1
            shared = shared_bytes(d, spec.bits, at_once)
        fits = shared <= max_shared_bytes()
        macros: dict[str, str | int] = {
            "TYPE": TYPE_NAMES[queries.dtype.name],
            "BITS": spec.bits,
            "QUERIES": at_once,
            "LOAD": load_width(d, spec.bits, packed.data.ptr),
            "DENSE": int(hadamard is None),
        }
        dynamic = shared if fits else lookup_bytes(spec.bits)
        compiled = kernel("inner_products.cu", "inner_products", macros, THREADS, dynamic)
        columns_of_blocks = min(-(-scales.size // THREADS), compiled.resident_blocks)
        step = at_once * MAX_GRID_Y
        for first in range(0, len(queries), step):
            part = queries[first : first + step]
            grid = (columns_of_blocks, -(-len(part) // at_once))
            scratch = None if fits else cupy.empty(grid[0] * grid[1] * shared, np.uint8)
            compiled(
                grid,
                (
                    part,
                    np.int64(len(part)),
                    packed,
                    scales,
                    np.int64(scales.size),
                    flat_scores[first : first + step],
                    c.decode_table if hadamard else c.centroids,
                    c.signs if hadamard else None,
                    np.int32(hadamard.rounds if hadamard else 0),
                    np.float32(block_factor(hadamard) if hadamard else 1.0),
                    np.float64(gain),
                    np.int32(d),
                    scratch,
                    np.int64(shared),
                ),
            )


def shared_bytes(head_dim: int, bits: int, queries: int) -> int:
    """Lookup table, rotated queries padded to 32 coordinates, and room for a sum."""
    columns = -(-head_dim // 32) * 32
    padded = max(1 << (head_dim - 1).bit_length(), 2)
    return lookup_bytes(bits) + 4 * queries * columns + 2 * padded


def load_width(head_dim: int, bits: int, address: int) -> int:
    """Bytes a lane loads at once from its row of codes (kernels/inner_products.cu)."""
    row = -(-head_dim * bits // 8)
    if head_dim % 32 == 0 and bits % 4 == 0 and width_of(address, row) == 16:
        return 16
    return 4 if width_of(address, row) >= 4 else 1
