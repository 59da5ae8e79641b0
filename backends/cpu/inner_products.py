"""Scores against packed vectors: rotate the queries once, then multiply with tiles of centroids.

<q, x> = |q| * scale / d * <z, c>, with z the rotated query in units of variance 1 and c the
centroids of the vector's codes.  A tile of looked-up centroids stays in the level-2 cache between
the look-up and the matrix product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec

from .codec import constants_of, encode_rows, launch, row_blocks
from .compile import compiled
from .kernels import Plan
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
    d = spec.head_dim
    codes, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    z, norms = rotate_queries(spec, query)
    flat_scores = scores.reshape(len(norms), len(flat_scales))
    if not flat_scores.size:
        return
    tables = constants_of(spec).encode
    look_up = compiled(Plan("look_up", d, spec.bits, "float32"))
    factors = (norms / np.float32(d))[:, None]
    tile_rows = max(1, TILE_ELEMENTS // d)

    def score(start: int, stop: int) -> None:
        tile = np.empty((min(tile_rows, stop - start), d), np.float32)
        for first in range(start, stop, tile_rows):
            part = slice(first, min(stop, first + tile_rows))
            centroids = tile[: part.stop - first]
            launch(look_up, spec, tables, codes[part], centroids, None)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                product = z @ centroids.T
                product *= factors
                product *= flat_scales[part]
                flat_scores[:, part] = product

    for_rows(len(codes), d, score)
