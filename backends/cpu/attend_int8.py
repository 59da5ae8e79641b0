"""Attention in integers of 8 bits: products of bytes summed in 32 bits (AVX-512 VNNI and VBMI).

Queries are rounded to 8 bits for each row, centroids once for all (int8_layout), and the weights of
a tile of tokens, values' scales included, to unsigned 8 bits for each row.  Sums of products are
exact; a tile's scores and its part of an output become float32 by one multiplication each.

For scores a lane belongs to a token: rows of fields are transposed by dwords, and one instruction
adds four coordinates of 16 tokens.  For outputs a lane belongs to a coordinate: fields of four
tokens are interleaved byte by byte, and one instruction adds four tokens of 16 coordinates.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from .attend import in_blocks_of_rows
from .attend_call import CALL, OFFSETS, SCORE_BYTES, UNIT, Fields, Scratch, row_bytes, row_registers
from .attend_units import Place, gather_norms, places_of
from .int8_layout import (
    OFFSET,
    REGISTER,
    UPPER_SHIFT,
    Chunk,
    byte_table,
    chunks,
    key_order,
    packed_part,
    places,
    rounded_centroids,
)
from .kernels import Arguments, Plan
from .packing import packed_bytes
from .quantize import MAGIC
from .simd import F32, I1, I8, I32, I64, Register, Simd, Value, vector
from .softmax import LOWEST_POWER, State, across, state_floats, tanh, variable
from .tile import TILE, Address
from .transpose import unzip

LANES = 16  # of 32 bits
BYTES = vector(I8, REGISTER)
SUMS_AT_ONCE = 16  # registers of products
LOG2_E = 1.0 / math.log(2.0)
MARGIN = 12.0  # by which base-2 exponents of weights may exceed 0
POWER = (0.99992809, 0.69326099, 0.24261081, 0.05517144)  # 2**f for |f| <= 1/2, to 8e-5
TINY = 1e-30


# -- queries ---------------------------------------------------------------------------------------


class Query(NamedTuple):
    """Where a row's parts lie: `limbs` rows of int8 first."""

    limbs: int
    pitch: int  # from limb to limb
    scale: int  # float32: what a sum of products is worth as an exponent of 2
    bias: int  # int32: minus what the centroids' offset adds to the sum


@lru_cache(maxsize=64)
def query_of(plan: Plan) -> Query:
    limbs = limbs_of(plan.bits)
    pitch = -(-len(key_order(plan.dim, plan.bits)) // LANES) * LANES
    return Query(limbs, pitch, limbs * pitch, limbs * pitch + 4)


def limbs_of(bits: int) -> int:
    return 1


def round_query(s: Simd, plan: Plan, row: Value) -> None:
    """Replace a rotated query by its 8-bit form, a `Query`."""
    b, query = s.b, query_of(plan)
    parts = [s.load(s.floats, row, 64 * k) for k in range(query.pitch // LANES)]
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


# -- units -----------------------------------------------------------------------------------------


class Rows:
    """Sums of products of a tile, row by row, then their weights: SCORE_BYTES each."""

    WEIGHTS = 4 * TILE  # behind int32 sums: uint8 [TILE], four tokens in turn, see _add_values
    WORTH = WEIGHTS + TILE  # float32: the worth of one unit of weight

    def __init__(self, s: Simd, plan: Plan, scratch: Value) -> None:
        self.s, self.base = s, Scratch(s, plan, scratch).scores

    def __getitem__(self, row: Value) -> Value:
        """The address of a row."""
        return self.s.at(self.base, self.s.times(row, SCORE_BYTES))


def attend_head_int8(s: Simd, plan: Plan, a: Arguments, place: Place) -> None:
    """Scores, weights and outputs of a tile and a key/value head."""
    rows, h, here = place.unit["rows"], place.head, place.here
    scratch = Scratch(s, plan, a.scratch)
    s.outlined("norms", gather_norms, a.source, h, here, scratch.norms)
    where = (a.source, h, here, place.ahead, a.scratch)
    s.outlined("columns", partial(_write_columns, plan), *where)
    s.outlined("scores", partial(_scores, plan), rows, place.query, *where)
    softmax = (place.query, place.states, place.outputs, a.scratch)
    s.outlined(
        "softmax", partial(_softmax, plan), a.source, place.unit.address, h, place.first, *softmax
    )
    s.outlined("outputs", partial(_outputs, plan), rows, place.outputs, *where)


class Ahead:
    """Brings packed vectors of the next tile nearer, evenly over the time, in the order of memory.

    Then the processor sees where it goes on and fetches by itself: more lines can be on their way
    than a program can ask for.  In STEPS steps each head of this tile asks for four heads of a
    token a step; where their number is no multiple of four, some tokens are left to the processor.
    """

    STEPS = 16
    HEADS = TILE // STEPS  # of a token in each step

    def __init__(
        self, plan: Plan, s: Simd, side: str, call_address: Value, head: Value, ahead: Value
    ) -> None:
        b, call = s.b, Fields(s, call_address, CALL)
        self.s, self.heads = s, call["kv_heads"]
        self.size = packed_bytes(plan.dim, plan.bits if side == "key" else plan.value_bits)
        self.base, self.pitch = call[f"{side}_codes"], call[f"{side}_head"]
        self.offset, self.head = cgutils.alloca_once(b, I64), cgutils.alloca_once(b, I64)
        per_token = b.udiv(s.at(self.heads, self.HEADS - 1), s.int64(self.HEADS))
        done = s.times(head, self.STEPS)
        token = b.udiv(done, per_token)
        offsets = s.at(ahead, 8 * TILE * OFFSETS.index(f"{side}_codes"))
        b.store(s.at(offsets, s.times(token, 8)), self.offset)
        self.last = s.at(offsets, 8 * (TILE - 1))
        b.store(s.times(b.sub(done, b.mul(token, per_token)), self.HEADS), self.head)

    def step(self) -> None:
        s, b = self.s, self.s.b
        offset, head = b.load(self.offset), b.load(self.head)
        start = s.at(s.at(self.base, s.load(I64, offset)), b.mul(head, self.pitch))
        for _ in range(self.HEADS):
            s.prefetch(start, self.size, level=2)
            start = s.at(start, self.pitch)
        following = s.at(head, self.HEADS)
        turned = b.icmp_unsigned(">=", following, self.heads)
        b.store(b.select(turned, s.int64(0), following), self.head)
        following = s.at(offset, s.times(b.zext(turned, I64), 8))
        inside = b.icmp_unsigned("<", following, self.last)
        b.store(b.select(inside, following, self.last), self.offset)


# -- fields ----------------------------------------------------------------------------------------


def _fields(
    s: Simd, dim: int, bits: int, chunk: Chunk, rows: list[Value], *, interleaved: bool
) -> Register:
    """One chunk of REGISTER / chunk.size packed rows; rows are interleaved dword by dword, or lie
    side by side.
    """
    first, count = packed_part(chunk, dim, bits)
    room = chunk.size  # each row's share of the loaded bytes
    stream = s.concat([_load_bytes(s, row, first, count, room) for row in rows])
    per_row = chunk.size // 4
    dwords = [
        (g % len(rows), g // len(rows)) if interleaved else (g // per_row, g % per_row)
        for g in range(LANES)
    ]
    if bits != 3:
        if interleaved and len(rows) > 1:
            order = [row * per_row + dword for row, dword in dwords]
            stream = s.shuffle(s.b.bitcast(stream, s.ints), None, order)
        return s.b.bitcast(stream, BYTES)
    # 3 bytes hold 8 codes, the first one in the highest bits
    order = [row * room + 3 * dword + byte for row, dword in dwords for byte in (2, 1, 0, 0)]
    stream = s.shuffle(stream, None, order)
    shifts = s.const_i([half + shift for half in (0, 32) for shift in (18, 12, 6, 0)] * 8, I8)
    return s.call("llvm.x86.avx512.pmultishift.qb.512", BYTES, shifts, stream)


def _load_bytes(s: Simd, address: Value, first: int, count: int, room: int) -> Register:
    """`count` bytes from `first` on, zeros behind them; reads nothing else."""
    kind = vector(I8, room)
    if count == room:
        return s.load(kind, address, first)
    mask = ir.Constant(vector(I1, room), [int(i < count) for i in range(room)])
    pointer = s.b.inttoptr(s.at(address, first), ir.PointerType())
    arguments = pointer, ir.Constant(I32, 1), mask, ir.Constant(kind, None)
    return s.call(f"llvm.masked.load.v{room}i8.p0", kind, *arguments)


class ByteTables:
    """Look-up of all codes of a register of fields."""

    def __init__(self, s: Simd, dim: int, bits: int, offset: int) -> None:
        self.s, self.places = s, places(bits)
        self.tables = [
            s.const_i([(x + offset + 128) % 256 - 128 for x in byte_table(dim, bits, place)], I8)
            for place in self.places
        ]

    def __call__(self, fields: Register, codes: range) -> list[Register]:
        s = self.s
        shifted = s.b.bitcast(s.b.lshr(s.b.bitcast(fields, s.ints), s.const_i(UPPER_SHIFT)), BYTES)
        return [
            s.call(
                "llvm.x86.avx512.permvar.qi.512",
                BYTES,
                self.tables[code],
                shifted if self.places[code].shifted else fields,
            )
            for code in codes
        ]


def _add_products(s: Simd, cell: Value, unsigned: Register, signed: Register) -> None:
    """Each lane of the sum gains four products of bytes."""
    total = s.b.load(cell)
    u, v = (s.b.bitcast(x, s.ints) for x in (unsigned, signed))
    s.b.store(s.call("llvm.x86.avx512.vpdpbusd.512", s.ints, total, u, v), cell)


def _sum(s: Simd, start: Register) -> Value:
    cell = cgutils.alloca_once(s.b, s.ints)
    s.b.store(start, cell)
    return cell


# -- scores ----------------------------------------------------------------------------------------


def _write_columns(
    plan: Plan,
    s: Simd,
    call_address: Value,
    head: Value,
    here: Value,
    ahead: Value,
    scratch: Value,
) -> None:
    """Dwords of fields of the tile's keys, those of 16 tokens side by side."""
    packed = places_of(s, "key_codes", call_address, head, here)
    columns = Scratch(s, plan, scratch).tile
    with s.loop(TILE // LANES) as i:
        target = s.at(columns, s.times(i, 4 * LANES))
        tokens = [s.at(s.times(i, LANES), j) for j in range(LANES)]
        addresses = [packed(token) for token in tokens]
        for chunk in chunks(plan.dim, plan.bits):
            dwords = chunk.size // 4
            registers = [
                _fields(s, plan.dim, plan.bits, chunk, addresses[j::dwords], interleaved=False)
                for j in range(dwords)
            ]
            columns_of = _transpose(s, [s.b.bitcast(x, s.ints) for x in registers])
            for dword, column in enumerate(columns_of):
                s.store(column, target, 4 * TILE * (chunk.start // 4 + dword))


def _transpose(s: Simd, registers: list[Register]) -> list[Register]:
    """n registers of 16 / n blocks of n lanes, each block transposed."""
    result, size = list(registers), len(registers)
    bit = 1
    while bit < size:
        span, unit = (4, 1) if bit < 4 else (size, 4)
        for i in range(size):
            if not i & bit:
                result[i], result[i + bit] = unzip(s, result[i], result[i + bit], span, unit)
        bit *= 2
    return result


def _scores(
    plan: Plan,
    s: Simd,
    rows: Value,
    query: Value,
    call_address: Value,
    head: Value,
    here: Value,
    ahead: Value,
    scratch: Value,
) -> None:
    """Sums of products of each row and each key."""
    coming = Ahead(plan, s, "key", call_address, head, ahead)
    columns, scores = Scratch(s, plan, scratch).tile, Rows(s, plan, scratch)
    pitch, shape = row_bytes(s, plan), query_of(plan)
    tables = ByteTables(s, plan.dim, plan.bits, OFFSET)
    codes = range(len(places(plan.bits)))
    dwords = len(key_order(plan.dim, plan.bits)) // (4 * len(codes))

    def block(row: Value, count: int) -> None:
        queries = s.at(query, s.times(row, pitch))
        registers = range(TILE // LANES)
        sums = [
            [_sum(s, s.splat(s.load(I32, queries, pitch * r + shape.bias))) for _ in registers]
            for r in range(count)
        ]
        with s.loop(dwords) as dword:
            for _ in range(Ahead.STEPS // dwords):
                coming.step()
            column = s.at(columns, s.times(dword, 4 * TILE))
            at = s.at(queries, s.times(dword, 4 * len(codes)))
            centroids = [tables(s.load(BYTES, column, REGISTER * t), codes) for t in registers]
            for code in codes:
                for r in range(count):
                    q = s.splat(s.load(I32, at, pitch * r + 4 * code))
                    for t in registers:
                        _add_products(s, sums[r][t], centroids[t][code], q)
        for r in range(count):
            target = scores[s.at(row, r)]
            for t in registers:
                s.store(s.b.load(sums[r][t]), target, 4 * LANES * t)

    in_blocks_of_rows(s, rows, block)


# -- weights ---------------------------------------------------------------------------------------


def _softmax(
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
    end = b.trunc(b.sub(unit["stop"], first), I32)
    begin = b.trunc(first, I32)
    with s.loop(unit["rows"]) as r:
        row = b.add(unit["row"], r)
        low = b.sub(s.load(I32, call["first"], s.times(row, 4)), begin)
        high = b.sub(s.load(I32, call["last"], s.times(row, 4)), begin)
        high = b.select(b.icmp_signed("<", high, end), high, end)
        skip = b.add(b.mul(head, call["bias_head"]), b.mul(row, call["bias_row"]))
        bias = s.load(F32, call["bias"], skip)
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


# -- outputs ---------------------------------------------------------------------------------------


def _outputs(
    plan: Plan,
    s: Simd,
    rows: Value,
    outputs: Value,
    call_address: Value,
    head: Value,
    here: Value,
    ahead: Value,
    scratch: Value,
) -> None:
    """Add a tile's weighted values to the outputs."""
    packed = places_of(s, "value_codes", call_address, head, here)
    coming = Ahead(plan, s, "value", call_address, head, ahead)
    scores, pitch = Rows(s, plan, scratch), row_bytes(s, plan)

    def block(row: Value, count: int) -> None:
        at = s.at(outputs, s.times(row, pitch))
        weights, place = scores[row], 0
        for chunk in chunks(plan.dim, plan.value_bits):
            for parts, codes in _portions(plan, chunk, count):
                _add_values(s, plan, chunk, parts, codes, packed, coming, weights, count, at, place)
            place += chunk.size // LANES * len(places(plan.value_bits))

    in_blocks_of_rows(s, rows, block)


def _portions(plan: Plan, chunk: Chunk, rows: int) -> list[tuple[range, range]]:
    """Parts of a chunk and codes of a field whose sums fit into registers together."""
    parts, codes = chunk.size // LANES, len(places(plan.value_bits))
    most = SUMS_AT_ONCE // rows
    parts_at_once = min(parts, max(2, most // codes)) if parts > 1 else 1
    codes_at_once = min(codes, max(1, most // parts_at_once))
    return [
        (range(part, part + parts_at_once), range(code, code + codes_at_once))
        for part in range(0, parts, parts_at_once)
        for code in range(0, codes, codes_at_once)
    ]


def _add_values(
    s: Simd,
    plan: Plan,
    chunk: Chunk,
    parts: range,
    codes: range,
    packed: Address,
    coming: Ahead,
    weights: Value,
    rows: int,
    outputs: Value,
    first_register: int,
) -> None:
    """Some coordinates of all tokens of the tile.

    Weights of tokens 16 r + 4 l .. + 3 are dword 4 l + r of a row's.
    """
    b, bits = s.b, plan.value_bits
    together = REGISTER // chunk.size  # quads of tokens
    tables = ByteTables(s, plan.dim, bits, 0)
    zero = s.const_i(0)
    sums = [[[_sum(s, zero) for _ in codes] for _ in parts] for _ in range(rows)]
    with s.loop(4) as turn:
        dwords = s.at(weights, s.at(s.times(turn, 16), Rows.WEIGHTS))
        for quad in range(0, 4, together):
            quads = range(quad, quad + together)
            if chunk.start == parts.start == codes.start == 0:
                for _ in quads:
                    coming.step()
            w = [
                [s.splat(s.load(I32, dwords, SCORE_BYTES * r + 4 * q)) for q in quads]
                for r in range(rows)
            ]
            first = s.times(turn, 4)
            mixed = [
                _fields(
                    s,
                    plan.dim,
                    bits,
                    chunk,
                    [packed(s.at(first, 16 * q + token)) for q in quads],
                    interleaved=True,
                )
                for token in range(4)
            ]
            for i, part in enumerate(parts):
                for q in range(together):
                    fields = _interleaved(s, mixed, q + together * part)
                    for k, centroids in enumerate(tables(fields, codes)):
                        for r in range(rows):
                            _add_products(s, sums[r][i][k], w[r][q], centroids)
    all_codes, pitch = len(places(bits)), row_bytes(s, plan)
    for r in range(rows):
        worth = s.splat(s.load(F32, weights, SCORE_BYTES * r + Rows.WORTH))
        for i, part in enumerate(parts):
            for k, code in enumerate(codes):
                place = pitch * r + 64 * (first_register + part * all_codes + code)
                number = b.sitofp(b.load(sums[r][i][k]), s.floats)
                old = s.load(s.floats, outputs, place)
                s.store(s.multiply_add(number, worth, old), outputs, place)


def _interleaved(s: Simd, rows: list[Register], dword: int) -> Register:
    """Of every four dwords the one with a number: its bytes of four rows side by side."""
    half, quarter = divmod(dword, 2)

    def zip_units(a: Register, c: Register, size: int, upper: int) -> Register:
        """Units of `size` bytes, in turn from the lower (upper) halves of 16 bytes of a and c."""
        per = 8 // size
        kind = vector(ir.IntType(8 * size), REGISTER // size)
        lanes = [
            group * 16 // size + upper * per + i + register * (REGISTER // size)
            for group in range(4)
            for i in range(per)
            for register in (0, 1)
        ]
        a, c = s.b.bitcast(a, kind), s.b.bitcast(c, kind)
        return s.b.bitcast(s.b.shuffle_vector(a, c, s.const_i(lanes)), BYTES)

    pairs = [zip_units(rows[i], rows[i + 1], 1, half) for i in (0, 2)]
    return zip_units(pairs[0], pairs[1], 2, quarter)


__all__ = ["attend_head_int8", "round_query"]
