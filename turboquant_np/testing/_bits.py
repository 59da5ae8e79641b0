"""Equality of arrays bit for bit, with a message that helps."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt


def assert_bits_equal(actual: Any, expected: Any) -> None:
    """Raise unless two arrays have the same dtype, the same shape and the same bits.

    It tells -0.0 from 0.0 and compares NaNs by their bits, which `numpy.testing` does not.

    Parameters
    ----------
    actual, expected : NumPy or CuPy arrays
        Of any dtype without Python objects; not necessarily in the same memory.

    Raises
    ------
    AssertionError
        The message names the first coordinate that differs, both values with their bits, and how
        many differ.
    TypeError
        If one is not a NumPy or CuPy array, or holds Python objects.

    Examples
    --------
    >>> import numpy as np
    >>> from turboquant_np.testing import assert_bits_equal
    >>> assert_bits_equal(np.float32([1, 2]), np.float32([1, 2]))
    >>> assert_bits_equal(np.float16([0.0]), np.float16([-0.0]))
    Traceback (most recent call last):
    AssertionError: 1 of 1 float16 values differ, first at [0]: 0.0 (0x0000) != -0.0 (0x8000)
    """
    __tracebackhide__ = True
    a, b = _on_host(actual, "actual"), _on_host(expected, "expected")
    if a.dtype != b.dtype:
        raise AssertionError(f"dtypes differ: {a.dtype} != {b.dtype}")
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {a.shape} != {b.shape}")
    differ = (_value_bytes(a) != _value_bytes(b)).any(axis=-1)
    if not differ.any():
        return
    at = tuple(int(i) for i in np.argwhere(differ)[0])
    subscript = ", ".join(map(str, at)) or "..."
    raise AssertionError(
        f"{int(differ.sum())} of {a.size} {a.dtype} values differ, first at [{subscript}]: "
        f"{_value_with_bits(a, at)} != {_value_with_bits(b, at)}"
    )


def _on_host(array: Any, name: str) -> npt.NDArray[Any]:
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        array = array.get()
    if isinstance(array, np.generic):
        array = np.asarray(array)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy or CuPy array, got {type(array).__qualname__}")
    if array.dtype.hasobject:
        raise TypeError(f"{name} holds Python objects, which have no bits to compare")
    return array


def _value_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """[*shape, itemsize] bytes of the values."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).reshape(*array.shape, array.dtype.itemsize)


def _value_with_bits(array: npt.NDArray[Any], at: tuple[int, ...]) -> str:
    value = array[at]  # a scalar, whose bytes are in native order
    bits = int.from_bytes(value.tobytes(), sys.byteorder)
    return f"{value!s} (0x{bits:0{2 * array.dtype.itemsize}x})"
