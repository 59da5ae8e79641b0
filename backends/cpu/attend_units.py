"""Attention kernels: units of work over pages.

A unit is a run of tokens of one sequence and a run of query rows.  It goes through its tokens tile
by tile and, within a tile, through the key/value heads, because the heads of a token lie side by
side in memory.  Units never share results, so nothing depends on how they are spread over threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from .ahead import Ahead, begin_ahead
from .attend import (
    Keys,
    KeyTile,
    Values,
    ValueTile,
    in_blocks_of_rows,
    outputs_block,
    rows_at_once,
    scores_block,
)
from .attend_call import CALL, OFFSETS, UNIT, Fields, Scratch, row_bytes, row_registers
from .byte_planes import ByteValues, KeyBytes, in_planes
from .kernels import Arguments, Plan
from .packing import packed_bytes
from .quantize import values_table
from .simd import F32, I32, I64, Simd, Value
from .softmax import State, Tile, Visible, softmax_row, state_floats
from .tile import TILE, KeyWindows, LookedUpKeys, PackedValues
from .tile_places import gather_norms, locate, places_of


class Run(NamedTuple):
    """What one task does: a unit, for some key/value heads."""

    unit: Fields
    first_head: Value
    stop_head: Value


class Place(NamedTuple):
    """Where the parts of a tile lie that belong to one key/value head; addresses."""

    unit: Fields
    head: Value  # its number
    first: Value  # token
    query: Value
    states: Value
    outputs: Value
    here: Value  # offsets of the tile's tokens


AttendHead = Callable[[Simd, Plan, Arguments, Place], None]


def attend_unit(
    s: Simd,
    plan: Plan,
    a: Arguments,
    call: Fields,
    task: Value,
    next_unit: Callable[[], Value],
    head: AttendHead,
) -> None:
    """A unit, or some key/value heads of it.

    head : what is done with a tile and a key/value head

    next_unit : claims another task and says which, or gives this one where there is none; that is
        done during the last tile, to fetch the next task's first tile ahead
    """
    b, pitch, run = s.b, row_bytes(s, plan), _run(s, call, task)
    unit = run.unit
    start, stop, rows = unit["start"], unit["stop"], unit["rows"]
    scratch, state_bytes = Scratch(s, plan, a.scratch), 4 * state_floats(s.width)
    states = s.at(call["states"], s.times(unit["place"], state_bytes))
    outputs = s.at(call["outputs"], s.times(unit["place"], pitch))
    heads = b.sub(run.stop_head, run.first_head)
    done = b.mul(run.first_head, rows)
    with s.loop(b.mul(heads, rows)) as i:
        place = b.add(done, i)
        State(s, s.at(states, s.times(place, state_bytes))).clear()
        row = s.at(outputs, s.times(place, pitch))
        for k in range(row_registers(plan, s.width)):
            s.store(s.const_f(0.0), row, 4 * s.width * k)
    tiles = b.udiv(b.add(b.sub(stop, start), s.int64(TILE - 1)), s.int64(TILE))
    locate(s, call, unit, start, s.int64(0), scratch.offsets)
    following = cgutils.alloca_once(b, I64)
    b.store(task, following)
    with s.loop(tiles) as i:
        first = b.add(start, s.times(i, TILE))
        size = 8 * TILE * len(OFFSETS)
        odd = s.times(b.and_(i, s.int64(1)), size)
        here = s.at(scratch.offsets, odd)
        ahead = s.at(scratch.offsets, b.sub(s.int64(size), odd))
        with b.if_then(b.icmp_signed("==", s.at(i, 1), tiles)):
            b.store(next_unit(), following)
        leave = b.icmp_signed("!=", b.load(following), task)
        coming_run = _run(s, call, b.load(following))
        coming = b.select(leave, coming_run.unit["start"], s.at(first, TILE))
        other_heads = b.sub(coming_run.first_head, run.first_head)
        locate(s, call, coming_run.unit, coming, other_heads, ahead)
        coming_heads = b.sub(coming_run.stop_head, coming_run.first_head)
        begin_ahead(s, call, scratch.cursors, ahead, run.first_head, coming_heads)
        with s.loop(heads) as i:
            h = b.add(run.first_head, i)
            done = b.mul(h, rows)
            state = s.at(states, s.times(done, state_bytes))
            output = s.at(outputs, s.times(done, pitch))
            row = b.add(b.mul(h, call["rows"]), unit["row"])
            query = s.at(call["rotated"], s.times(row, pitch))
            head(s, plan, a, Place(unit, h, first, query, state, output, here))


def attend_head(s: Simd, plan: Plan, a: Arguments, place: Place) -> None:
    """Scores, weights and outputs in float32."""
    rows, h, here = place.unit["rows"], place.head, place.here
    scratch = Scratch(s, plan, a.scratch)
    # The norms come first, so that their stores are done when vectors of them are loaded.
    s.outlined("norms", gather_norms, a.source, h, here, scratch.norms)
    where = (a.source, h, here, a.scratch)
    s.outlined("windows", partial(_write_windows, plan), *where)
    few = s.b.icmp_signed("<=", rows, s.int64(most_rows_looked_up(s, plan)))
    scores = (a.scratch, rows, place.query)
    with s.b.if_else(few) as (then, otherwise):
        with then:
            s.outlined("scores", partial(_scores, plan), *scores, a.tables, *where)
        with otherwise:
            s.outlined("key_tile", partial(_write_key_tile, plan), a.tables, *where)
            s.outlined("scores_of_tile", partial(_scores_of_tile, plan), *scores)
    softmax = (a.source, place.unit.address, h, place.first, place.states, a.scratch)
    s.outlined("softmax", partial(_softmax, plan), *softmax)
    outputs = (a.scratch, rows, place.states, place.outputs)
    with s.b.if_else(few) as (then, otherwise):
        with then:
            s.outlined("outputs", partial(_outputs, plan), *outputs, a.signs, *where)
        with otherwise:
            s.outlined("value_tile", partial(_write_value_tile, plan), a.signs, *where)
            s.outlined("outputs_of_tile", partial(_outputs_of_tile, plan), *outputs)


def _run(s: Simd, call: Fields, task: Value) -> Run:
    """Units behind the whole ones are divided by heads, into tasks that follow each other."""
    b, whole, parts, heads = s.b, call["whole_units"], call["parts"], call["kv_heads"]
    behind = b.sub(task, whole)
    is_whole = b.icmp_signed("<", behind, s.int64(0))
    number = b.select(is_whole, task, b.add(whole, b.sdiv(behind, parts)))
    part = b.srem(behind, parts)
    first, stop = (b.sdiv(b.mul(x, heads), parts) for x in (part, s.at(part, 1)))
    unit = Fields(s, s.at(call["unit_list"], s.times(number, 8 * len(UNIT))), UNIT)
    zero = s.int64(0)
    return Run(unit, b.select(is_whole, zero, first), b.select(is_whole, heads, stop))


def most_rows_looked_up(s: Simd, plan: Plan) -> int:
    """Up to how many rows it costs less to look up for each block than to fill tiles."""
    in_one_step = {"avx512": 32, "avx2": 8, "generic": 0}[s.target.level]
    cheap = max(1 << plan.bits, 1 << plan.value_bits) <= in_one_step
    return rows_at_once(s) * (2 if cheap else 1)


def _write_windows(
    plan: Plan,
    s: Simd,
    call_address: Value,
    head: Value,
    here: Value,
    scratch: Value,
) -> None:
    """Windows of one head of the tile's keys."""
    packed = places_of(s, "key_codes", call_address, head, here)

    def rows(i: Value) -> list[Value]:
        return [packed(s.at(s.times(i, s.width), j)) for j in range(s.width)]

    windows = Scratch(s, plan, scratch).windows
    if in_planes(s.target, plan.dim, plan.bits):
        KeyBytes(s, plan.dim, windows).write(rows)
    else:
        KeyWindows(s, plan.bits, plan.dim, windows).write(rows)


def _scores(plan: Plan, s: Simd, scratch: Value, rows: Value, query: Value, *where: Value) -> None:
    with _keys(plan, s, *where) as keys:
        _score_rows(plan, s, keys, scratch, rows, query)


def _write_key_tile(plan: Plan, s: Simd, *where: Value) -> None:
    scratch = where[-1]
    with _keys(plan, s, *where) as keys:
        KeyTile(s, plan.dim, Scratch(s, plan, scratch).tile).write(keys)


def _scores_of_tile(plan: Plan, s: Simd, scratch: Value, rows: Value, query: Value) -> None:
    keys = KeyTile(s, plan.dim, Scratch(s, plan, scratch).tile)
    _score_rows(plan, s, keys, scratch, rows, query)


def _score_rows(plan: Plan, s: Simd, keys: Keys, scratch: Value, rows: Value, query: Value) -> None:
    pitch = row_bytes(s, plan)
    scores = Scratch(s, plan, scratch).scores

    def block(row: Value, count: int) -> None:
        to = s.at(scores, s.times(row, 4 * TILE))
        scores_block(s, count, plan.dim, keys, s.at(query, s.times(row, pitch)), to)

    in_blocks_of_rows(s, rows, block)


def _outputs(
    plan: Plan,
    s: Simd,
    scratch: Value,
    rows: Value,
    states: Value,
    outputs: Value,
    *where: Value,
) -> None:
    with _values(plan, s, *where) as values:
        _weigh_rows(plan, s, values, scratch, rows, states, outputs)


def _write_value_tile(plan: Plan, s: Simd, *where: Value) -> None:
    scratch = where[-1]
    with _values(plan, s, *where) as values:
        ValueTile(s, plan.dim, Scratch(s, plan, scratch).tile).write(values)


def _outputs_of_tile(
    plan: Plan, s: Simd, scratch: Value, rows: Value, states: Value, outputs: Value
) -> None:
    values = ValueTile(s, plan.dim, Scratch(s, plan, scratch).tile)
    _weigh_rows(plan, s, values, scratch, rows, states, outputs)


def _weigh_rows(
    plan: Plan,
    s: Simd,
    values: Values,
    scratch: Value,
    rows: Value,
    states: Value,
    outputs: Value,
) -> None:
    pitch = row_bytes(s, plan)
    scores = Scratch(s, plan, scratch).scores

    def block(row: Value, count: int) -> None:
        weights = s.at(scores, s.times(row, 4 * TILE))
        state = s.at(states, s.times(row, 4 * state_floats(s.width)))
        to = s.at(outputs, s.times(row, pitch))
        outputs_block(s, count, plan.dim, values, weights, state, to)

    in_blocks_of_rows(s, rows, block)


@contextmanager
def _keys(
    plan: Plan,
    s: Simd,
    tables: Value,
    call_address: Value,
    head: Value,
    here: Value,
    scratch: Value,
) -> Iterator[Keys]:
    """Keys of the tile; besides, those of the next tile are fetched nearer."""
    memory = Scratch(s, plan, scratch)
    coming = Ahead(s, "key", packed_bytes(plan.dim, plan.bits), call_address, memory.cursors)
    if in_planes(s.target, plan.dim, plan.bits):
        yield KeyBytes(s, plan.dim, memory.windows, coming.step)
    else:
        windows = KeyWindows(s, plan.bits, plan.dim, memory.windows)
        yield LookedUpKeys(windows, values_table(s, tables, plan.bits), coming.step)
    coming.finish()


@contextmanager
def _values(
    plan: Plan,
    s: Simd,
    tables: Value,
    call_address: Value,
    head: Value,
    here: Value,
    scratch: Value,
) -> Iterator[Values]:
    """Values of the tile; besides, those of the next tile are fetched nearer."""
    size, cursors = packed_bytes(plan.dim, plan.value_bits), Scratch(s, plan, scratch).cursors
    coming = Ahead(s, "value", size, call_address, cursors)
    packed = places_of(s, "value_codes", call_address, head, here)
    if in_planes(s.target, plan.dim, plan.value_bits):
        yield ByteValues(s, plan.dim, packed, coming.step)
    else:
        table = values_table(s, tables, plan.value_bits)
        yield PackedValues(s, plan.value_bits, plan.dim, packed, table, coming.step)
    coming.finish()


@contextmanager
def rows_of_unit(
    s: Simd, call: Fields, unit: Fields, head: Value, first: Value
) -> Iterator[tuple[Value, Value, Value, Value]]:
    """A loop over rows: number in the unit, tokens seen of a tile (from, to), bias of scores."""
    b = s.b
    end = b.trunc(b.sub(unit["stop"], first), I32)
    begin = b.trunc(first, I32)
    with s.loop(unit["rows"]) as r:
        row = b.add(unit["row"], r)
        low = b.sub(s.load(I32, call["first"], s.times(row, 4)), begin)
        high = b.sub(s.load(I32, call["last"], s.times(row, 4)), begin)
        high = b.select(b.icmp_signed("<", high, end), high, end)
        skip = b.add(b.mul(head, call["bias_head"]), b.mul(row, call["bias_row"]))
        yield r, low, high, s.load(F32, call["bias"], skip)


def _softmax(
    plan: Plan,
    s: Simd,
    call_address: Value,
    unit_address: Value,
    head: Value,
    first: Value,
    states: Value,
    scratch_address: Value,
) -> None:
    """Scores become weights of the looked-up values, norms included."""
    b = s.b
    call, unit = Fields(s, call_address, CALL), Fields(s, unit_address, UNIT)
    scratch = Scratch(s, plan, scratch_address)
    cap = b.bitcast(b.trunc(call["soft_cap"], I32), F32)
    tile = Tile(scratch.norms, s.at(scratch.norms, 4 * TILE), cap)
    zero, whole = ir.Constant(I32, 0), ir.Constant(I32, TILE)
    with rows_of_unit(s, call, unit, head, first) as (r, low, high, bias):
        scores = s.at(scratch.scores, s.times(r, 4 * TILE))
        state = State(s, s.at(states, s.times(r, 4 * state_floats(s.width))))
        starts = b.icmp_signed("<=", low, zero)
        sees_all = b.and_(starts, b.icmp_signed(">=", high, whole))
        with b.if_else(sees_all, likely=True) as (then, otherwise):
            with then:
                softmax_row(s, tile, scores, bias, None, state)
            with otherwise:
                softmax_row(s, tile, scores, bias, Visible(low, high), state)
