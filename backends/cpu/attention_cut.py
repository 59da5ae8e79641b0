"""How attention over a batch is cut into units of work.

Everything depends on the lengths of each sequence alone, never on the number of threads or on the
rest of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ROWS_PER_UNIT = 64  # at most, unless one query token has more heads than that
SHORT_CHUNK, LONG_CHUNK = 512, 1024  # tokens of a unit: if one unit holds all rows, and else
MOST_CHUNKS = 128

Ints = npt.NDArray[np.int64]


class Cut(NamedTuple):
    """How a batch is divided.

    Attributes
    ----------
    units : int64 [units, len(UNIT)]
    merges : int64 [row tiles, len(MERGE)]
    first, last : int32 [rows], the tokens each query row sees: from `first` to before `last`
    places : int, rows of partial results
    tokens : int, of all units
    most_rows : int, of any unit
    """

    units: Ints
    merges: Ints
    first: npt.NDArray[np.int32]
    last: npt.NDArray[np.int32]
    places: int
    tokens: int
    most_rows: int


def cut(
    starts: Ints, positions: Ints, context_lens: Ints, group: int, kv_heads: int, window: int
) -> Cut:
    """Divide query rows and contexts into units; a pure function of the batch's lengths.

    starts : [num_seqs + 1] first query token of each sequence
    positions : [num_seqs] position of that token
    window : sliding window, 0 if there is none
    """
    lengths = np.diff(starts)
    tokens_per_tile = max(1, ROWS_PER_UNIT // group)
    tiles_of = -(-lengths // tokens_per_tile)
    seq = np.repeat(np.arange(len(lengths)), tiles_of)
    number = np.arange(len(seq)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    begin = number * tokens_per_tile  # query tokens of the tile, within the sequence
    end = np.minimum(begin + tokens_per_tile, lengths[seq])

    tile_stop = np.clip(positions[seq] + end, 0, context_lens[seq])
    tile_start = np.zeros_like(tile_stop)
    if window:
        tile_start = np.clip(positions[seq] + begin + 1 - window, 0, tile_stop)
    visible = tile_stop - tile_start
    shortest = np.where(tiles_of[seq] == 1, SHORT_CHUNK, LONG_CHUNK)
    doublings = np.ceil(np.log2(np.maximum(visible / (shortest * MOST_CHUNKS), 1.0)))
    chunk = shortest << doublings.astype(np.int64)
    chunks = -(-visible // chunk)

    rows = (end - begin) * group
    row = (starts[seq] + begin) * group
    tile = np.repeat(np.arange(len(seq)), chunks)
    part = np.arange(len(tile)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    start = tile_start[tile] + part * chunk[tile]
    stop = np.minimum(start + chunk[tile], tile_stop[tile])
    sizes = rows[tile] * kv_heads
    place = np.cumsum(sizes) - sizes
    first_unit = np.cumsum(chunks) - chunks
    merge_place = np.append(place, 0)[np.minimum(first_unit, len(place))]

    position = np.repeat(positions, lengths) + np.arange(len(seq) and starts[-1])
    position -= np.repeat(starts[:-1], lengths)
    last = np.repeat(position + 1, group)
    first = np.maximum(last - window, 0) if window else np.zeros_like(last)
    return Cut(
        np.stack([seq[tile], row[tile], rows[tile], start, stop, place], axis=1),
        np.stack([merge_place, chunks, rows, row], axis=1),
        first.astype(np.int32),
        last.astype(np.int32),
        int(sizes.sum()),
        int((stop - start).sum()),
        int(rows.max(initial=0)),
    )
