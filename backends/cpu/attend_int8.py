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

from .ahead import Ahead
from .attend import in_blocks_of_rows
from .attend_call import SCORE_BYTES, Scratch, row_bytes
from .attend_units import Place
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
from .simd import F32, I32, Simd, Value
from .tile import TILE, Address
from .tile_places import gather_norms, places_of

SUMS_AT_ONCE = 16  # registers of products
STEPS = TILE // 4  # of fetching ahead, for a head; for keys, half of them with the transposition


def attend_head_int8(s: Simd, plan: Plan, a: Arguments, place: Place) -> None:
    """Scores, weights and outputs of a tile and a key/value head."""
    rows, h, here = place.unit["rows"], place.head, place.here
    scratch = Scratch(s, plan, a.scratch)
    s.outlined("norms", gather_norms, a.source, h, here, scratch.norms)
    where = (a.source, h, here, a.scratch)
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


def _write_columns(
    plan: Plan,
    s: Simd,
    call_address: Value,
    head: Value,
    here: Value,
    scratch: Value,
) -> None:
    """Dwords of fields of the tile's keys, those of 16 tokens side by side."""
    packed = places_of(s, "key_codes", call_address, head, here)
    memory = Scratch(s, plan, scratch)
    size, columns = packed_bytes(plan.dim, plan.bits), memory.tile
    coming = Ahead(s, "key", size, call_address, memory.cursors)
    with s.loop(TILE // LANES) as i:
        for _ in range(STEPS // 2 // (TILE // LANES)):
            coming.step_in_each_quarter()
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
    coming.finish()


def _scores(
    plan: Plan,
    s: Simd,
    rows: Value,
    query: Value,
    call_address: Value,
    head: Value,
    here: Value,
    scratch: Value,
) -> None:
    """Sums of products of each row and each key."""
    memory, scores = Scratch(s, plan, scratch), Rows(s, plan, scratch)
    size = packed_bytes(plan.dim, plan.bits)
    coming, columns = Ahead(s, "key", size, call_address, memory.cursors), memory.tile
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
        together = 2 - dwords % 2
        with s.loop(dwords // together) as turn:
            for _ in range(-(-STEPS // 2 * together // dwords)):
                coming.step_in_each_quarter()
            for part in range(together):
                dword = s.at(s.times(turn, together), part)
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
    coming.finish()


def _outputs(
    plan: Plan,
    s: Simd,
    rows: Value,
    outputs: Value,
    call_address: Value,
    head: Value,
    here: Value,
    scratch: Value,
) -> None:
    """Add a tile's weighted values to the outputs."""
    packed = places_of(s, "value_codes", call_address, head, here)
    size, cursors = packed_bytes(plan.dim, plan.value_bits), Scratch(s, plan, scratch).cursors
    coming = Ahead(s, "value", size, call_address, cursors)
    scores, pitch = Rows(s, plan, scratch), row_bytes(s, plan)

    def block(row: Value, count: int) -> None:
        at = s.at(outputs, s.times(row, pitch))
        weights, place = scores[row], 0
        portions = [
            (chunk, parts, codes)
            for chunk in chunks(plan.dim, plan.value_bits)
            for parts, codes in _portions(plan, chunk, count)
        ]
        for number, (chunk, parts, codes) in enumerate(portions):
            place = chunk.start // LANES * len(places(plan.value_bits))
            chores = range(number, 4, min(4, len(portions)))  # the first ones share them
            _add_values(
                s, plan, chunk, parts, codes, packed, coming, chores, weights, count, at, place
            )

    in_blocks_of_rows(s, rows, block)
    coming.finish()


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
    chores: range,
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
            for _ in set(quads) & set(chores):
                coming.step_in_each_quarter()
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
