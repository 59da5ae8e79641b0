"""Rotations: the same on every machine, orthogonal, and those of the older packages."""

from __future__ import annotations

import hashlib
import importlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from turboquant_np import TurboQuant
from turboquant_np.rotation import (
    HadamardRotation,
    fast_hadamard_transform,
    haar_rotation,
    mt19937_raw,
    random_signs,
    rotation_from_matrix,
)
from turboquant_np.testing.strategies import HEAD_DIMS

Matrix = npt.NDArray[np.float64]


def digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# -- pinned: equal on every machine and in every version -------------------------------------------


def test_raw_stream_is_mt19937() -> None:
    # The first outputs of std::mt19937, whose default seed is 5489.
    assert mt19937_raw(5489, 3).tolist() == [3499211612, 581869302, 3890346734]
    assert mt19937_raw(5489, 10_000)[-1] == 4123659995  # as the C++ standard demands
    assert (mt19937_raw(-1, 8) == mt19937_raw(2**32 - 1, 8)).all()


@pytest.mark.parametrize(
    ("d", "seed", "sha256"),
    [
        (2, 0, "437cb43a30226e63"),
        (3, 1, "ff9b5729d5ed88f9"),
        (96, 7, "dcd73d68107ac217"),
        (128, 42, "fcdef8235737a3f8"),
        (1536, 2**32 - 1, "60e5dd45bbba6ae0"),
    ],
)
def test_signs_are_pinned(d: int, seed: int, sha256: str) -> None:
    assert digest(random_signs(d, seed).astype(np.int8)) == sha256


def test_signs_of_seed_42() -> None:
    expected = [-1, 1, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, -1, 1, -1]
    assert random_signs(16, 42).tolist() == expected


@pytest.mark.parametrize(
    ("d", "seed", "sha256"),
    [
        (2, 0, "de82cf72f3203b04"),
        (3, 1, "5e56b64887b4c198"),
        (4, 42, "273839eb1624a21b"),
        (64, 1, "6fe3fccbbe3d70e0"),
        (96, 7, "89d578f79292daa1"),
        (128, 42, "049dfdba4ab003e0"),
        (200, 2**32 - 1, "1cf8bcb86847c610"),
    ],
)
def test_haar_matrices_are_pinned(d: int, seed: int, sha256: str) -> None:
    assert digest(haar_rotation(d, seed).fixed.astype("<i8")) == sha256


# -- other packages --------------------------------------------------------------------------------


def test_haar_matrix_of_aither_kvcache() -> None:
    row = haar_rotation(128, 42).matrix[0, :4]
    np.testing.assert_allclose(row, [0.174885, 0.120727, 0.085467, -0.145567], atol=2e-6)


@pytest.mark.parametrize("d", [4, 64, 128, 256])
@pytest.mark.parametrize("seed", [0, 42])
def test_haar_matrices_agree_with_torch(d: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    gaussian = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    expected = (q * torch.sign(torch.diagonal(r))).numpy()
    # torch's own float32 QR is this inexact at d = 256
    np.testing.assert_allclose(haar_rotation(d, seed).matrix, expected, atol=5e-6)


@pytest.mark.parametrize("d", [2, 5, 64, 100, 1536])
def test_signs_agree_with_torch(d: int) -> None:
    torch = pytest.importorskip("torch")
    for seed in (0, 42, 12345):
        expected = 2 * torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(seed)) - 1
        assert random_signs(d, seed).tolist() == expected.tolist()


# -- Hadamard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_transform_is_sylvesters_matrix(d: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, d))
    np.testing.assert_allclose(
        fast_hadamard_transform(x), x @ scipy.linalg.hadamard(d).T, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("d", [0, 3, 12])
def test_transform_needs_a_power_of_two(d: int) -> None:
    with pytest.raises(ValueError, match=f"power of two long, got {d}"):
        fast_hadamard_transform(np.zeros((2, d)))


def hadamard_step(d: int, signs: npt.NDArray[np.float32], step: int) -> Matrix:
    """One (half) round as a product of explicit matrices."""
    p = 1 << (d.bit_length() - 1)
    transform: Matrix = scipy.linalg.hadamard(p) / math.sqrt(p)
    if p == d:
        return transform @ np.diag(signs)
    rest = np.eye(d - p)
    blocks = (transform, rest) if step % 2 == 0 else (rest, transform)
    half, odd = d // 2, d % 2
    one, gap, middle = np.eye(half), np.zeros((half, odd)), math.sqrt(2) * np.eye(odd)
    mix = np.block([[one, gap, one], [gap.T, middle, gap.T], [one, gap, -one]]) / math.sqrt(2)
    product: Matrix = mix @ scipy.linalg.block_diag(*blocks) @ np.diag(signs)
    return product


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_hadamard_rotation_is_a_product_of_simple_ones(d: int, rounds: int) -> None:
    expected = np.eye(d)
    for step in range(rounds if d & (d - 1) == 0 else 2 * rounds):
        expected = hadamard_step(d, random_signs(d, 7 + step), step) @ expected
    rotation = HadamardRotation(d, seed=7, rounds=rounds)
    np.testing.assert_allclose(rotation.matrix, expected, atol=1e-7)


def test_growth_beyond_float32_is_refused() -> None:
    assert HadamardRotation(4096, 0, rounds=16).growth == 2.0**96
    with pytest.raises(ValueError, match=r"at most 2\*\*192, got 8192\*\*16"):
        HadamardRotation(8192, 0, rounds=16)


# -- what is computed is what `matrix` shows -------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("d", [2, 3, 6, 8, 33, 80, 127, 128, 256])
def test_matrix_shows_the_rotation(d: int, kind: str) -> None:
    tq = TurboQuant(head_dim=d, bits=8, rotation=kind, seed=9, backend="reference")
    x = np.random.default_rng(2).standard_normal((40, d)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    packed, norms = tq.encode(x)
    codes = packed.astype(int)  # at 8 bits the bytes are the codes
    cells = np.concatenate([[-np.inf], tq.boundaries_inner, [np.inf]])
    rotated = x @ tq.rotation.T
    assert (rotated > cells[codes] - 1e-6).all()
    assert (rotated < cells[codes + 1] + 1e-6).all()
    decoded = tq.decode(packed, norms, dtype=np.float32)
    expected = (tq.centroids[codes] @ tq.rotation) * norms[:, None]
    np.testing.assert_allclose(decoded, expected, atol=1e-6)


@given(
    d=st.sampled_from(HEAD_DIMS),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["hadamard", "haar"]),
)
def test_rotations_are_orthogonal(d: int, seed: int, kind: str) -> None:
    rotation = haar_rotation(d, seed) if kind == "haar" else HadamardRotation(d, seed)
    q = rotation.matrix.astype(np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(d), atol=1e-6)


# -- Haar ------------------------------------------------------------------------------------------


def test_haar_matrices_are_the_q_of_lapack() -> None:
    rotation = importlib.import_module("turboquant_np.rotation")
    g = rotation._gaussian(96 * 96, 5).reshape(96, 96)
    q, r = np.linalg.qr(g)
    expected = q * np.sign(np.diagonal(r))
    np.testing.assert_allclose(haar_rotation(96, 5).matrix, expected, rtol=0, atol=2.0**-24)


def test_gaussian_numbers_are_box_muller() -> None:
    rotation = importlib.import_module("turboquant_np.rotation")
    u = (mt19937_raw(3, 4096) & 0xFFFFFF).reshape(-1, 2, 8) / 2.0**24
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, 0])), 2 * np.pi * u[:, 1]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    np.testing.assert_allclose(rotation._gaussian(4096, 3), expected, rtol=1e-14, atol=1e-14)


def test_haar_matrices_follow_the_haar_measure() -> None:
    # For Haar on O(d): E tr Q = 0, E (tr Q)^2 = 1, E (tr Q)^4 = 3, E Q_ij^2 = 1/d, det +-1 alike.
    n, d = 1500, 6
    q = np.stack([haar_rotation.__wrapped__(d, 1000 + seed).matrix for seed in range(n)])
    trace = np.trace(q, axis1=1, axis2=2)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (4, 3, 96)]:
        assert abs((trace**power).mean() - moment) < 6 * math.sqrt(variance / n)
    squares = (q**2).mean(axis=0)
    assert np.abs(squares - 1 / d).max() < 6 * math.sqrt(2 / (d * d) / n)
    positive = (np.linalg.det(q) > 0).mean()
    assert abs(positive - 0.5) < 6 * 0.5 / math.sqrt(n)


def test_haar_has_a_largest_size() -> None:
    with pytest.raises(ValueError, match="head_dim <= 8192, got 8193; use rotation='hadamard'"):
        haar_rotation(8193, 0)
    with pytest.raises(ValueError, match="head_dim <= 8192, got 8193"):
        rotation_from_matrix(np.broadcast_to(np.float32(0), (8193, 8193)))


# -- matrices of the user --------------------------------------------------------------------------


def test_a_matrix_of_the_user_is_used(backend: str) -> None:
    permutation = np.eye(64)[::-1]
    tq = TurboQuant(head_dim=64, bits=8, rotation=permutation, backend=backend)
    assert (tq.rotation == permutation).all()
    x = np.random.default_rng(3).standard_normal((5, 64))
    y = x[:, ::-1] / np.linalg.norm(x, axis=1, keepdims=True)
    packed, _ = tq.encode(x)
    assert (packed == np.searchsorted(tq.boundaries_inner, y)).mean() > 0.99


def test_a_haar_matrix_given_by_hand_gives_the_same_bits(backend: str) -> None:
    x = np.random.default_rng(4).standard_normal((50, 32)).astype(np.float32)
    by_seed = TurboQuant(head_dim=32, bits=4, rotation="haar", seed=6, backend=backend)
    by_hand = TurboQuant(head_dim=32, bits=4, rotation=by_seed.rotation, backend=backend)
    assert (by_seed.encode(x)[0] == by_hand.encode(x)[0]).all()


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.ones((3, 4)), ValueError, r"square \[head_dim, head_dim\], got \(3, 4\)"),
        (np.ones(9), ValueError, r"got \(9,\)"),
        (np.ones((4, 4)), ValueError, "max |Q Q^T - I| is 4, allowed 1e-4"),
        (1.001 * np.eye(4), ValueError, "is 0.002"),
        (np.full((4, 4), np.nan), ValueError, "is inf, allowed"),
        (np.eye(4, dtype=int), TypeError, "floating point, got int64"),
        (np.eye(1), ValueError, ">= 2, got 1"),
        (np.eye(8), ValueError, "the rotation matrix is 8 x 8, head_dim is 4"),
    ],
)
def test_other_matrices_are_refused(matrix: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("|", r"\|").replace("^", r"\^")):
        TurboQuant(head_dim=4, rotation=matrix)


def test_later_changes_of_the_matrix_do_not_matter() -> None:
    matrix = np.eye(4)
    rotation = rotation_from_matrix(matrix)
    matrix[0, 0] = 9
    assert rotation.matrix[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        rotation.fixed[0, 0] = 9
