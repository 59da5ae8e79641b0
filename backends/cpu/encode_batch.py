"""Encoding, a batch of vectors at a time: faster than row by row from two rounds on."""

from __future__ import annotations

from .columns import Columns, batches
from .convert import ITEM_SIZE, load_floats
from .kernels import Arguments, Plan
from .normalize import (
    final_scale,
    fold,
    is_unsafe,
    norm_of,
    normalize_memory,
)
from .packing import pack_words, packed_bytes
from .quantize import GAIN, Quantizer, header_value
from .simd import F32, Register, Simd, Value
from .transpose import fold_rows, transpose


def emit_encode_batch(s: Simd, plan: Plan, a: Arguments) -> None:
    """Vectors -> packed codes and norms."""
    batch = BatchEncoder(s, plan, a)
    with batches(s, a) as first:
        batch.emit(first)


class BatchEncoder:
    """Emits the encoding of one batch; loads its tables where it is made."""

    def __init__(self, s: Simd, plan: Plan, a: Arguments) -> None:
        self.s, self.plan, self.a = s, plan, a
        self.memory = Columns(s, plan, a, a.source_pitch)
        self.gain = header_value(s, a.tables, GAIN)
        shift = 32 - plan.bits if s.target.has_funnel else 0
        self.quantizer = Quantizer(s, a.tables, plan.bits, plan.cells, shift)
        self.row_bytes = packed_bytes(plan.dim, plan.bits)

    def emit(self, first: Value) -> None:
        """Encode the `width` vectors from number `first` on."""
        s, b, memory = self.s, self.s.b, self.memory
        per_word, bits = memory.codes_per_word, self.plan.bits
        self._load_rows(first)
        norm = s.load(s.floats, memory.norms)
        is_zero = b.fcmp_ordered("==", norm, s.const_f(0.0))
        factor = b.select(is_zero, s.const_f(0.0), b.fdiv(self.gain, norm))

        def quantise(registers: list[Register], column: Value, distance: int) -> None:
            word = b.udiv(column, s.int64(per_word))
            for k, x in enumerate(registers):
                code = self.quantizer(b.fmul(x, factor))
                place = s.times(s.at(word, k * distance // per_word), memory.size)
                # what was there before is shifted out, or stays above the codes
                so_far = s.load(s.ints, memory.words, place)
                if s.target.has_funnel:
                    longer = s.funnel(so_far, code, bits)
                else:
                    longer = b.add(b.shl(so_far, s.const_i(bits)), code)
                s.store(longer, memory.words, place)

        after = s.at(first, s.width)
        memory.rotate(s.at(self.a.source, b.mul(after, self.a.source_pitch)), quantise)
        self._write_codes(first)
        self._write_scales(first, norm)

    def _target(self, number: Value) -> Value:
        return self.s.at(self.a.target, self.s.times(number, self.row_bytes))

    def _load_rows(self, first: Value) -> None:
        """Rows in float32, rescaled where they have to be; norms and exponents."""
        s, b, plan, memory = self.s, self.s.b, self.plan, self.memory
        count, step = plan.dim // s.width, ITEM_SIZE[plan.dtype] * s.width
        squares = memory.columns  # not in use yet
        with s.loop(s.width) as u:
            # without it, stores to memory that isn't in the cache would hold up all later ones
            s.prefetch(self._target(self.memory.number(first, u)), self.row_bytes, write=True)
            source = s.at(self.a.source, b.mul(self.memory.number(first, u), self.a.source_pitch))
            row = s.at(memory.rows, s.times(u, memory.pitch))
            x = [load_floats(s, plan.dtype, source, step * k, s.width) for k in range(count)]
            for k, y in enumerate(x):
                s.store(y, row, memory.size * k)
            s.store(fold(s, [b.fmul(y, y) for y in x]), squares, s.times(u, memory.size))
        sums = fold_rows(s, [s.load(s.floats, squares, memory.size * u) for u in range(s.width)])
        s.store(norm_of(s, sums), memory.norms)
        s.store(s.const_i(0), memory.exponents)
        with b.if_then(s.any_lane(is_unsafe(s, sums)), likely=False), s.loop(s.width) as u:
            row = s.at(memory.rows, s.times(u, memory.pitch))
            norm, exponent = normalize_memory(s, row, count, memory.columns)
            s.store(norm, memory.norms, s.times(u, 4))
            s.store(exponent, memory.exponents, s.times(u, 4))

    def _write_codes(self, first: Value) -> None:
        """Words to rows, and their bytes to the target."""
        s, bits, memory = self.s, self.plan.bits, self.memory
        words, n = self.plan.dim // memory.codes_per_word, memory.codes_per_word
        numbers = [self.memory.number(first, u) for u in range(s.width)]
        for start in range(0, words, s.width):
            held = min(s.width, words - start)
            size = packed_bytes(held * n, bits)
            offset = packed_bytes(start * n, bits)
            columns = [s.load(s.ints, memory.words, memory.size * (start + t)) for t in range(held)]
            columns += [s.const_i(0)] * (s.width - held)
            for number, row in zip(numbers, transpose(s, columns), strict=True):
                stream = pack_words(s, row, n * bits)
                s.store(s.resize(stream, size), self._target(number), offset)

    def _write_scales(self, first: Value, norm: Register) -> None:
        s, b, memory = self.s, self.s.b, self.memory
        s.store(final_scale(s, norm, s.load(s.ints, memory.exponents)), memory.norms)
        left = b.sub(self.a.rows, first)
        left = b.select(b.icmp_signed("<", left, s.int64(s.width)), left, s.int64(s.width))
        target = s.at(self.a.scales, s.times(first, 4))
        with s.loop(left) as u:
            s.store(s.load(F32, memory.norms, s.times(u, 4)), target, s.times(u, 4))
