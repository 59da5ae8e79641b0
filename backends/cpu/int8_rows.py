"""Rows in 8 bits: rounding queries, and the softmax that makes weights of 8 bits."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

from llvmlite import ir

from .attend_call import CALL, SCORE_BYTES, UNIT, Fields, Scratch, row_bytes, row_registers
from .attend_units import rows_of_unit
from .int8_layout import OFFSET, key_order, rounded_centroids
from .int8_registers import BYTES, LANES
from .kernels import Plan
from .quantize import MAGIC
from .simd import F32, I8, I32, Register, Simd, Value, vector
from .softmax import LOWEST_POWER, State, across, state_floats, tanh, variable
from .tile import TILE

LOG2_E = 1.0 / math.log(2.0)
MARGIN = 12.0  # by which base-2 exponents of weights may exceed 0
POWER = (0.99992809, 0.69326099, 0.24261081, 0.05517144)  # 2**f for |f| <= 1/2, to 8e-5
TINY = 1e-30


class Query(NamedTuple):
    """Where the parts of a rounded query lie, in bytes; int8 coordinates come first."""

    size: int  # of the coordinates, in whole registers of them
    scale: int  # float32: what a sum of products is worth as an exponent of 2
    bias: int  # int32: minus what the centroids' offset adds to the sum


@lru_cache(maxsize=64)
def query_of(plan: Plan) -> Query:
    size = -(-len(key_order(plan.dim, plan.bits)) // LANES) * LANES
    return Query(size, size, size + 4)


def round_query(s: Simd, plan: Plan, row: Value) -> None:
    """Replace a rotated query by its 8-bit form, a `Query`."""
    b, query = s.b, query_of(plan)
    parts = [s.load(s.floats, row, 64 * k) for k in range(query.size // LANES)]
    absolute = [s.as_floats(b.and_(s.as_ints(x), s.const_i(0x7FFFFFFF))) for x in parts]
    most, total = absolute[0], absolute[0]
    for x in absolute[1:]:
        most, total = s.maximum(x, most), b.fadd(total, x)
    most = s.maximum(across(s, most, s.maximum), s.const_f(TINY))
    total = across(s, total, b.fadd)
    most = b.fadd(most, b.fsub(total, total))  # not finite if the row is not
    inverse = b.fdiv(s.const_f(127.0), most)
    total = s.const_i(0)
    magic = s.const_f(MAGIC)
    for k, x in enumerate(parts):
        shifted = s.multiply_add(x, inverse, magic)
        number = s.as_ints(shifted)
        total = b.add(total, b.sub(number, s.as_ints(magic)))
        s.store(b.trunc(number, vector(I8, LANES)), row, LANES * k)
    gain = rounded_centroids(plan.dim, plan.bits).gain * LOG2_E / 127.0
    s.store(s.first(b.fmul(most, s.const_f(gain))), row, query.scale)
    bias = b.mul(across(s, total, b.add), s.const_i(-OFFSET))
    s.store(s.first(bias), row, query.bias)


class Rows:
    """Sums of products of a tile, row by row, then their weights: SCORE_BYTES each."""

    WEIGHTS = 4 * TILE  # behind int32 sums: uint8 [TILE], four tokens in turn, see _add_values
    WORTH = WEIGHTS + TILE  # float32: the worth of one unit of weight

    def __init__(self, s: Simd, plan: Plan, scratch: Value) -> None:
        self.s, self.base = s, Scratch(s, plan, scratch).scores

    def __getitem__(self, row: Value) -> Value:
        """The address of a row."""
        return self.s.at(self.base, self.s.times(row, SCORE_BYTES))


def softmax_int8(
    plan: Plan,
    s: Simd,
    call_address: Value,
    unit_address: Value,
    head: Value,
    first: Value,
    query: Value,
    states: Value,
    outputs: Value,
    scratch: Value,
) -> None:
    """Sums of products become weights of 8 bits."""
    b = s.b
    call, unit = Fields(s, call_address, CALL), Fields(s, unit_address, UNIT)
    scores, norms = Rows(s, plan, scratch), Scratch(s, plan, scratch).norms
    pitch = row_bytes(s, plan)
    cap = b.bitcast(b.trunc(call["soft_cap"], I32), F32)
    with rows_of_unit(s, call, unit, head, first) as (r, low, high, bias):
        _softmax_row(
            s,
            plan,
            scores[r],
            norms,
            s.load(F32, s.at(query, s.times(r, pitch)), query_of(plan).scale),
            bias,
            cap,
            low,
            high,
            State(s, s.at(states, s.times(r, 4 * state_floats(s.width)))),
            s.at(outputs, s.times(r, pitch)),
        )


def _softmax_row(
    s: Simd,
    plan: Plan,
    row: Value,
    norms: Value,
    scale: Value,
    bias: Value,
    cap: Value,
    first: Value,
    last: Value,
    state: State,
    output: Value,
) -> None:
    b, count = s.b, TILE // LANES
    factor, shift = s.splat(scale), s.splat(b.fmul(bias, ir.Constant(F32, LOG2_E)))
    x = []
    for k in range(count):
        number = b.sitofp(s.load(s.ints, row, 64 * k), s.floats)
        number = b.fmul(number, s.load(s.floats, norms, 64 * k))
        x.append(variable(s, s.multiply_add(number, factor, shift)))
    with b.if_then(b.fcmp_ordered(">", cap, ir.Constant(F32, 0.0)), likely=False):
        limit = s.splat(b.fmul(cap, ir.Constant(F32, LOG2_E)))
        for cell in x:
            b.store(b.fmul(limit, tanh(s, b.fdiv(b.load(cell), limit))), cell)
    inside = b.and_(
        b.icmp_signed("<=", first, ir.Constant(I32, 0)),
        b.icmp_signed(">=", last, ir.Constant(I32, TILE)),
    )
    partly = b.not_(inside)
    lanes = [s.const_i(range(k * LANES, (k + 1) * LANES)) for k in range(count)]
    low, high = s.splat(first), s.splat(last)
    visible = [b.and_(b.icmp_signed(">=", i, low), b.icmp_signed("<", i, high)) for i in lanes]
    with b.if_then(partly, likely=False):
        for seen, cell in zip(visible, x, strict=True):
            b.store(b.select(seen, b.load(cell), s.const_f(LOWEST_POWER)), cell)
    scores = [b.load(cell) for cell in x]
    top = _raise_maximum(s, plan, scores, state, output)
    shifter = b.fsub(s.const_f(MAGIC), top)
    least = b.fadd(top, s.const_f(-126.0))
    p = [variable(s, _power(s, s.maximum(least, score), shifter)) for score in scores]
    with b.if_then(partly, likely=False):
        for seen, cell in zip(visible, p, strict=True):
            b.store(b.select(seen, b.load(cell), s.const_f(0.0)), cell)
    total, most, scaled = None, s.as_ints(s.const_f(TINY)), []
    for k, cell in enumerate(p):
        weight = b.load(cell)
        total = weight if total is None else b.fadd(total, weight)
        weight = b.fmul(weight, s.load(s.floats, norms, 4 * TILE + 64 * k))
        scaled.append(weight)
        most = _larger(s, most, s.as_ints(weight))
    s.store(b.fadd(s.load(s.floats, state.sums), total), state.sums)
    largest = s.first(s.as_floats(across(s, most, partial(_larger, s))))
    # a negative scale, or NaN, is the largest unsigned integer
    negative = b.fcmp_ordered("<", largest, ir.Constant(F32, 0.0))
    largest = b.select(negative, ir.Constant(F32, math.nan), largest)
    inverse = s.splat(b.fdiv(ir.Constant(F32, 255.0), largest))
    half = s.const_f(0.5)
    numbers = [b.fptosi(s.multiply_add(w, inverse, half), s.ints) for w in scaled]
    words = vector(ir.IntType(16), 32)
    pack = "llvm.x86.avx512.packusdw.512"
    pairs = [s.call(pack, words, numbers[k], numbers[k + 1]) for k in (0, 2)]
    s.store(s.call("llvm.x86.avx512.packuswb.512", BYTES, *pairs), row, Rows.WEIGHTS)
    gain = rounded_centroids(plan.dim, plan.value_bits).gain / 255.0
    s.store(b.fmul(largest, ir.Constant(F32, gain)), row, Rows.WORTH)


def _larger(s: Simd, a: Register, c: Register) -> Register:
    return s.b.select(s.b.icmp_unsigned(">", a, c), a, c)


def _power(s: Simd, x: Register, shifter: Register) -> Register:
    """2 ** (x - t), to 8e-5, where `shifter` is MAGIC - t for a whole t."""
    b = s.b
    shifted = b.fadd(x, shifter)
    f = b.fsub(x, b.fsub(shifted, shifter))
    power = s.const_f(POWER[-1])
    for c in POWER[-2::-1]:
        power = s.multiply_add(power, f, s.const_f(c))
    return s.as_floats(b.add(s.as_ints(power), b.shl(s.as_ints(shifted), s.const_i(23))))


def _raise_maximum(s: Simd, plan: Plan, x: list[Register], state: State, output: Value) -> Register:
    """What to subtract from exponents, a whole number; earlier results follow if it is raised."""
    b = s.b
    before = s.splat(s.load(F32, state.power))
    most = x[0]
    for score in x[1:]:
        most = s.maximum(most, score)
    top = variable(s, before)
    over = b.fcmp_ordered(">", most, b.fadd(before, s.const_f(MARGIN)))
    with b.if_then(s.any_lane(over), likely=False):
        raised = s.maximum(across(s, most, s.maximum), before)
        raised = s.call("llvm.ceil.v16f32", s.floats, raised)
        b.store(raised, top)
        s.store(s.first(raised), state.power)
        s.store(s.first(b.fmul(raised, s.const_f(math.log(2.0)))), state.maximum)
        change = s.maximum(b.fsub(before, raised), s.const_f(-127.0))
        decay = s.as_floats(
            b.shl(b.fptosi(b.fadd(change, s.const_f(127.0)), s.ints), s.const_i(23))
        )
        s.store(b.fmul(s.load(s.floats, state.sums), decay), state.sums)
        for k in range(row_registers(plan, LANES)):
            s.store(b.fmul(s.load(s.floats, output, 64 * k), decay), output, 64 * k)
    return b.load(top)
