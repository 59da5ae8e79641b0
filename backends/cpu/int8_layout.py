"""Codes as bytes for integer arithmetic: how rows are cut, and tables of centroids in 8 bits.

A row's codes lie in "fields", bytes of one to eight codes: its packed bytes as they are, or, for 3
bits, bytes with two codes each, since packed codes cross bytes.  A byte permutation looks up 64
fields at once in a table of 64 entries, by the lower 6 bits of each, so one table for each place of
a code within those bits saves shifting and masking: only codes in the upper 2 bits need one shift.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turboquant_np.codebook import unit_variance_centroids

from .packing import packed_bytes

MOST_BITS = 4  # more need finer centroids than 8 bits can hold
REGISTER = 64  # bytes
LARGEST = 127  # of a rounded centroid, by magnitude
OFFSET = 128  # added to centroids where the instruction wants unsigned bytes
UPPER_SHIFT = 2  # brings codes in the upper 2 bits of a field to where tables look


class Place(NamedTuple):
    """Where a field holds one of its codes: `offset` bits up, after a shift if `shifted`."""

    shifted: bool
    offset: int


class Chunk(NamedTuple):
    """Fields start .. start + size - 1 of a row; size is 16, 32 or 64."""

    start: int
    size: int


class Rounded(NamedTuple):
    """Centroids as integers: centroid ~ gain * integers."""

    integers: npt.NDArray[np.int8]
    gain: float


def places(bits: int) -> list[Place]:
    """The codes of a field in order."""
    if bits == 3:
        return [Place(False, 3), Place(False, 0)]
    offsets = range(8 - bits, -1, -bits)
    return [
        Place(True, offset - UPPER_SHIFT) if offset + bits > 6 else Place(False, offset)
        for offset in offsets
    ]


def field_count(dim: int, bits: int) -> int:
    return -(-dim // len(places(bits)))


def chunks(dim: int, bits: int) -> list[Chunk]:
    """Whole registers of fields, then the smallest part of one that holds the rest."""
    count = field_count(dim, bits)
    whole = [Chunk(start, REGISTER) for start in range(0, count - REGISTER + 1, REGISTER)]
    left = count - REGISTER * len(whole)
    if left:
        size = next(size for size in (16, 32, 64) if left <= size)
        whole.append(Chunk(count - left, size))
    return whole


def packed_part(chunk: Chunk, dim: int, bits: int) -> tuple[int, int]:
    """First packed byte of a chunk, and how many there are."""
    size = len(places(bits)) * bits
    first = chunk.start * size // 8
    return first, min(packed_bytes(dim, bits) - first, chunk.size * size // 8)


def key_order(dim: int, bits: int) -> list[int]:
    """The coordinate in each place of a quantised query; `dim` and more is padding.

    Four places that lie in one product: a dword of fields, one of its codes, its bytes.
    """
    codes, dwords = len(places(bits)), -(-field_count(dim, bits) // 4)
    return [
        (4 * dword + byte) * codes + code
        for dword in range(dwords)
        for code in range(codes)
        for byte in range(4)
    ]


def value_order(dim: int, bits: int) -> list[int]:
    """The coordinate in each place of an output; `dim` and more is padding.

    Registers of 16 places: chunk, part of it, code.  Lane 4 l + k of a part belongs to byte k of
    one dword of fields, see attend_int8.
    """
    codes = len(places(bits))
    return [
        (chunk.start + 4 * (chunk.size // 16 * group + part) + byte) * codes + code
        for chunk in chunks(dim, bits)
        for part in range(chunk.size // 16)
        for code in range(codes)
        for group in range(4)
        for byte in range(4)
    ]


def padded_dim(dim: int, key_bits: int, value_bits: int) -> int:
    """Places of a row that has room for a query and for an output: whole float32 registers."""
    longest = max(len(key_order(dim, key_bits)), len(value_order(dim, value_bits)))
    return -(-longest // 16) * 16


@lru_cache(maxsize=16)
def rounded_centroids(dim: int, bits: int) -> Rounded:
    """The multiple of the centroids that is nearest to integers of 8 bits, and its inverse.

    Nearest in mean square, with the probabilities of a Gaussian coordinate's codes and the best
    gain for each multiple.  For 4 bits that adds 0.1 % to the mean squared error, where the largest
    multiple that fits would add 0.3 %.
    """
    centroids = unit_variance_centroids(dim, bits)
    edges = [-math.inf, *((centroids[1:] + centroids[:-1]) / 2), math.inf]
    below = np.array([math.erf(edge / math.sqrt(2.0)) for edge in edges])
    probability = np.diff(below) / 2
    multiples = np.arange(LARGEST // 2, LARGEST, 1 / 64) / np.abs(centroids).max()
    integers = np.rint(centroids * multiples[:, None])
    gains = (probability * integers * centroids).sum(1) / (probability * integers**2).sum(1)
    errors = (probability * (centroids - gains[:, None] * integers) ** 2).sum(1)
    best = int(errors.argmin())
    return Rounded(integers[best].astype(np.int8), float(gains[best]))


def byte_table(dim: int, bits: int, place: Place) -> list[int]:
    """[64] rounded centroids by the lower 6 bits of a field."""
    integers = rounded_centroids(dim, bits).integers
    codes = np.arange(REGISTER) >> place.offset & (1 << bits) - 1
    return [int(integers[code]) for code in codes]
