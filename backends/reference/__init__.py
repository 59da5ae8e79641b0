"""The definition in plain NumPy: one obvious line for each step of docs/format.md.

Every other backend must equal this one bit for bit in codes, stored scales and decoded values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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

name = "reference"
device = "cpu"


def why_unavailable() -> str | None:
    return None


def describe() -> dict[str, str]:
    return {"numpy": np.__version__}


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    return np.empty(shape, dtype)


def first_non_finite(scales: Any) -> int | None:
    bad = ~np.isfinite(scales.reshape(-1))
    return int(bad.argmax()) if bad.any() else None
