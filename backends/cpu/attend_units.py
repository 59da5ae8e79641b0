"""Attention kernels: units of work over pages, and the merging of their partial results.

A unit is a run of tokens of one sequence and a run of query rows.  It goes through its tokens tile
by tile and, within a tile, through the key/value heads, because the heads of a token lie side by
side in memory.  Units never share results, so nothing depends on how they are spread over threads.
"""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from .attend import (
    NOTHING,
    STATE_BYTES,
    exp,
    in_blocks_of_rows,
    scores_block,
    softmax_row,
    values_block,
    variable,
)
from .kernels import Arguments, Plan
from .packing import packed_bytes
from .quantize import values_table
from .simd import F32, I32, I64, Simd, Value
from .tile import TILE, look_up, registers_of

# What all units of a call share, as int64: addresses, and strides in bytes.
CALL = (
    *("key_codes", "key_block", "key_token", "key_head"),
    *("key_norms", "key_norm_block", "key_norm_token", "key_norm_head"),
    *("value_codes", "value_block", "value_token", "value_head"),
    *("value_norms", "value_norm_block", "value_norm_token", "value_norm_head"),
    *("block_size", "kv_heads"),
    "gains",  # float32: of keys, of values, the soft cap or 0
    *("query", "query_head"),  # float32 [kv_heads, rows of the batch, registers * width]
    *("bias", "bias_head"),  # float32 [kv_heads, rows], added to scaled scores
    *("first", "last"),  # int32 [rows], the tokens each row sees
    *("states", "outputs"),  # partial results: maximum, sum, decay; float32 [registers * width]
    *("result_states", "results", "result_head"),  # merged: the same, by head and row
)
# One unit: block table, its first row and their number, its tokens, its place among partial results
# (counted in rows; head h and row r are at place + h * rows + r).
UNIT = ("blocks", "row", "rows", "start", "stop", "place")
# Rows whose partial results lie in `chunks` units behind each other.
MERGE = ("place", "chunks", "rows", "row")

OFFSETS = ("key_codes", "key_norms", "value_codes", "value_norms")  # of each token of a tile


class Fields:
    """int64 fields in memory, by name."""

    def __init__(self, s: Simd, address: Value, names: tuple[str, ...]) -> None:
        self.s, self.address, self.names = s, address, names

    def __getitem__(self, name: str) -> Value:
        return self.s.load(I64, self.address, 8 * self.names.index(name))


def attend_scratch_bytes(dim: int, rows: int, width: int) -> int:
    """A tile, scores, gains, and the offsets of two tiles."""
    tile = 4 * width * registers_of(dim, width) * TILE
    return tile + 4 * TILE * (rows + 2) + 2 * 8 * TILE * len(OFFSETS)


class Scratch:
    """Addresses within a thread's scratch memory."""

    def __init__(self, s: Simd, dim: int, base: Value) -> None:
        self.offsets = base  # int64 [2, len(OFFSETS), TILE]
        self.gains = s.at(base, 2 * 8 * TILE * len(OFFSETS))  # float32 [2, TILE]
        self.tile = s.at(self.gains, 2 * 4 * TILE)
        self.scores = s.at(self.tile, 4 * s.width * registers_of(dim, s.width) * TILE)


def emit_attend(s: Simd, plan: Plan, a: Arguments) -> None:
    """a.rows units at a.target; a.source holds the call, a.signs the tables of the values."""
    with s.loop(a.rows) as u:
        unit = s.at(a.target, s.times(u, 8 * len(UNIT)))
        _attend_unit(s, plan, a, Fields(s, a.source, CALL), Fields(s, unit, UNIT))


def _attend_unit(s: Simd, plan: Plan, a: Arguments, call: Fields, unit: Fields) -> None:
    b = s.b
    start, stop, rows = unit["start"], unit["stop"], unit["rows"]
    place, heads = unit["place"], call["kv_heads"]
    registers = registers_of(plan.dim, s.width)
    pitch = 4 * s.width * registers
    scratch = Scratch(s, plan.dim, a.scratch)
    states = s.at(call["states"], s.times(place, STATE_BYTES))
    outputs = s.at(call["outputs"], s.times(place, pitch))
    with s.loop(b.mul(heads, rows)) as i:
        s.store(ir.Constant(F32, NOTHING), states, s.times(i, STATE_BYTES))
        s.store(ir.Constant(F32, 0.0), states, s.at(s.times(i, STATE_BYTES), 4))
        row = s.at(outputs, s.times(i, pitch))
        for k in range(registers):
            s.store(s.const_f(0.0), row, 4 * s.width * k)
    tiles = b.udiv(b.add(b.sub(stop, start), s.int64(TILE - 1)), s.int64(TILE))
    _locate(s, call, unit, start, scratch.offsets)
    with s.loop(tiles) as i:
        first = b.add(start, s.times(i, TILE))
        size = 8 * TILE * len(OFFSETS)
        odd = s.times(b.and_(i, s.int64(1)), size)
        here = s.at(scratch.offsets, odd)
        ahead = s.at(scratch.offsets, b.sub(s.int64(size), odd))
        _locate(s, call, unit, b.add(first, s.int64(TILE)), ahead)
        with s.loop(heads) as h:
            done = b.mul(h, rows)
            state = s.at(states, s.times(done, STATE_BYTES))
            output = s.at(outputs, s.times(done, pitch))
            query = s.at(call["query"], b.mul(h, call["query_head"]))
            query = s.at(query, s.times(unit["row"], pitch))
            where = (a.source, h, here, ahead, scratch.tile)
            # The gains come first, so that their stores are done when vectors of them are loaded.
            s.outlined("gains", _gather_gains, a.source, h, here, scratch.gains)
            s.outlined("keys", partial(_look_up_tile, plan, "key"), a.tables, *where)
            scores = partial(_scores, registers)
            s.outlined("scores", scores, rows, query, scratch.tile, scratch.scores)
            softmax = (a.source, unit.address, h, first, state, a.scratch)
            s.outlined("softmax", partial(_softmax, plan), *softmax)
            s.outlined("values", partial(_look_up_tile, plan, "value"), a.signs, *where)
            weigh = partial(_weigh, registers)
            s.outlined("weigh", weigh, rows, scratch.scores, scratch.tile, state, output)


def _scores(registers: int, s: Simd, rows: Value, query: Value, tile: Value, scores: Value) -> None:
    pitch = 4 * s.width * registers

    def block(row: Value, count: int) -> None:
        from_, to = s.at(query, s.times(row, pitch)), s.at(scores, s.times(row, 4 * TILE))
        scores_block(s, count, registers, from_, tile, to)

    in_blocks_of_rows(s, rows, block)


def _weigh(
    registers: int, s: Simd, rows: Value, scores: Value, tile: Value, states: Value, outputs: Value
) -> None:
    pitch = 4 * s.width * registers

    def block(row: Value, count: int) -> None:
        weights = s.at(scores, s.times(row, 4 * TILE))
        state = s.at(states, s.times(row, STATE_BYTES))
        values_block(s, count, registers, weights, tile, state, s.at(outputs, s.times(row, pitch)))

    in_blocks_of_rows(s, rows, block)


def _locate(s: Simd, call: Fields, unit: Fields, first: Value, offsets: Value) -> None:
    """Byte offsets of TILE tokens from `first` on; behind the last token, the last one again."""
    b = s.b
    final = b.sub(unit["stop"], s.int64(1))
    block_size = b.trunc(call["block_size"], I32)
    with s.loop(TILE) as j:
        token = b.add(first, j)
        token = b.trunc(b.select(b.icmp_signed("<", token, final), token, final), I32)
        page = b.zext(b.udiv(token, block_size), I64)
        slot = b.zext(b.urem(token, block_size), I64)
        block = s.load(I64, unit["blocks"], s.times(page, 8))
        for i, name in enumerate(OFFSETS):
            stride = name.replace("_codes", "").replace("_norms", "_norm")
            offset = b.add(
                b.mul(block, call[f"{stride}_block"]), b.mul(slot, call[f"{stride}_token"])
            )
            s.store(offset, offsets, s.at(s.times(j, 8), 8 * TILE * i))


def _offset(s: Simd, offsets: Value, name: str, j: Value) -> Value:
    return s.load(I64, offsets, s.at(s.times(j, 8), 8 * TILE * OFFSETS.index(name)))


def _look_up_tile(
    plan: Plan,
    side: str,
    s: Simd,
    tables: Value,
    call_address: Value,
    head: Value,
    here: Value,
    ahead: Value,
    tile: Value,
) -> None:
    """Look up one head of the tile's tokens, and fetch the next tile's codes into the cache."""
    bits = plan.bits if side == "key" else plan.value_bits
    table = values_table(s, tables, bits)
    call = Fields(s, call_address, CALL)
    base = s.at(call[f"{side}_codes"], s.b.mul(head, call[f"{side}_head"]))
    pitch = 4 * s.width * registers_of(plan.dim, s.width)
    with s.loop(TILE) as j:
        coming = s.at(base, _offset(s, ahead, f"{side}_codes", j))
        s.prefetch(coming, packed_bytes(plan.dim, bits))
        packed = s.at(base, _offset(s, here, f"{side}_codes", j))
        look_up(s, table, bits, plan.dim, packed, s.at(tile, s.times(j, pitch)))


def _gather_gains(s: Simd, call_address: Value, head: Value, here: Value, gains: Value) -> None:
    """Norms of the tile's tokens, times the gain of their side: [2 (keys, values), TILE]."""
    call = Fields(s, call_address, CALL)
    for i, side in enumerate(("key", "value")):
        base = s.at(call[f"{side}_norms"], s.b.mul(head, call[f"{side}_norm_head"]))
        gain = s.load(F32, call["gains"], 4 * i)
        with s.loop(TILE) as j:
            norm = s.load(F32, s.at(base, _offset(s, here, f"{side}_norms", j)))
            s.store(s.b.fmul(norm, gain), gains, s.at(s.times(j, 4), 4 * TILE * i))


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
    scratch = Scratch(s, plan.dim, scratch_address)
    cap = s.load(F32, call["gains"], 8)
    end = b.trunc(b.sub(unit["stop"], first), I32)
    begin = b.trunc(first, I32)
    with s.loop(unit["rows"]) as r:
        row = b.add(unit["row"], r)
        low = b.sub(s.load(I32, call["first"], s.times(row, 4)), begin)
        high = b.sub(s.load(I32, call["last"], s.times(row, 4)), begin)
        high = b.select(b.icmp_signed("<", high, end), high, end)
        bias = s.load(F32, s.at(call["bias"], b.mul(head, call["bias_head"])), s.times(row, 4))
        softmax_row(
            s,
            s.at(scratch.scores, s.times(r, 4 * TILE)),
            scratch.gains,
            s.at(scratch.gains, 4 * TILE),
            bias,
            cap,
            low,
            high,
            s.at(states, s.times(r, STATE_BYTES)),
        )


def emit_merge(s: Simd, plan: Plan, a: Arguments) -> None:
    """a.rows merges at a.target: chunks of the same rows become one result, divided by its sum."""
    call = Fields(s, a.source, CALL)
    heads = call["kv_heads"]
    with s.loop(a.rows) as m:
        merge = Fields(s, s.at(a.target, s.times(m, 8 * len(MERGE))), MERGE)
        with s.loop(heads) as h, s.loop(merge["rows"]) as r:
            _merge_row(s, plan, call, merge, h, r)


def _merge_row(s: Simd, plan: Plan, call: Fields, merge: Fields, head: Value, r: Value) -> None:
    b = s.b
    registers = registers_of(plan.dim, s.width)
    pitch = 4 * s.width * registers
    rows = merge["rows"]
    place = b.add(merge["place"], b.add(b.mul(head, rows), r))
    step = b.mul(call["kv_heads"], rows)  # from chunk to chunk
    top = variable(s, s.const_f(NOTHING))
    with s.loop(merge["chunks"]) as c:
        state = _state(s, call, b.add(place, b.mul(c, step)))
        s.b.store(s.maximum(s.splat(s.load(F32, state)), b.load(top)), top)
    total = variable(s, s.const_f(0.0))
    sums = [variable(s, s.const_f(0.0)) for _ in range(registers)]
    with s.loop(merge["chunks"]) as c:
        at = b.add(place, b.mul(c, step))
        state = _state(s, call, at)
        weight = exp(s, b.fsub(s.splat(s.load(F32, state)), b.load(top)))
        part = s.splat(s.load(F32, state, 4))
        b.store(s.multiply_add(weight, part, b.load(total)), total)
        output = s.at(call["outputs"], s.times(at, pitch))
        for k, cell in enumerate(sums):
            value = s.load(s.floats, output, 4 * s.width * k)
            b.store(s.multiply_add(weight, value, b.load(cell)), cell)
    whole = b.load(total)
    seen = b.fcmp_ordered(">", whole, s.const_f(0.0))
    share = b.fdiv(s.const_f(1.0), b.select(seen, whole, s.const_f(1.0)))
    row = b.add(merge["row"], r)
    result = s.at(call["results"], b.add(b.mul(head, call["result_head"]), s.times(row, pitch)))
    for k, cell in enumerate(sums):
        s.store(b.fmul(b.load(cell), share), result, 4 * s.width * k)
    count = b.udiv(call["result_head"], s.int64(pitch))  # rows of the batch
    final = s.at(call["result_states"], s.times(b.add(b.mul(head, count), row), STATE_BYTES))
    s.store(s.first(b.load(top)), final)
    s.store(s.first(whole), final, 4)


def _state(s: Simd, call: Fields, place: Value) -> Value:
    return s.at(call["states"], s.times(place, STATE_BYTES))


__all__ = ["CALL", "MERGE", "UNIT", "attend_scratch_bytes", "emit_attend", "emit_merge"]
