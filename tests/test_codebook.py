"""The shipped Lloyd-Max tables against the conditions of optimality and published values."""

from __future__ import annotations

import hashlib
import math
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.integrate import quad

from turboquant_np.codebook import (
    compute_codebook_scipy,
    get_codebook,
    get_theory_bounds,
    unit_variance_centroids,
)
from turboquant_np.theory import expected_mse

ALL_BITS = range(1, 9)


def sphere_density(x: float, d: int) -> float:
    """Section 3.1 of arXiv:2504.19874: density of a coordinate of a uniform unit vector."""
    c = math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d - 1) / 2))
    return c * math.pow(1 - x * x, (d - 3) / 2)


def normal_density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def cell_mean(density: Any, low: float, high: float) -> float:
    mass, _ = quad(density, low, high, epsabs=0, epsrel=1e-12)
    moment, _ = quad(lambda x: x * density(x), low, high, epsabs=0, epsrel=1e-12)
    return float(moment / mass)


def positive_cells(z: npt.NDArray[np.float64], end: float) -> npt.NDArray[np.float64]:
    """Cell edges of the positive half."""
    half = z[len(z) // 2 :]
    return np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [end]])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("d", [3, 4, 5, 7, 8, 16, 31, 32, 48, 63])
def test_sphere_centroids_are_the_means_of_their_cells(d: int, bits: int) -> None:
    y = unit_variance_centroids(d, bits) / math.sqrt(d)
    edges = positive_cells(y, 1.0)
    means = [cell_mean(lambda x: sphere_density(x, d), low, high) for low, high in pairwise(edges)]
    np.testing.assert_allclose(y[len(y) // 2 :], means, rtol=1e-11)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("d", [64, 100, 4096])
def test_normal_centroids_are_the_means_of_their_cells(d: int, bits: int) -> None:
    z = unit_variance_centroids(d, bits)
    edges = positive_cells(z, 40.0)
    means = [cell_mean(normal_density, low, high) for low, high in pairwise(edges)]
    np.testing.assert_allclose(z[len(z) // 2 :], means, rtol=1e-11)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_on_the_circle_centroids_are_the_means_of_their_cells(bits: int) -> None:
    # The density 1 / (pi sqrt(1 - y^2)) is infinite at the ends, its integrals are elementary.
    y = unit_variance_centroids(2, bits) / math.sqrt(2)
    edges = positive_cells(y, 1.0)
    means = np.diff(-np.sqrt(1 - edges**2)) / np.diff(np.arcsin(edges))
    np.testing.assert_allclose(y[len(y) // 2 :], means, rtol=1e-11)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_in_three_dimensions_the_codebook_is_uniform(bits: int) -> None:
    # Archimedes: a coordinate of a point on the ordinary sphere is uniform on [-1, 1].
    levels = 2**bits
    y = (2 * np.arange(levels) + 1 - levels) / levels
    np.testing.assert_allclose(get_codebook(3, bits)[0], y, rtol=1e-14)


def test_normal_centroids_are_those_of_max() -> None:
    # J. Max, "Quantizing for minimum distortion", 1960, table I.
    published = {
        1: [0.7980],
        2: [0.4528, 1.510],
        3: [0.2451, 0.7560, 1.344, 2.152],
        4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
    }
    for bits, positive in published.items():
        ours = unit_variance_centroids(64, bits)[2 ** (bits - 1) :]
        np.testing.assert_allclose(ours, positive, atol=6e-4)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("d", [2, 3, 8, 33, 63, 64, 128])
def test_tables_ascend_and_mirror(d: int, bits: int) -> None:
    z = unit_variance_centroids(d, bits)
    assert z.shape == (2**bits,)
    assert (np.diff(z) > 0).all()
    assert (z == -z[::-1]).all()
    assert z[-1] < min(8.0, math.sqrt(d))  # the exact product of docs/format.md needs < 8


@pytest.mark.parametrize("d", [2, 5, 16, 63, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tables_agree_with_lloyds_iteration(d: int, bits: int) -> None:
    centroids, boundaries, _ = get_codebook(d, bits)
    computed, computed_boundaries, mse = compute_codebook_scipy(d, bits)
    np.testing.assert_allclose(computed, centroids, atol=1e-9)
    np.testing.assert_allclose(computed_boundaries, boundaries, atol=1e-9)
    if d < 64:  # from 64 on the iteration is for the normal density
        assert mse == pytest.approx(expected_mse(d, bits), rel=1e-9)


def test_tables_are_part_of_the_format() -> None:
    table = (files("turboquant_np.data") / "codebooks.csv").read_bytes()
    assert hashlib.sha256(table).hexdigest() == (
        "d112d0664ba1d9e29d792eaa5906f3df94096a5bf1a03488ac3ade06d7dd3064"
    ), "the tables decide bits: a change of them needs a new FORMAT_VERSION"


def test_get_codebook_scales_the_tables() -> None:
    centroids, boundaries, mse = get_codebook(256, 3)
    np.testing.assert_array_equal(centroids, unit_variance_centroids(256, 3) / 16)
    np.testing.assert_array_equal(boundaries, (centroids[1:] + centroids[:-1]) / 2)
    assert mse == expected_mse(256, 3)


@pytest.mark.parametrize("function", [get_codebook, compute_codebook_scipy, expected_mse])
def test_bits_and_dimension_are_checked(function: Any) -> None:
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"Supported bit-widths: 1, 2, .*, 8\. Got {bits}"):
            function(64, bits)
    for wrong in (4.0, "4", True, None):
        with pytest.raises(TypeError, match="bits must be an integer from 1 to 8"):
            function(64, wrong)
        with pytest.raises(TypeError, match="must be an integer >= 2"):
            function(wrong, 4)
    for d in (1, 0, -64):
        with pytest.raises(ValueError, match=f"must be an integer >= 2, got {d}"):
            function(d, 4)
    with pytest.raises(ValueError, match="Got 9"):
        get_theory_bounds(9)
