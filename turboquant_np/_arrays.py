"""Arrays on their way in and out: which library owns them, and how its kind is given back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")

Dtype = np.dtype[Any]
GiveBack = Callable[[Any], Any]

_DLPACK_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged


def float_dtype(dtype: Any) -> Dtype:
    """The NumPy dtype for "float16", np.float32, torch.bfloat16, ml_dtypes.bfloat16, ...

    Raises
    ------
    TypeError
        If it is none of float16, bfloat16, float32, float64.
    ImportError
        If bfloat16 is asked for without ml_dtypes.
    """
    try:
        name = np.dtype(dtype).name if dtype is not None else "None"
    except TypeError:  # "bfloat16" before ml_dtypes is imported, torch.float16, ...
        name = str(dtype).rpartition(".")[2]
    if name not in FLOAT_NAMES:
        raise TypeError(f"dtype must be one of {', '.join(FLOAT_NAMES)}, got {dtype!r}")
    return _bfloat16() if name == "bfloat16" else np.dtype(name)


def _bfloat16() -> Dtype:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "bfloat16 needs ml_dtypes: pip install 'turboquant-np[bfloat16]'"
        ) from error
    dtype: Dtype = np.dtype(ml_dtypes.bfloat16)
    return dtype


@cache
def dtype_name(dtype: Dtype) -> str:
    """dtype.name, which NumPy puts together anew each time."""
    return dtype.name


def take_in(x: Any, name: str) -> tuple[Any, GiveBack]:
    """View `x` as a NumPy or CuPy array, without a copy, and say how to give results back.

    NumPy and CuPy arrays pass; other producers of DLPack (torch, JAX, array_api_strict, ...) are
    viewed by the library that owns their memory, and results return as arrays of their library.

    Raises
    ------
    TypeError
        If `x` is no array, a masked array, or lives on a device that is neither a CPU nor CUDA.
    """
    cupy = sys.modules.get("cupy")
    if type(x) is np.ndarray or (cupy is not None and type(x) is cupy.ndarray):  # in most calls
        return x, _as_is
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost; fill or drop it first"
        )
    if isinstance(x, (np.ndarray, np.generic)):  # norms[0] is a scalar of NumPy
        return np.asarray(x), _as_is  # numpy.matrix and other subclasses redefine operators
    if cupy is not None and isinstance(x, cupy.ndarray):
        return x, _as_is
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _from_torch(x, torch, name), lambda result: _to_torch(result, torch)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
        return _from_dlpack(x, name), lambda result: _to_namespace(result, namespace)
    raise TypeError(
        f"{name} must be a NumPy or CuPy array or offer DLPack (torch, JAX, ...), "
        f"got {type(x).__module__}.{type(x).__qualname__}; numpy.asarray converts sequences"
    )


def native(array: Any) -> Any:
    """The same values, aligned and in native byte order; a copy only where they are not."""
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    aligned = not isinstance(array, np.ndarray) or array.flags.aligned
    return array if aligned else array.copy()


def _as_is(result: Any) -> Any:
    return result


def _from_dlpack(x: Any, name: str) -> Any:
    device = int(x.__dlpack_device__()[0])
    if device in _DLPACK_CPU_DEVICES:
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError):  # bfloat16 has no NumPy type in DLPack
            return np.asarray(x)
    if device in _DLPACK_CUDA_DEVICES:
        try:
            import cupy
        except ImportError as error:
            raise TypeError(
                f"{name} is on a GPU; install CuPy: pip install 'turboquant-np[cuda12]' or cuda13"
            ) from error
        return cupy.from_dlpack(x)
    raise TypeError(
        f"{name} lives on DLPack device type {device}; move it to a CPU or a CUDA device"
    )


def _from_torch(x: Any, torch: Any, name: str) -> Any:
    if x.requires_grad:
        raise TypeError(f"{name} requires grad, and quantising has no gradient; pass x.detach()")
    if x.dtype == torch.bfloat16:
        return _from_dlpack(x.view(torch.int16), name).view(_bfloat16())
    return _from_dlpack(x, name)


def _to_torch(result: Any, torch: Any) -> Any:
    if result.dtype.name == "bfloat16":
        return torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(result)


def _to_namespace(result: Any, namespace: Any) -> Any:
    if namespace is None:
        return result
    if result.dtype.name == "bfloat16" or not hasattr(namespace, "from_dlpack"):
        return namespace.asarray(result)
    return namespace.from_dlpack(result)


def widen(x: Any) -> Any:
    """Finite numbers as float32; float16 in host memory two to three times faster than `astype`.

    Shift the fields into place and let a multiplication by 2**112 mend the exponent, which is exact
    for subnormal numbers too.
    """
    if not isinstance(x, np.ndarray) or x.dtype != np.float16:
        return x.astype(np.float32, copy=False)
    fields = x.view(np.int16).astype(np.int32)  # the sign in all upper bits
    fields <<= 13
    fields &= np.int32(-0x70002000)  # sign, exponent and mantissa: 0x8fffe000
    numbers = fields.view(np.float32)
    numbers *= np.float32(2.0**112)
    return numbers
