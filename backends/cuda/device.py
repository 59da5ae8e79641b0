"""Which device calls go to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["on_device"]

_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


def on_device(device: int) -> AbstractContextManager[Any]:
    """Make `device` the current one; in most calls it is, and then entering it again costs more."""
    import cupy

    if cupy.cuda.runtime.getDevice() == device:
        return _AS_IT_IS
    chosen: AbstractContextManager[Any] = cupy.cuda.Device(device)
    return chosen
