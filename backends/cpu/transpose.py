"""Between rows and columns: `width` registers of `width` lanes, transposed on the way.

Each stage trades one bit of the lane number for one bit of the register number, by two shuffles for
two registers.  What it puts side by side are the partners of one stride, so that a stage of the
Walsh-Hadamard transform, or of a sum over lanes, costs no shuffles of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from .simd import Register, Simd

Combine = Callable[[int, Register, Register], tuple[Register, Register]]  # (stage, even, odd)


def unzip(s: Simd, a: Register, b: Register, span: int, unit: int) -> tuple[Register, Register]:
    """The even and the odd units of every span of lanes: those of a, then those of b."""

    def lanes(odd: int) -> list[int]:
        starts = [
            start + i + register * s.width
            for start in range(0, s.width, span)
            for register in (0, 1)
            for i in range(odd * unit, span, 2 * unit)
        ]
        return [start + lane for start in starts for lane in range(unit)]

    return s.shuffle(a, b, lanes(0)), s.shuffle(a, b, lanes(1))


def keep(stage: int, even: Register, odd: Register) -> tuple[Register, Register]:
    return even, odd


def transpose(s: Simd, registers: list[Register], combine: Combine = keep) -> list[Register]:
    """`width` registers -> the same number, lane l of register r in lane r of register l.

    combine : applied to each pair of results of a stage: lanes whose numbers differ by 2**stage
    """
    result, stage = list(registers), 0
    while 1 << stage < s.width:
        bit = 1 << stage
        span, unit = (4, 1) if bit < 4 else (s.width, 4)
        for i in range(s.width):
            if not i & bit:
                even, odd = unzip(s, result[i], result[i + bit], span, unit)
                result[i], result[i + bit] = combine(stage, even, odd)
        stage += 1
    return result


def fold_rows(s: Simd, registers: list[Register]) -> Register:
    """Fold the lanes of each of `width` registers in halves; lane r holds the sum of register r."""
    result = dict(enumerate(registers))
    stages = {16: [(16, 8, 4), (16, 4, 8)], 8: [(8, 4, 4)], 4: []}[s.width]
    for span, unit, bit in [*stages, (4, 2, 1), (4, 1, 2)]:
        result = {
            i: s.b.fadd(*unzip(s, x, result[i | bit], span, unit))
            for i, x in result.items()
            if not i & bit
        }
    return result[0]
