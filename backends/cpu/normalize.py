"""Norms in the prescribed order, and the rare rows whose squares leave the safe range.

Folding in halves adds whole registers first and lanes last, so it costs no shuffles until one
register is left.  The sum of squares tells for free whether a row needs care: NaN, infinity, zero
and anything that might over- or underflow all leave the safe range and take a branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from turboquant_np._spec import SAFE_SUM_OF_SQUARES

from .simd import F32, F64, I32, I64, Register, Simd, Value

FOLD_RADIX = 16
NAN_BITS = 0x7FC00000


class Normalized(NamedTuple):
    """A row rescaled by 2**-exponent, so that its squares neither over- nor underflow."""

    registers: list[Register]
    norm: Value  # float32; NaN if the row has NaN or infinity
    exponent: Value  # int32


def fold(s: Simd, registers: list[Register]) -> Register:
    """Fold a power of two of registers in halves, without the lanes."""
    while len(registers) > 1:
        half = len(registers) // 2
        registers = [s.b.fadd(registers[i], registers[i + half]) for i in range(half)]
    return registers[0]


def fold_lanes(s: Simd, register: Register) -> Value:
    """Fold the lanes of one register in halves; the sum as a scalar."""
    stride = s.width // 2
    while stride:
        other = s.shuffle(register, None, [i ^ stride for i in range(s.width)])
        register = s.b.fadd(register, other)
        stride //= 2
    return s.first(register)


def fold_memory(s: Simd, load: Callable[[Value], Register], count: int, partial: Value) -> Value:
    """The same over `count` registers (a power of two) given by `load(index)`.

    partial : address of room for count / FOLD_RADIX registers.
    """
    size = 4 * s.width
    while True:
        radix = min(FOLD_RADIX, count)
        stride = count // radix
        with s.loop(stride) as i:
            folded = fold(s, [load(s.at(i, k * stride)) for k in range(radix)])
            if stride > 1:
                s.store(folded, partial, s.times(i, size))
        if stride == 1:
            return fold_lanes(s, folded)
        count = stride

        def load(index: Value) -> Register:
            return s.load(s.floats, partial, s.times(index, size))


def is_unsafe(s: Simd, sum_of_squares: Value) -> Value:
    """Whether the range step is needed, for a scalar or for each lane of a register."""
    low, high = (s.constant_like(sum_of_squares, float(bound)) for bound in SAFE_SUM_OF_SQUARES)
    b = s.b
    at_least = b.fcmp_ordered(">=", sum_of_squares, low)
    return b.not_(b.and_(at_least, b.fcmp_ordered("<=", sum_of_squares, high)))


def magnitude_bits(s: Simd, register: Register) -> Register:
    """|x| as integers, which order like the floats, infinity and then NaN above all."""
    return s.b.and_(s.as_ints(register), s.const_i(0x7FFFFFFF))


def larger(s: Simd, a: Register, b: Register) -> Register:
    return s.b.select(s.b.icmp_signed(">", a, b), a, b)


def largest_lane(s: Simd, bits: Register) -> Value:
    stride = s.width // 2
    while stride:
        bits = larger(s, bits, s.shuffle(bits, None, [i ^ stride for i in range(s.width)]))
        stride //= 2
    return s.first(bits)


def exponent_of(s: Simd, bits: Value) -> Value:
    """e with 2**e <= |x| < 2**(e + 1), from the bits of |x|; 0 for zero, infinity and NaN."""
    b = s.b

    def i32(value: int) -> Value:
        return ir.Constant(I32, value)

    normal = b.sub(b.lshr(bits, i32(23)), i32(127))
    leading = b.ctlz(bits, ir.Constant(ir.IntType(1), 0))
    subnormal = b.sub(i32(31 - 149), leading)
    exponent = b.select(b.icmp_signed("<", bits, i32(1 << 23)), subnormal, normal)
    ordinary = b.and_(is_finite(s, bits), b.icmp_signed("!=", bits, i32(0)))
    return b.select(ordinary, exponent, i32(0))


def is_finite(s: Simd, bits: Value) -> Value:
    return s.b.icmp_signed("<", bits, ir.Constant(I32, 0x7F800000))


def two_factors(s: Simd, exponent: Value) -> tuple[Register, Register]:
    """Powers of two whose product is 2**-exponent.

    One alone may exceed float32; with the two a result is rounded at most once, because where the
    first product is subnormal the second one is zero.
    """
    b = s.b
    down = b.neg(exponent)
    first = b.ashr(down, ir.Constant(I32, 1))
    return s.splat(power_of_two(s, first)), s.splat(power_of_two(s, b.sub(down, first)))


def power_of_two(s: Simd, exponent: Value) -> Value:
    """2**exponent as float32, for normal results."""
    biased = s.b.add(exponent, ir.Constant(I32, 127))
    return s.b.bitcast(s.b.shl(biased, ir.Constant(I32, 23)), F32)


def final_scale(s: Simd, scale: Value, exponent: Value) -> Value:
    """scale * 2**exponent (ldexp), with the one NaN that is stored; of a row, or of a register.

    The product is exact in float64, so it is rounded once, into float32.
    """
    b = s.b
    wide = b.sext(exponent, s.like(exponent, I64))
    biased = b.add(wide, s.constant_like(wide, 1023))
    power = b.bitcast(b.shl(biased, s.constant_like(wide, 52)), s.like(scale, F64))
    product = b.fptrunc(b.fmul(b.fpext(scale, power.type), power), scale.type)
    canonical = b.bitcast(s.constant_like(exponent, NAN_BITS), scale.type)
    return b.select(b.fcmp_unordered("uno", product, product), canonical, product)


def norm_of(s: Simd, sum_of_squares: Value) -> Value:
    """The square root, of a scalar or of a register."""
    is_register = isinstance(sum_of_squares.type, ir.VectorType)
    name = f"llvm.sqrt.v{s.width}f32" if is_register else "llvm.sqrt.f32"
    return s.call(name, sum_of_squares.type, sum_of_squares)


def nan(s: Simd) -> Value:
    return s.b.bitcast(ir.Constant(I32, NAN_BITS), F32)


def normalize_registers(s: Simd, registers: list[Register]) -> Normalized:
    """The range step for a row in registers."""
    b = s.b
    total = fold_lanes(s, fold(s, [b.fmul(x, x) for x in registers]))
    before = b.block
    with b.if_then(is_unsafe(s, total), likely=False):
        bits = magnitude_bits(s, registers[0])
        for x in registers[1:]:
            bits = larger(s, bits, magnitude_bits(s, x))
        largest = largest_lane(s, bits)
        exponent = exponent_of(s, largest)
        one, two = two_factors(s, exponent)
        rescaled = [b.fmul(b.fmul(x, one), two) for x in registers]
        sum_again = fold_lanes(s, fold(s, [b.fmul(x, x) for x in rescaled]))
        sum_again = b.select(is_finite(s, largest), sum_again, nan(s))
        branch = b.block

    def merge(fast: Value, slow: Value) -> Value:
        phi = b.phi(fast.type)
        phi.add_incoming(fast, before)
        phi.add_incoming(slow, branch)
        return phi

    merged = [merge(x, y) for x, y in zip(registers, rescaled, strict=True)]
    chosen, exponent = merge(total, sum_again), merge(ir.Constant(I32, 0), exponent)
    return Normalized(merged, norm_of(s, chosen), exponent)


def normalize_memory(s: Simd, row: Value, count: int, partial: Value) -> tuple[Value, Value]:
    """The range step for a row of `count` zero-padded registers at address `row`, in place.

    Returns norm and exponent as in `Normalized`.
    """
    b, size = s.b, 4 * s.width

    def at(i: Value) -> Register:
        return s.load(s.floats, row, s.times(i, size))

    def square(i: Value) -> Register:
        x = at(i)
        return b.fmul(x, x)

    total = fold_memory(s, square, count, partial)
    before = b.block
    with b.if_then(is_unsafe(s, total), likely=False):
        s.store(s.const_i(0), partial)
        with s.loop(count) as i:
            so_far = s.load(s.ints, partial)
            s.store(larger(s, so_far, magnitude_bits(s, at(i))), partial)
        largest = largest_lane(s, s.load(s.ints, partial))
        exponent = exponent_of(s, largest)
        one, two = two_factors(s, exponent)
        with s.loop(count) as i:
            s.store(b.fmul(b.fmul(at(i), one), two), row, s.times(i, size))
        sum_again = fold_memory(s, square, count, partial)
        sum_again = b.select(is_finite(s, largest), sum_again, nan(s))
        branch = b.block
    chosen, chosen_exponent = b.phi(F32), b.phi(I32)
    for block, value, e in (
        (before, total, ir.Constant(I32, 0)),
        (branch, sum_again, exponent),
    ):
        chosen.add_incoming(value, block)
        chosen_exponent.add_incoming(e, block)
    return norm_of(s, chosen), chosen_exponent
