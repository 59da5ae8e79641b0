"""The softmax of attention over a tile of scores, on vector registers, with exp and tanh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from .simd import F32, Register, Simd, Value
from .tile import TILE

MARGIN = 8.0  # by which scores may exceed the maximum that is subtracted from them
LOWEST_POWER = -(2.0**22)  # what is subtracted from exponents of 2 at first
NOTHING = -1e30  # for minus infinity, where a difference of two must not be NaN


def state_floats(width: int) -> int:
    """Of a row's state: partial sums in the lanes of a register, and the numbers in `State`."""
    return 2 * width  # so that states, and the registers in them, do not straddle cache lines


class State:
    """A row's state in memory.

    sums : of weights, in the lanes of a register
    maximum : what is subtracted from scores
    decay : what earlier outputs must be multiplied by
    power : the maximum as an exponent of 2, where weights have 8 bits
    """

    def __init__(self, s: Simd, address: Value) -> None:
        self.s, self.sums = s, address
        self.maximum, self.decay, self.power = (s.at(address, 4 * (s.width + i)) for i in range(3))

    def clear(self) -> None:
        """As it is before the first score."""
        s = self.s
        s.store(s.const_f(0.0), self.sums)
        s.store(ir.Constant(F32, NOTHING), self.maximum)
        s.store(ir.Constant(F32, LOWEST_POWER), self.power)


class Tile(NamedTuple):
    """What all rows of a tile share: its tokens' norms, [TILE] floats each, and the soft cap."""

    key_norms: Value
    value_norms: Value
    soft_cap: Value  # float, 0 for none


class Visible(NamedTuple):
    """Tokens of a tile that a row sees, as i32: those from `first` to before `last`."""

    first: Value
    last: Value


def softmax_row(
    s: Simd, tile: Tile, scores: Value, bias: Value, visible: Visible | None, state: State
) -> None:
    """Turn a row of raw scores into weights of the tile's vectors, online.

    scores : [TILE] floats, replaced by exp(score - maximum) * value norm
    bias : float, added to each scaled score
    visible : None if the row sees the whole tile
    """
    b, places = s.b, range(0, 4 * TILE, 4 * s.width)
    x = []
    for here in places:
        norm = s.load(s.floats, tile.key_norms, here)
        score = s.multiply_add(s.load(s.floats, scores, here), norm, s.splat(bias))
        x.append(variable(s, score))
    with b.if_then(b.fcmp_ordered(">", tile.soft_cap, ir.Constant(F32, 0.0)), likely=False):
        cap = s.splat(tile.soft_cap)
        for cell in x:
            b.store(b.fmul(cap, tanh(s, b.fdiv(b.load(cell), cap))), cell)
    x = [b.load(cell) for cell in x]
    if visible is not None:
        seen = [_between(s, visible, k * s.width) for k in range(len(x))]
        x = [b.select(v, score, s.const_f(NOTHING)) for v, score in zip(seen, x, strict=True)]
    top = _raise_maximum(s, x, state)
    weights = [exp(s, b.fsub(score, top)) for score in x]
    if visible is not None:
        weights = [b.select(v, w, s.const_f(0.0)) for v, w in zip(seen, weights, strict=True)]
    decay = s.splat(s.load(F32, state.decay))
    total = s.multiply_add(s.load(s.floats, state.sums), decay, weights[0])
    for w in weights[1:]:
        total = b.fadd(total, w)
    s.store(total, state.sums)
    for here, w in zip(places, weights, strict=True):
        s.store(b.fmul(w, s.load(s.floats, tile.value_norms, here)), scores, here)


def _between(s: Simd, visible: Visible, start: int) -> Register:
    """Which of the tokens from `start` on, one in each lane, are seen."""
    b, token = s.b, s.const_i(range(start, start + s.width))
    after = b.icmp_signed(">=", token, s.splat(visible.first))
    return b.and_(after, b.icmp_signed("<", token, s.splat(visible.last)))


def _raise_maximum(s: Simd, x: list[Register], state: State) -> Register:
    """What to subtract from the scores x, and the decay that follows from it, in the state.

    It stays while no score exceeds it by more than MARGIN: weights up to exp(MARGIN) do no harm,
    and most tiles are spared the maximum over lanes and its exponential.
    """
    b = s.b
    before = s.splat(s.load(F32, state.maximum))
    most = x[0]
    for score in x[1:]:
        most = s.maximum(most, score)
    top = variable(s, before)
    s.store(ir.Constant(F32, 1.0), state.decay)
    over = s.any_lane(b.fcmp_ordered(">", most, b.fadd(before, s.const_f(MARGIN))))
    with b.if_then(over, likely=False):
        raised = s.maximum(across(s, most, s.maximum), before)
        b.store(raised, top)
        s.store(s.first(raised), state.maximum)
        s.store(s.first(exp(s, b.fsub(before, raised))), state.decay)
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

    2**(n + f) with |f| <= 1/2: a polynomial for 2**f, n added to the exponent.
    """
    b, log2_e = s.b, s.const_f(1.0 / math.log(2.0))
    shifter = s.const_f(1.5 * 2.0**23)  # its last bits become n
    shifted = s.multiply_add(x, log2_e, shifter)
    f = s.multiply_add(x, log2_e, b.fsub(shifter, shifted))
    power = s.const_f(EXP2_COEFFICIENTS[0])
    for c in EXP2_COEFFICIENTS[1:]:
        power = s.multiply_add(power, f, s.const_f(c))
    scaled = b.add(s.as_ints(power), b.shl(s.as_ints(shifted), s.const_i(23)))
    tiny = b.fcmp_ordered("<", x, s.const_f(-126.0 * math.log(2.0)))
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


# 2^f for |f| <= 1/2: the least largest relative error of degree 6, 2e-9
EXP2_COEFFICIENTS = (
    0.0001534581206157282,
    0.0013399931268724735,
    0.009618488957326398,
    0.05550328776842802,
    0.24022646890628105,
    0.6931472057373232,
    1.0,
)
# tanh(x) = x + x^3 P(x^2) for |x| < 0.625 (Cephes, single precision)
TANH_COEFFICIENTS = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)
