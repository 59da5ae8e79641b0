"""Dense rotations: what happens before and after the matrix product.

A row enters the product as whole numbers of at most 2**22 and the matrix as multiples of 2**-24, so
every partial sum is exact in float64 and BLAS may add in any order it likes.
"""

from __future__ import annotations

from llvmlite import ir

from turboquant_np.rotation import MATRIX_FRACTION_BITS

from .convert import ITEM_SIZE, store_floats
from .encode import RowWriter, load_row, scratch_rows, write_row
from .kernels import Arguments, Plan, each_register, registers_of_row
from .normalize import (
    exponent_of,
    larger,
    largest_lane,
    magnitude_bits,
    normalize_memory,
    two_factors,
)
from .simd import F32, F64, I32, I64, Simd, Value, vector

INPUT_BITS = 22
ROUNDING = 12582912.0  # 1.5 * 2**23: adding it rounds to a whole number


def emit_fix(s: Simd, plan: Plan, a: Arguments) -> None:
    """Vectors -> float64 rows of whole numbers, norms, and two exponents for each row."""
    b = s.b
    row, partial = scratch_rows(s, plan, a)[:2]
    count = registers_of_row(plan.dim, s.width)
    with s.loop(a.rows) as i:
        load_row(s, plan, s.at(a.source, b.mul(i, a.source_pitch)), row)
        norm, exponent = normalize_memory(s, row, count, partial)
        s.store(norm, a.scales, s.times(i, 4))
        s.store(s.const_i(0), partial)
        with s.loop(count) as k:
            bits = magnitude_bits(s, s.load(s.floats, row, s.times(k, 4 * s.width)))
            s.store(larger(s, s.load(s.ints, partial), bits), partial)
        magnitude = exponent_of(s, largest_lane(s, s.load(s.ints, partial)))
        s.store(exponent, a.exponents, s.times(i, 8))
        s.store(magnitude, a.exponents, s.at(s.times(i, 8), 4))
        one, two = two_factors(s, b.sub(magnitude, ir.Constant(I32, INPUT_BITS - 1)))
        usable = b.fcmp_ordered("==", norm, norm)  # keeps NaN out of the product
        target = s.at(a.target, s.times(i, 8 * plan.dim))

        def fix(element: Value, valid: int, target: Value = target) -> None:
            x = s.load(s.floats, row, s.times(element, 4))
            scaled = b.fmul(b.fmul(x, one), two)
            whole = b.fsub(b.fadd(scaled, s.const_f(ROUNDING)), s.const_f(ROUNDING))
            whole = b.select(usable, whole, s.const_f(0.0))
            store_floats(s, "float64", whole, target, s.times(element, 8), valid)

        each_register(s, plan.dim, fix)


def emit_encode_product(s: Simd, plan: Plan, a: Arguments) -> None:
    """Rows of the product -> packed codes (or z); `scales` holds norms and becomes scales."""
    b = s.b
    row = scratch_rows(s, plan, a)[0]
    writer = RowWriter(s, plan, a)
    with s.loop(a.rows) as i:
        norm = s.load(F32, a.scales, s.times(i, 4))
        exponent = s.load(I32, a.exponents, s.times(i, 8))
        magnitude = s.load(I32, a.exponents, s.at(s.times(i, 8), 4))
        shift = b.sub(magnitude, ir.Constant(I32, INPUT_BITS - 1 + MATRIX_FRACTION_BITS))
        biased = b.sext(b.add(shift, ir.Constant(I32, 1023)), I64)
        power = s.splat(b.bitcast(b.shl(biased, ir.Constant(I64, 52)), F64))
        source = s.at(a.source, b.mul(i, a.source_pitch))
        _load_product(s, plan, source, power, row)
        write_row(s, plan, a, writer, i, norm, exponent)


def emit_decode_product(s: Simd, plan: Plan, a: Arguments) -> None:
    """Rows of the product times the float64 in `parameter` and the scales -> vectors."""
    factor = s.splat(s.b.bitcast(a.parameter, F64))
    row, size = scratch_rows(s, plan, a)[0], ITEM_SIZE[plan.dtype]
    with s.loop(a.rows) as i:
        _load_product(s, plan, s.at(a.source, s.b.mul(i, a.source_pitch)), factor, row)
        scale = s.splat(s.load(F32, a.scales, s.times(i, 4)))
        target = s.at(a.target, s.times(i, size * plan.dim))

        def finish(
            element: Value, count: int, scale: Value = scale, target: Value = target
        ) -> None:
            x = s.b.fmul(s.load(s.floats, row, s.times(element, 4)), scale)
            store_floats(s, plan.dtype, x, target, s.times(element, size), count)

        each_register(s, plan.dim, finish)


def _load_product(s: Simd, plan: Plan, source: Value, factor: Value, row: Value) -> None:
    """float64 row times factor, rounded to float32, into the scratch row."""

    def load(element: Value, count: int) -> None:
        product = s.load(vector(F64, count), source, s.times(element, 8))
        x = s.b.fptrunc(s.b.fmul(s.resize(product, s.width), factor), s.floats)
        s.store(x, row, s.times(element, 4))

    each_register(s, plan.dim, load)
