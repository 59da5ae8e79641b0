"""A tile: packed vectors looked up into rows of float32 centroids, coordinates in lane order.

Attention may take coordinates in any order, as long as queries and outputs follow it.  So one byte
shuffle gives each lane a 32-bit window of consecutive codes, and register after register is shifted
out of it: one shuffle for up to 32 / bits registers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .packing import packed_bytes
from .simd import I8, Simd, Table, Value, vector

TILE = 32  # tokens: 16 kB at 128 dimensions, half of a small first-level cache


class LaneGroup(NamedTuple):
    """Lane l holds the codes of coordinates start + l * codes .. + codes - 1, one a register."""

    start: int
    codes: int


def registers_of(dim: int, width: int) -> int:
    """Registers for one vector, the last one padded."""
    return -(-dim // width)


def lane_groups(bits: int, dim: int, width: int) -> list[LaneGroup]:
    """Split a vector into groups whose lanes each find their codes in 4 bytes."""
    groups, start, left = [], 0, registers_of(dim, width)
    while left:
        count = min(left, 32 // bits)
        while not _fits(LaneGroup(start, count), bits, width):
            count -= 1
        groups.append(LaneGroup(start, count))
        start, left = start + count * width, left - count
    return groups


def _fits(group: LaneGroup, bits: int, width: int) -> bool:
    return all(bit % 8 + group.codes * bits <= 32 for bit in _first_bits(group, bits, width))


def _first_bits(group: LaneGroup, bits: int, width: int) -> list[int]:
    """Position in the bit stream of each lane's first code."""
    return [(group.start + lane * group.codes) * bits for lane in range(width)]


def coordinate_order(bits: int, dim: int, width: int) -> npt.NDArray[np.int64]:
    """[registers * width] the coordinate in each place of a tile row; `dim` and more is padding."""
    lanes = np.arange(width)
    return np.concatenate(
        [
            group.start + lanes * group.codes + k
            for group in lane_groups(bits, dim, width)
            for k in range(group.codes)
        ]
    )


def look_up(s: Simd, table: Table, bits: int, dim: int, packed: Value, row: Value) -> None:
    """Write the centroids of one packed vector into a tile row; padding gets any centroid."""
    size, place = packed_bytes(dim, bits), 0
    for group in lane_groups(bits, dim, s.width):
        first = _first_bits(group, bits, s.width)
        begin = first[0] // 8
        end = min(size, (first[-1] + group.codes * bits + 7) // 8)
        stream = s.load(vector(I8, end - begin), packed, begin)
        order = [
            min(bit // 8 + byte, end - 1) - begin for bit in first for byte in (3, 2, 1, 0)
        ]  # first code in the high bits of its window
        window = s.b.bitcast(s.shuffle(stream, None, order), s.ints)
        for k in range(group.codes):
            shift = [32 - bit % 8 - bits * (k + 1) for bit in first]
            s.store(table(s.b.lshr(window, s.const_i(shift))), row, 4 * s.width * place)
            place += 1
