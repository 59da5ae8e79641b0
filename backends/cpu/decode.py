"""Decoding kernels: unpack, look up, rotate back, scale, store."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import cgutils

from .convert import ITEM_SIZE, store_floats
from .encode import scratch_rows
from .kernels import (
    Arguments,
    Plan,
    each_group,
    each_register,
    rows_at_once,
    signs_pitch,
    stays_in_registers,
)
from .normalize import fold, fold_lanes
from .packing import GROUP, load_codes
from .quantize import values_table
from .rotate import RowRotation, rotate_registers
from .simd import F32, I32, Register, Simd, Table, Value

Write = Callable[[Value, list[Register], int], None]  # (first element, registers, count)


def emit_decode(s: Simd, plan: Plan, a: Arguments) -> None:
    """Packed codes and scales -> vectors."""
    if stays_in_registers(s, plan):
        _decode_in_registers(s, plan, a)
    else:
        _decode_in_memory(s, plan, a)
    if plan.streams:
        s.finish_streams()


def emit_look_up(s: Simd, plan: Plan, a: Arguments) -> None:
    """Packed codes -> the values in the table, float32 or float64, with no scale or rotation."""
    _look_up(s, plan, a, lambda _: None)


def emit_look_up_scaled(s: Simd, plan: Plan, a: Arguments) -> None:
    """Packed codes and scales -> the values in the table times scale and factor.

    `parameter` holds the bits of the factor, a float32.
    """
    b = s.b
    factor = b.bitcast(b.trunc(a.parameter, I32), F32)

    def multiplier(row: Value) -> Register:
        return s.splat(b.fmul(s.load(F32, a.scales, s.times(row, 4)), factor))

    _look_up(s, plan, a, multiplier)


def _look_up(
    s: Simd, plan: Plan, a: Arguments, multiplier: Callable[[Value], Register | None]
) -> None:
    table = values_table(s, a.tables, plan.bits)
    size = ITEM_SIZE[plan.dtype]
    with s.loop(a.rows) as i:
        target, times = s.at(a.target, s.times(i, size * plan.dim)), multiplier(i)

        def write(
            element: Value,
            values: list[Register],
            count: int,
            target: Value = target,
            times: Register | None = times,
        ) -> None:
            for k, x in enumerate(values):
                valid = min(s.width, count - k * s.width)
                offset = s.times(s.at(element, k * s.width), size)
                y = x if times is None else s.b.fmul(x, times)
                store_floats(s, plan.dtype, y, target, offset, valid)

        _each_values(s, plan, table, s.at(a.source, s.b.mul(i, a.source_pitch)), write)


def emit_score(s: Simd, plan: Plan, a: Arguments) -> None:
    """Packed codes and scales -> inner products with one query, float32 [rows].

    `signs` is the address of the query's coordinates z with zeros behind them, `parameter` holds
    the bits of the float32 that all scores are multiplied with.
    """
    b = s.b
    table = values_table(s, a.tables, plan.bits)
    factor = b.bitcast(b.trunc(a.parameter, I32), F32)
    sums = [cgutils.alloca_once(b, s.floats) for _ in range(GROUP)]
    with s.loop(a.rows) as i:
        for place in sums:
            b.store(s.const_f(0.0), place)

        def add(element: Value, values: list[Register], count: int) -> None:
            for k, x in enumerate(values):
                z = s.load(s.floats, a.signs, s.times(s.at(element, k * s.width), 4))
                b.store(s.multiply_add(x, z, b.load(sums[k])), sums[k])

        _each_values(s, plan, table, s.at(a.source, b.mul(i, a.source_pitch)), add)
        total = fold_lanes(s, fold(s, [b.load(place) for place in sums]))
        scale = s.load(F32, a.scales, s.times(i, 4))
        s.store(b.fmul(b.fmul(total, factor), scale), a.target, s.times(i, 4))


def _each_values(s: Simd, plan: Plan, table: Table, source: Value, write: Write) -> None:
    """write(first element, registers of values, count) for every group of a packed row."""
    group_bytes = GROUP * s.width * plan.bits // 8

    def group(number: Value, element: Value, count: int) -> None:
        codes = load_codes(s, plan.bits, source, s.times(number, group_bytes), count)
        write(element, [table(code) for code in codes], count)

    each_group(s, plan.dim, GROUP, group)


def _decode_in_registers(s: Simd, plan: Plan, a: Arguments) -> None:
    b, count, size = s.b, plan.dim // s.width, ITEM_SIZE[plan.dtype]
    table = values_table(s, a.tables, plan.bits)
    group_bytes = GROUP * s.width * plan.bits // 8
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
            row: list[Register] = []
            for k in range(0, count, GROUP):
                held = min(GROUP, count - k) * s.width
                codes = load_codes(s, plan.bits, source, k // GROUP * group_bytes, held)
                row += [table(code) for code in codes]
            rows.append(row)
        pitch = signs_pitch(plan.dim, s.width)
        rows = rotate_registers(s, rows, a.signs, pitch, a.parameter, back=True)
        for i, row in zip(numbers, rows, strict=True):
            scale = s.splat(s.load(F32, a.scales, s.times(i, 4)))
            target = s.at(a.target, s.times(i, size * plan.dim))
            for k, x in enumerate(row):
                offset = size * s.width * k
                y = b.fmul(x, scale)
                store_floats(s, plan.dtype, y, target, offset, s.width, streams=plan.streams)


def _decode_in_memory(s: Simd, plan: Plan, a: Arguments) -> None:
    row, size = scratch_rows(s, plan, a)[0], ITEM_SIZE[plan.dtype]
    pitch = signs_pitch(plan.dim, s.width)
    table = values_table(s, a.tables, plan.bits)

    def keep(element: Value, values: list[Register], count: int) -> None:
        for k, x in enumerate(values):
            s.store(x, row, s.times(s.at(element, k * s.width), 4))

    with s.loop(a.rows) as i:
        target = s.at(a.target, s.times(i, size * plan.dim))

        def fetch(element: Value, count: int, target: Value = target) -> None:
            if not plan.streams:
                s.prefetch(s.at(target, s.times(element, size)), size * count, write=True)

        rotation = RowRotation(s, plan.dim, row, a.signs, pitch, a.parameter, fetch)
        _each_values(s, plan, table, s.at(a.source, s.b.mul(i, a.source_pitch)), keep)
        rotation.back()
        scale = s.splat(s.load(F32, a.scales, s.times(i, 4)))

        def finish(
            element: Value,
            count: int,
            scale: Register = scale,
            target: Value = target,
            rotation: RowRotation = rotation,
        ) -> None:
            offset = s.times(element, 4)
            x = rotation.first_signs(s.load(s.floats, row, offset), offset)
            y, place = s.b.fmul(x, scale), s.times(element, size)
            store_floats(s, plan.dtype, y, target, place, count, streams=plan.streams)

        each_register(s, plan.dim, finish)
