"""The two products of attention over a tile of tokens: queries by keys, weights by values.

Each row of queries, weights and outputs belongs to one query head of one query token.  Sums stay in
registers for a block of some rows and some registers: of tokens for scores, of coordinates for
outputs.  For a block or two of rows, centroids go from the look-up into the sums;
for more rows the tile's centroids are written to memory once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .simd import F32, Register, Simd, Value
from .softmax import State, state_floats, variable
from .tile import TILE, Body, Chore, registers_at_once, registers_of

UNROLLED = 8  # coordinates of keys in memory


class Keys(Protocol):
    """Keys of a tile of tokens."""

    def each_coordinate(self, half: Value, tokens: Value, body: Body) -> None:
        """body(coordinate, registers_at_once registers of it, from the token register on).

        half : 0 or 1, of the coordinates
        """


class Values(Protocol):
    """Values of a tile of tokens."""

    chore: Chore

    def registers(self, token: Value, places: range) -> list[Register]:
        """Some registers of a token's row."""


class KeyTile:
    """Keys in memory: float32 [coordinates, TILE]."""

    def __init__(self, s: Simd, dim: int, address: Value) -> None:
        self.s, self.address = s, address
        self.coordinates = registers_of(dim, s.width) * s.width

    def write(self, keys: Keys) -> None:
        s = self.s
        at_once = registers_at_once(s.width)
        parts = TILE // (s.width * at_once)
        with s.loop(parts) as i, s.loop(2) as half:
            tokens = s.times(i, at_once)

            def store(coordinate: Value, key: list[Register], tokens: Value = tokens) -> None:
                here = self._place(coordinate, tokens)
                for t, register in enumerate(key):
                    s.store(register, here, 4 * s.width * t)

            keys.each_coordinate(half, tokens, store)

    def each_coordinate(self, half: Value, tokens: Value, body: Body) -> None:
        s, unrolled = self.s, min(UNROLLED, self.s.width // 2)
        turns = self.coordinates // 2 // unrolled
        with s.loop(turns) as i:
            turn = s.b.add(s.times(half, turns), i)
            for k in range(unrolled):
                coordinate = s.at(s.times(turn, unrolled), k)
                here = self._place(coordinate, tokens)
                parts = range(registers_at_once(s.width))
                body(coordinate, [s.load(s.floats, here, 4 * s.width * t) for t in parts])

    def _place(self, coordinate: Value, tokens: Value) -> Value:
        s = self.s
        row = s.at(self.address, s.times(coordinate, 4 * TILE))
        return s.at(row, s.times(tokens, 4 * s.width))


class ValueTile:
    """Values in memory: float32 [tokens, coordinates]."""

    def __init__(self, s: Simd, dim: int, address: Value) -> None:
        self.s, self.address, self.count = s, address, registers_of(dim, s.width)
        self.chore: Chore = lambda: None

    def write(self, values: Values) -> None:
        s = self.s
        with s.loop(TILE) as token:
            values.chore()
            row = self._row(token)
            for k, register in enumerate(values.registers(token, range(self.count))):
                s.store(register, row, 4 * s.width * k)

    def registers(self, token: Value, places: range) -> list[Register]:
        row = self._row(token)
        return [self.s.load(self.s.floats, row, 4 * self.s.width * k) for k in places]

    def _row(self, token: Value) -> Value:
        return self.s.at(self.address, self.s.times(token, 4 * self.s.width * self.count))


def rows_at_once(s: Simd) -> int:
    """Rows of a block."""
    return {16: 4, 8: 4, 4: 1}[s.width]


def in_blocks_of_rows(s: Simd, rows: Value, body: Callable[[Value, int], None]) -> None:
    """body(first row, count) over `rows` (i64) rows: whole blocks, then halves of them."""
    size = rows_at_once(s)
    whole = s.b.udiv(rows, s.int64(size))
    with s.loop(whole) as i:
        body(s.times(i, size), size)
    start = s.times(whole, size)
    while size > 1:
        size //= 2
        some = s.b.and_(rows, s.int64(size))
        with s.b.if_then(s.b.icmp_signed("!=", some, s.int64(0))):
            body(start, size)
        start = s.b.add(start, some)


def scores_block(s: Simd, rows: int, dim: int, keys: Keys, query: Value, scores: Value) -> None:
    """scores[r, t] = <query[r], keys[t]> for `rows` rows and all tokens of the tile.

    The halves are summed apart, as shorter sums have smaller errors.

    query : rows of registers_of(dim) registers; scores : rows of TILE floats
    """
    pitch = 4 * s.width * registers_of(dim, s.width)
    at_once = registers_at_once(s.width)
    with s.loop(TILE // (s.width * at_once)) as i:
        target = s.at(scores, s.times(i, 4 * s.width * at_once))
        offsets = [4 * TILE * r + 4 * s.width * t for r in range(rows) for t in range(at_once)]
        for offset in offsets:
            s.store(s.const_f(0.0), target, offset)
        with s.loop(2) as half:
            sums = [variable(s, s.const_f(0.0)) for _ in offsets]

            def add(coordinate: Value, key: list[Register], sums: list[Value] = sums) -> None:
                here = s.at(query, s.times(coordinate, 4))
                for r in range(rows):
                    q = s.splat(s.load(F32, here, r * pitch))
                    for register, cell in zip(key, sums[r * len(key) :], strict=False):
                        s.b.store(s.multiply_add(q, register, s.b.load(cell)), cell)

            keys.each_coordinate(half, s.times(i, at_once), add)
            for cell, offset in zip(sums, offsets, strict=True):
                other = s.load(s.floats, target, offset)
                s.store(s.b.fadd(s.b.load(cell), other), target, offset)


def outputs_block(
    s: Simd, rows: int, dim: int, values: Values, weights: Value, states: Value, outputs: Value
) -> None:
    """outputs[r] = outputs[r] * decay[r] + sum_t weights[r, t] values[t]."""
    registers = registers_of(dim, s.width)
    pitch = 4 * s.width * registers
    at_once = registers_at_once(s.width)
    starts = range(0, registers, at_once)
    for number, start in enumerate(starts):
        part = range(start, min(start + at_once, registers))
        chores = range(number, 2, min(2, len(starts)))  # the first two parts share them
        cells = []
        for r in range(rows):
            state = State(s, s.at(states, 4 * state_floats(s.width) * r))
            decay = s.splat(s.load(F32, state.decay))
            for k in part:
                old = s.load(s.floats, outputs, r * pitch + 4 * s.width * k)
                cells.append(variable(s, s.b.fmul(old, decay)))
        add_products(s, cells, rows, range(TILE), TILE, values, part, weights, chores)
        for i, cell in enumerate(cells):
            r, k = i // len(part), part[i % len(part)]
            s.store(s.b.load(cell), outputs, r * pitch + 4 * s.width * k)


def add_products(
    s: Simd,
    cells: list[Value],
    rows: int,
    tokens: range,
    pitch: int,
    values: Values,
    part: range,
    weights: Value,
    chores: range = range(0),
) -> None:
    """cells[r, k] += sum_t weights[r, t] values[t, k].

    pitch : of rows of weights, in floats
    chores : whether those of even tokens, and of odd ones, are done here
    """
    with s.loop(len(tokens) // 2) as pair:
        for i in range(2):
            t = s.at(s.times(pair, 2), tokens.start + i)
            if i in chores:
                values.chore()
            value = values.registers(t, part)
            for r in range(rows):
                w = s.splat(s.load(F32, s.at(weights, s.times(t, 4)), 4 * pitch * r))
                for register, cell in zip(value, cells[r * len(part) :], strict=False):
                    s.b.store(s.multiply_add(w, register, s.b.load(cell)), cell)
