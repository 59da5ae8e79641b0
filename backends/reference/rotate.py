"""The rotations as docs/format.md prescribes them (step 4)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from turboquant_np.rotation import (
    MATRIX_FRACTION_BITS,
    DenseRotation,
    HadamardRotation,
    Rotation,
    fast_hadamard_transform,
)

Float32s = npt.NDArray[np.float32]

INPUT_BITS = 22  # a row enters a dense product as whole numbers of at most 2**22
CENTROID_FRACTION_BITS = 19  # centroids of z are below 8
HALF_SQRT = np.float32(math.sqrt(0.5))


def rotate(rotation: Rotation, rows: Float32s) -> Float32s:
    """[n, d] -> [n, d]: the rotation times its growth, in float32."""
    if isinstance(rotation, DenseRotation):
        return _rotate_dense(rotation, rows)
    for step, signs in enumerate(rotation.signs):
        rows = rows * signs
        if rotation.is_power_of_two:
            rows = fast_hadamard_transform(rows)
        else:
            rows = _mix_halves(_transform_block(rotation, rows, step))
    return rows


def rotate_back(rotation: HadamardRotation, rows: Float32s) -> Float32s:
    """[n, d] -> [n, d]: the inverse rotation times the growth, in float32."""
    for step, signs in reversed(list(enumerate(rotation.signs))):
        if rotation.is_power_of_two:
            rows = fast_hadamard_transform(rows)
        else:
            rows = _transform_block(rotation, _mix_halves(rows), step)
        rows = rows * signs
    return rows


def _transform_block(rotation: HadamardRotation, rows: Float32s, step: int) -> Float32s:
    """Normalised transform of the first `block` coordinates in even steps, of the last in odd."""
    block = rotation.block
    part = slice(0, block) if step % 2 == 0 else slice(-block, None)
    rows = rows.copy()
    rows[:, part] = fast_hadamard_transform(rows[:, part]) * np.float32(1 / math.sqrt(block))
    return rows


def _mix_halves(rows: Float32s) -> Float32s:
    """a, b = first and last d // 2 coordinates become (a + b) / sqrt(2), (a - b) / sqrt(2)."""
    half = rows.shape[-1] // 2
    a, b = rows[:, :half], rows[:, -half:]
    middle = rows[:, half : rows.shape[-1] - half]  # one coordinate if d is odd, else none
    return np.concatenate([(a + b) * HALF_SQRT, middle, (a - b) * HALF_SQRT], axis=1)


def _rotate_dense(rotation: DenseRotation, rows: Float32s) -> Float32s:
    """Fixed point times fixed point: every partial sum is exact in float64, in any order."""
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    exponents = np.frexp(largest)[1] - 1  # largest lies in [2**e, 2**(e+1))
    fixed = np.rint(np.ldexp(rows.astype(np.float64), INPUT_BITS - 1 - exponents))
    product = fixed @ rotation.fixed.T
    rotated: Float32s = np.ldexp(
        product, exponents - (INPUT_BITS - 1) - MATRIX_FRACTION_BITS
    ).astype(np.float32)
    return rotated


def rotate_back_dense(rotation: DenseRotation, centroids: Float32s, gain: np.float64) -> Float32s:
    """[n, d] centroids of z -> [n, d] unit vectors in the original domain, in float32."""
    fixed = np.rint(np.ldexp(centroids.astype(np.float64), CENTROID_FRACTION_BITS))
    product = fixed @ rotation.fixed
    factor = np.ldexp(gain, -CENTROID_FRACTION_BITS - MATRIX_FRACTION_BITS)
    unit: Float32s = (product * factor).astype(np.float32)
    return unit
