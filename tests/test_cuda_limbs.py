"""Products by signed bytes equal products of whole numbers, with what lanes load and add."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from turboquant_np.backends.cuda.layout import DENSE_HEAD_DIMS
from turboquant_np.backends.cuda.limbs import NUMBER_LIMBS, fragments, limbs, limbs_needed, words
from turboquant_np.rotation import haar_rotation

LARGEST = 2**22


def numbers(d: int, seed: int) -> Any:
    """[16, d] whole numbers up to 2**22: random, extreme, and where limbs carry."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-LARGEST, LARGEST + 1, (16, d))
    rows[12] = LARGEST
    rows[13] = -LARGEST
    rows[14] = rng.choice([-LARGEST, LARGEST], d)
    rows[15] = rng.choice([0, 127, 128, -128, -129, 32639, 32640, -32896, -32897], d)
    return rows


def tensor_core_product(rows: Any, matrix: Any) -> Any:
    """[16, d] as a warp of kernels/imma.cuh gets it: fragments as mma.m16n8k32 reads them.

    Lane 4 g + t has bytes 4 t .. + 3 and 16 + 4 t .. + 3 of row g (factor) or column g (matrix),
    and of a product columns 2 t and 2 t + 1.
    """
    d = len(matrix)
    loaded = fragments(matrix).astype(np.int64)
    count = loaded.shape[3]
    cut = limbs(rows.astype(np.float64), NUMBER_LIMBS).astype(np.int64)
    # coordinate 32 c + 8 t + 4 half + byte is number 16 half + 4 t + byte of the chunk's 32
    cut = cut.reshape(16, d // 32, 4, 2, 4, NUMBER_LIMBS).transpose(5, 1, 0, 3, 2, 4)
    factor = cut.reshape(NUMBER_LIMBS, d // 32, 16, 32)
    tiles = loaded.reshape(d // 32, 4, d // 32, count, 8, 4, 2, 4).transpose(0, 1, 2, 3, 6, 5, 7, 4)
    tiles = tiles.reshape(d // 32, 4, d // 32, count, 32, 8)
    sums = np.zeros((count + 2, 16, d // 32, 4, 4, 2), np.int64)
    for i in range(NUMBER_LIMBS):
        for j in range(count):
            product = np.einsum("crk,npckg->rnpg", factor[i], tiles[:, :, :, j])
            sums[i + j] += product.reshape(16, d // 32, 4, 4, 2)  # [row, k, pair, t, 0 or 1]
    low, middle = sums[0] + sums[1] * 256, sums[2] + sums[3] * 256
    assert max(np.abs(sums).max(), np.abs(low).max(), np.abs(middle).max()) < 2**31
    total = low + middle * 2**16 + sum(s * 256**k for k, s in enumerate(sums[4:], 4))
    return total.transpose(0, 1, 3, 2, 4).reshape(16, d)  # coordinate 8 (4 k + t) + 2 pair + 0 or 1


@pytest.mark.parametrize("d", DENSE_HEAD_DIMS)
def test_products_are_exact(d: int) -> None:
    rng = np.random.default_rng(d)
    fixed = haar_rotation(d, seed=d + 1).fixed
    edge = rng.choice([-128.0 * 0x10101, 127.0 * 0x10101, 0.0, 32640.0, -32897.0], (d, d))
    permutation = np.eye(d)[rng.permutation(d)] * 2.0**24  # needs a fourth limb
    for matrix in (fixed, fixed.T, edge, permutation):
        rows = numbers(d, d)
        got = tensor_core_product(rows, matrix)
        np.testing.assert_array_equal(got, rows @ matrix.astype(np.int64).T)


def test_limbs_needed() -> None:
    for largest, count in ((127 * 0x10101, 3), (127 * 0x10101 + 1, 4), (2**24, 4)):
        assert limbs_needed(np.array([[largest, 0.0]])) == count
    assert limbs_needed(np.array([[-128.0 * 0x10101 - 1, 0.0]])) == 4


def test_limbs_are_digits() -> None:
    whole = np.concatenate([numbers(64, 5).ravel(), [127 * 0x10101, -128 * 0x10101]])
    digits = limbs(whole.astype(np.float64), 3)
    np.testing.assert_array_equal(digits @ np.array([1, 256, 65536]), whole)
    held = words(whole.astype(np.float64))[:, None] >> np.array([0, 8, 16], np.uint32)
    np.testing.assert_array_equal((held & 0xFF).astype(np.uint8).view(np.int8), digits)
    with pytest.raises(OverflowError, match="3 limbs"):
        limbs(np.array([2.0**24]), 3)
