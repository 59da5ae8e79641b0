"""Lloyd-Max codebooks: the scalar quantisers that TurboQuant applies to rotated coordinates.

After the rotation each coordinate y of a unit vector has the same known density, so one table per
bit width serves all data and nothing is learnt.  Tables are kept in units of z = sqrt(d) * y, which
has variance 1.  From d = 64 on the format uses the table of the standard normal density, which
costs at most 0.4 % of the error there; below, the table of the exact density on the sphere.

The shipped tables (``data/codebooks.csv``) are part of the numeric format: they decide bits.
"""

from __future__ import annotations

import csv
import math
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_BITS", "compute_codebook_scipy", "get_codebook", "get_theory_bounds"]

MAX_BITS = 8
GAUSSIAN_FROM_DIM = 64  # from this head_dim on the codebook is the one of the normal density

Floats = npt.NDArray[np.float64]


@cache
def _shipped_tables() -> dict[tuple[int, int], Floats]:
    """{(d, bits): positive centroids of z, ascending}; d = 0 stands for the normal density."""
    text = (files("turboquant_np.data") / "codebooks.csv").read_text("ascii")
    rows = csv.reader(line for line in text.splitlines() if not line.startswith("#"))
    return {(int(d), int(b)): np.array(values, np.float64) for d, b, *values in rows}


def check_bits(bits: int) -> int:
    """Return `bits` as int, or raise the error every entry point shares."""
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")
    if not 1 <= bits <= MAX_BITS:
        allowed = ", ".join(map(str, range(1, MAX_BITS + 1)))
        raise ValueError(f"Supported bit-widths: {allowed}. Got {bits}")
    return int(bits)


def check_dim(d: int, name: str = "head_dim") -> int:
    """Return the dimension as int, or raise the error every entry point shares."""
    if isinstance(d, bool) or not isinstance(d, (int, np.integer)):
        raise TypeError(f"{name} must be an integer >= 2, got {d!r}")
    if d < 2:
        raise ValueError(f"{name} must be an integer >= 2, got {d}")
    return int(d)


def unit_variance_centroids(d: int, bits: int) -> Floats:
    """The format's centroids in units of z = sqrt(d) y: shape [2**bits], ascending, float64."""
    d, bits = check_dim(d, "d"), check_bits(bits)
    positive = _shipped_tables()[(d if d < GAUSSIAN_FROM_DIM else 0, bits)]
    return np.concatenate([-positive[::-1], positive])


def get_codebook(d: int, bits: int) -> tuple[Floats, Floats, float]:
    """Return the codebook for coordinates of a unit vector.

    Parameters
    ----------
    d : int
        Dimension of the vectors, at least 2.
    bits : int
        Bits per coordinate, 1 to 8.

    Returns
    -------
    centroids : ndarray, float64, shape [2**bits]
        Ascending; in units of a coordinate of a unit vector.
    boundaries : ndarray, float64, shape [2**bits - 1]
        Inner decision boundaries, half way between neighbouring centroids.
    mse : float
        Exact expected squared error of a whole unit vector, ``theory.expected_mse(d, bits)``.

    Raises
    ------
    ValueError, TypeError
        If `d` or `bits` is out of range or not an integer.

    Notes
    -----
    Centroids of the density of section 3.1 of arXiv:2504.19874, normal from d = 64 on.

    Examples
    --------
    >>> from turboquant_np.codebook import get_codebook
    >>> centroids, boundaries, mse = get_codebook(128, 2)
    >>> [round(float(c) * 128**0.5, 4) for c in centroids]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    >>> round(mse, 4)
    0.116
    """
    from .theory import expected_mse

    z = unit_variance_centroids(d, bits)
    centroids = z / math.sqrt(d)
    return centroids, (centroids[1:] + centroids[:-1]) / 2, expected_mse(d, bits)


def get_theory_bounds(bits: int) -> tuple[float, float]:
    """Return (lower, upper) bounds on the squared error of a unit vector at `bits` per coordinate.

    The lower bound ``4**-bits`` holds for every quantiser (theorem 3 of arXiv:2504.19874), the
    upper one ``sqrt(3) * pi / 2 * 4**-bits`` for TurboQuant with a Haar rotation (theorem 1).

    Examples
    --------
    >>> from turboquant_np.codebook import get_theory_bounds
    >>> lower, upper = get_theory_bounds(4)
    >>> round(lower, 5), round(upper, 5)
    (0.00391, 0.01063)
    """
    rate = 4.0 ** -check_bits(bits)
    return rate, math.sqrt(3.0) * math.pi / 2.0 * rate


def compute_codebook_scipy(
    d: int, bits: int, max_iter: int = 2000, tol: float = 1e-12
) -> tuple[Floats, Floats, float]:
    """Compute a Lloyd-Max codebook from scratch, independently of the shipped tables.

    Lloyd's iteration alternates the two conditions of optimality: boundaries lie half way between
    centroids, centroids are the means of their cells.  It starts from the quantiles of f^(1/3),
    which are optimal in the limit of many levels.

    Parameters
    ----------
    d : int
        Dimension; from 64 on the density is N(0, 1/d), below it is the exact one on the sphere.
    bits : int
        1 to 8.  The iteration needs about 4**bits steps to settle.
    max_iter : int
        Upper limit on the number of iterations.
    tol : float
        Stop when no centroid moves by more than this, in units of 1/sqrt(d).

    Returns
    -------
    centroids, boundaries, mse
        As in `get_codebook`, except that `mse` is d times the expected squared error of one
        coordinate under the density the codebook was computed for.

    Examples
    --------
    >>> from turboquant_np.codebook import compute_codebook_scipy
    >>> centroids, boundaries, mse = compute_codebook_scipy(d=128, bits=3)
    >>> round(mse, 5)
    0.03455
    """
    from scipy import special  # here, not above: it would double the time of the package's import

    d, bits = check_dim(d, "d"), check_bits(bits)
    p = (np.arange(2**bits) + 0.5) / 2**bits
    if d >= GAUSSIAN_FROM_DIM:
        z = math.sqrt(3.0) * special.ndtri(p)
    else:
        a = (d - 3) / 6 + 1
        z = math.sqrt(d) * (2 * special.betaincinv(a, a, p) - 1)
    for _ in range(max_iter):
        mass, moment = cell_moments(d, (z[1:] + z[:-1]) / 2)
        new = moment / mass
        new = (new - new[::-1]) / 2
        moved = float(np.abs(new - z).max())
        z = new
        if moved <= tol:
            break
    mass, moment = cell_moments(d, (z[1:] + z[:-1]) / 2)
    mse = 1.0 - 2.0 * float(z @ moment) + float(z * z @ mass)
    centroids = z / math.sqrt(d)
    return centroids, (centroids[1:] + centroids[:-1]) / 2, mse


def cell_moments(d: int, boundaries: Floats, *, exact: bool = False) -> tuple[Floats, Floats]:
    """Probability and first moment of z = sqrt(d) y in each of the cells between `boundaries`.

    The density is that of a coordinate on the sphere for d < 64 or with `exact`, else the normal
    one.
    """
    from scipy import special

    if d >= GAUSSIAN_FROM_DIM and not exact:
        cdf = special.ndtr(boundaries)
        tail = np.exp(-(boundaries**2) / 2) / math.sqrt(2 * math.pi)
    else:
        y = boundaries / math.sqrt(d)
        cdf = special.betainc((d - 1) / 2, (d - 1) / 2, (1 + y) / 2)
        log_c = special.gammaln(d / 2) - special.gammaln((d - 1) / 2) - math.log(math.pi) / 2
        tail = math.sqrt(d) * math.exp(log_c) / (d - 1) * (1 - y**2) ** ((d - 1) / 2)
    # tail(b) is the integral of z f(z) from b to the end of the support
    mass = np.diff(cdf, prepend=0.0, append=1.0)
    moment = -np.diff(tail, prepend=0.0, append=0.0)
    return mass, moment
