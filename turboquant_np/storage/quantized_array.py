"""`QuantizedArray`: packed codes, scales and the quantiser that made them, as one value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _arrays
from .._checks import take_in_packed
from ..quantizer import TurboQuant

__all__ = ["QuantizedArray"]


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """What `TurboQuant.encode` returns, together with what it takes to decode it.

    Parameters
    ----------
    packed : array, uint8, shape [..., packed_dim]
    norms : array, float32, shape [...]
        As `TurboQuant.encode` returns them: NumPy arrays (memory-mapped ones too) or CuPy arrays.
    quantizer : TurboQuant
    dtype : dtype-like, optional
        Of the array that was encoded, and so the default of `decode`; by default the quantiser's.

    Raises
    ------
    TypeError, ValueError
        If `packed` and `norms` do not fit each other or the quantiser.

    Examples
    --------
    >>> import numpy as np
    >>> from turboquant_np import QuantizedArray, TurboQuant
    >>> x = np.random.default_rng(0).standard_normal((1000, 128)).astype(np.float32)
    >>> quantized = QuantizedArray.encode(x, TurboQuant(head_dim=128, bits=4))
    >>> quantized
    QuantizedArray(shape=(1000, 128), dtype=float32, bits=4, nbytes=68000)
    >>> quantized[10:20].decode().shape
    (10, 128)
    """

    packed: Any
    norms: Any
    quantizer: TurboQuant
    dtype: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.quantizer, TurboQuant):
            raise TypeError(f"quantizer must be a TurboQuant, got {self.quantizer!r}")
        packed, norms, _ = take_in_packed(self.quantizer._spec, self.packed, self.norms)
        dtype = self.quantizer.dtype if self.dtype is None else _arrays.float_dtype(self.dtype)
        for name, value in {"packed": packed, "norms": norms, "dtype": dtype}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def encode(cls, x: Any, quantizer: TurboQuant, *, check_finite: bool = True) -> QuantizedArray:
        """Quantise vectors and remember their dtype.

        Parameters
        ----------
        x : array, shape [..., head_dim]
        quantizer : TurboQuant
        check_finite : bool, default True
            As in `TurboQuant.encode`, which also tells what raises.

        Examples
        --------
        >>> import numpy as np
        >>> from turboquant_np import QuantizedArray, TurboQuant
        >>> QuantizedArray.encode(np.ones((3, 64)), TurboQuant(head_dim=64)).dtype
        dtype('float64')
        """
        vectors, _ = _arrays.take_in(x, "x")
        packed, norms = quantizer.encode(vectors, check_finite=check_finite)
        return cls(packed, norms, quantizer, vectors.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was encoded, (..., head_dim)."""
        return (*self.norms.shape, self.quantizer.head_dim)

    @property
    def ndim(self) -> int:
        """Number of axes, the one of the coordinates included."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the scales."""
        return int(self.packed.nbytes + self.norms.nbytes)

    def decode(self, *, dtype: Any = None, out: Any = None) -> Any:
        """Restore the vectors; index first to restore only some.

        Parameters
        ----------
        dtype : dtype-like, optional
            By default that of the array which was encoded.
        out : array, shape [..., head_dim], optional
            C-contiguous array to write into; its dtype is the output dtype.

        Returns
        -------
        array, shape [..., head_dim]

        Examples
        --------
        >>> import numpy as np
        >>> from turboquant_np import QuantizedArray, TurboQuant
        >>> x = np.linspace(-1, 1, 640, dtype=np.float32).reshape(10, 64)
        >>> quantized = QuantizedArray.encode(x, TurboQuant(head_dim=64, bits=8))
        >>> bool(abs(quantized[3].decode() - x[3]).max() < 0.01)
        True
        """
        if dtype is None and out is None:
            dtype = self.dtype
        return self.quantizer.decode(self.packed, self.norms, dtype=dtype, out=out)

    def inner_products(self, query: Any, *, out: Any = None) -> Any:
        """Inner products of queries with the vectors, without decoding them.

        Parameters
        ----------
        query : array, shape [*m, head_dim]
        out : array, float32, shape [*m, *shape[:-1]], optional

        Returns
        -------
        array, float32, shape [*m, *shape[:-1]]
            See `TurboQuant.inner_products`.

        Examples
        --------
        >>> import numpy as np
        >>> from turboquant_np import QuantizedArray, TurboQuant
        >>> x = np.eye(3, 64, dtype=np.float32)
        >>> quantized = QuantizedArray.encode(x, TurboQuant(head_dim=64, bits=6))
        >>> int(quantized.inner_products(x[1]).argmax()), quantized.inner_products(x).shape
        (1, (3, 3))
        """
        return self.quantizer.inner_products(query, self.packed, self.norms, out=out)

    def __getitem__(self, index: Any) -> QuantizedArray:
        """Some of the vectors: any NumPy index over the leading axes.

        Where the selected rows lie one after another (``q[10:20]``, ``q[3]``) nothing is copied or
        read; other selections copy the codes they select.
        """
        index = index if isinstance(index, tuple) else (index,)
        if any(i is Ellipsis for i in index):
            rows, codes = index, (*index, slice(None))
        else:
            rows, codes = (*index, Ellipsis), (*index, Ellipsis)  # an array even if 0-d
        norms = self.norms[rows]  # first: it refuses an index that reaches into the coordinates
        return QuantizedArray(self.packed[codes], norms, self.quantizer, self.dtype)

    def __len__(self) -> int:
        if self.ndim == 1:
            raise TypeError("a single vector has no rows; decode() gives its coordinates")
        return self.shape[0]

    def __iter__(self) -> Iterator[QuantizedArray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("decoding makes new values; a view of them is impossible")
        decoded = np.asarray(self.decode())  # CuPy refuses here: moving to the host is explicit
        return decoded if dtype is None else decoded.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return (
            f"QuantizedArray(shape={self.shape}, dtype={self.dtype}, "
            f"bits={self.quantizer.bits}, nbytes={self.nbytes})"
        )
