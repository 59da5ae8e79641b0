"""What is refused, and what the error says: given, allowed, and the call that works."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _arrays, _backend
from ._spec import CodecSpec


def check_vectors(spec: CodecSpec, vectors: Any, name: str) -> None:
    """`vectors` is floating point and ends in an axis of length head_dim."""
    if vectors.dtype.name not in _arrays.FLOAT_NAMES:
        raise TypeError(
            f"{name} must be {', '.join(_arrays.FLOAT_NAMES)}, got {vectors.dtype}; "
            "convert it with astype(numpy.float32) if that loses nothing"
        )
    if vectors.ndim == 0:
        raise ValueError(f"{name} needs at least one axis of length {spec.head_dim}, got 0-d")
    if vectors.shape[-1] != spec.head_dim:
        raise ValueError(
            f"Expected last dim {spec.head_dim}, got {vectors.shape[-1]} "
            f"({name} has shape {vectors.shape})"
        )


def take_in_packed(spec: CodecSpec, packed: Any, norms: Any) -> tuple[Any, Any, _arrays.GiveBack]:
    """Packed codes and scales as C-contiguous native arrays that fit each other."""
    codes, give_back = _arrays.take_in(packed, "packed")
    scales, _ = _arrays.take_in(norms, "norms")
    if codes.dtype != np.uint8:
        raise TypeError(f"packed must be uint8 as encode returns it, got {codes.dtype}")
    if scales.dtype.name != "float32":
        raise TypeError(f"norms must be float32 as encode returns them, got {scales.dtype}")
    if codes.ndim == 0 or codes.shape[-1] != spec.packed_dim:
        raise ValueError(
            f"packed must end in an axis of {spec.packed_dim} bytes "
            f"({spec.head_dim} codes of {spec.bits} bits), got shape {codes.shape}"
        )
    if scales.shape != codes.shape[:-1]:
        raise ValueError(
            f"norms must have the shape of packed without its last axis, {codes.shape[:-1]}, "
            f"got {scales.shape}"
        )
    check_same_place(scales, "norms", codes, "packed")
    return _contiguous(codes), _contiguous(_arrays.native(scales)), give_back


def take_in_out(
    out: Any, shape: tuple[int, ...], dtypes: tuple[str, ...], name: str, like: Any
) -> Any:
    """`out` as an array that can be written into: shape, dtype, place and layout as needed."""
    if isinstance(out, np.generic):
        raise TypeError(f"{name} must be an array to write into, got a scalar ({out.dtype})")
    array, _ = _arrays.take_in(out, name)
    check_same_place(array, name, like, "the input")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if _arrays.dtype_name(array.dtype) not in dtypes:
        raise TypeError(f"{name} must be {', '.join(dtypes)}, got {array.dtype}")
    if not array.flags.c_contiguous or _arrays.native(array) is not array:
        raise ValueError(f"{name} must be C-contiguous, aligned and in native byte order")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return array


def check_same_place(a: Any, a_name: str, b: Any, b_name: str) -> None:
    """Both arrays live in host memory, or on the same CUDA device."""
    a_device, b_device = _backend.device_of(a), _backend.device_of(b)
    if a_device != b_device:
        raise ValueError(
            f"{a_name} and {b_name} must live in the same memory, got {a_device} and {b_device}"
        )
    if a_device == "cuda" and a.device.id != b.device.id:
        raise ValueError(
            f"{a_name} is on CUDA device {a.device.id} and {b_name} on device {b.device.id}"
        )


def value_error(vectors: Any, row: int) -> Exception:
    """Say what is wrong with vector number `row`, counted over the flattened leading axes."""
    index = tuple(int(i) for i in np.unravel_index(row, vectors.shape[:-1]))
    vector = vectors[index]
    vector = vector.get() if hasattr(vector, "get") else np.asarray(vector)
    values = vector.astype(np.float64)
    hint = "clean the input, or pass check_finite=False to let such vectors decode to NaN"
    if not np.isfinite(values).all():
        column = int((~np.isfinite(values)).argmax())
        return ValueError(f"x[{_subscript(*index, column)}] is {values[column]}; {hint}")
    largest = int(np.abs(values).argmax())
    with np.errstate(over="ignore"):
        fits = np.isfinite(values[largest].astype(np.float32))
    if not fits:
        at = _subscript(*index, largest)
        return ValueError(f"x[{at}] = {values[largest]:g} does not fit float32; {hint}")
    return OverflowError(
        f"the scale of x[{_subscript(*index)}] exceeds the largest float32 "
        f"(its norm is {np.linalg.norm(values):g}); scale the input down"
    )


def _subscript(*index: int) -> str:
    return ", ".join(map(str, index)) or "..."


def _contiguous(array: Any) -> Any:
    return array if array.flags.c_contiguous else array.copy(order="C")
