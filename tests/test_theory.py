"""Exact expected errors against quadrature, published values and the bounds of the paper."""

from __future__ import annotations

import math

import pytest
from scipy.integrate import quad

from turboquant_np import TurboQuant
from turboquant_np.codebook import get_codebook
from turboquant_np.theory import expected_mse, get_theory_bounds


def mse_by_quadrature(d: int, bits: int) -> float:
    """d times the expected squared error of a coordinate under the density of the paper."""
    log_c = math.lgamma(d / 2) - math.lgamma((d - 1) / 2) - math.log(math.pi) / 2
    centroids, boundaries, _ = get_codebook(d, bits)
    # The density beyond 40 standard deviations is below 1e-300 where it is not cut off anyway.
    edges = [-min(1.0, 40 / math.sqrt(d)), *boundaries, min(1.0, 40 / math.sqrt(d))]
    total = 0.0
    for c, low, high in zip(centroids, edges[:-1], edges[1:], strict=True):

        def error(y: float, c: float = c) -> float:
            return (y - c) ** 2 * math.exp(log_c + (d - 3) / 2 * math.log1p(-y * y))

        total += quad(error, low, high, epsabs=1e-17, epsrel=1e-11)[0]
    return d * total


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("d", [5, 8, 33, 63, 64, 80, 128, 1536])
def test_expected_mse_is_the_integral(d: int, bits: int) -> None:
    assert expected_mse(d, bits) == pytest.approx(mse_by_quadrature(d, bits), rel=1e-8)


def test_known_values() -> None:
    known = {
        64: [0.35839711, 0.11454612, 0.03344366, 0.00917116],
        128: [0.36089103, 0.11600510, 0.03397907, 0.00932486],
        256: [0.36213623, 0.11674129],
        10**7: [0.363380, 0.117482, 0.034548, 0.009501],  # Max 1960: the normal density
    }
    for d, errors in known.items():
        for bits, error in enumerate(errors, start=1):
            assert expected_mse(d, bits) == pytest.approx(error, rel=1e-4 if d > 256 else 1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_error_lies_between_the_bounds_of_the_paper(bits: int) -> None:
    lower, upper = get_theory_bounds(bits)
    for d in [*range(8, 200), 255, 256, 257, 576, 1536, 8192, 10**6]:
        assert lower < expected_mse(d, bits) < upper


def test_the_lower_bound_does_not_hold_on_the_circle() -> None:
    # The paper's theorem 3 needs large d: 16 points on a circle, 2 bits a coordinate, beat 4**-2.
    assert expected_mse(2, 2) < get_theory_bounds(2)[0]


def test_bounds() -> None:
    assert get_theory_bounds(1)[0] == 0.25
    assert get_theory_bounds(8)[0] == 2.0**-16
    uppers = [get_theory_bounds(bits)[1] for bits in (1, 2, 3, 4)]
    assert uppers == pytest.approx([0.68017, 0.17004, 0.04251, 0.01063], abs=5e-6)


def test_the_quantiser_reports_them() -> None:
    tq = TurboQuant(head_dim=128, bits=3)
    assert (tq.theory_lower, tq.theory_upper) == get_theory_bounds(3)
    assert tq.mse_total == expected_mse(128, 3)
