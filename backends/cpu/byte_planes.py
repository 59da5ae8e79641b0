"""Look-up of 8-bit codes, 64 at once: float32 centroids as four planes of bytes (AVX-512 VBMI).

A table of 256 float32 fills 16 registers; gathers from memory take 14 cycles for 16 codes on a
Zen 5.  A byte permutation of two registers looks up 64 codes of 7 bits in one instruction, and
centroids are symmetric around 0: code c and 255 - c differ in the sign.  So four permutations give
the four bytes of 64 centroids' magnitudes, and interleaving them makes the floats.

Lane l of the j-th of four registers belongs to byte 16 (l / 4) + 4 j + l % 4 of 64.  Values keep
that order; keys' codes are put where each lane finds its token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir

from turboquant_np.codebook import unit_variance_centroids

from .int8_registers import BYTES, transpose_blocks
from .simd import I8, Register, Simd, Target, Value, vector
from .tile import TILE, Address, Body, Chore, KeyWindows

BITS = 8
AT_ONCE = 64  # codes
REGISTERS = 4  # of their centroids
LANES = AT_ONCE // REGISTERS
UNROLLED = 8  # coordinates of keys
CODES = 4  # of a window


def in_planes(target: Target, dim: int, bits: int) -> bool:
    """Whether codes are looked up this way."""
    return target.permutes_bytes and bits == BITS and dim % AT_ONCE == 0


def planes_order(dim: int) -> list[int]:
    """The coordinate in each place of a row of values."""
    return [
        start + LANES * (lane // 4) + 4 * register + lane % 4
        for start in range(0, dim, AT_ONCE)
        for register in range(REGISTERS)
        for lane in range(LANES)
    ]


class BytePlanes:
    """Centroids, by 64 codes."""

    def __init__(self, s: Simd, dim: int) -> None:
        self.s = s
        magnitudes = unit_variance_centroids(dim, BITS)[128:].astype("<f4")
        planes = magnitudes.view(np.int8).reshape(128, 4).T
        self.planes = [
            (s.const_i(plane[:AT_ONCE].tolist(), I8), s.const_i(plane[AT_ONCE:].tolist(), I8))
            for plane in planes
        ]

    def __call__(self, codes: Register) -> list[Register]:
        s, b = self.s, self.s.b
        zero, ones = (ir.Constant(BYTES, [x] * AT_ONCE) for x in (0, -1))
        flipped = b.xor(codes, ones)
        positive = b.icmp_signed("<", codes, zero)  # codes from 128 on
        index = b.select(positive, codes, flipped)  # its highest bit is ignored
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        planes = [s.call(name, BYTES, low, index, high) for low, high in self.planes]
        sign = b.and_(flipped, ir.Constant(BYTES, [-128] * AT_ONCE))
        planes[3] = b.or_(planes[3], sign)
        pairs = [self._zip(planes[i], planes[i + 1], 8) for i in (0, 2)]
        found = [self._zip(low, high, 16) for low, high in zip(*pairs, strict=True)]
        return [s.as_floats(s.b.bitcast(x, s.ints)) for two in found for x in two]

    def _zip(self, a: Register, c: Register, bits: int) -> list[Register]:
        """Numbers of a and c in turn, from the lower halves of 16 bytes, and from the upper."""
        s, per = self.s, 128 // bits  # of a block of 16 bytes
        count = 4 * per
        kind = vector(ir.IntType(bits), count)
        a, c = s.b.bitcast(a, kind), s.b.bitcast(c, kind)
        return [
            s.shuffle(
                a, c, [per * block + i + n for block in range(4) for i in part for n in (0, count)]
            )
            for part in (range(per // 2), range(per // 2, per))
        ]


class KeyBytes:
    """Codes of a tile of keys in memory, [coordinates, TILE] bytes, and their centroids.

    chore : what is done besides, a little at a time, once for each token
    """

    def __init__(self, s: Simd, dim: int, address: Value, chore: Chore = lambda: None) -> None:
        self.s, self.dim, self.address, self.chore = s, dim, address, chore

    def write(self, rows: Callable[[Value], list[Value]]) -> None:
        """rows(i) are the addresses of packed keys LANES * i .. LANES * i + LANES - 1.

        Windows of four codes, as for other widths, are taken apart where they lie.
        """
        s = self.s
        KeyWindows(s, BITS, self.dim, self.address).write(rows)
        coordinates = [4 * lane + code for code in range(CODES) for lane in range(4)]
        order = [16 * block + byte for block in range(4) for byte in coordinates]
        with s.loop(self.dim // CODES) as i:
            here = s.at(self.address, s.times(i, CODES * TILE))
            windows = [s.load(BYTES, here, TILE * k) for k in range(CODES)]
            apart = [s.b.bitcast(s.shuffle(w, None, order), s.ints) for w in windows]
            for k, codes in enumerate(transpose_blocks(s, apart)):
                s.store(codes, here, TILE * k)

    def each_coordinate(self, half: Value, tokens: Value, body: Body) -> None:
        """See attend.Keys; all tokens of a tile at once."""
        s, planes = self.s, BytePlanes(self.s, self.dim)
        turns = self.dim // 2 // UNROLLED
        chores = TILE * UNROLLED // self.dim or 1
        with s.loop(turns) as i:
            turn = s.b.add(s.times(half, turns), i)
            first = s.times(turn, UNROLLED)
            for k in range(UNROLLED):
                for _ in range(chores * k // UNROLLED, chores * (k + 1) // UNROLLED):
                    self.chore()
                coordinate = s.at(first, k)
                codes = s.load(BYTES, s.at(self.address, s.times(coordinate, TILE)))
                body(coordinate, planes(codes))


class ByteValues:
    """Values of a tile, straight from the cache; see tile.PackedValues."""

    def __init__(self, s: Simd, dim: int, packed: Address, chore: Chore) -> None:
        self.s, self.packed, self.chore = s, packed, chore
        self.planes = BytePlanes(s, dim)

    def registers(self, token: Value, places: range) -> list[Register]:
        """Centroids in some places of a token's row, which are whole groups of registers."""
        packed = self.packed(token)
        groups = range(places.start // REGISTERS, places.stop // REGISTERS)
        codes = [self.s.load(BYTES, packed, AT_ONCE * group) for group in groups]
        return [x for some in codes for x in self.planes(some)]
