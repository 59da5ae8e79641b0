"""Addresses and strides of arrays, for kernels whose arguments are integers.

NumPy takes a microsecond or two to tell one address; a compiled function is told all at once.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import register_jitable


def _array(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "A", readonly=True)


DESCRIBE = types.int64(
    types.Array(types.int64, 1, "C"),
    types.int64,
    *[_array(types.uint8, 4), _array(types.float32, 3)] * 2,
    _array(types.int64, 2),
    _array(types.float32, 2),
    _array(types.float32, 1),
    _array(types.float32, 3),
    _array(types.float32, 3),
    _array(types.float32, 2),
)


@register_jitable
def _put(fields, start, array):  # type: ignore[no-untyped-def]
    fields[start] = array.ctypes.data
    for axis in range(array.ndim):
        fields[start + 1 + axis] = array.strides[axis]
    return start + 1 + array.ndim


def describe(  # type: ignore[no-untyped-def]
    fields, start, k_packed, k_norms, v_packed, v_norms, tables, bias, sinks, query, out, lse
):
    """Write address and strides of each array into fields[start:]; return the address of fields."""
    start = _put(fields, start, k_packed)
    start = _put(fields, start, k_norms)
    start = _put(fields, start, v_packed)
    start = _put(fields, start, v_norms)
    start = _put(fields, start, tables)
    start = _put(fields, start, bias)
    start = _put(fields, start, sinks)
    start = _put(fields, start, query)
    start = _put(fields, start, out)
    start = _put(fields, start, lse)
    return fields.ctypes.data
