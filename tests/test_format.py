"""The numeric format: stored bits that may never change, and an implementation without floats."""

from __future__ import annotations

import csv
import math
import random
from fractions import Fraction
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from turboquant_np import FORMAT_VERSION, TurboQuant
from turboquant_np.rotation import haar_rotation, mt19937_raw
from turboquant_np.testing import assert_bits_equal

# -- golden files ----------------------------------------------------------------------------------

with np.load(Path(__file__).parent / "golden" / "format_1.npz") as archive:
    GOLDEN = dict(archive)
CASES = sorted({name.rpartition("/")[0] for name in GOLDEN if name.count("/") == 5})


def test_there_is_a_golden_file_for_this_version() -> None:
    assert FORMAT_VERSION == 1
    assert len(CASES) == 42


@pytest.mark.parametrize("case", CASES)
def test_golden_bits(case: str, backend: str) -> None:
    head_dim, bits, rotation, scale, seed = case.split("/")
    tq = TurboQuant(
        head_dim=int(head_dim),
        bits=int(bits),
        rotation=rotation,
        scale=scale,
        seed=int(seed),
        backend=backend,
    )
    packed, norms = tq.encode(GOLDEN[f"{head_dim}/x"])
    assert_bits_equal(packed, GOLDEN[f"{case}/packed"])
    assert_bits_equal(norms, GOLDEN[f"{case}/norms"])
    decoded = tq.decode(GOLDEN[f"{case}/packed"], GOLDEN[f"{case}/norms"], dtype=np.float32)
    assert_bits_equal(decoded, GOLDEN[f"{case}/decoded"])


# -- docs/format.md once more, in exact rational arithmetic ----------------------------------------
#
# Every rounding to float32 or float64 below is an explicit call, done with integers.


def rounded(q: Fraction | int, digits: int, lowest: int) -> Fraction:
    """The nearest number of `digits` binary digits whose last one is at least 2**lowest."""
    q = Fraction(q)
    if q == 0:
        return q
    exponent = q.numerator.bit_length() - q.denominator.bit_length()  # floor(log2 |q|) or above it
    if abs(q) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, lowest)
    return round(q / unit) * unit  # round() of a Fraction takes ties to even


def f32(q: Fraction | int) -> Fraction:
    return rounded(q, 24, -149)


def f64(q: Fraction | int) -> Fraction:
    return rounded(q, 53, -1074)


def sqrt(q: Fraction, to: object) -> Fraction:
    """Correctly rounded: the root to 200 places, and one more digit that says whether it ended."""
    places = 200
    scaled = q * 4**places
    floor = math.isqrt(int(scaled))
    root = Fraction(2 * floor + (floor * floor != scaled), 2 * 2**places)
    return f32(root) if to is f32 else f64(root)


def fold(values: list[Fraction]) -> Fraction:
    size = 1
    while size < len(values):
        size *= 2
    values = values + [Fraction(0)] * (size - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [f32(values[i] + values[half + i]) for i in range(half)]
    return values[0]


def raw_stream(seed: int, count: int) -> list[int]:
    """MT19937 after init_genrand, run by Python's own generator."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFFFFFF)
    generator = random.Random()
    generator.setstate((3, (*state, 624), None))
    return [generator.getrandbits(32) for _ in range(count)]


def butterflies(v: list[Fraction], low: int, high: int) -> list[Fraction]:
    v, stride = v[:], 1
    while stride < high - low:
        for i in range(low, high):
            if not (i - low) & stride:
                v[i], v[i + stride] = f32(v[i] + v[i + stride]), f32(v[i] - v[i + stride])
        stride *= 2
    return v


class Exact:
    """The codec of one setting, for lists of Fractions."""

    def __init__(self, d: int, bits: int, rotation: str, scale: str, seed: int) -> None:
        self.d, self.bits, self.rotation, self.scale = d, bits, rotation, scale
        self.power_of_two = d & (d - 1) == 0
        self.growth = Fraction(1)
        if rotation == "haar":
            self.matrix = haar_rotation(d, seed).fixed.astype(int).tolist()
        else:
            steps = 3 if self.power_of_two else 6
            self.signs = [[2 * (u & 1) - 1 for u in raw_stream(seed + r, d)] for r in range(steps)]
            if self.power_of_two:
                self.growth = sqrt(Fraction(d**3), f64)
        root = sqrt(Fraction(d), f64)
        self.encode_gain = f32(f64(root / self.growth))
        self.decode_gain = f64(1 / f64(root * self.growth))
        text = (files("turboquant_np.data") / "codebooks.csv").read_text("ascii")
        key = [str(d if d < 64 else 0), str(bits)]
        row = next(line for line in csv.reader(text.splitlines()) if line[:2] == key)
        positive = [f64(Fraction(number)) for number in row[2:]]
        table = [-c for c in reversed(positive)] + positive
        self.centroids = [f32(c) for c in table]
        self.thresholds = [f32(f64(a + b) / 2) for a, b in pairwise(table)]

    def half_round(self, v: list[Fraction], step: int, *, back: bool) -> list[Fraction]:
        d, p, half = self.d, 1 << (self.d.bit_length() - 1), self.d // 2
        if p == d:
            return butterflies(v, 0, d)
        low = 0 if step % 2 == 0 else d - p
        factor = f32(f64(1 / sqrt(Fraction(p), f64)))
        mixing = f32(sqrt(Fraction(1, 2), f64))

        def transform(v: list[Fraction]) -> list[Fraction]:
            v = butterflies(v, low, low + p)
            return [f32(t * factor) if low <= i < low + p else t for i, t in enumerate(v)]

        def mix(v: list[Fraction]) -> list[Fraction]:
            v = v[:]
            for i, j in zip(range(half), range(d - half, d), strict=True):
                v[i], v[j] = f32(f32(v[i] + v[j]) * mixing), f32(f32(v[i] - v[j]) * mixing)
            return v

        return transform(mix(v)) if back else mix(transform(v))

    def rotate(self, v: list[Fraction]) -> list[Fraction]:
        if self.rotation == "haar":
            largest = max(map(abs, v))
            shift = Fraction(1)
            while largest and largest * shift >= 2**22:
                shift /= 2
            while largest and largest * shift < 2**21:
                shift *= 2
            fixed = [round(t * shift) for t in v]
            sums = [sum(m * t for m, t in zip(row, fixed, strict=True)) for row in self.matrix]
            return [f32(Fraction(s) / shift / 2**24) for s in sums]
        for step, signs in enumerate(self.signs):
            v = [s * t for s, t in zip(signs, v, strict=True)]
            v = self.half_round(v, step, back=False)
        return v

    def encode(self, x: list[Fraction]) -> tuple[int, Fraction]:
        """The codes as one big integer, and the stored scale."""
        squares, power = fold([f32(t * t) for t in x]), Fraction(1)
        largest = max(map(abs, x))
        if largest and not Fraction(1, 2**60) <= squares <= 2**60:
            while largest * power >= 2:
                power /= 2
            while largest * power < 1:
                power *= 2
            x = [f32(t * power) for t in x]
            squares = fold([f32(t * t) for t in x])
        norm = sqrt(squares, f32)
        factor = f32(self.encode_gain / norm) if norm else Fraction(0)
        z = [f32(t * factor) for t in self.rotate(x)]
        codes = [sum(t > threshold for threshold in self.thresholds) for t in z]
        c = [self.centroids[code] for code in codes]
        ratio = Fraction(1)
        if norm and self.scale != "norm":
            along = fold([f32(a * b) for a, b in zip(z, c, strict=True)])
            square = fold([f32(a * a) for a in c])
            ratio = f32(along / square if self.scale == "mse" else self.d / along)
        stream = 0
        for code in codes:
            stream = stream << self.bits | code
        return stream, f32(f32(norm * ratio) / power)

    def decode(self, stream: int, scale: Fraction) -> list[Fraction]:
        top = self.bits * (self.d - 1)
        codes = [stream >> (top - self.bits * i) & (2**self.bits - 1) for i in range(self.d)]
        if self.rotation == "haar":
            fixed = [round(self.centroids[code] * 2**19) for code in codes]
            sums = [sum(fixed[i] * self.matrix[i][j] for i in range(self.d)) for j in range(self.d)]
            unit = [f32(f64(s * self.decode_gain / 2**43)) for s in sums]
        else:
            unit = [f32(self.centroids[code] * f32(self.decode_gain)) for code in codes]
            for step, signs in reversed(list(enumerate(self.signs))):
                unit = self.half_round(unit, step, back=True)
                unit = [s * t for s, t in zip(signs, unit, strict=True)]
        return [f32(t * scale) for t in unit]


def test_the_exact_codec_rounds_as_numpy_does() -> None:
    rng = np.random.default_rng(8)
    a, b = np.ldexp(rng.standard_normal((2, 500)), rng.integers(-70, 60, (2, 500))).astype("f4")
    for p, q in zip(a, b, strict=True):
        assert f32(Fraction(float(p)) * Fraction(float(q))) == Fraction(float(p * q))
        assert f32(Fraction(float(p)) / Fraction(float(q))) == Fraction(float(p / q))
        assert sqrt(Fraction(float(abs(p))), f32) == Fraction(float(np.sqrt(abs(p))))
    assert raw_stream(77, 1000) == mt19937_raw(77, 1000).tolist()


@pytest.mark.parametrize(
    ("d", "bits", "rotation", "scale"),
    [
        (8, 3, "hadamard", "norm"),
        (8, 1, "hadamard", "mse"),
        (8, 5, "haar", "unbiased"),
        (6, 3, "hadamard", "unbiased"),
        (6, 4, "haar", "mse"),
        (7, 2, "hadamard", "mse"),
        (13, 8, "hadamard", "norm"),
        (64, 4, "hadamard", "unbiased"),
    ],
)
def test_format_in_rational_arithmetic(
    d: int, bits: int, rotation: str, scale: str, backend: str
) -> None:
    exact = Exact(d, bits, rotation, scale, seed=11)
    tq = TurboQuant(head_dim=d, bits=bits, rotation=rotation, scale=scale, seed=11, backend=backend)
    # In the last rows squares are subnormal: their sum shows whether the row was rescaled first.
    exponents = np.array([0, 0, 0, 10, -25, -40, 62, 120, -100, -145, *[-64] * 8])[:, None]
    x = np.ldexp(np.random.default_rng(9).standard_normal((18, d)), exponents).astype(np.float32)
    x[1] = np.arange(d) == 1
    x[2] = 0
    packed, norms = tq.encode(x)
    decoded = tq.decode(packed, norms, dtype=np.float32)
    for row in range(len(x)):
        stream, stored = exact.encode([Fraction(float(t)) for t in x[row]])
        padding = 8 * tq.packed_dim - d * bits
        assert packed[row].tobytes() == (stream << padding).to_bytes(tq.packed_dim, "big")
        assert Fraction(float(norms[row])) == stored
        assert [Fraction(float(t)) for t in decoded[row]] == exact.decode(stream, stored)
