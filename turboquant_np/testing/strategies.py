"""Hypothesis strategies: arrays as they occur in the wild, and quantiser settings.

The bulk of an array comes from one seed and one magnitude, which is fast and shrinks to a single
number; up to three special values are then put in at drawn places.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_np import TurboQuantConfig
from turboquant_np._arrays import float_dtype
from turboquant_np._spec import SCALE_KINDS
from turboquant_np.config import ROTATION_KINDS

from ._hypothesis import st

__all__ = [
    "DEVICE_LAYOUTS",
    "HEAD_DIMS",
    "LAYOUTS",
    "configs",
    "float_arrays",
    "lay_out",
    "seeds",
    "shapes",
]

#: Powers of two and their neighbours, odd numbers, and the head_dims of well-known models.
HEAD_DIMS = (2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 63, 64, 65, 80, 96, 100, 112, 127, 128, 192, 256)

#: The layouts that `lay_out` knows for NumPy and CuPy arrays, and for NumPy arrays.
DEVICE_LAYOUTS = ("C", "F", "reversed", "strided")
LAYOUTS = (*DEVICE_LAYOUTS, "offset", "read-only", "swapped")

_MAX_SEED = 2**32 - 1  # seeds are taken modulo 2**32


def shapes(
    head_dim: int, *, max_leading: int = 3, max_side: int = 4
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes ``(*leading, head_dim)`` with 0 to `max_leading` leading axes, some of length 0."""
    leading = st.lists(st.integers(0, max_side), max_size=max_leading)
    return leading.map(lambda sides: (*sides, head_dim))


@st.composite
def float_arrays(
    draw: st.DrawFn,
    shape: Any,
    *,
    dtypes: Iterable[Any] = ("float16", "float32", "float64"),
    finite: bool = False,
    layouts: Iterable[str] = LAYOUTS,
) -> npt.NDArray[Any]:
    """Floating-point arrays of any magnitude, layout and byte order.

    Parameters
    ----------
    shape : tuple of int, or a strategy for one
    dtypes : iterable of dtype-like
        "bfloat16" needs ml_dtypes.
    finite : bool, default False
        Leave out NaN and infinities.  Norms still may exceed the largest float32.
    layouts : iterable of str
        From `LAYOUTS`; see `lay_out`.

    Examples
    --------
    >>> from hypothesis import given
    >>> from turboquant_np.testing.strategies import float_arrays, shapes
    >>> @given(float_arrays(shapes(64)))
    ... def test_something(x):
    ...     assert x.shape[-1] == 64
    >>> test_something()
    """
    where = draw(shape) if isinstance(shape, st.SearchStrategy) else tuple(shape)
    dtype = float_dtype(draw(st.sampled_from(list(dtypes))))
    rng = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**16))))
    tiny, huge = _magnitudes(dtype)
    magnitude = draw(st.sampled_from([1.0, 0.0, tiny, huge, 1e-3, 1e3]))
    with np.errstate(over="ignore", under="ignore"):
        x = (rng.standard_normal(where) * magnitude).astype(dtype)
        if x.size:
            special = _special_values(dtype, finite)
            for _ in range(draw(st.integers(0, 3))):
                x.reshape(-1)[draw(st.integers(0, x.size - 1))] = draw(st.sampled_from(special))
    laid_out: npt.NDArray[Any] = lay_out(x, draw(st.sampled_from(list(layouts))))
    return laid_out


def lay_out(x: Any, layout: str) -> Any:
    """The same values in another memory layout.

    Parameters
    ----------
    x : NumPy or CuPy array
    layout : str
        For both libraries (`DEVICE_LAYOUTS`): "C"; "F"; "reversed" (all strides negative);
        "strided" (every second element of a larger buffer).  For NumPy alone: "offset" (at an odd
        address); "read-only"; "swapped" (the other byte order; bfloat16, which has none, is kept).

    Raises
    ------
    ValueError
        If the layout is none of these.
    """
    every_axis = range(x.ndim)
    if layout == "F":
        return x.copy(order="F")
    if layout == "reversed":
        backwards = (..., *(slice(None, None, -1) for _ in every_axis))
        return x[backwards].copy()[backwards]
    if layout == "strided":
        for axis in every_axis:
            x = x.repeat(2, axis)
        return x[(..., *(slice(None, None, 2) for _ in every_axis))]
    if layout == "offset":
        unaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        unaligned[...] = x
        return unaligned
    if layout == "swapped":
        return x.astype(x.dtype.newbyteorder("S")) if x.dtype.kind == "f" else x
    x = x.copy(order="C")
    if layout == "read-only":
        x.setflags(write=False)
    elif layout != "C":
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return x


def seeds() -> st.SearchStrategy[int]:
    """Seeds of rotations: small ones, large ones and negative ones."""
    return st.integers(0, 50) | st.integers(-_MAX_SEED, _MAX_SEED)


def configs(
    *,
    head_dims: Iterable[int] = HEAD_DIMS,
    bits: Iterable[int] = range(1, 9),
    rotations: Iterable[str] = ROTATION_KINDS,
    scales: Iterable[str] = SCALE_KINDS,
    backend: str = "auto",
) -> st.SearchStrategy[TurboQuantConfig]:
    """Settings of quantisers, with seeds of all magnitudes and one to four Hadamard rounds.

    Examples
    --------
    >>> from hypothesis import given
    >>> from turboquant_np import TurboQuant
    >>> from turboquant_np.testing.strategies import configs
    >>> @given(configs(head_dims=[64, 128], bits=[4]))
    ... def test_packed_dim(config):
    ...     assert TurboQuant(config).packed_dim == config.head_dim // 2
    >>> test_packed_dim()
    """
    return st.builds(
        TurboQuantConfig,
        head_dim=st.sampled_from(list(head_dims)),
        bits=st.sampled_from(list(bits)),
        seed=seeds(),
        hadamard_rounds=st.sampled_from([3, 1, 2, 4]),
        rotation=st.sampled_from(list(rotations)),
        scale=st.sampled_from(list(scales)),
        backend=st.just(backend),
    )


def _magnitudes(dtype: np.dtype[Any]) -> tuple[float, float]:
    """A small and a large magnitude of normal numbers whose vectors have finite float32 norms."""
    return (1e-4, 1e3) if dtype == np.float16 else (1e-36, 1e35)


def _special_values(dtype: np.dtype[Any], finite: bool) -> list[float]:
    """Values at the edges of `dtype` and, for float64, of float32."""
    if dtype == np.float16:
        edges = [2.0**-24, 2.0**-14, 65504.0]
    elif dtype.name == "bfloat16":
        edges = [2.0**-133, 2.0**-126, 3.3895313892515355e38]
    else:  # those of float32, as float64 is rounded to it first
        edges = [2.0**-149, 2.0**-126, float(np.finfo(np.float32).max)]
    values = [0.0, 1.0, *edges]
    if not finite:
        values += [float("inf"), float("nan")]
        if dtype == np.float64:
            values += [sys.float_info.max]  # beyond float32
    return [sign * value for value in values for sign in (1.0, -1.0)]
