"""Codes of a tile of tokens on their way to centroids.

A window is 32 bits with some consecutive codes of one vector; a register holds one window a lane.
One byte shuffle, or none, makes windows of up to 32 / bits registers of codes; shifts pick codes.
For values a register belongs to one token.  For keys windows are transposed, so that a register
holds the same coordinates of as many tokens as it has lanes, and no sums over lanes are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .packing import packed_bytes
from .simd import I8, Register, Simd, Table, Value, vector

TILE = 64  # tokens
Body = Callable[[Value, list[Register]], None]
Address = Callable[[Value], Value]
Chore = Callable[[], None]


class LaneGroup(NamedTuple):
    """Lane l holds the codes of coordinates start + l * codes .. + codes - 1."""

    start: int
    codes: int


def registers_at_once(width: int) -> int:
    """Registers of tokens of a key's coordinate, or of coordinates of a value, for each row.

    With the rows of a block (attend.rows_at_once) as many sums as registers can hold beside
    tables.  Where 16 registers of 8 lanes are few, more rows share what is looked up.
    """
    return 2 if width == 8 else 4


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


def value_order(bits: int, dim: int, width: int) -> list[int]:
    """The coordinate in each place of a row of values; `dim` and more is padding.

    Keys keep the order of coordinates.
    """
    return [
        group.start + lane * group.codes + k
        for group in lane_groups(bits, dim, width)
        for k in range(group.codes)
        for lane in range(width)
    ]


def window(s: Simd, group: LaneGroup, bits: int, dim: int, packed: Value) -> Register:
    """The windows of one packed vector."""
    first = _first_bits(group, bits, s.width)
    begin = first[0] // 8
    end = min(packed_bytes(dim, bits), (first[-1] + group.codes * bits + 7) // 8)
    size = end - begin
    half = 1 << (size.bit_length() - 1)  # two loads, which may overlap, of a size that CPUs have
    stream, behind = s.load(vector(I8, half), packed, begin), size - half
    if behind:
        stream = s.concat([stream, s.load(vector(I8, half), packed, begin + behind)])

    def place(byte: int, lane: int) -> int:
        """In `stream`; upper lanes prefer the second load, as some shuffles do not cross halves."""
        byte = min(byte - begin, size - 1)
        second = byte >= half or (behind and byte >= behind and 2 * lane >= s.width)
        return half + byte - behind if second else byte

    bytes_in_order = range(4) if _keeps_bytes(group, bits) else range(3, -1, -1)
    order = [place(bit // 8 + i, lane) for lane, bit in enumerate(first) for i in bytes_in_order]
    windows = s.b.bitcast(s.shuffle(stream, None, order), s.ints)
    if any(bit % 8 for bit in first):
        windows = s.b.shl(windows, s.const_i([bit % 8 for bit in first]))
    return windows


def shift_of(group: LaneGroup, k: int, bits: int) -> int:
    """Where the k-th code of a window begins; codes follow each other from high bits to low."""
    if _keeps_bytes(group, bits):
        return k * bits // 8 * 8 + 8 - bits - k * bits % 8
    return 32 - bits * (k + 1)


def _keeps_bytes(group: LaneGroup, bits: int) -> bool:
    """Whether windows may keep the order of bytes: no code lies in two of them."""
    return 8 % bits == 0 and group.codes * bits % 8 == 0


class KeyWindows:
    """Windows of a tile of keys in memory: int32 [groups, lanes, copies, TILE].

    Codes of 4 bits begin at a byte or in the middle of one.  Their windows are kept twice, once
    shifted by half a byte; then a load from an odd address does what a shift would do, while the
    units that shift and multiply have other work.
    """

    def __init__(self, s: Simd, bits: int, dim: int, address: Value) -> None:
        self.s, self.bits, self.dim, self.address = s, bits, dim, address
        self.groups, self.copies = lane_groups(bits, dim, s.width), copies_of(bits)

    def write(self, rows: Callable[[Value], list[Value]]) -> None:
        """rows(i) are the addresses of packed keys i * width .. i * width + width - 1."""
        s = self.s
        with s.loop(TILE // s.width) as i:
            packed = rows(i)
            here = s.at(self.address, s.times(i, 4 * s.width))
            for number, group in enumerate(self.groups):
                rows_of = [window(s, group, self.bits, self.dim, row) for row in packed]
                for lane, windows in enumerate(transpose(s, rows_of)):
                    place = (number * s.width + lane) * self.copies
                    for copy in range(self.copies):
                        shifted = s.b.lshr(windows, s.const_i(copy * self.bits))
                        s.store(shifted, here, 4 * TILE * (place + copy))

    def place(self, number: int, lane: Value, tokens: Value) -> Value:
        """Address of a lane of a group's windows, from a register of tokens on."""
        s = self.s
        place = s.times(s.at(lane, number * s.width), 4 * TILE * self.copies)
        return s.at(s.at(self.address, place), s.times(tokens, 4 * s.width))

    def codes(self, group: LaneGroup, k: int, address: Value) -> Register:
        """The k-th code of each window at an address, with other bits above it."""
        s, shift = self.s, shift_of(group, k, self.bits)
        if self.copies * self.bits == 8:
            return s.load(s.ints, address, 4 * TILE * (shift % 8 // self.bits) + shift // 8)
        return s.b.lshr(s.load(s.ints, address), s.const_i(shift))


class LookedUpKeys:
    """Keys of a tile, from their windows.

    chore : what is done besides, a little at a time, once for each token
    """

    def __init__(self, windows: KeyWindows, table: Table, chore: Chore) -> None:
        self.windows, self.table, self.chore = windows, table, chore

    def each_coordinate(self, half: Value, tokens: Value, body: Body) -> None:
        """body(coordinate, its centroids for some registers of tokens).

        half : 0 or 1, of the lanes of windows
        tokens : number of the first register of tokens
        """
        w, s = self.windows, self.windows.s
        at_once = registers_at_once(s.width)
        share = -(-at_once // len(w.groups))  # of the chores of a lane of tokens
        for number, group in enumerate(w.groups):
            chores = range(number * share, min((number + 1) * share, at_once))
            with s.loop(s.width // 2) as i:
                lane = s.b.add(s.times(half, s.width // 2), i)
                here = w.place(number, lane, tokens)
                first = s.at(s.times(lane, group.codes), group.start)
                for k in range(group.codes):
                    turn = slice(*(len(chores) * n // group.codes for n in (k, k + 1)))
                    for _ in chores[turn]:
                        self.chore()
                    codes = [w.codes(group, k, s.at(here, 4 * s.width * t)) for t in range(at_once)]
                    body(s.at(first, k), [self.table(code) for code in codes])


def copies_of(bits: int) -> int:
    """How often windows of keys are kept, each copy shifted by a code more."""
    return 2 if bits == 4 else 1


def key_windows_bytes(bits: int, dim: int, width: int) -> int:
    """Memory for a tile's windows, and what a load from an odd address reads behind them."""
    return 4 * width * (TILE * len(lane_groups(bits, dim, width)) * copies_of(bits) + 1)


class PackedValues:
    """Values of a tile, straight from the cache.

    packed : address of a token's codes, by its number in the tile
    chore : what is done besides, a little at a time, once for each token
    """

    def __init__(
        self,
        s: Simd,
        bits: int,
        dim: int,
        packed: Address,
        table: Table,
        chore: Chore = lambda: None,
    ) -> None:
        self.s, self.bits, self.dim = s, bits, dim
        self.packed, self.table, self.chore = packed, table, chore
        groups = lane_groups(bits, dim, s.width)
        self.places = [(group, k) for group in groups for k in range(group.codes)]

    def registers(self, token: Value, places: range) -> list[Register]:
        """Centroids in some places of a token's row."""
        s, bits = self.s, self.bits
        found, packed = self.places[places.start : places.stop], self.packed(token)
        windows = {group: window(s, group, bits, self.dim, packed) for group, _ in found}
        return [
            self.table(s.b.lshr(windows[group], s.const_i(shift_of(group, k, bits))))
            for group, k in found
        ]


def transpose(s: Simd, rows: list[Register]) -> list[Register]:
    """Lane i of row j becomes lane j of row i."""
    rows, width = list(rows), s.width
    stride = 1
    while stride < width:
        low = [j if not j & stride else width + j - stride for j in range(width)]
        high = [lane + stride for lane in low]
        for i in range(width):
            if not i & stride:
                a, b = rows[i], rows[i + stride]
                rows[i], rows[i + stride] = s.shuffle(a, b, low), s.shuffle(a, b, high)
        stride *= 2
    return rows
