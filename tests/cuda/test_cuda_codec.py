"""The cuda backend equals the reference bit for bit, on every kind of input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.testing import assert_bits_equal

cupy: Any = pytest.importorskip("cupy")
ml_dtypes: Any = pytest.importorskip("ml_dtypes")

DTYPES = ["float16", "bfloat16", "float32", "float64"]
USUAL_DIMS = [64, 80, 96, 112, 128, 192, 256]
OTHER_DIMS = [
    2,
    3,
    5,
    8,
    32,
    33,
    63,
    100,
    127,
    129,
    160,
    200,
    255,
    320,
    768,
    1000,
    1024,
    1536,
    3000,
]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def rows_of_every_kind(d: int, dtype: np.dtype[Any], seed: int) -> Any:
    """Ordinary rows, zeros, constants, spikes, subnormal and huge ones, NaN and infinities."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((71, d))
    limits = ml_dtypes.finfo(dtype)
    big, small = float(limits.max), float(limits.smallest_subnormal)
    x[0], x[1], x[2] = 0.0, -0.0, 3.0
    x[3] = np.where(np.arange(d) % 2, 1.0, -1.0)
    x[4], x[5] = 0, 0
    x[4, d // 2], x[5, 0] = 7.0, small
    x[6] *= small * 8
    x[7] *= big / 16
    x[8] = big
    x[9] *= 1e-19
    x[10] *= 1e18
    x[11, d - 1], x[12, 0], x[13, d // 2] = np.nan, np.inf, -np.inf
    x[14:40] *= np.exp(rng.uniform(-80, 80, 26))[:, None]
    x[40:50] *= np.exp(rng.uniform(-20, 20, (10, d)))
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(dtype)


def quantizers(**settings: Any) -> tuple[TurboQuant, TurboQuant]:
    return TurboQuant(**settings, backend="cuda"), TurboQuant(**settings, backend="reference")


def assert_same(tq: TurboQuant, expected: TurboQuant, x: Any, out_dtypes: list[str]) -> None:
    want = expected.encode(x, check_finite=False)
    got = tq.encode(cupy.asarray(x), check_finite=False)
    for array, other in zip(got, want, strict=True):
        assert_bits_equal(array.get(), other)
    for name in out_dtypes:
        back = tq.decode(*map(cupy.asarray, want), dtype=name).get()
        with np.errstate(all="ignore"):
            other = expected.decode(*want, dtype=name)
        nan = np.isnan(other)
        assert (np.isnan(back) == nan).all()  # which NaN differs between processors
        assert_bits_equal(np.where(nan, 0, back), np.where(nan, 0, other))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", USUAL_DIMS)
def test_kernels_in_registers(d: int, bits: int) -> None:
    variants = itertools.product(("norm", "mse", "unbiased"), (1, 3), DTYPES)
    for i, (scale, rounds, name) in enumerate(variants):
        if (i + bits + d // 16) % 12:  # two of 24 for each pair of d and bits
            continue
        tq, expected = quantizers(head_dim=d, bits=bits, scale=scale, hadamard_rounds=rounds)
        outputs = [DTYPES[(i + bits) % 4], DTYPES[(i + bits + 1) % 4]]
        assert_same(tq, expected, rows_of_every_kind(d, dtype_of(name), i), outputs)


@pytest.mark.parametrize("d", OTHER_DIMS)
def test_any_head_dim(d: int) -> None:
    for bits, scale in zip(range(1, 9), itertools.cycle(("norm", "mse", "unbiased"))):
        tq, expected = quantizers(head_dim=d, bits=bits, scale=scale, seed=bits)
        name = DTYPES[bits % 4]
        assert_same(tq, expected, rows_of_every_kind(d, dtype_of(name), bits), [name])


def test_rows_beyond_shared_memory() -> None:
    tq, expected = quantizers(head_dim=70_000, bits=4, hadamard_rounds=1)
    x = np.random.default_rng(3).standard_normal((3, 70_000)).astype(np.float32)
    assert_same(tq, expected, x, ["float32"])


@pytest.mark.parametrize("d", [2, 16, 63, 64, 96, 128, 192, 200])
def test_dense_rotations(d: int) -> None:
    for bits, scale in zip((1, 3, 4, 8), ("norm", "mse", "unbiased", "norm"), strict=True):
        tq, expected = quantizers(head_dim=d, bits=bits, scale=scale, rotation="haar")
        name = DTYPES[(bits + d) % 4]
        assert_same(tq, expected, rows_of_every_kind(d, dtype_of(name), bits), DTYPES)


@pytest.mark.parametrize("d", [64, 128])
def test_rotation_matrices_of_any_entries(d: int) -> None:
    """A permutation has entries of 1, which no Haar matrix of these sizes has."""
    rng = np.random.default_rng(d)
    matrix = np.eye(d)[rng.permutation(d)] * rng.choice([-1.0, 1.0], d)
    settings = {"head_dim": d, "bits": 4, "rotation": matrix}
    tq, expected = quantizers(**settings)
    for name in DTYPES:
        assert_same(tq, expected, rows_of_every_kind(d, dtype_of(name), d), [name])


def test_many_rounds() -> None:
    for d in (96, 128, 200):
        tq, expected = quantizers(head_dim=d, bits=4, hadamard_rounds=16)
        assert_same(tq, expected, rows_of_every_kind(d, np.dtype(np.float16), d), ["float32"])


@pytest.mark.parametrize(
    ("d", "rotation"),
    [(128, "haar"), *((d, "hadamard") for d in (48, 100, 127, 128, 192))],
)
@pytest.mark.parametrize("name", DTYPES)
def test_strides(d: int, rotation: str, name: str) -> None:
    tq, expected = quantizers(head_dim=d, bits=3, rotation=rotation)
    rng = np.random.default_rng(d)
    base = rng.standard_normal((6, 5, 4, 2 * d + 3)).astype(dtype_of(name))
    on_gpu = cupy.asarray(base)
    views: list[Callable[[Any], Any]] = [
        lambda a: a[..., :d],  # rows apart
        lambda a: a[:, 1, :, 1 : d + 1],  # two strides, unaligned
        lambda a: a[::-1, ::2, :, :d],  # backwards, three strides
        lambda a: a[..., : 2 * d : 2],  # elements apart
        lambda a: a[0, 0, 0, :d],  # one vector
        lambda a: a[:0, ..., :d],  # none
        lambda a: a.transpose(2, 0, 1, 3)[..., :d],
    ]
    for view in views:
        want = expected.encode(view(base))
        got = tq.encode(view(on_gpu))
        for array, other in zip(got, want, strict=True):
            assert_bits_equal(array.get(), other)
    broadcast = cupy.broadcast_to(on_gpu[0, 0, 0, :d], (3, 5, d))
    packed, _ = tq.encode(broadcast)
    assert (packed == packed[0, 0]).all()


def test_packed_codes_at_any_address() -> None:
    tq, expected = quantizers(head_dim=128, bits=3)
    x = np.random.default_rng(0).standard_normal((50, 128)).astype(np.float16)
    codes, scales = expected.encode(x)
    for shift in (0, 1, 2, 4, 8):
        memory = cupy.zeros(codes.size + 16, np.uint8)
        packed = memory[shift : shift + codes.size].reshape(codes.shape)
        norms = cupy.empty(50, np.float32)
        tq.encode(cupy.asarray(x), out=(packed, norms))
        assert_bits_equal(packed.get(), codes)
        assert not memory[:shift].any()
        assert not memory[shift + codes.size :].any()
        back = cupy.empty(50 * 128 + 1, np.float16)[1:].reshape(50, 128)
        tq.decode(packed, norms, out=back)
        assert_bits_equal(back.get(), expected.decode(codes, scales))


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
@pytest.mark.parametrize(("d", "queries"), [(128, 1), (128, 11), (80, 3), (100, 8), (7, 2)])
def test_inner_products(rotation: str, d: int, queries: int) -> None:
    rng = np.random.default_rng(d)
    x = rng.standard_normal((3, 301, d)).astype(np.float16)
    for bits, name in zip(range(1, 9), itertools.cycle(DTYPES)):
        tq, expected = quantizers(head_dim=d, bits=bits, rotation=rotation)
        query = rng.standard_normal((queries, d)).astype(dtype_of(name))
        packed, norms = expected.encode(x)
        want = expected.inner_products(query, packed, norms)
        got = tq.inner_products(cupy.asarray(query), cupy.asarray(packed), cupy.asarray(norms))
        length = np.linalg.norm(query.astype(np.float64), axis=-1)[:, None, None]
        assert got.shape == (queries, 3, 301)
        assert (np.abs(got.get() - want) <= 4e-6 * length * norms).all()


def test_inner_products_at_all_magnitudes() -> None:
    tq, expected = quantizers(head_dim=64, bits=4)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 64))
    packed, norms = expected.encode(x.astype(np.float32))
    for power in (-1000, -300, -140, -20, 20, 120, 300):
        query = rng.standard_normal((2, 64)) * 2.0**power
        with np.errstate(all="ignore"):
            want = expected.inner_products(query, packed, norms)
        got = tq.inner_products(*map(cupy.asarray, (query, packed, norms))).get()
        length = np.linalg.norm(query, axis=-1)[:, None]
        finite = np.isfinite(want)
        assert (np.isfinite(got) == finite).all()
        with np.errstate(over="ignore"):
            allowed = 4e-6 * length * norms + 2.0**-149
        assert (np.abs(got[finite] - want[finite]) <= allowed[finite]).all()


def test_non_finite_values_are_named() -> None:
    tq = TurboQuant(head_dim=64, bits=4)
    x = cupy.ones((5, 3, 64), np.float32)
    x[2, 1, 7] = np.nan
    with pytest.raises(ValueError, match=r"x\[2, 1, 7\] is nan"):
        tq.encode(x)
    x[2, 1] = 3e38
    with pytest.raises(OverflowError, match=r"x\[2, 1\]"):
        tq.encode(x)
