"""Preparing the CUDA kernels, for programs that must not compile in the middle of their work."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from . import _arrays, _backend
from .quantizer import TurboQuant

__all__ = ["compiled_kernels", "release_captured", "warmup"]


def warmup(tq: TurboQuant, dtypes: Sequence[Any] = ("float16",)) -> None:
    """Compile the kernels of a quantiser and copy its tables, on the current CUDA device.

    A kernel is compiled when it is first needed (about a second each, then kept on disk by CuPy).
    Call this before capturing a CUDA graph, where nothing may be compiled or allocated, and before
    measuring time.

    Parameters
    ----------
    tq : TurboQuant
    dtypes : sequence of dtype-like
        Input dtypes of `encode` and `inner_products` and output dtypes of `decode` to prepare.

    Raises
    ------
    RuntimeError
        If there is no usable GPU; the message says what is missing.

    Notes
    -----
    Kernels also depend on how arrays are aligned; those for arrays as CuPy allocates them are
    prepared.  Capturing works with ``out=`` and ``check_finite=False``, for Hadamard rotations, and
    for others of head_dim 64, 96, 128 and 192.

    Examples
    --------
    >>> from turboquant_np import TurboQuant
    >>> from turboquant_np.cuda import warmup
    >>> tq = TurboQuant(head_dim=128, bits=4)
    >>> warmup(tq, dtypes=["float16", "float32"])  # doctest: +SKIP
    """
    backend = _backend.load("cuda")
    if reason := backend.why_unavailable():
        raise RuntimeError(f"backend 'cuda' is not available: {reason}")
    import cupy

    for dtype in map(_arrays.float_dtype, dtypes):
        vectors = cupy.zeros((2, tq.head_dim), dtype)
        packed, norms = tq.encode(vectors, check_finite=False)
        tq.decode(packed, norms, dtype=dtype)
        tq.inner_products(vectors[0], packed, norms)
        tq.inner_products(vectors, packed, norms)
    cupy.cuda.get_current_stream().synchronize()


def compiled_kernels() -> list[str]:
    """The kernels this process has compiled or loaded so far, one line each.

    Examples
    --------
    Nothing was compiled in the middle of some work:

    >>> import numpy as np
    >>> from turboquant_np import TurboQuant
    >>> from turboquant_np.cuda import compiled_kernels
    >>> before = compiled_kernels()
    >>> packed, norms = TurboQuant(head_dim=64).encode(np.ones((2, 64)))  # NumPy: on the CPU
    >>> compiled_kernels() == before
    True
    """
    lines: list[str] = importlib.import_module(
        "turboquant_np.backends.cuda.compile"
    ).compiled_kernels()
    return lines


def release_captured() -> None:
    """Give back the memory that steps of attention keep for CUDA graphs they were captured in.

    A graph holds addresses, not arrays, so scratch memory and copies of arguments that a capture
    saw are kept for the life of the process.  Call this when every graph captured so far is done
    with: none of them may be launched again.  Waits for the devices; steps captured later are not
    affected.

    Raises
    ------
    RuntimeError
        If there is no usable GPU; the message says what is missing.

    Examples
    --------
    >>> from turboquant_np.cuda import release_captured
    >>> del graph  # doctest: +SKIP
    >>> release_captured()  # doctest: +SKIP
    """
    backend = _backend.load("cuda")
    if reason := backend.why_unavailable():
        raise RuntimeError(f"backend 'cuda' is not available: {reason}")
    importlib.import_module("turboquant_np.backends.cuda.attention").release_captured()
