"""Norms in a prescribed order, safe over the whole range of float32 (docs/format.md, steps 1-3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from turboquant_np._spec import SAFE_SUM_OF_SQUARES

Float32s = npt.NDArray[np.float32]


def fold_sum(x: Float32s) -> Float32s:
    """Sum of the last axis: zero-padded to a power of two, then folded in halves.

    s[i] += s[i + size/2], then size/4, ..., so neighbours are added last.
    """
    size = 1 << (x.shape[-1] - 1).bit_length()
    padding = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    x = np.pad(x, padding)
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def normalize_range(x: Float32s) -> tuple[Float32s, Float32s, npt.NDArray[np.int32]]:
    """(rows, norms, exponents): rows * 2**exponents is the input, norms are those of `rows`.

    x: [n, d].  A row whose sum of squares lies in the safe range keeps exponent 0; another one is
    multiplied by the power of two that brings its largest magnitude into [1, 2).  A row with NaN or
    infinity gets norm NaN, a zero row norm 0.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        sums = fold_sum(x * x)
        low, high = SAFE_SUM_OF_SQUARES  # powers of two, exact in float32
        safe = (sums >= low) & (sums <= high)
        largest = np.abs(x).max(axis=-1)  # NaN if there is one
        _, exponents = np.frexp(np.where(np.isfinite(largest), largest, 0))
        exponents = np.where(safe | (largest == 0) | ~np.isfinite(largest), 0, exponents - 1)
        rows = np.ldexp(x, -exponents[:, None]).astype(np.float32)
        norms = np.where(safe, np.sqrt(sums), np.sqrt(fold_sum(rows * rows)))
        norms = np.where(np.isfinite(largest), norms, np.float32(np.nan))
    return rows, norms, exponents.astype(np.int32)
