"""Attention in integers of 8 bits: products of bytes summed in 32 bits (AVX-512 VNNI and VBMI).

Queries are rounded to 8 bits for each row, centroids once for all (int8_layout), and the weights of
a tile of tokens, values' scales included, to unsigned 8 bits for each row.  Sums of products are
exact; a tile's scores and its part of an output become float32 by one multiplication each.

For scores a lane belongs to a token: rows of fields are transposed by dwords, and one instruction
adds four coordinates of 16 tokens.  For outputs a lane belongs to a coordinate: fields of four
tokens are interleaved byte by byte, and one instruction adds four tokens of 16 coordinates.
"""

from __future__ import annotations

from functools import partial

from numba.core import cgutils

from .attend import in_blocks_of_rows
from .attend_call import CALL, OFFSETS, SCORE_BYTES, Fields, Scratch, row_bytes
from .attend_units import Place, gather_norms, places_of
from .int8_layout import (
    OFFSET,
    REGISTER,
    Chunk,
    chunks,
    key_order,
    places,
)
from .int8_registers import (
    BYTES,
    LANES,
    ByteTables,
    add_products,
    integer_sum,
    interleaved,
    load_fields,
    transpose_blocks,
)
from .int8_rows import Rows, query_of, softmax_int8
from .kernels import Arguments, Plan
from .packing import packed_bytes
from .simd import F32, I32, I64, Simd, Value
from .tile import TILE, Address

SUMS_AT_ONCE = 16  # registers of products


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
        "softmax",
        partial(softmax_int8, plan),
        a.source,
        place.unit.address,
        h,
        place.first,
        *softmax,
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
                load_fields(s, plan.dim, plan.bits, chunk, addresses[j::dwords], interleaved=False)
                for j in range(dwords)
            ]
            columns_of = transpose_blocks(s, [s.b.bitcast(x, s.ints) for x in registers])
            for dword, column in enumerate(columns_of):
                s.store(column, target, 4 * TILE * (chunk.start // 4 + dword))


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
            [
                integer_sum(s, s.splat(s.load(I32, queries, pitch * r + shape.bias)))
                for _ in registers
            ]
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
                        add_products(s, sums[r][t], centroids[t][code], q)
        for r in range(count):
            target = scores[s.at(row, r)]
            for t in registers:
                s.store(s.b.load(sums[r][t]), target, 4 * LANES * t)

    in_blocks_of_rows(s, rows, block)


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
    sums = [[[integer_sum(s, zero) for _ in codes] for _ in parts] for _ in range(rows)]
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
                load_fields(
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
                    fields = interleaved(s, mixed, q + together * part)
                    for k, centroids in enumerate(tables(fields, codes)):
                        for r in range(rows):
                            add_products(s, sums[r][i][k], w[r][q], centroids)
    all_codes, pitch = len(places(bits)), row_bytes(s, plan)
    for r in range(rows):
        worth = s.splat(s.load(F32, weights, SCORE_BYTES * r + Rows.WORTH))
        for i, part in enumerate(parts):
            for k, code in enumerate(codes):
                place = pitch * r + 64 * (first_register + part * all_codes + code)
                number = b.sitofp(b.load(sums[r][i][k]), s.floats)
                old = s.load(s.floats, outputs, place)
                s.store(s.multiply_add(number, worth, old), outputs, place)
