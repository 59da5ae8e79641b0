"""What a kernel is: the constants it is specialised for, its arguments, its first check.

All kernels take the same ten integers, addresses mostly, and return a status, so that one cached
function type serves them all (compile.py).  encode.py, decode.py and dense.py write their bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import NamedTuple

from llvmlite import ir

from .quantize import SMALLEST_NORMAL
from .simd import CACHE_LINE, F32, I32, PAGE, Simd, Value, target

OK, FLUSHES_SUBNORMALS = 0, 1
STREAMED = 48 << 20  # bytes of vectors from which on decoding writes past the caches


@dataclass(frozen=True)
class Plan:
    """Constants of one specialisation.

    Attributes
    ----------
    kind : {"encode", "encode_batch", "fix", "encode_product", "decode", "decode_batch",
        "look_up", "look_up_scaled", "score", "decode_product", "attend", "attend_int8"}
    dim, bits : int
    dtype : str
        Element type of the vectors on the side that is not codes.
    scale : {"norm", "mse", "unbiased"}
    cells : int
        Of the quantiser's grid; 0 if it has none.
    output : {"codes", "z"}
        Whether an encoder writes packed codes or the float32 coordinates they are made from.
    value_bits : int
        Attention: bits of the values; `bits` are those of the keys.
    streams : bool
        Whether a decoder's vectors go past the caches.
    """

    kind: str
    dim: int
    bits: int = 8
    dtype: str = "float32"
    scale: str = "norm"
    cells: int = 0
    output: str = "codes"
    value_bits: int = 0
    streams: bool = False

    def key(self) -> str:
        """A text from which `from_key` makes an equal plan."""
        return " ".join(map(str, astuple(self)))

    @classmethod
    def from_key(cls, key: str) -> Plan:
        kind, dim, bits, dtype, scale, cells, output, value_bits, streams = key.split()
        numbers = {"dim": dim, "bits": bits, "cells": cells, "value_bits": value_bits}
        return cls(
            kind,
            **{name: int(number) for name, number in numbers.items()},
            dtype=dtype,
            scale=scale,
            output=output,
            streams=streams == str(True),
        )

    @property
    def is_power_of_two(self) -> bool:
        return self.dim & (self.dim - 1) == 0


class Arguments(NamedTuple):
    """The arguments of every kernel, all int64; addresses unless said otherwise."""

    source: Value
    source_pitch: Value  # bytes from row to row
    target: Value  # rows follow each other
    scales: Value  # float32 [rows]
    rows: Value  # their number
    tables: Value  # see quantize.host_tables
    signs: Value  # float32 [steps + 1, signs_pitch / 4], see rotate.RowRotation
    parameter: Value  # rounds of the rotation, or the bits of a float
    scratch: Value  # zeros, scratch_floats(plan) of them
    exponents: Value  # int32 [rows, 2], dense rotations only


def signs_pitch(dim: int, width: int) -> int:
    """Bytes from the signs of a step to those of the next, a register more than needed.

    Whole pages from half a page on, so that signs and scratch rows, which begin at a page, have the
    same offset in it: a load waits for an earlier store with an equal offset, even elsewhere.
    """
    size = 4 * (dim + width)
    unit = PAGE if size > PAGE // 2 else CACHE_LINE
    return -(-size // unit) * unit


def row_floats(dim: int, width: int) -> int:
    """Length of a scratch row: zero-padded to a power of two of registers, and one more."""
    return max(width, 1 << (dim - 1).bit_length()) + width


def scratch_floats(dim: int, width: int) -> int:
    """Room for what the kernels keep beside their arguments."""
    rows = 4 * row_floats(dim, width)  # a row, partial sums, two rows of products
    return max(rows, 3 * width * (dim + width))  # columns.Columns


def registers_of_row(dim: int, width: int) -> int:
    return (row_floats(dim, width) - width) // width


def stays_in_registers(s: Simd, plan: Plan) -> bool:
    """Whether whole rows are held in (virtual) registers."""
    most = 32 if s.width == 4 else 16
    return plan.is_power_of_two and s.width <= plan.dim <= most * s.width


def can_batch(width: int, plan: Plan) -> bool:
    """Whether batches of `width` vectors can be encoded and decoded, which pays from two rounds on.

    Not where a batch would not fit the first-level cache, or where looking up thresholds in memory
    takes most of the time anyway.
    """
    fits = plan.is_power_of_two and width <= plan.dim <= 128 and plan.bits <= 5
    return fits and plan.output == "codes" and plan.scale == "norm"


def can_stream(dim: int, size: int, address: int, pitch: int) -> bool:
    """Whether results of `size` bytes should go past the caches, and can.

    That spares reading the lines that are going to be written.  Smaller results stay in the caches,
    where whoever asked for them finds them.  Lines stored in two halves take longer than usual.
    """
    cpu = target()
    if cpu.level != "avx512" or size < STREAMED or dim % cpu.width:
        return False
    stored_at_once = pitch // dim * cpu.width
    return stored_at_once % CACHE_LINE == 0 and address % CACHE_LINE == 0


def rows_at_once(s: Simd, plan: Plan) -> int:
    """How many rows in registers keep the arithmetic units busy without spilling much."""
    return max(1, min(4, s.target.registers * s.width // plan.dim))


def each_register(s: Simd, dim: int, body: Callable[[Value, int], None]) -> None:
    """body(first element, count) for every register of a row; the last may be partial."""
    if dim >= s.width:
        with s.loop(dim // s.width) as i:
            body(s.times(i, s.width), s.width)
    if dim % s.width:
        body(s.int64(dim - dim % s.width), dim % s.width)


def each_group(
    s: Simd, dim: int, registers: int, body: Callable[[Value, Value, int], None]
) -> None:
    """body(group number, first element, count) for groups of `registers` registers."""
    size = registers * s.width
    if dim >= size:
        with s.loop(dim // size) as i:
            body(i, s.times(i, size), size)
    if dim % size:
        body(s.int64(dim // size), s.int64(dim - dim % size), dim % size)


def subnormals_survive(s: Simd, tables: Value) -> Value:
    """Whether the CPU keeps subnormal results and operands, as IEEE 754 says.

    Some libraries switch that off for their thread (flush-to-zero, denormals-are-zero).
    """
    b = s.b
    tiny = s.load(F32, tables, 4 * SMALLEST_NORMAL)
    there = b.fmul(tiny, ir.Constant(F32, 0.5))
    back = b.bitcast(b.fmul(there, ir.Constant(F32, 2.0)), I32)
    return b.icmp_signed("==", back, b.bitcast(tiny, I32))
