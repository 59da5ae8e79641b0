"""Decoding, a batch of vectors at a time: faster than row by row from two rounds on."""

from __future__ import annotations

from .columns import Columns, batches
from .convert import ITEM_SIZE, store_floats
from .kernels import Arguments, Plan
from .packing import load_words, packed_bytes
from .quantize import values_table
from .rotate import butterflies, load_signs
from .simd import F32, Register, Simd, Value
from .transpose import transpose


def emit_decode_batch(s: Simd, plan: Plan, a: Arguments) -> None:
    """Packed codes and scales -> vectors."""
    batch = BatchDecoder(s, plan, a)
    with batches(s, a) as first:
        batch.emit(first)
    if plan.streams:
        s.finish_streams()


class BatchDecoder:
    """Emits the decoding of one batch; loads its table where it is made."""

    def __init__(self, s: Simd, plan: Plan, a: Arguments) -> None:
        self.s, self.plan, self.a = s, plan, a
        self.memory = Columns(s, plan, a, s.int64(ITEM_SIZE[plan.dtype] * plan.dim))
        self.table = values_table(s, a.tables, plan.bits)

    def emit(self, first: Value) -> None:
        """Decode the `width` vectors from number `first` on."""
        self._load_codes(first)
        following = self._target(self.s.at(first, self.s.width))
        self.memory.rotate_back(following, self._look_up)
        self._write_rows(first, following)

    def _load_codes(self, first: Value) -> None:
        s, n, bits, memory = self.s, self.memory.codes_per_word, self.plan.bits, self.memory
        words = self.plan.dim // n
        numbers = [self.memory.number(first, u) for u in range(s.width)]
        sources = [s.at(self.a.source, s.b.mul(i, self.a.source_pitch)) for i in numbers]
        for start in range(0, words, s.width):
            held = min(s.width, words - start)
            offset = packed_bytes(start * n, bits)
            rows = [load_words(s, n, bits, source, offset, held) for source in sources]
            rows = [s.as_floats(row) for row in rows]
            for t, column in enumerate(transpose(s, rows)[:held]):
                s.store(column, memory.words, memory.size * (start + t))

    def _look_up(self, block: Value) -> list[Register]:
        """The columns of a block of `width`."""
        s, n = self.s, self.memory.codes_per_word
        base = s.at(self.memory.words, s.times(block, self.memory.size * (s.width // n)))
        columns = []
        for t in range(s.width // n):
            word = s.load(s.ints, base, self.memory.size * t)
            for i in range(n):
                shift = self.plan.bits * (n - 1 - i)
                columns.append(self.table(s.b.lshr(word, s.const_i(shift)) if shift else word))
        return columns

    def _target(self, number: Value) -> Value:
        return self.s.at(self.a.target, self.s.b.mul(number, self.memory.vector_pitch))

    def _write_rows(self, first: Value, following: Value) -> None:
        """Strides from `width` on, signs of step 0, scale."""
        s, plan, memory = self.s, self.plan, self.memory
        quarter = s.width // 4  # of a batch
        following = s.b.add(following, s.times(memory.vector_pitch, 3 * quarter))
        with s.loop(s.width) as u:
            memory.fetch(following, quarter, u, s.width)
            # codes too: one line each, at 4 bits, is more than some processors fetch in time
            coming = s.b.mul(s.b.add(s.at(first, s.width), u), self.a.source_pitch)
            s.prefetch(s.at(self.a.source, coming), packed_bytes(plan.dim, plan.bits))
            number = self.memory.number(first, u)
            row = s.at(memory.rows, s.times(u, memory.pitch))
            places = [memory.size * k for k in range(plan.dim // s.width)]
            x = butterflies(s, [s.load(s.floats, row, place) for place in places])
            scale = s.splat(s.load(F32, self.a.scales, s.times(number, 4)))
            target = self._target(number)
            for k, y in enumerate(x):
                y = s.b.fmul(y, load_signs(s, self.a.signs, s.int64(places[k])))
                offset = ITEM_SIZE[plan.dtype] * s.width * k
                y = s.b.fmul(y, scale)
                store_floats(s, plan.dtype, y, target, offset, s.width, streams=plan.streams)
