"""What a layer does besides matrix products: in array operations, and as few kernels on a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy as np

__all__ = ["ArrayOperations", "Operations", "operations_for"]


class Operations(Protocol):
    """Normalisation, rotary position embedding and activation."""

    def rms_norm(self, x: Any, gain: Any, eps: float, dtype: Any) -> Any:
        """x / sqrt(mean(x**2) + eps) * gain over the last axis, float32 [T, width] -> `dtype`."""

    def rope(self, x: Any, cos: Any, sin: Any) -> None:
        """Rotate the channels (2i, 2i + 1) of [T, heads, head_dim] by an angle of their token.

        In place.  cos, sin : float32 [T, 1, head_dim / 2].
        """

    def swiglu(self, gate: Any, up: Any) -> Any:
        """silu(gate) * up."""


class ArrayOperations:
    """Plain array operations; each is a pass over memory, and on a GPU a kernel of its own."""

    def rms_norm(self, x: Any, gain: Any, eps: float, dtype: Any) -> Any:
        mean = np.square(x).mean(axis=-1, keepdims=True, dtype=np.float32)
        return (x / np.sqrt(mean + np.float32(eps)) * gain).astype(dtype, copy=False)

    def rope(self, x: Any, cos: Any, sin: Any) -> None:
        even, odd = x[..., 0::2], x[..., 1::2]
        x[..., 0::2], x[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos

    def swiglu(self, gate: Any, up: Any) -> Any:
        with np.errstate(over="ignore"):  # exp(-gate) = inf gives 0, as it should
            return gate / (1 + np.exp(-gate)) * up


class FusedOperations:
    """The same as one or two CuPy kernels each: a decoding step lasts as long as its launches."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._squares = cupy.ReductionKernel(
            "T x", "T sum", "x * x", "a + b", "sum = a", "0", "smollm2_squares"
        )
        self._norm = cupy.ElementwiseKernel(
            "float32 x, float32 sum, float32 gain, float32 width, float32 eps",
            "T out",
            "out = T(x * rsqrtf(sum / width + eps) * gain)",
            "smollm2_norm",
        )
        self._rope = cupy.ElementwiseKernel(
            "T even, T odd, float32 cos, float32 sin",
            "T new_even, T new_odd",
            "float a = even, b = odd;"
            "new_even = T(a * cos - b * sin); new_odd = T(a * sin + b * cos)",
            "smollm2_rope",
        )
        self._swiglu = cupy.ElementwiseKernel(
            "T gate, T up",
            "T out",
            "float g = gate; out = T(g / (1 + expf(-g)) * float(up))",
            "smollm2_swiglu",
        )

    def rms_norm(self, x: Any, gain: Any, eps: float, dtype: Any) -> Any:
        total = self._squares(x, axis=-1, keepdims=True)
        out = self._cupy.empty(x.shape, dtype)
        return self._norm(x, total, gain, np.float32(x.shape[-1]), np.float32(eps), out)

    def rope(self, x: Any, cos: Any, sin: Any) -> None:
        even, odd = x[..., 0::2], x[..., 1::2]
        self._rope(even, odd, cos, sin, even, odd)

    def swiglu(self, gate: Any, up: Any) -> Any:
        return self._swiglu(gate, up)


@cache
def operations_for(xp: Any) -> Operations:
    """Those of an array library, numpy or cupy."""
    return FusedOperations(xp) if xp.__name__ == "cupy" else ArrayOperations()
