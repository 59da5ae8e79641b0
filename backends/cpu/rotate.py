"""The randomised Hadamard rotation on vector registers and in memory.

A stride below the register width pairs lanes: x * (+1, -1, ...) + swapped x is one shuffle and one
fused multiply-add, which rounds like the addition or subtraction that it is.  A larger stride pairs
registers.  Rows that do not fit the registers are transformed in passes over a scratch row: the
first pass does all strides within a block, every further pass up to four more.  Strides ascend, as
the format prescribes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from .simd import F32, I64, Register, Simd, Value, vector

HALF_SQRT = math.sqrt(0.5)
Hook = Callable[[list[Register], list[Value]], list[Register]]  # (registers, byte offsets)


def transform_lanes(s: Simd, register: Register, size: int) -> Register:
    """Walsh-Hadamard transform of every run of `size` lanes."""
    stride = 1
    while stride < size:
        signs = s.const_f([-1.0 if i & stride else 1.0 for i in range(s.width)])
        swapped = s.shuffle(register, None, [i ^ stride for i in range(s.width)])
        register = s.multiply_add(register, signs, swapped)
        stride *= 2
    return register


def butterflies(s: Simd, registers: list[Register], stride: int = 1) -> list[Register]:
    """Walsh-Hadamard transform across a power of two of registers, from a stride on."""
    registers = list(registers)
    while stride < len(registers):
        for i in range(len(registers)):
            if not i & stride:
                a, b = registers[i], registers[i + stride]
                registers[i], registers[i + stride] = s.b.fadd(a, b), s.b.fsub(a, b)
        stride *= 2
    return registers


def transform_registers(s: Simd, registers: list[Register]) -> list[Register]:
    return butterflies(s, [transform_lanes(s, x, s.width) for x in registers])


def load_signs(s: Simd, signs: Value, offset: Value) -> Register:
    """Signs of one register, +1 or -1."""
    return s.load(s.floats, signs, offset)


def no_hook(registers: list[Register], offsets: list[Value]) -> list[Register]:
    return registers


def transform_memory(
    s: Simd, base: Value, size: int, first: Hook = no_hook, last: Hook = no_hook
) -> None:
    """Transform `size` (a power of two) floats at address `base` in place.

    first, last : applied to the registers of the first pass after loading and of the last pass
        before storing; they get the byte offsets from `base`.
    """
    width = s.width
    if size < width:
        x = first([s.load(s.floats, base)], [s.int64(0)])[0]
        y = last([transform_lanes(s, x, size)], [s.int64(0)])[0]
        s.store(s.resize(y, size), base)
        return
    block = min(s.target.registers, size // width)
    done = block * width
    with s.loop(size // done) as i:
        start = s.times(i, 4 * done)
        offsets = [s.at(start, 4 * width * k) for k in range(block)]
        registers = first([s.load(s.floats, base, o) for o in offsets], offsets)
        registers = transform_registers(s, registers)
        _store_all(s, last(registers, offsets) if done == size else registers, base, offsets)
    while done < size:
        radix = min(s.target.registers, size // done)
        with s.loop(size // (done * radix)) as i, s.loop(done // width) as j:
            start = s.b.add(s.times(i, 4 * done * radix), s.times(j, 4 * width))
            offsets = [s.at(start, 4 * done * k) for k in range(radix)]
            registers = butterflies(s, [s.load(s.floats, base, o) for o in offsets])
            finished = done * radix == size
            _store_all(s, last(registers, offsets) if finished else registers, base, offsets)
        done *= radix


def _store_all(s: Simd, registers: list[Register], base: Value, offsets: list[Value]) -> None:
    for register, offset in zip(registers, offsets, strict=True):
        s.store(register, base, offset)


def mix_halves(s: Simd, row: Value, dim: int, *, signs: Value, back: bool) -> None:
    """a, b = first and last dim // 2 floats become (a + b) / sqrt(2), (a - b) / sqrt(2), in place.

    signs : address of what all coordinates are multiplied with, before that if `back`, else after
        it, and then times 1 / sqrt(2) (but for a coordinate in the middle).
    """
    half, width, b = dim // 2, s.width, s.b
    distance = 4 * (dim - half)

    def step(offset: Value, count: int) -> None:
        offsets = [offset, s.at(offset, distance)]
        x = [s.load(s.floats, row, o) for o in offsets]
        for y, o in zip(mix(s, x, offsets, signs=signs, back=back), offsets, strict=True):
            s.store(s.resize(y, count), row, o)

    if half >= width:
        with s.loop(half // width) as i:
            step(s.times(i, 4 * width), width)
    if half % width:
        step(s.int64(4 * (half - half % width)), half % width)
    if dim % 2:
        middle = b.fmul(s.load(F32, row, 4 * half), s.load(F32, signs, 4 * half))
        s.store(middle, row, 4 * half)


def mix(
    s: Simd, x: list[Register], offsets: list[Value], *, signs: Value, back: bool
) -> list[Register]:
    """The same for registers of the first half followed by those of the last."""

    def multiply(x: list[Register]) -> list[Register]:
        return [s.b.fmul(y, load_signs(s, signs, o)) for y, o in zip(x, offsets, strict=True)]

    if back:
        x = multiply(x)
    pairs = list(zip(x[: len(x) // 2], x[len(x) // 2 :], strict=True))
    x = [s.b.fadd(*pair) for pair in pairs] + [s.b.fsub(*pair) for pair in pairs]
    root = s.const_f(HALF_SQRT)
    return [s.b.fmul(y, root) for y in x] if back else multiply(x)


class RowRotation:
    """The Hadamard rotation of one scratch row, forward and back.

    Signs: [steps + 1, pitch / 4] float32; the last row is all +1 (no flips), so that every
    step can end (forward) or begin (back) with the signs of the next one.  Forward they are
    multiplied as `mix_halves` wants them.

    Where the dimension is 3 * 2**k, the last pass over a part also mixes the halves: both combine
    coordinates a multiple of dim / 6 apart.

    fetch : may prefetch what belongs to some coordinates, given the number of the first one and how
        many they are; called here and there for all of them, so that memory works all the time
    """

    def __init__(
        self,
        s: Simd,
        dim: int,
        row: Value,
        signs: Value,
        pitch: int,
        rounds: Value,
        fetch: Callable[[Value, int], None],
    ) -> None:
        self.s, self.dim, self.row, self.signs = s, dim, row, signs
        self.pitch = pitch  # bytes of a row of signs
        self.rounds = rounds
        self.fetch = fetch
        self.block = 1 << (dim.bit_length() - 1)
        self.is_power_of_two = self.block == dim
        self.sixth = dim // 6 if 2 * dim == 3 * self.block and dim % (6 * s.width) == 0 else 0

    def first_signs(self, x: Register, offset: Value) -> Register:
        return self.s.b.fmul(x, load_signs(self.s, self.signs, offset))

    def forward(self) -> None:
        """Rotate; the signs of step 0 have been applied already."""
        s = self.s
        with s.loop(self.rounds) as r:
            if self.is_power_of_two:
                flips = self._signs_of(s.at(r, 1))
                first = self._fetching(s.int64(0))
                transform_memory(s, self.row, self.dim, first, self._flip(flips))
                return
            for half in (0, 1):
                flips = self._signs_of(s.at(s.times(r, 2), half + 1))
                if self.sixth:
                    self._transform_part(half, partial(mix, s, signs=flips, back=False))
                else:
                    self._transform_part(half)
                    mix_halves(s, self.row, self.dim, signs=flips, back=False)

    def back(self) -> None:
        """Rotate back, all but the signs of step 0."""
        s = self.s
        if self.sixth:
            self._sixths_back()
            return
        with s.loop(self.rounds) as i:
            r = s.b.sub(s.b.sub(self.rounds, i), s.int64(1))
            if self.is_power_of_two:
                flips = self._signs_of(s.at(r, 1))
                first = self._fetching(s.int64(0), self._flip(flips))
                transform_memory(s, self.row, self.dim, first)
                return
            for half in (1, 0):
                flips = self._signs_of(s.at(s.times(r, 2), half + 1))
                mix_halves(s, self.row, self.dim, signs=flips, back=True)
                self._transform_part(half)

    def _sixths_back(self) -> None:
        s = self.s
        last = s.b.sub(self.rounds, s.int64(1))

        def mix_back(r: Value, half: int) -> Hook:
            flips = self._signs_of(s.at(s.times(r, 2), half + 1))
            return partial(mix, s, signs=flips, back=True)

        flips = self._signs_of(s.times(self.rounds, 2))
        mix_halves(s, self.row, self.dim, signs=flips, back=True)
        with s.loop(last) as i:
            r = s.b.sub(last, i)
            self._transform_part(1, mix_back(r, 0))
            self._transform_part(0, mix_back(s.b.sub(r, s.int64(1)), 1))
        self._transform_part(1, mix_back(s.int64(0), 0))
        self._transform_part(0)

    def _signs_of(self, step: Value) -> Value:
        return self.s.at(self.signs, self.s.times(step, self.pitch))

    def _flip(self, flips: Value) -> Hook:
        s = self.s

        def hook(registers: list[Register], offsets: list[Value]) -> list[Register]:
            return [
                s.b.fmul(x, load_signs(s, flips, o))
                for x, o in zip(registers, offsets, strict=True)
            ]

        return hook

    def _fetching(self, start: Value, then: Hook = no_hook) -> Hook:
        """Fetch what belongs to the registers, whose offsets count from coordinate `start` on."""
        s = self.s

        def hook(registers: list[Register], offsets: list[Value]) -> list[Register]:
            element = s.b.add(start, s.b.lshr(offsets[0], s.int64(2)))
            self.fetch(element, len(registers) * s.width)
            return then(registers, offsets)

        return hook

    def _transform_part(self, half: int, then: Hook | None = None) -> None:
        """Transform the first or last `block` coordinates; `then` (of sixths only) mixes."""
        s, scale = self.s, self.s.const_f(1 / math.sqrt(self.block))

        def normalise(registers: list[Register], _: list[Value]) -> list[Register]:
            return [s.b.fmul(x, scale) for x in registers]

        start = s.int64(half * (self.dim - self.block))
        base = s.at(self.row, s.times(start, 4))
        if not self.sixth:
            transform_memory(s, base, self.block, self._fetching(start), normalise)
            return
        with s.loop(4) as i:
            part = s.times(i, self.sixth)
            first = self._fetching(s.b.add(start, part))
            transform_memory(s, s.at(base, s.times(part, 4)), self.sixth, first)
        held = range(6) if then else range(2 * half, 2 * half + 4)
        four = slice(held.index(2 * half), held.index(2 * half) + 4)
        with s.loop(self.sixth // s.width) as j:
            offsets = [s.at(s.times(j, 4 * s.width), 4 * self.sixth * k) for k in held]
            x = [s.load(s.floats, self.row, o) for o in offsets]
            x[four] = normalise(butterflies(s, x[four]), [])
            _store_all(s, then(x, offsets) if then else x, self.row, offsets)


def rotate_registers(
    s: Simd, rows: list[list[Register]], signs: Value, pitch: int, rounds: Value, *, back: bool
) -> list[list[Register]]:
    """Rotate several rows held in registers, in step: they hide each other's latencies."""
    b, count = s.b, len(rows[0])
    flat = [x for row in rows for x in row]
    before, loop, done = b.block, b.append_basic_block("round"), b.append_basic_block("rotated")
    b.branch(loop)
    b.position_at_end(loop)
    turn = b.phi(I64)
    turn.add_incoming(s.int64(0), before)
    phis = [b.phi(vector(F32, s.width)) for _ in flat]
    for phi, x in zip(phis, flat, strict=True):
        phi.add_incoming(x, before)
    step = b.sub(b.sub(rounds, turn), s.int64(1)) if back else turn
    start = s.at(signs, s.times(step, pitch))
    flips = [load_signs(s, start, 4 * s.width * k) for k in range(count)]
    result = []
    for u in range(len(rows)):
        registers = phis[u * count : (u + 1) * count]
        if not back:
            registers = [s.b.fmul(x, f) for x, f in zip(registers, flips, strict=True)]
        registers = transform_registers(s, registers)
        if back:
            registers = [s.b.fmul(x, f) for x, f in zip(registers, flips, strict=True)]
        result.append(registers)
    following = s.at(turn, 1)
    turn.add_incoming(following, b.block)
    for phi, x in zip(phis, [x for row in result for x in row], strict=True):
        phi.add_incoming(x, b.block)
    b.cbranch(b.icmp_signed("<", following, rounds), loop, done)
    b.position_at_end(done)
    return result
