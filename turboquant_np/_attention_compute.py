"""The arithmetic of attention: its names, and who can do it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _backend

if TYPE_CHECKING:
    from .quantizer import TurboQuant

__all__ = ["attention_in", "check_compute", "check_host_compute"]

COMPUTE = ("float32", "int8")


def check_compute(compute: str) -> None:
    """Raise ValueError unless an arithmetic has that name."""
    if compute not in COMPUTE:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, got {compute!r}")


def attention_in(compute: str, backend: _backend.Backend) -> Any:
    """A backend's attention in that arithmetic.

    Raises
    ------
    ValueError
        If the backend has no such.
    """
    if compute == "float32":
        return backend.attention
    attention = getattr(backend, "attention_int8", None)
    if attention is None:
        raise ValueError(
            f"backend {backend.name!r} has no compute='int8'; use compute='float32', or "
            "NumPy arrays and the backend 'cpu'"
        )
    return attention


def check_host_compute(
    compute: str, device: str, pairs: Iterable[tuple[TurboQuant, TurboQuant]]
) -> None:
    """Look before the first token whether pages can be attended to in that arithmetic.

    Parameters
    ----------
    compute : str
    device : str
        Of the pages.
    pairs : of the quantisers of keys and of values

    Raises
    ------
    ValueError
        If the name is unknown, or the device, a backend, this processor or the bits do not suit.
    """
    check_compute(compute)
    if compute == "float32":
        return
    if device == "cuda":
        raise ValueError(
            "compute='int8' is for device='cpu', got device='cuda'; use compute='float32'"
        )
    for key, value in dict.fromkeys(pairs):
        backend: Any = _backend.backend_for(np.empty(0), key.config.backend)
        attention_in(compute, backend)
        if reason := backend.why_no_int8(key._spec, value._spec):
            raise ValueError(reason)
