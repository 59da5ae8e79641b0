"""Exhaustive search: the largest inner products, block by block, so that few scores exist at once.

The first block is short and sorted; of each later one only what beats a query's k-th best score so
far is looked at.  Blocks double in size until they hold `SCORES_AT_ONCE` scores.  Everything is
array functions, the same for NumPy and CuPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays, _backend
from ._checks import check_same_place

if TYPE_CHECKING:
    from .quantizer import TurboQuant

FIRST_ROWS = 1024
QUERIES_AT_ONCE = 1024
SCORES_AT_ONCE = 1 << 22  # 16 MiB


def check_k(k: Any, count: int) -> int:
    """`k` as an int from 1 to the number of vectors."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= count:
        raise ValueError(f"k must be from 1 to the {count} vectors, got {k}")
    return int(k)


def take_in_offsets(offsets: Any, scales: Any) -> Any:
    """`offsets` as a floating-point array beside `scales`, one number a vector."""
    array, _ = _arrays.take_in(offsets, "offsets")
    if array.dtype.name not in _arrays.FLOAT_NAMES:
        raise TypeError(f"offsets must be {', '.join(_arrays.FLOAT_NAMES)}, got {array.dtype}")
    if array.shape != scales.shape:
        raise ValueError(f"offsets must have the shape of norms, {scales.shape}, got {array.shape}")
    check_same_place(array, "offsets", scales, "norms")
    return array


def search(
    quantizer: TurboQuant, queries: Any, codes: Any, scales: Any, offsets: Any, k: int
) -> tuple[Any, Any]:
    """(scores float32, rows int64), both [queries, k], of checked arrays; see `TurboQuant.topk`."""
    xp = _backend.array_module(codes)
    best = xp.empty((len(queries), k), np.float32)
    found = xp.empty((len(queries), k), np.int64)
    step = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // k))
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        best[part], found[part] = _search(quantizer, queries[part], codes, scales, offsets, k)
    return best, found


def _search(
    quantizer: TurboQuant, queries: Any, codes: Any, scales: Any, offsets: Any, k: int
) -> tuple[Any, Any]:
    most = max(k, SCORES_AT_ONCE // len(queries))
    xp = _backend.array_module(codes)
    memory = xp.empty(len(queries) * min(most, len(codes)), np.float32)
    best = found = None
    for start, stop in _blocks(len(codes), max(k, min(FIRST_ROWS, most)), most):
        scores = memory[: len(queries) * (stop - start)].reshape(len(queries), stop - start)
        quantizer.inner_products(queries, codes[start:stop], scales[start:stop], out=scores)
        if offsets is not None:
            scores += offsets[start:stop].astype(np.float32)
        if best is None:
            best, found = largest(scores, k)
        else:
            best, found = _with_better(best, found, scores, start)
    return best, found


def _blocks(count: int, first: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover 0..count: of `first`, then as many as came before, at most `most`."""
    start = 0
    while start < count:
        stop = min(count, start + min(most, max(first, start)))
        yield start, stop
        start = stop


def _with_better(best: Any, found: Any, scores: Any, start: int) -> tuple[Any, Any]:
    """`best` and `found` after a block whose first row is `start`.

    What equals the k-th best is passed over, since its row is higher.  What beats it is moved to
    the front of a narrow array, one line a query, whose unused places are NaN and so sorted last.
    """
    xp = _backend.array_module(scores)
    places = xp.flatnonzero(~(scores <= best[:, -1:]))  # NaN lets everything through
    if not len(places):
        return best, found
    query, row = xp.divmod(places, scores.shape[1])
    counts = xp.bincount(query, minlength=len(best))
    column = xp.arange(len(places)) - (xp.cumsum(counts) - counts)[query]
    width = int(counts.max())
    values = xp.full((len(best), width), np.nan, np.float32)
    rows = xp.zeros((len(best), width), np.int64)
    values[query, column] = scores.reshape(-1)[places]
    rows[query, column] = row + start
    best, position = largest(xp.concatenate((best, values), axis=1), best.shape[1])
    return best, xp.take_along_axis(xp.concatenate((found, rows), axis=1), position, axis=1)


def largest(scores: Any, k: int) -> tuple[Any, Any]:
    """The k largest scores along the last axis, largest first, and their positions there.

    Of equal scores the one that stands first wins, NaN comes last.  Score and position are combined
    to one integer which sorts like the pair, so that this holds at the k-th place too.
    """
    length = scores.shape[-1]
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes -0 and 0 equal
    ascending = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    ascending = np.where(np.isnan(scores), np.uint32(0), ascending).astype(np.uint64)
    # CuPy cannot count down in unsigned integers.
    from_the_end = np.arange(length, dtype=np.uint64, like=scores)[::-1]
    keys = ascending << 32 | from_the_end
    best = np.sort(np.partition(keys, length - k, axis=-1)[..., length - k :], axis=-1)[..., ::-1]
    positions = length - 1 - (best & np.uint64(2**32 - 1)).astype(np.int64)
    return np.take_along_axis(scores, positions, axis=-1), positions
