"""Registers of 64 fields: loading, looking up, transposing, multiplying and adding their codes."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .int8_layout import REGISTER, UPPER_SHIFT, Chunk, byte_table, packed_part, places
from .simd import I1, I8, I32, Register, Simd, Value, vector
from .transpose import unzip

LANES = 16  # of 32 bits
BYTES = vector(I8, REGISTER)


def load_fields(
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


def add_products(s: Simd, cell: Value, unsigned: Register, signed: Register) -> None:
    """Each lane of the sum gains four products of bytes."""
    total = s.b.load(cell)
    u, v = (s.b.bitcast(x, s.ints) for x in (unsigned, signed))
    s.b.store(s.call("llvm.x86.avx512.vpdpbusd.512", s.ints, total, u, v), cell)


def integer_sum(s: Simd, start: Register) -> Value:
    cell = cgutils.alloca_once(s.b, s.ints)
    s.b.store(start, cell)
    return cell


def transpose_blocks(s: Simd, registers: list[Register]) -> list[Register]:
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


def interleaved(s: Simd, rows: list[Register], dword: int) -> Register:
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
