"""The three inner loops of attention over a tile of looked-up vectors, on vector registers.

A tile holds TILE tokens of one key/value head as rows of float32 centroids.  Each row of queries,
weights and outputs belongs to one query head of one query token.  Sums are kept in registers for a
block of (width / 4) rows and 4 tokens, so that their lanes can be added up together, 16 sums in 15
additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

from .simd import F32, Register, Simd, Value
from .tile import TILE

TOKENS_AT_ONCE = 4
REGISTERS_AT_ONCE = 4
STATE_BYTES = 12  # maximum, sum, decay of a row
NOTHING = -1e30  # for minus infinity, where a difference of two must not be NaN


def rows_at_once(s: Simd) -> int:
    """Rows of a block, so that a block has as many sums as a register has lanes."""
    return max(1, s.width // TOKENS_AT_ONCE)


def in_blocks_of_rows(s: Simd, rows: Value, body: Callable[[Value, int], None]) -> None:
    """body(first row, count) over `rows` (i64) rows: whole blocks, then the rest one by one."""
    block = rows_at_once(s)
    whole = s.b.udiv(rows, s.int64(block))
    with s.loop(whole) as i:
        body(s.times(i, block), block)
    if block > 1:
        start = s.times(whole, block)
        with s.loop(s.b.sub(rows, start)) as i:
            body(s.b.add(start, i), 1)


def scores_block(
    s: Simd, rows: int, registers: int, query: Value, keys: Value, scores: Value
) -> None:
    """scores[r, t] = <query[r], keys[t]> for `rows` rows and all tokens of the tile.

    query, keys: rows of `registers` registers; scores: rows of TILE floats.
    """
    pitch = 4 * s.width * registers
    with s.loop(TILE // TOKENS_AT_ONCE) as block:
        tile = s.at(keys, s.times(block, TOKENS_AT_ONCE * pitch))
        sums = [s.const_f(0.0)] * (rows * TOKENS_AT_ONCE)
        for k in range(registers):
            here = 4 * s.width * k
            tokens = [s.load(s.floats, tile, t * pitch + here) for t in range(TOKENS_AT_ONCE)]
            for r in range(rows):
                q = s.load(s.floats, query, r * pitch + here)
                for t, key in enumerate(tokens):
                    i = r * TOKENS_AT_ONCE + t
                    sums[i] = s.multiply_add(q, key, sums[i])
        totals = sum_lanes(s, sums)
        spread = s.width // len(sums)
        target = s.at(scores, s.times(block, 4 * TOKENS_AT_ONCE))
        for r in range(rows):
            lanes = [(r * TOKENS_AT_ONCE + t) * spread for t in range(TOKENS_AT_ONCE)]
            s.store(s.shuffle(totals, None, lanes), target, 4 * TILE * r)


def sum_lanes(s: Simd, sums: Sequence[Register]) -> Register:
    """A register whose lane i * width / n holds the sum over the lanes of sums[i]."""
    level, stride = list(sums), s.width // 2
    while stride:
        mine = [i if not i & stride else s.width + i for i in range(s.width)]
        swapped = [lane ^ stride for lane in mine]
        half = len(level) // 2
        pairs = zip(level[:half], level[half:], strict=True) if half else [(level[0], level[0])]
        level = [s.b.fadd(s.shuffle(a, b, mine), s.shuffle(a, b, swapped)) for a, b in pairs]
        stride //= 2
    return level[0]


def softmax_row(
    s: Simd,
    scores: Value,
    key_gains: Value,
    value_gains: Value,
    bias: Value,
    soft_cap: Value,
    first: Value,
    last: Value,
    state: Value,
) -> None:
    """Turn a row of raw scores into weights of the tile's vectors, online.

    scores : [TILE] floats, replaced by exp(score - maximum) * value gain
    key_gains, value_gains : [TILE] floats, what the looked-up vectors must be multiplied by
    bias : float, added to each scaled score
    soft_cap : float, 0 for none
    first, last : i32, visible tokens of the tile are those from `first` to before `last`
    state : address of (maximum, sum, decay); decay is what earlier outputs must be multiplied by
    """
    b, count = s.b, TILE // s.width
    lanes = [s.const_i(range(k * s.width, (k + 1) * s.width)) for k in range(count)]
    low, high = s.splat(first), s.splat(last)
    visible = [b.and_(b.icmp_signed(">=", i, low), b.icmp_signed("<", i, high)) for i in lanes]
    nothing = s.const_f(NOTHING)
    x = []
    for k in range(count):
        here = 4 * s.width * k
        gain = s.load(s.floats, key_gains, here)
        score = s.multiply_add(s.load(s.floats, scores, here), gain, s.splat(bias))
        x.append(variable(s, score))
    with b.if_then(b.fcmp_ordered(">", soft_cap, ir.Constant(F32, 0.0)), likely=False):
        cap = s.splat(soft_cap)
        for cell in x:
            b.store(b.fmul(cap, tanh(s, b.fdiv(b.load(cell), cap))), cell)
    x = [b.select(v, b.load(cell), nothing) for v, cell in zip(visible, x, strict=True)]
    before = s.splat(s.load(F32, state))
    top = x[0]
    for score in x[1:]:
        top = s.maximum(top, score)
    top = s.maximum(across(s, top, s.maximum), before)
    weights = [
        b.select(v, exp(s, b.fsub(score, top)), s.const_f(0.0))
        for v, score in zip(visible, x, strict=True)
    ]
    decay = exp(s, b.fsub(before, top))
    total = weights[0]
    for w in weights[1:]:
        total = b.fadd(total, w)
    total = across(s, total, b.fadd)
    total = s.multiply_add(s.splat(s.load(F32, state, 4)), decay, total)
    s.store(s.first(top), state)
    s.store(s.first(total), state, 4)
    s.store(s.first(decay), state, 8)
    for k, w in enumerate(weights):
        here = 4 * s.width * k
        s.store(b.fmul(w, s.load(s.floats, value_gains, here)), scores, here)


def values_block(
    s: Simd,
    rows: int,
    registers: int,
    weights: Value,
    values: Value,
    states: Value,
    outputs: Value,
) -> None:
    """outputs[r] = outputs[r] * decay[r] + sum_t weights[r, t] values[t]."""
    pitch = 4 * s.width * registers
    for start in range(0, registers, REGISTERS_AT_ONCE):
        part = range(start, min(start + REGISTERS_AT_ONCE, registers))
        cells = []
        for r in range(rows):
            decay = s.splat(s.load(F32, states, STATE_BYTES * r + 8))
            for k in part:
                old = s.load(s.floats, outputs, r * pitch + 4 * s.width * k)
                cells.append(variable(s, s.b.fmul(old, decay)))
        with s.loop(TILE) as t:
            row = s.at(values, s.times(t, pitch))
            value = [s.load(s.floats, row, 4 * s.width * k) for k in part]
            for r in range(rows):
                w = s.splat(s.load(F32, s.at(weights, s.times(t, 4)), 4 * TILE * r))
                for v, cell in zip(value, cells[r * len(part) :], strict=False):
                    s.b.store(s.multiply_add(w, v, s.b.load(cell)), cell)
        for i, cell in enumerate(cells):
            r, k = i // len(part), part[i % len(part)]
            s.store(s.b.load(cell), outputs, r * pitch + 4 * s.width * k)


def variable(s: Simd, start: Register) -> Value:
    """A register's worth of memory that can change in a loop; LLVM keeps it in a register."""
    cell = cgutils.alloca_once(s.b, s.floats)
    s.b.store(start, cell)
    return cell


def across(
    s: Simd, register: Register, combine: Callable[[Register, Register], Register]
) -> Register:
    """Every lane holds all lanes combined."""
    stride = s.width // 2
    while stride:
        other = s.shuffle(register, None, [i ^ stride for i in range(s.width)])
        register = combine(register, other)
        stride //= 2
    return register


def exp(s: Simd, x: Register) -> Register:
    """e**x for x <= 0, to 2 units in the last place; 0 where it would be subnormal.

    2**(n + f) with |f| <= 1/2: a Taylor polynomial of degree 7 for 2**f, n added to the exponent.
    """
    b = s.b
    y = b.fmul(x, s.const_f(1.0 / math.log(2.0)))
    shifter = s.const_f(1.5 * 2.0**23)  # its last bits become n
    shifted = b.fadd(y, shifter)
    n = b.fsub(shifted, shifter)
    f = s.multiply_add(x, s.const_f(1.0 / math.log(2.0)), b.fneg(n))
    power = s.const_f(math.log(2.0) ** 7 / math.factorial(7))
    for k in range(6, -1, -1):
        power = s.multiply_add(power, f, s.const_f(math.log(2.0) ** k / math.factorial(k)))
    scaled = b.add(s.as_ints(power), b.shl(s.as_ints(shifted), s.const_i(23)))
    tiny = b.fcmp_ordered("<", y, s.const_f(-126.0))
    return b.select(tiny, s.const_f(0.0), s.as_floats(scaled))


def tanh(s: Simd, x: Register) -> Register:
    """Hyperbolic tangent to a few units in the last place.

    Near 0 the odd polynomial of Cephes' tanhf, else (1 - e) / (1 + e) with e = exp(-2 |x|).
    """
    b = s.b
    one = s.const_f(1.0)
    magnitude = s.as_floats(b.and_(s.as_ints(x), s.const_i(0x7FFFFFFF)))
    e = exp(s, b.fmul(magnitude, s.const_f(-2.0)))
    large = b.fdiv(b.fsub(one, e), b.fadd(one, e))
    square = b.fmul(x, x)
    series = s.const_f(TANH_COEFFICIENTS[0])
    for c in TANH_COEFFICIENTS[1:]:
        series = s.multiply_add(series, square, s.const_f(c))
    small = s.multiply_add(b.fmul(series, square), magnitude, magnitude)
    result = b.select(b.fcmp_ordered("<", magnitude, s.const_f(0.625)), small, large)
    sign = b.and_(s.as_ints(x), s.const_i(-(2**31)))
    return s.as_floats(b.or_(s.as_ints(result), sign))


# tanh(x) = x + x^3 P(x^2) for |x| < 0.625 (Cephes, single precision)
TANH_COEFFICIENTS = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)
