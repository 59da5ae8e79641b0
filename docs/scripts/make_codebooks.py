"""Make turboquant_np/data/codebooks.csv: Lloyd-Max centroids to 17 digits.

Row d holds the optimal centroids for one coordinate z = sqrt(d) * y of a vector y that is uniform
on the unit sphere of dimension d (d = 2..63), row 0 those for a standard normal variable, which
the format uses from d = 64 on.  The density of y is proportional to (1 - y^2)^((d-3)/2)
(arXiv:2504.19874, lemma 1).

A codebook is optimal when each centroid is the mean of its cell and each boundary lies half way
between two centroids.  Those equations are solved by Newton's method in 40-digit arithmetic, for
the positive half (the density is symmetric).  Takes about a minute; needs mpmath.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from mpmath import mp, mpf

from turboquant_np.codebook import compute_codebook_scipy

mp.dps = 40
MAX_BITS = 8
DIMENSIONS = [0, *range(2, 64)]  # 0: the standard normal density

# A density is given by three functions of x >= 0: f(x), P(x) = int_0^x f, M(x) = int_0^x t f.
Density = tuple[Callable[[mpf], mpf], Callable[[mpf], mpf], Callable[[mpf], mpf]]


def normal_density() -> Density:
    c = 1 / mp.sqrt(2 * mp.pi)
    return (
        lambda x: c * mp.exp(-x * x / 2),
        lambda x: mp.erf(x / mp.sqrt(2)) / 2,
        lambda x: c * (1 - mp.exp(-x * x / 2)),
    )


def sphere_density(d: int) -> Density:
    """Density of one coordinate of a uniform unit vector; x = cos(theta)."""
    c = mp.gamma(mpf(d) / 2) / (mp.sqrt(mp.pi) * mp.gamma(mpf(d - 1) / 2))

    def f(x: mpf) -> mpf:
        return c * (1 - x * x) ** (mpf(d - 3) / 2)

    def mass(x: mpf) -> mpf:
        # int sin^n = ((n-1) int sin^(n-2) - sin^(n-1) cos) / n, from theta(x) to pi/2
        sin, n = mp.sqrt(1 - x * x), d - 2
        total = mp.asin(x) if n % 2 == 0 else x
        for k in range(2 + n % 2, n + 1, 2):
            total = ((k - 1) * total + sin ** (k - 1) * x) / k
        return c * total

    def moment(x: mpf) -> mpf:
        return c / (d - 1) * (1 - (1 - x * x) ** (mpf(d - 1) / 2))

    return f, mass, moment


def first_guess(d: int, bits: int) -> list[mpf]:
    """Lloyd's iteration in float64: slow to converge, but it never leaves the right basin."""
    centroids, _, _ = compute_codebook_scipy(d or 64, bits, max_iter=4000)
    return [mpf(float(c)) * (8 if d == 0 else 1) for c in centroids[2 ** (bits - 1) :]]


def residual_and_jacobian(
    c: list[mpf], density: Density, end: mpf
) -> tuple[list[mpf], list[mpf], list[mpf], list[mpf]]:
    """F_i = c_i P_i - M_i over cell i, and the three diagonals of dF/dc."""
    f, mass, moment = density
    n = len(c)
    b = [mpf(0), *[(c[i] + c[i + 1]) / 2 for i in range(n - 1)], end]
    p = [mass(x) if x != mp.inf else mpf(1) / 2 for x in b]
    m = [moment(x) if x != mp.inf else 1 / mp.sqrt(2 * mp.pi) for x in b]
    fb = [mpf(0), *[f(x) for x in b[1:-1]], mpf(0)]  # the two outer ends do not move
    res = [c[i] * (p[i + 1] - p[i]) - (m[i + 1] - m[i]) for i in range(n)]
    right = [(c[i] - b[i + 1]) * fb[i + 1] / 2 if i < n - 1 else mpf(0) for i in range(n)]
    left = [-(c[i] - b[i]) * fb[i] / 2 for i in range(n)]
    diagonal = [p[i + 1] - p[i] + right[i] + left[i] for i in range(n)]
    return res, left, diagonal, right


def solve_tridiagonal(
    left: list[mpf], diagonal: list[mpf], right: list[mpf], rhs: list[mpf]
) -> list[mpf]:
    n, d, r = len(rhs), diagonal[:], rhs[:]
    for i in range(1, n):
        w = left[i] / d[i - 1]
        d[i] -= w * right[i - 1]
        r[i] -= w * r[i - 1]
    x = [mpf(0)] * n
    for i in reversed(range(n)):
        x[i] = (r[i] - (right[i] * x[i + 1] if i < n - 1 else 0)) / d[i]
    return x


def in_order(c: list[mpf], end: mpf) -> bool:
    return c[0] > 0 and c[-1] < end and all(a < b for a, b in pairwise(c))


def positive_centroids(d: int, bits: int) -> list[mpf]:
    """The positive half of the codebook, in units of z = sqrt(d) y."""
    density, end = (normal_density(), mp.inf) if d == 0 else (sphere_density(d), mpf(1))
    c = first_guess(d, bits)
    for _ in range(60):
        res, left, diagonal, right = residual_and_jacobian(c, density, end)
        step = solve_tridiagonal(left, diagonal, right, res)
        damping = mpf(1)
        while not in_order(new := [x - damping * s for x, s in zip(c, step, strict=True)], end):
            damping /= 2
        done = max(abs(a - b) for a, b in zip(new, c, strict=True)) < mpf(10) ** -30
        c = new
        if done:
            return [x * (mp.sqrt(d) if d else 1) for x in c]
    raise ArithmeticError(f"no convergence at d={d}, bits={bits}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "turboquant_np" / "data" / "codebooks.csv"
    parser.add_argument("output", nargs="?", type=Path, default=default)
    args = parser.parse_args()
    lines = [
        "# d (0 = standard normal), bits, positive centroids of z = sqrt(d) y (make_codebooks.py)"
    ]
    for d in DIMENSIONS:
        for bits in range(1, MAX_BITS + 1):
            values = [mp.nstr(c, 17, strip_zeros=False) for c in positive_centroids(d, bits)]
            lines.append(",".join([str(d), str(bits), *values]))
        print(f"d = {d} done", flush=True)
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
