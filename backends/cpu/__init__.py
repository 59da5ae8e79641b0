"""The default backend for NumPy arrays: Numba kernels written in LLVM vector instructions.

Bit for bit equal to the reference backend.  simd.py explains how one source serves every CPU,
kernels.py what a kernel is, compile.py how it is compiled and cached.
"""

from __future__ import annotations

import llvmlite
import numba
import numpy as np

from ..reference import first_non_finite
from .attention import attention
from .attention_int8 import attention_int8, why_no_int8
from .codec import decode, encode
from .compile import cache_directory
from .inner_products import inner_products
from .paged import encode_paged
from .results import empty
from .simd import target
from .threads import num_threads

__all__ = [
    "attention",
    "attention_int8",
    "decode",
    "describe",
    "device",
    "empty",
    "encode",
    "encode_paged",
    "first_non_finite",
    "inner_products",
    "name",
    "why_no_int8",
    "why_unavailable",
]

name = "cpu"
device = "cpu"


def why_unavailable() -> str | None:
    """None: where Numba can be imported this backend works."""
    return None


def describe() -> dict[str, str]:
    """Versions, SIMD level, threads and the cache of compiled kernels."""
    cpu = target()
    return {
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
        "simd": f"{cpu.level} ({cpu.width} float32 lanes)",
        "cpu": cpu.cpu,
        "threads": str(num_threads()),
        "cache": cache_directory() or "not writable: kernels are compiled in every process",
    }
