"""Whole numbers cut into signed bytes, which 8-bit integer tensor cores multiply.

A dense rotation is prescribed as an exact product of whole numbers (docs/format.md), so any exact
arithmetic gives its bits; kernels/imma.cuh does it with these.  Nothing here needs CuPy or a GPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NUMBER_LIMBS = 3  # of a coordinate or a centroid, at most 2**22


def limbs(whole: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int8]:
    """[..., count] digits in [-128, 127] of whole numbers to the base 256, the lowest first."""
    rest = whole.astype(np.int64)
    digits = np.empty((*whole.shape, count), np.int8)
    for i in range(count):
        digits[..., i] = rest.astype(np.int8)  # the low byte, signed
        rest = (rest - digits[..., i]) >> 8
    if rest.any():
        raise OverflowError(f"a number up to {np.abs(whole).max():.0f} has more than {count} limbs")
    return digits


def limbs_needed(matrix: npt.NDArray[np.float64]) -> int:
    """3 if all entries lie in the 24 bits that three limbs hold, else 4."""
    low, high = -128 * 0x10101, 127 * 0x10101
    return 3 if low <= matrix.min() and matrix.max() <= high else 4


def fragments(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
    """Limbs of `matrix`, for products ``matrix @ row``, in the order in which lanes load them.

    Returns
    -------
    ndarray, int8, shape [d / 32, 4, d / 32, limbs, 32, 8]
        Lane 4 g + t of tile (k, pair) holds, for input chunk c, the 8 entries of columns
        8 (4 c + t) .. + 7 in row 8 (4 k + g // 2) + 2 pair + g % 2: lane 4 g + t then gets the
        product's coordinates 8 (4 k + t) + 2 pair and the next one.
    """
    d, count = len(matrix), limbs_needed(matrix)
    # row 8 (4 k + g // 2) + 2 pair + g % 2 = [k, g // 2, pair, g % 2], column = [c, t, i]
    cut = limbs(matrix, count).reshape(d // 32, 4, 4, 2, d // 32, 4, 8, count)
    order = cut.transpose(0, 2, 4, 7, 1, 3, 5, 6)
    return np.ascontiguousarray(order).reshape(d // 32, 4, d // 32, count, 32, 8)


def words(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.uint32]:
    """The limbs of each number in the low bytes of a word."""
    padded = np.zeros((*numbers.shape, 4), np.int8)
    padded[..., :NUMBER_LIMBS] = limbs(numbers, NUMBER_LIMBS)
    return padded.view(np.uint32)[..., 0]
