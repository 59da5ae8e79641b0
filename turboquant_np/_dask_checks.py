"""What the functions of `turboquant_np.dask` refuse, before anything is computed."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np

from . import _arrays
from ._checks import check_same_place, check_vectors
from .quantizer import TurboQuant

__all__ = ["check_array", "check_packed", "check_quantizer", "check_query"]


def check_quantizer(quantizer: Any) -> None:
    if not isinstance(quantizer, TurboQuant):
        raise TypeError(f"quantizer must be a TurboQuant, got {type(quantizer).__name__}")


def check_array(array: Any, name: str, last: int) -> None:
    if not isinstance(array, da.Array):
        raise TypeError(
            f"{name} must be a dask array, got {type(array).__module__}.{type(array).__name__}; "
            "the methods of TurboQuant take other arrays, or use dask.array.from_array"
        )
    if array.ndim == 0:
        raise ValueError(f"{name} needs at least one axis, got a 0-d array")
    if array.shape[-1] == last and array.numblocks[-1] != 1:
        raise ValueError(
            f"every chunk must hold whole vectors, but the last axis of {name} is cut into "
            f"{array.chunks[-1]}; use {name}.rechunk({{{array.ndim - 1}: -1}})"
        )


def check_packed(packed: Any, norms: Any, quantizer: Any) -> None:
    check_quantizer(quantizer)
    check_array(packed, "packed", quantizer.packed_dim)
    if not isinstance(norms, da.Array):
        raise TypeError(f"norms must be a dask array, got {type(norms).__name__}")
    if packed.dtype != np.uint8 or norms.dtype != np.float32:
        raise TypeError(
            "packed must be uint8 and norms float32 as encode returns them, "
            f"got {packed.dtype} and {norms.dtype}"
        )
    if packed.shape[-1] != quantizer.packed_dim:
        raise ValueError(
            f"packed must end in an axis of {quantizer.packed_dim} bytes "
            f"({quantizer.head_dim} codes of {quantizer.bits} bits), got shape {packed.shape}"
        )
    if norms.chunks != packed.chunks[:-1]:
        raise ValueError(
            "norms must have the shape and chunks of packed without its last axis, "
            f"{packed.chunks[:-1]}, got {norms.chunks}; rechunk one like the other"
        )
    check_same_place(norms._meta, "norms", packed._meta, "packed")


def check_query(query: Any, packed: Any, norms: Any, quantizer: Any) -> da.Array:
    check_packed(packed, norms, quantizer)
    if not isinstance(query, da.Array):
        array, _ = _arrays.take_in(query, "query")
        query = da.from_array(array, chunks=array.shape, asarray=False)
    check_vectors(quantizer._spec, query, "query")
    check_array(query, "query", quantizer.head_dim)
    check_same_place(query._meta, "query", packed._meta, "packed")
    return query
