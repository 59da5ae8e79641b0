"""The backend for CuPy arrays: fused kernels, bit for bit the reference.

Importing it imports no CuPy; `why_unavailable` says what is missing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .attention import attention
from .codec import decode, encode
from .inner_products import inner_products
from .paged import encode_paged

__all__ = [
    "attention",
    "decode",
    "describe",
    "device",
    "empty",
    "encode",
    "encode_paged",
    "first_non_finite",
    "inner_products",
    "name",
    "why_unavailable",
]

name = "cuda"
device = "cuda"

MIN_COMPUTE_CAPABILITY = 80  # asynchronous copies, bfloat16 conversions


@cache
def why_unavailable() -> str | None:
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); pip install 'turboquant-np[cuda12]' (or cuda13)"
    if int(cupy.__version__.split(".")[0]) < 14:
        return f"CuPy {cupy.__version__} is too old; pip install 'cupy-cuda13x>=14'"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable GPU: {error}"
    capabilities = [cupy.cuda.Device(i).compute_capability for i in range(count)]
    if not any(int(capability) >= MIN_COMPUTE_CAPABILITY for capability in capabilities):
        return (
            f"compute capability 8.0 (Ampere) or later is needed, found {', '.join(capabilities)}"
        )
    return None


def describe() -> dict[str, str]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    return {
        "cupy": cupy.__version__,
        "device": properties["name"].decode(),
        "compute capability": f"{properties['major']}.{properties['minor']}",
        "CUDA driver": str(cupy.cuda.runtime.driverGetVersion()),
        "NVRTC": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
    }


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    import cupy

    with like.device:
        return cupy.empty(shape, dtype)


def first_non_finite(scales: Any) -> int | None:
    import cupy

    with scales.device:
        bad = ~cupy.isfinite(scales.reshape(-1))
        if not bad.any():
            return None
        return int(bad.argmax())
