"""The bit layout of codes: a stream of fixed-width numbers, first index in the high bits.

A vector of d codes of b bits takes ceil(d * b / 8) bytes.  Code i occupies the stream's bits
b*i .. b*i + b - 1, its most significant bit first, and bit 0 of the stream is the most significant
bit of byte 0, as in `numpy.packbits`.  Bits behind the last code are zero.  At 4 bits this is
``[1, 2] -> 0x12``, at 2 bits ``[0, 1, 2, 3] -> 0x1b``, at 3 bits ``0..7 -> 05 39 77``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .codebook import check_bits

__all__ = ["pack", "packed_size", "unpack"]


def packed_size(d: int, bits: int) -> int:
    """Bytes taken by `d` codes of `bits` bits: ceil(d * bits / 8).

    Examples
    --------
    >>> from turboquant_np.packing import packed_size
    >>> packed_size(128, 4), packed_size(127, 3)
    (64, 48)
    """
    bits = check_bits(bits)
    if d < 0:
        raise ValueError(f"d must not be negative, got {d}")
    return -(-d * bits // 8)


def pack(indices: Any, bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes along the last axis.

    Parameters
    ----------
    indices : array_like of int, shape [..., d]
        Codes from 0 to 2**bits - 1.
    bits : int
        1 to 8.

    Returns
    -------
    ndarray, uint8, shape [..., ceil(d * bits / 8)]

    Raises
    ------
    TypeError
        If `indices` are not integers.
    ValueError
        If a code is out of range; the first one is named.

    Examples
    --------
    >>> from turboquant_np.packing import pack
    >>> pack([0, 1, 2, 3, 4, 5, 6, 7], bits=3).tobytes().hex()
    '053977'
    """
    bits = check_bits(bits)
    codes = np.asarray(indices)
    if not np.issubdtype(codes.dtype, np.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    if codes.ndim == 0:
        raise ValueError("codes need at least one axis, got a 0-d array")
    wrong = (codes < 0) | (codes >= 2**bits)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"code {codes[at]} at index {at} does not fit {bits} bits (0..{2**bits - 1})"
        )
    most_significant_first = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    bit = (codes.astype(np.uint8)[..., None] >> most_significant_first) & 1
    return np.packbits(bit.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1)


def unpack(packed: Any, bits: int, d: int) -> npt.NDArray[np.uint8]:
    """Undo `pack`: the first `d` codes of each row.

    Parameters
    ----------
    packed : array_like, uint8, shape [..., ceil(d * bits / 8)]
    bits, d : int

    Returns
    -------
    ndarray, uint8, shape [..., d]

    Raises
    ------
    TypeError
        If `packed` is not uint8.
    ValueError
        If its last axis has another length.

    Examples
    --------
    >>> from turboquant_np.packing import pack, unpack
    >>> unpack(pack([3, 0, 2], bits=2), bits=2, d=3).tolist()
    [3, 0, 2]
    """
    rows = np.asarray(packed)
    size = packed_size(d, bits)
    if rows.dtype != np.uint8:
        raise TypeError(f"packed codes must be uint8, got {rows.dtype}")
    if rows.ndim == 0 or rows.shape[-1] != size:
        raise ValueError(f"{d} codes of {bits} bits take {size} bytes, got shape {rows.shape}")
    bit = np.unpackbits(rows, axis=-1, count=d * bits).reshape(*rows.shape[:-1], d, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    codes: npt.NDArray[np.uint8] = (bit * weights).sum(axis=-1, dtype=np.uint8)
    return codes
