"""Scores against packed vectors: rotate the queries once, then multiply with tiles of centroids.

<q, x> = |q| * scale / d * <z, c>, with z the rotated query in units of variance 1 and c the
centroids of the vector's codes.  A tile of looked-up centroids, times their scales, stays in the
level-2 cache between the look-up and the matrix product, which writes the scores.  For a few
queries no tile is written: each row of codes is looked up and multiplied in registers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec

from .codec import address, encode_rows, launch, row_blocks
from .compile import compiled
from .kernels import Plan
from .simd import target
from .threads import for_rows

TILE_ELEMENTS = 1 << 17  # 512 KiB of float32


def rotate_queries(spec: CodecSpec, query: Any) -> tuple[Any, Any]:
    """(z, norms): float32 [m, d] and [m] with rotated query = z * norm / sqrt(d)."""
    d = spec.head_dim
    count = query.size // d
    z, norms = np.empty((count, d), np.float32), np.empty(count, np.float32)
    for start, rows in row_blocks(query, d):
        part = slice(start, start + len(rows))
        encode_rows(spec, rows, z[part], norms[part], "norm", "z")
    return z, norms


def inner_products(spec: CodecSpec, query: Any, packed: Any, scales: Any, scores: Any) -> None:
    """Fill scores[m, n] with <query[m], decoded[n]>."""
    codes, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    z, norms = rotate_queries(spec, query)
    flat_scores = scores.reshape(len(norms), len(flat_scales))
    if not flat_scores.size:
        return
    score = _score_row_by_row if len(z) <= few_queries(spec) else _score_tile_by_tile
    score(spec, z, norms, codes, flat_scales, flat_scores)


def few_queries(spec: CodecSpec) -> int:
    """Up to how many queries going row by row is the faster way (measured with AVX-512).

    Each query looks all codes up again, which takes longest where a table does not fit registers,
    and in short rows much time goes into their ends.
    """
    return 8 if spec.head_dim >= 64 and spec.bits <= 6 else 4


def _score_row_by_row(
    spec: CodecSpec, z: Any, norms: Any, codes: Any, scales: Any, scores: Any
) -> None:
    kernel = compiled(Plan("score", spec.head_dim, spec.bits))
    padded = np.zeros((len(z), spec.head_dim + target().width), np.float32)
    padded[:, : spec.head_dim] = z
    factors = norms / np.float32(spec.head_dim)
    for query, factor, row in zip(padded, factors, scores, strict=True):
        bits = int(factor.view(np.int32))
        launch(kernel, spec, "encode", codes, row, scales, signs=address(query), parameter=bits)


def _score_tile_by_tile(
    spec: CodecSpec, z: Any, norms: Any, codes: Any, scales: Any, scores: Any
) -> None:
    d = spec.head_dim
    kernel = compiled(Plan("look_up_scaled", d, spec.bits))
    tile_rows = max(1, TILE_ELEMENTS // d)
    # each side gets 1 / sqrt(d): then no factor exceeds the length of its vector
    root = np.float32(1 / math.sqrt(d))
    bits = int(root.view(np.int32))
    with np.errstate(invalid="ignore"):
        queries = z * (norms * root)[:, None]

    def score(start: int, stop: int) -> None:
        tile = np.empty((min(tile_rows, stop - start), d), np.float32)
        for first in range(start, stop, tile_rows):
            part = slice(first, min(stop, first + tile_rows))
            vectors = tile[: part.stop - first]
            launch(kernel, spec, "encode", codes[part], vectors, scales[part], parameter=bits)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                np.matmul(queries, vectors.T, out=scores[:, part])

    for_rows(len(codes), d, score)
