"""What happens to rows before and after units: rotation, merging of partial results, rotation back.

Rotations are products with a matrix, all rows padded to whole registers.  They are made here and
not by a BLAS, whose threads would wait in the way of ours.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from .attend import ValueTile, add_products, in_blocks_of_rows
from .attend_call import MERGE, ROTATED_ROWS, Fields, Scratch, row_bytes, row_registers
from .convert import load_floats, store_floats
from .int8_rows import round_query
from .kernels import Arguments, Plan
from .simd import F32, I32, Register, Simd, Value
from .softmax import NOTHING, State, across, exp, state_floats, variable
from .tile import registers_at_once

Store = Callable[[Value, int, Register], None]  # (row, number of the register, the register)


def rotate_rows(s: Simd, plan: Plan, a: Arguments, call: Fields, task: Value) -> None:
    """Rows of the query, times the gain, become rows of `rotated`."""
    b, pitch = s.b, row_bytes(s, plan)
    plain = Scratch(s, plan, a.scratch).rows
    start, rows = s.times(task, ROTATED_ROWS), call["rows"]
    left = b.sub(b.mul(call["kv_heads"], rows), start)
    count = b.select(b.icmp_signed("<", left, s.int64(ROTATED_ROWS)), left, s.int64(ROTATED_ROWS))
    gain = s.splat(b.bitcast(b.trunc(call["gain"], I32), F32))
    with s.loop(count) as i:
        place = b.add(start, i)
        token, head = _token_and_head(s, call, b.udiv(place, rows), b.urem(place, rows))
        source, target = _place(s, call, "query", token, head), s.at(plain, s.times(i, pitch))
        for k, count_of in _registers(s, plan):
            part = load_floats(s, "float32", source, 4 * s.width * k, count_of)
            s.store(b.fmul(part, gain), target, 4 * s.width * k)
        for k in range(len(_registers(s, plan)), row_registers(plan, s.width)):
            s.store(s.const_f(0.0), target, 4 * s.width * k)

    rotated = s.at(call["rotated"], s.times(start, pitch))

    def store(row: Value, k: int, register: Register) -> None:
        s.store(register, s.at(rotated, s.times(row, pitch)), 4 * s.width * k)

    _times_matrix(s, plan, plain, count, call["into_tiles"], store)
    if plan.kind == "attend_int8":
        with s.loop(count) as i:
            round_query(s, plan, s.at(rotated, s.times(i, pitch)))


def merge_rows(s: Simd, plan: Plan, a: Arguments, call: Fields, task: Value) -> None:
    """Partial results of a run of rows and one key/value head become results."""
    b, pitch, heads = s.b, row_bytes(s, plan), call["kv_heads"]
    merged = Scratch(s, plan, a.scratch).rows
    number, h = b.udiv(task, heads), b.urem(task, heads)
    merge = Fields(s, s.at(call["merge_list"], s.times(number, 8 * len(MERGE))), MERGE)

    def result(name: str, r: Value) -> Value:
        """Where a row's result goes in an array."""
        token, head = _token_and_head(s, call, h, b.add(merge["row"], r))
        return _place(s, call, name, token, head)

    with s.loop(merge["rows"]) as r:
        target = s.at(merged, s.times(r, pitch))
        _merge_row(s, plan, call, merge, h, r, target, result("lse", r))

    def store(row: Value, k: int, register: Register) -> None:
        inside = dict(_registers(s, plan)).get(k)
        if inside:
            store_floats(s, "float32", register, result("out", row), 4 * s.width * k, inside)

    _times_matrix(s, plan, merged, merge["rows"], call["out_of_tiles"], store)


def _merge_row(
    s: Simd,
    plan: Plan,
    call: Fields,
    merge: Fields,
    head: Value,
    r: Value,
    target: Value,
    lse: Value,
) -> None:
    """Weigh a row's partial results and the sink, which is one whose output is zero."""
    b, pitch, rows = s.b, row_bytes(s, plan), merge["rows"]
    place = b.add(merge["place"], b.add(b.mul(head, rows), r))
    step = b.mul(call["kv_heads"], rows)  # from chunk to chunk
    _, query_head = _token_and_head(s, call, head, b.add(merge["row"], r))
    sink = s.splat(s.load(F32, call["sinks"], b.mul(query_head, call["sinks_head"])))

    def parts() -> ir.Value:
        return s.loop(merge["chunks"])

    def state(c: Value) -> State:
        at = b.add(place, b.mul(c, step))
        return State(s, s.at(call["states"], s.times(at, 4 * state_floats(s.width))))

    top = variable(s, s.maximum(sink, s.const_f(NOTHING)))
    with parts() as c:
        b.store(s.maximum(s.splat(s.load(F32, state(c).maximum)), b.load(top)), top)
    total = variable(s, s.const_f(0.0))
    sums = [variable(s, s.const_f(0.0)) for _ in range(row_registers(plan, s.width))]
    with parts() as c:
        weight = exp(s, b.fsub(s.splat(s.load(F32, state(c).maximum)), b.load(top)))
        part = s.load(s.floats, state(c).sums)
        b.store(s.multiply_add(weight, part, b.load(total)), total)
        output = s.at(call["outputs"], s.times(b.add(place, b.mul(c, step)), pitch))
        for k, cell in enumerate(sums):
            value = s.load(s.floats, output, 4 * s.width * k)
            b.store(s.multiply_add(weight, value, b.load(cell)), cell)
    every = b.fadd(across(s, b.load(total), b.fadd), exp(s, b.fsub(sink, b.load(top))))
    whole = s.first(every)
    seen = b.fcmp_ordered(">", whole, ir.Constant(F32, 0.0))
    share = b.fdiv(ir.Constant(F32, 1.0), b.select(seen, whole, ir.Constant(F32, 1.0)))
    for k, cell in enumerate(sums):
        s.store(b.fmul(b.load(cell), s.splat(share)), target, 4 * s.width * k)
    log = b.fadd(s.first(b.load(top)), s.call("llvm.log.f32", F32, whole))
    s.store(b.select(seen, log, ir.Constant(F32, float("-inf"))), lse)


def _token_and_head(s: Simd, call: Fields, head: Value, row: Value) -> tuple[Value, Value]:
    """Query token and query head of a key/value head's row."""
    group = call["group"]
    return s.b.udiv(row, group), s.b.add(s.b.mul(head, group), s.b.urem(row, group))


def _place(s: Simd, call: Fields, name: str, token: Value, head: Value) -> Value:
    """Of a query token and query head in an array."""
    b = s.b
    skip = b.add(b.mul(token, call[f"{name}_token"]), b.mul(head, call[f"{name}_head"]))
    return s.at(call[name], skip)


def _registers(s: Simd, plan: Plan) -> list[tuple[int, int]]:
    """(number, elements) of the registers of an unpadded row."""
    starts = range(0, plan.dim, s.width)
    return [(k, min(s.width, plan.dim - start)) for k, start in enumerate(starts)]


def _times_matrix(
    s: Simd, plan: Plan, source: Value, rows: Value, matrix: Value, store: Store
) -> None:
    """Rows that follow each other, times the matrix at an address."""
    registers, pitch = row_registers(plan, s.width), row_bytes(s, plan)
    factor = ValueTile(s, registers * s.width, matrix)
    at_once = registers_at_once(s.width)
    for start in range(0, registers, at_once):  # a part of the matrix stays in the cache
        part = range(start, min(start + at_once, registers))

        def block(row: Value, count: int, part: range = part) -> None:
            here, size = s.at(source, s.times(row, pitch)), registers * s.width
            halves = []  # summed apart, as shorter sums have smaller errors
            for half in (range(size // 2), range(size // 2, size)):
                cells = [variable(s, s.const_f(0.0)) for _ in range(count * len(part))]
                add_products(s, cells, count, half, size, factor, part, here)
                halves.append([s.b.load(cell) for cell in cells])
            for i, (x, y) in enumerate(zip(*halves, strict=True)):
                r, k = i // len(part), part[i % len(part)]
                store(s.at(row, r), k, s.b.fadd(x, y))

        in_blocks_of_rows(s, rows, block)
