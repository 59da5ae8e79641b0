"""Scores against packed vectors: rotate the queries once, then multiply with tiles of centroids.

<q, x> = |q| * scale / d * <z, c>, with z the rotated query in units of variance 1 and c the
centroids of the vector's codes.  A tile of looked-up centroids stays in the level-2 cache between
the look-up and the matrix product.  For a query or two no tile is written: each row of codes is
looked up and multiplied in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec

from .codec import address, encode_rows, launch, row_blocks
from .compile import compiled
from .kernels import Plan
from .simd import target
from .threads import for_rows

ROW_BY_ROW_QUERIES = 2  # up to so many, the product is done while looking up
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
    d = spec.head_dim
    codes, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    z, norms = rotate_queries(spec, query)
    flat_scores = scores.reshape(len(norms), len(flat_scales))
    if not flat_scores.size:
        return
    factors = norms / np.float32(d)
    if len(z) <= ROW_BY_ROW_QUERIES:
        _score_row_by_row(spec, z, factors, codes, flat_scales, flat_scores)
    else:
        _score_tile_by_tile(spec, z, factors, codes, flat_scales, flat_scores)


def _score_row_by_row(
    spec: CodecSpec, z: Any, factors: Any, codes: Any, scales: Any, scores: Any
) -> None:
    kernel = compiled(Plan("score", spec.head_dim, spec.bits))
    padded = np.zeros((len(z), spec.head_dim + target().width), np.float32)
    padded[:, : spec.head_dim] = z
    for query, factor, row in zip(padded, factors, scores, strict=True):
        bits = int(factor.view(np.int32))
        launch(kernel, spec, "encode", codes, row, scales, signs=address(query), parameter=bits)


def _score_tile_by_tile(
    spec: CodecSpec, z: Any, factors: Any, codes: Any, scales: Any, scores: Any
) -> None:
    d = spec.head_dim
    kernel = compiled(Plan("look_up", d, spec.bits, "float32"))
    tile_rows = max(1, TILE_ELEMENTS // d)

    def score(start: int, stop: int) -> None:
        tile = np.empty((min(tile_rows, stop - start), d), np.float32)
        for first in range(start, stop, tile_rows):
            part = slice(first, min(stop, first + tile_rows))
            centroids = tile[: part.stop - first]
            launch(kernel, spec, "encode", codes[part], centroids, None)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                product = z @ centroids.T
                product *= factors[:, None]
                product *= scales[part]
                scores[:, part] = product

    for_rows(len(codes), d, score)
