"""Encoding kernels: load, normalise, rotate, quantise, pack, one row after the other."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from .convert import ITEM_SIZE, load_floats
from .kernels import (
    Arguments,
    Plan,
    each_group,
    each_register,
    registers_of_row,
    row_floats,
    rows_at_once,
    signs_pitch,
    stays_in_registers,
)
from .normalize import (
    final_scale,
    fold,
    fold_lanes,
    fold_memory,
    normalize_memory,
    normalize_registers,
)
from .packing import GROUP, packed_bytes, store_codes
from .quantize import DIM, GAIN, Quantizer, values_table
from .rotate import RowRotation, rotate_registers
from .simd import F32, Register, Simd, Value

BYTES_AHEAD = 8192  # of the source, fetched into the cache while a row is being worked on


def emit_encode(s: Simd, plan: Plan, a: Arguments) -> None:
    """Vectors -> packed codes (or z) and stored scales."""
    if stays_in_registers(s, plan):
        _encode_in_registers(s, plan, a)
    else:
        _encode_in_memory(s, plan, a)


class RowWriter:
    """From the rotated coordinates of a row to its codes (or z) and stored scale."""

    def __init__(self, s: Simd, plan: Plan, a: Arguments) -> None:
        self.s, self.plan, self.a = s, plan, a
        self.gain = s.load(F32, a.tables, 4 * GAIN)
        self.dim = s.load(F32, a.tables, 4 * DIM)
        self.codes = plan.output == "codes"
        self.needs_sums = plan.scale != "norm" and self.codes
        if self.codes:
            self.quantizer = Quantizer(s, a.tables, plan.bits, plan.cells)
        if self.needs_sums:
            self.centroids = values_table(s, a.tables, plan.bits)
        self.row_bytes = packed_bytes(plan.dim, plan.bits) if self.codes else 4 * plan.dim
        self.group_bytes = GROUP * s.width * (plan.bits if self.codes else 32) // 8

    def factor(self, norm: Value) -> Register:
        """encode_gain / norm in all lanes; 0 for a zero row."""
        b, zero = self.s.b, ir.Constant(F32, 0.0)
        is_zero = b.fcmp_ordered("==", norm, zero)
        return self.s.splat(b.select(is_zero, zero, b.fdiv(self.gain, norm)))

    def write_group(
        self, rotated: list[Register], factor: Register, address: Value, count: int
    ) -> tuple[list[Register], list[Register]]:
        """Write `count` coordinates (up to GROUP registers) and return the terms of the two sums,
        z * centroid and centroid**2 (nothing if they aren't needed)."""
        s, b = self.s, self.s.b
        z = [b.fmul(x, factor) for x in rotated]
        valid = [min(s.width, count - k * s.width) for k in range(len(z))]
        if not self.codes:
            for k, x in enumerate(z):
                s.store(s.resize(x, valid[k]), address, 4 * k * s.width)
            return [], []
        codes = [s.keep_lanes(self.quantizer(x), n) for x, n in zip(z, valid, strict=True)]
        store_codes(s, codes, self.plan.bits, address, 0, count)
        if not self.needs_sums:
            return [], []
        centroids = [s.keep_lanes(self.centroids(c), n) for c, n in zip(codes, valid, strict=True)]
        along = [b.fmul(x, c) for x, c in zip(z, centroids, strict=True)]
        return along, [b.fmul(c, c) for c in centroids]

    def stored_scale(self, norm: Value, along: Value | None, square: Value | None) -> Value:
        """The scale before the power of two of the range step."""
        b, zero = self.s.b, ir.Constant(F32, 0.0)
        if not self.needs_sums:
            return norm
        mse = self.plan.scale == "mse"
        ratio = b.fdiv(along, square) if mse else b.fdiv(self.dim, along)
        return b.select(b.fcmp_ordered("==", norm, zero), zero, b.fmul(norm, ratio))

    def write_scale(self, row: Value, scale: Value, exponent: Value) -> None:
        s = self.s
        s.store(final_scale(s, scale, exponent), self.a.scales, s.times(row, 4))


def _encode_in_registers(s: Simd, plan: Plan, a: Arguments) -> None:
    b, count = s.b, plan.dim // s.width
    writer, size = RowWriter(s, plan, a), ITEM_SIZE[plan.dtype]
    together = rows_at_once(s, plan)
    last = b.sub(a.rows, s.int64(1))
    turns = b.udiv(s.at(last, together), s.int64(together))
    with s.loop(turns) as turn:
        # behind the last row it is done again, so that `together` need not divide the rows
        numbers = [s.at(s.times(turn, together), u) for u in range(together)]
        numbers = [b.select(b.icmp_signed("<", i, last), i, last) for i in numbers]
        rows = []
        for i in numbers:
            source = s.at(a.source, b.mul(i, a.source_pitch))
            ahead = b.mul(a.source_pitch, s.int64(BYTES_AHEAD // (size * plan.dim)))
            s.prefetch(s.at(source, ahead), size * plan.dim)
            offsets = [size * s.width * k for k in range(count)]
            loaded = [load_floats(s, plan.dtype, source, o, s.width) for o in offsets]
            rows.append(normalize_registers(s, loaded))
        rotated = rotate_registers(
            s,
            [row.registers for row in rows],
            a.signs,
            signs_pitch(plan.dim, s.width),
            a.parameter,
            back=False,
        )
        for i, row, registers in zip(numbers, rows, rotated, strict=True):
            factor = writer.factor(row.norm)
            target = s.at(a.target, s.times(i, writer.row_bytes))
            along, square = [], []
            for k in range(0, count, GROUP):
                part = registers[k : k + GROUP]
                address = s.at(target, k // GROUP * writer.group_bytes)
                terms = writer.write_group(part, factor, address, len(part) * s.width)
                along += terms[0]
                square += terms[1]
            sums = [fold_lanes(s, fold(s, x)) if x else None for x in (along, square)]
            writer.write_scale(i, writer.stored_scale(row.norm, *sums), row.exponent)


def _encode_in_memory(s: Simd, plan: Plan, a: Arguments) -> None:
    row, partial = scratch_rows(s, plan, a)[:2]
    pitch, size = signs_pitch(plan.dim, s.width), ITEM_SIZE[plan.dtype]
    writer = RowWriter(s, plan, a)
    with s.loop(a.rows) as i:
        source = s.at(a.source, s.b.mul(i, a.source_pitch))
        following = s.at(source, a.source_pitch)

        def fetch(element: Value, count: int, following: Value = following) -> None:
            s.prefetch(s.at(following, s.times(element, size)), size * count)

        rotation = RowRotation(s, plan.dim, row, a.signs, pitch, a.parameter, fetch)
        load_row(s, plan, source, row, rotation.first_signs)
        norm, exponent = normalize_memory(s, row, registers_of_row(plan.dim, s.width), partial)
        rotation.forward()
        write_row(s, plan, a, writer, i, norm, exponent)


def scratch_rows(s: Simd, plan: Plan, a: Arguments) -> list[Value]:
    """Addresses of the row, the partial sums, and the two rows of products."""
    return [s.at(a.scratch, 4 * k * row_floats(plan.dim, s.width)) for k in range(4)]


def load_row(
    s: Simd,
    plan: Plan,
    source: Value,
    row: Value,
    then: Callable[[Register, Value], Register] = lambda x, offset: x,
) -> None:
    """Convert a row of vectors into the scratch row, zeros behind it in the last register.

    then : applied to each register and its byte offset.
    """
    size = ITEM_SIZE[plan.dtype]

    def load(element: Value, count: int) -> None:
        x = load_floats(s, plan.dtype, source, s.times(element, size), count)
        offset = s.times(element, 4)
        s.store(s.keep_lanes(then(x, offset), count), row, offset)

    each_register(s, plan.dim, load)


def write_row(
    s: Simd, plan: Plan, a: Arguments, writer: RowWriter, i: Value, norm: Value, exponent: Value
) -> None:
    """Quantise and pack the rotated scratch row as row i."""
    row, partial, *products = scratch_rows(s, plan, a)
    factor = writer.factor(norm)
    target = s.at(a.target, s.times(i, writer.row_bytes))

    def write(group: Value, element: Value, count: int) -> None:
        offset = s.times(element, 4)
        parts = [s.at(offset, 4 * s.width * k) for k in range(-(-count // s.width))]
        rotated = [s.load(s.floats, row, o) for o in parts]
        address = s.at(target, s.times(group, writer.group_bytes))
        for terms, product in zip(
            writer.write_group(rotated, factor, address, count), products, strict=True
        ):
            for term, o in zip(terms, parts, strict=False):
                s.store(term, product, o)

    each_group(s, plan.dim, GROUP, write)
    sums: list[Value | None] = [None, None]
    if writer.needs_sums:
        for k, product in enumerate(products):

            def load(index: Value, product: Value = product) -> Register:
                return s.load(s.floats, product, s.times(index, 4 * s.width))

            sums[k] = fold_memory(s, load, registers_of_row(plan.dim, s.width), partial)
    writer.write_scale(i, writer.stored_scale(norm, *sums), exponent)
