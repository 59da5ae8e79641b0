"""A batch of `width` vectors in columns: register c holds coordinate c of every vector, one a lane.

No stride of the Walsh-Hadamard transform needs shuffles then, and what is done once a vector (norm,
scale) is done once a batch.  The columns lie in the first-level cache, and passes over them do a
few strides each.  Rows become columns by a transposition that does the strides within a register on
its way (transpose.py), so the first round costs what it costs in rows; each further one is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .convert import ITEM_SIZE
from .kernels import Arguments, Plan, signs_pitch
from .rotate import butterflies, load_signs
from .simd import CACHE_LINE, F32, Register, Simd, Value
from .transpose import transpose, unzip

Take = Callable[[list[Register], Value, int], None]  # (registers, first column, distance)


@contextmanager
def batches(s: Simd, a: Arguments) -> Iterator[Value]:
    """A loop over the batches that cover the rows; the number of the first vector of each."""
    with s.loop(s.b.udiv(s.at(a.rows, s.width - 1), s.int64(s.width))) as turn:
        yield s.times(turn, s.width)


class Columns:
    """The scratch memory of a batch, and its rotation: rows on one side, columns on the other.

    rows : address of float32 [width, dim + width]; the register more keeps the rows in different
        sets of the cache
    columns : float32 [dim, width]
    words : int32 [dim / codes_per_word, width]
    norms, exponents : float32 and int32 [width]
    vector_pitch : bytes from vector to vector outside, in the source or the target
    """

    def __init__(self, s: Simd, plan: Plan, a: Arguments, vector_pitch: Value) -> None:
        self.s, self.plan, self.a = s, plan, a
        self.size = 4 * s.width  # of a register
        self.pitch = 4 * (plan.dim + s.width)  # of a row
        self.vector_pitch = vector_pitch
        self.writes = plan.kind == "decode_batch"
        self.fetches = not plan.streams
        # as many codes as fit, if they end at the end of a byte or in its middle
        self.codes_per_word = min(s.width, 8 if plan.bits <= 4 else 4)
        self.last = s.b.sub(a.rows, s.int64(1))
        self.rows = a.scratch
        self.columns = s.at(self.rows, s.width * self.pitch)
        self.words = s.at(self.columns, plan.dim * self.size)
        self.norms = s.at(self.words, plan.dim * self.size // self.codes_per_word)
        self.exponents = s.at(self.norms, self.size)

    def number(self, first: Value, u: int | Value) -> Value:
        """Of vector u of the batch; behind the last vector that one is done again."""
        number = self.s.at(first, u)
        return self.s.b.select(self.s.b.icmp_signed("<", number, self.last), number, self.last)

    def rotate(self, following: Value, take: Take) -> None:
        """Rotate the rows by two rounds or more and hand over the columns of the result.

        following : address of the next batch's vectors, which are fetched into the cache meanwhile
        take : emits what is done with some columns, in a loop that comes to each column once
        """
        s = self.s
        quarter = s.times(self.vector_pitch, s.width // 4)  # of a batch

        def take_and_fetch(registers: list[Register], first: Value, distance: int) -> None:
            self.fetch(s.b.add(following, s.times(quarter, 2)), s.width // 2, first, distance)
            take(registers, first, distance)

        self._transpose_rows(following)
        with s.loop(s.b.sub(self.a.parameter, s.int64(1))) as turn:
            self._high_strides(self._store)
            step = s.at(turn, 1)
            self._low_strides(step, s.b.add(following, s.b.mul(step, quarter)))
        self._high_strides(take_and_fetch)

    def rotate_back(self, following: Value, look_up: Callable[[Value], list[Register]]) -> None:
        """Rotate columns back by two rounds or more, all but the strides from `width` on and the
        signs of step 0, which are left to be done in rows.

        following : address of where the next batch's vectors will be, all but the last quarter of
            which are fetched meanwhile
        look_up : emits the columns of a block of `width`
        """
        s, blocks = self.s, self.plan.dim // self.s.width
        quarter = s.width // 4  # of a batch
        with s.loop(blocks) as j:
            self.fetch(following, quarter, j, blocks)
            self._store(butterflies(s, look_up(j)), s.times(j, s.width), 1)
        self._high_strides(self._store)
        following = s.b.add(following, s.times(self.vector_pitch, quarter))
        last = s.b.sub(self.a.parameter, s.int64(1))
        with s.loop(s.b.sub(last, s.int64(1))) as turn:
            with s.loop(blocks) as j:
                self.fetch(following, quarter, j, blocks)
                self._store(
                    self._signed_low_strides(s.b.sub(last, turn), j), s.times(j, s.width), 1
                )
            self._high_strides(self._store)
        with s.loop(blocks) as j:
            self.fetch(following, 2 * quarter, j, blocks)
            rows = transpose(s, self._signed_low_strides(s.int64(1), j))
            for u, row in enumerate(rows):
                s.store(row, self.rows, s.at(s.times(j, self.size), u * self.pitch))

    def _transpose_rows(self, following: Value) -> None:
        """Rows to columns, with the signs of step 0 and the strides below `width`."""
        s = self.s
        with s.loop(self.plan.dim // s.width) as j:
            self.fetch(following, s.width // 4, j, self.plan.dim // s.width)
            column = s.times(j, self.size)
            signs = load_signs(s, self.a.signs, column)
            even_signs, odd_signs = unzip(s, signs, signs, 4, 1)

            def combine(
                stage: int,
                even: Register,
                odd: Register,
                signs: tuple[Register, Register] = (even_signs, odd_signs),
            ) -> tuple[Register, Register]:
                if stage == 0:
                    return self._signed_butterfly(even, odd, *signs)
                return s.b.fadd(even, odd), s.b.fsub(even, odd)

            places = [s.at(column, u * self.pitch) for u in range(s.width)]
            rows = [s.load(s.floats, self.rows, place) for place in places]
            self._store(transpose(s, rows, combine), s.times(j, s.width), 1)

    def _low_strides(self, step: Value, following: Value) -> None:
        """The signs of a step and the strides below `width`."""
        s, blocks = self.s, self.plan.dim // self.s.width
        with s.loop(blocks) as j:
            self.fetch(following, s.width // 4, j, blocks)
            self._store(self._signed_low_strides(step, j), s.times(j, s.width), 1)

    def _signed_low_strides(self, step: Value, block: Value) -> list[Register]:
        """The columns of a block of `width`, with the signs of a step and these strides done."""
        s = self.s
        first = s.times(block, s.width)
        x = self._load(first, 1, s.width)
        pitch = signs_pitch(self.plan.dim, s.width)
        signs = s.at(s.at(self.a.signs, s.times(step, pitch)), s.times(first, 4))
        sign = [s.splat(s.load(F32, signs, 4 * c)) for c in range(s.width)]
        for c in range(0, s.width, 2):
            x[c : c + 2] = self._signed_butterfly(*x[c : c + 2], *sign[c : c + 2])
        return butterflies(s, x, stride=2)

    def _high_strides(self, take: Take) -> None:
        """The strides from `width` on; the last pass hands its columns over."""
        s, dim, done = self.s, self.plan.dim, self.s.width
        while True:
            radix = min(s.target.registers, dim // done)
            finished = done * radix == dim
            with s.loop(dim // (done * radix)) as i, s.loop(done) as j:
                first = s.b.add(s.times(i, done * radix), j)
                x = butterflies(s, self._load(first, done, radix))
                (take if finished else self._store)(x, first, done)
            if finished:
                return
            done *= radix

    def _signed_butterfly(
        self, x: Register, y: Register, x_sign: Register, y_sign: Register
    ) -> tuple[Register, Register]:
        """Sum and difference of x and y with signs of +1 or -1: three instructions, not four."""
        s = self.s
        x = s.b.fmul(x, x_sign)
        return s.multiply_add(y, y_sign, x), s.multiply_add(s.b.fneg(y), y_sign, x)

    def _load(self, first: Value, distance: int, count: int) -> list[Register]:
        s = self.s
        base = s.at(self.columns, s.times(first, self.size))
        return [s.load(s.floats, base, self.size * distance * k) for k in range(count)]

    def _store(self, registers: list[Register], first: Value, distance: int) -> None:
        s = self.s
        base = s.at(self.columns, s.times(first, self.size))
        for k, x in enumerate(registers):
            s.store(x, base, self.size * distance * k)

    def fetch(self, vectors: Value, count: int, turn: Value, turns: int) -> None:
        """Prefetch `count` vectors outside, a share in each of `turns` turns.

        Spread like this, memory works all the time; a burst of prefetches would stall.
        """
        if not self.fetches:
            return
        s, pitch = self.s, self.vector_pitch
        many = max(1, count // turns)  # vectors in a turn
        shares = max(1, turns // count)  # of a vector
        share = max(CACHE_LINE, ITEM_SIZE[self.plan.dtype] * self.plan.dim // shares)
        number = s.b.udiv(s.times(turn, many), s.int64(shares))
        # the last byte of each piece that is as long as a line: where vectors straddle lines, the
        # first line has been fetched with what came before
        offset = s.at(s.times(s.b.urem(turn, s.int64(shares)), share), CACHE_LINE - 1)
        base = s.at(s.b.add(vectors, s.b.mul(number, pitch)), offset)
        for k in range(many):
            s.prefetch(s.b.add(base, s.times(pitch, k)), share, write=self.writes)
