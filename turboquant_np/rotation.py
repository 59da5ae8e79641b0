"""The rotations, defined from a seed alone, the same on every machine.

TurboQuant rotates every vector by one fixed random orthogonal matrix, so that its coordinates
follow a known density whatever the data are.  Two families are offered:

* `HadamardRotation`, the default: rounds of random signs and a fast Walsh-Hadamard transform.
* `DenseRotation`: a Haar-distributed matrix (the one the paper's theorem is about) or one of yours.

What fixes them, bit for bit, is docs/format.md: 32-bit outputs of MT19937 for the random bits, and
for Haar nothing but correctly rounded float64 additions, multiplications, divisions and square
roots in a fixed order, with the result rounded to multiples of 2**-24.  No libm, no LAPACK, no BLAS
sum takes part, because their last bits differ between machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .codebook import check_dim

__all__ = [
    "DenseRotation",
    "HadamardRotation",
    "Rotation",
    "fast_hadamard_transform",
    "haar_rotation",
    "mt19937_raw",
    "random_signs",
    "rotation_from_matrix",
]

Floats = npt.NDArray[np.float64]

MATRIX_FRACTION_BITS = 24  # entries of a dense rotation are multiples of 2**-24
# Partial sums of the exact product stay below 2**53 by Cauchy-Schwarz while
# sqrt(d) * 2**22 * 2**24 does: see docs/format.md.
MAX_DENSE_DIM = 8192
# A row of norm 2**30 times the growth of an unnormalised transform stays below 2**127.
MAX_GROWTH_SQUARED = 2**192


def mt19937_raw(seed: int, count: int) -> npt.NDArray[np.uint32]:
    """The first `count` 32-bit outputs of MT19937 in its legacy seeding (seed modulo 2**32).

    This is the stream behind `numpy.random.RandomState` and `torch.manual_seed` on a CPU.
    """
    generator: Any = np.random.MT19937()
    generator.state = np.random.RandomState(seed % 2**32).get_state(legacy=False)
    raw: npt.NDArray[np.uint32] = generator.random_raw(count).astype(np.uint32)
    return raw


def random_signs(d: int, seed: int) -> npt.NDArray[np.float32]:
    """`d` signs +-1 from the low bits of the stream of `seed`; a set bit means +1."""
    return (2.0 * (mt19937_raw(seed, d) & 1) - 1.0).astype(np.float32)


def fast_hadamard_transform(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Unnormalised Walsh-Hadamard transform of the last axis, strides 1, 2, 4, ... in that order.

    The order of the strides does not matter mathematically; in float32 it decides the last bits, so
    the format prescribes it.

    Raises
    ------
    ValueError
        If the length of the last axis is not a power of two.

    Examples
    --------
    >>> import numpy as np
    >>> from turboquant_np.rotation import fast_hadamard_transform
    >>> fast_hadamard_transform(np.array([1.0, 2.0, 3.0, 4.0]))
    array([10., -2., -4.,  0.])
    """
    *batch, d = x.shape
    if d < 1 or d & (d - 1):
        raise ValueError(f"the last axis must be a power of two long, got {d}")
    stride = 1
    while stride < d:
        pairs = x.reshape(*batch, d // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(*batch, d)
        stride *= 2
    return x


@dataclass(frozen=True, eq=False)
class HadamardRotation:
    """Rounds of (random signs, Walsh-Hadamard transform).

    For head_dim = 2**k a round flips signs and transforms all coordinates, unnormalised.  For other
    head_dims a round is two half rounds, see docs/format.md: the transform (normalised) acts on the
    first or on the last `block` coordinates, the largest power of two below head_dim, and a
    butterfly between the two halves spreads the result.

    Attributes
    ----------
    head_dim, seed, rounds : int

    Raises
    ------
    ValueError
        If head_dim is a power of two and head_dim**rounds exceeds 2**192.
    """

    head_dim: int
    seed: int
    rounds: int = 3

    kind = "hadamard"

    def __post_init__(self) -> None:
        if self.is_power_of_two and self.head_dim**self.rounds > MAX_GROWTH_SQUARED:
            raise ValueError(
                f"head_dim**hadamard_rounds must be at most 2**192, got {self.head_dim}**"
                f"{self.rounds}, which float32 could not hold; use fewer rounds"
            )

    @property
    def is_power_of_two(self) -> bool:
        return self.head_dim & (self.head_dim - 1) == 0

    @property
    def block(self) -> int:
        """Length of one fast transform: the largest power of two that fits."""
        return 1 << (self.head_dim.bit_length() - 1)

    @cached_property
    def signs(self) -> npt.NDArray[np.float32]:
        """[steps, head_dim], one row of signs for each round or half round."""
        steps = self.rounds if self.is_power_of_two else 2 * self.rounds
        return np.stack([random_signs(self.head_dim, self.seed + r) for r in range(steps)])

    @property
    def growth(self) -> float:
        """Factor by which the prescribed (partly unnormalised) transform lengthens a vector."""
        return math.sqrt(float(self.head_dim**self.rounds)) if self.is_power_of_two else 1.0

    @cached_property
    def matrix(self) -> npt.NDArray[np.float32]:
        """[head_dim, head_dim] with y = matrix @ x, for inspection; nothing is computed with it."""
        x = np.eye(self.head_dim)  # row j becomes column j of the matrix
        for r, signs in enumerate(self.signs.astype(np.float64)):
            x = x * signs
            if self.is_power_of_two:
                x = fast_hadamard_transform(x) / math.sqrt(self.head_dim)
            else:
                part = slice(0, self.block) if r % 2 == 0 else slice(-self.block, None)
                x[:, part] = fast_hadamard_transform(x[:, part]) / math.sqrt(self.block)
                half = self.head_dim // 2
                a, b = x[:, :half].copy(), x[:, -half:].copy()
                x[:, :half], x[:, -half:] = (a + b) / math.sqrt(2), (a - b) / math.sqrt(2)
        return np.ascontiguousarray(x.T).astype(np.float32)


@dataclass(frozen=True, eq=False)
class DenseRotation:
    """An orthogonal matrix, stored as integers so that products with it are exact.

    Attributes
    ----------
    fixed : ndarray, float64, shape [head_dim, head_dim]
        The matrix times 2**24, whole numbers; y = fixed @ x * 2**-24.
    kind : {"haar", "matrix"}
    seed : int or None
    """

    fixed: Floats
    kind: str
    seed: int | None = None

    growth = 1.0

    @property
    def head_dim(self) -> int:
        return len(self.fixed)

    @cached_property
    def matrix(self) -> npt.NDArray[np.float32]:
        """[head_dim, head_dim] with y = matrix @ x; exact in float32."""
        return (self.fixed * 2.0**-MATRIX_FRACTION_BITS).astype(np.float32)


Rotation = HadamardRotation | DenseRotation


@lru_cache(maxsize=16)
def haar_rotation(d: int, seed: int) -> DenseRotation:
    """The Haar-distributed rotation of `seed`: Q of the QR of a Gaussian matrix, R's diagonal > 0.

    Agrees with `random_orthogonal(d, seed)` of aither-kvcache to 2e-6 for d a power of two >= 4.

    Raises
    ------
    ValueError
        If d is above 8192 (the matrix would not fit the exact product, nor most memories).
    """
    if d > MAX_DENSE_DIM:
        raise ValueError(
            f"a dense rotation needs head_dim <= {MAX_DENSE_DIM}, got {d}; use rotation='hadamard'"
        )
    columns = _orthonormal_rows(_gaussian(d * d, seed).reshape(d, d).T.copy())
    fixed = np.rint(columns.T * 2.0**MATRIX_FRACTION_BITS)
    fixed.setflags(write=False)
    return DenseRotation(fixed, "haar", seed)


def rotation_from_matrix(matrix: Any) -> DenseRotation:
    """Wrap an orthogonal [d, d] matrix; its entries are rounded to multiples of 2**-24.

    Raises
    ------
    ValueError
        If it is not square, not finite, larger than 8192, or its rows are not orthonormal to 1e-4.
    """
    q = np.asarray(matrix)
    if q.ndim != 2 or q.shape[0] != q.shape[1]:
        raise ValueError(f"a rotation matrix must be square [head_dim, head_dim], got {q.shape}")
    if not np.issubdtype(q.dtype, np.floating):
        raise TypeError(f"a rotation matrix must be floating point, got {q.dtype}")
    d = check_dim(q.shape[0])
    if d > MAX_DENSE_DIM:
        raise ValueError(f"a dense rotation needs head_dim <= {MAX_DENSE_DIM}, got {d}")
    fixed = np.rint(q.astype(np.float64) * 2.0**MATRIX_FRACTION_BITS)
    q = fixed * 2.0**-MATRIX_FRACTION_BITS  # what is checked is what will be used, and stored
    error = float(np.abs(q @ q.T - np.eye(d)).max()) if np.isfinite(q).all() else math.inf
    if error > 1e-4:
        raise ValueError(
            f"a rotation matrix must be orthogonal: max |Q Q^T - I| is {error:.3g}, allowed 1e-4; "
            "orthogonalise it first, for example with numpy.linalg.qr"
        )
    fixed.setflags(write=False)
    return DenseRotation(fixed, "matrix")


def _gaussian(count: int, seed: int) -> Floats:
    """Standard normal numbers: Box-Muller on 24-bit uniforms, in torch's blocks of 16.

    The first eight uniforms of a block give the radii, the last eight the angles; the block is then
    (r cos, r sin).
    """
    blocks = -(-count // 16)
    u = (mt19937_raw(seed, 16 * blocks) & 0xFFFFFF).reshape(blocks, 2, 8) * 2.0**-24
    radius = np.sqrt(-2.0 * _log(1.0 - u[:, 0]))
    cos, sin = _cos_sin_turns(u[:, 1])
    return np.stack([radius * cos, radius * sin], axis=1).reshape(-1)[:count]


def _log(u: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """ln u from exactly prescribed operations: u = m 2**e, ln m = 2 artanh((m-1)/(m+1))."""
    m, e = np.frexp(u)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2.0 * m, m), e - low
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    series = np.zeros_like(s)
    for k in range(23, 0, -2):
        series = series * s2 + 1.0 / k
    result: npt.NDArray[Any] = e * 0.6931471805599453 + 2.0 * s * series
    return result


def _cos_sin_turns(t: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    """cos and sin of 2 pi t for t in [0, 1), from exactly prescribed operations."""
    octant = np.floor(8.0 * t)
    part = 8.0 * t - octant
    odd = octant % 2 == 1
    x = np.where(odd, 1.0 - part, part) * 0.7853981633974483
    x2 = x * x
    cos, sin = _taylor(x2, 0), x * _taylor(x2, 1)
    swap = np.isin(octant, (1.0, 2.0, 5.0, 6.0))
    cos, sin = np.where(swap, sin, cos), np.where(swap, cos, sin)
    cos = np.where((octant >= 2) & (octant < 6), -cos, cos)
    return cos, np.where(octant >= 4, -sin, sin)


def _taylor(x2: npt.NDArray[Any], odd: int) -> npt.NDArray[Any]:
    """sum_k (-x2)^k / (2k + odd)!, Horner from k = 9."""
    series = np.ones_like(x2)
    for k in range(9, 0, -1):
        n = 2 * k + odd
        series = 1.0 - series * x2 / (n * (n - 1))
    return series


def _orthonormal_rows(a: Floats) -> Floats:
    """Modified Gram-Schmidt on the rows, in place, every sum folded in halves.

    The Q of a QR decomposition with positive diagonal of R, by a fixed order of operations.
    """
    for k in range(len(a)):
        a[k] /= np.sqrt(_fold_sum(a[k] * a[k]))
        if k + 1 < len(a):
            a[k + 1 :] -= _fold_sum(a[k + 1 :] * a[k])[..., None] * a[k]
    return a


def _fold_sum(x: Floats) -> Any:
    """Sum of the last axis: zero-padded to a power of two, then folded in halves."""
    d = x.shape[-1]
    size = 1 << (d - 1).bit_length()
    if size > d:
        half = size // 2
        head = x[..., :half].copy()
        head[..., : d - half] += x[..., half:]
        x, size = head, half
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size : 2 * size]
    return x[..., 0]
