"""The softmax of attention over a tile of scores, on vector registers, with exp and tanh."""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils

from .simd import F32, Register, Simd, Value
from .tile import TILE

STATE_BYTES = 12  # maximum, sum, decay of a row
MARGIN = 8.0  # by which scores may exceed the maximum that is subtracted from them
LOWEST_POWER = -(2.0**22)  # what is subtracted from exponents of 2 at first
NOTHING = -1e30  # for minus infinity, where a difference of two must not be NaN


def softmax_row(
    s: Simd,
    scores: Value,
    key_norms: Value,
    value_norms: Value,
    bias: Value,
    soft_cap: Value,
    first: Value,
    last: Value,
    state: Value,
) -> None:
    """Turn a row of raw scores into weights of the tile's vectors, online.

    scores : [TILE] floats, replaced by exp(score - maximum) * value norm
    key_norms, value_norms : [TILE] floats
    bias : float, added to each scaled score
    soft_cap : float, 0 for none
    first, last : i32, visible tokens of the tile are those from `first` to before `last`
    state : address of (maximum or a little less, sum, decay); decay is what earlier outputs must be
        multiplied by
    """
    b, count = s.b, TILE // s.width
    lanes = [s.const_i(range(k * s.width, (k + 1) * s.width)) for k in range(count)]
    low, high = s.splat(first), s.splat(last)
    visible = [b.and_(b.icmp_signed(">=", i, low), b.icmp_signed("<", i, high)) for i in lanes]
    nothing = s.const_f(NOTHING)
    x = []
    for k in range(count):
        here = 4 * s.width * k
        norm = s.load(s.floats, key_norms, here)
        score = s.multiply_add(s.load(s.floats, scores, here), norm, s.splat(bias))
        x.append(variable(s, score))
    with b.if_then(b.fcmp_ordered(">", soft_cap, ir.Constant(F32, 0.0)), likely=False):
        cap = s.splat(soft_cap)
        for cell in x:
            b.store(b.fmul(cap, tanh(s, b.fdiv(b.load(cell), cap))), cell)
    x = [b.select(v, b.load(cell), nothing) for v, cell in zip(visible, x, strict=True)]
    top = _raise_maximum(s, x, state)
    weights = [
        b.select(v, exp(s, b.fsub(score, top)), s.const_f(0.0))
        for v, score in zip(visible, x, strict=True)
    ]
    total = weights[0]
    for w in weights[1:]:
        total = b.fadd(total, w)
    total = across(s, total, b.fadd)
    decay = s.splat(s.load(F32, state, 8))
    total = s.multiply_add(s.splat(s.load(F32, state, 4)), decay, total)
    s.store(s.first(total), state, 4)
    for k, w in enumerate(weights):
        here = 4 * s.width * k
        s.store(b.fmul(w, s.load(s.floats, value_norms, here)), scores, here)


def _raise_maximum(s: Simd, x: list[Register], state: Value) -> Register:
    """What to subtract from the scores x, and the decay that follows from it, in the state.

    It stays while no score exceeds it by more than MARGIN: weights up to exp(MARGIN) do no harm,
    and most tiles are spared the maximum over lanes and its exponential.
    """
    b = s.b
    before = s.splat(s.load(F32, state))
    most = x[0]
    for score in x[1:]:
        most = s.maximum(most, score)
    top = variable(s, before)
    s.store(ir.Constant(F32, 1.0), state, 8)
    over = b.fcmp_ordered(">", most, b.fadd(before, s.const_f(MARGIN)))
    mask = b.bitcast(over, ir.IntType(s.width))
    with b.if_then(b.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0)), likely=False):
        raised = s.maximum(across(s, most, s.maximum), before)
        b.store(raised, top)
        s.store(s.first(raised), state)
        s.store(s.first(exp(s, b.fsub(before, raised))), state, 8)
    return b.load(top)


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
    """e**x for x < 80, to 2 units in the last place; 0 where it would be subnormal.

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
