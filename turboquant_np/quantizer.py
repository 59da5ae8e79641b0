"""`TurboQuant`: the quantiser users hold.  Checks here, arithmetic in the backends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _arrays, _backend, _topk, validation
from ._checks import (
    check_same_place,
    check_vectors,
    take_in_out,
    take_in_packed,
    value_error,
)
from ._quantizer_facts import QuantizerFacts
from .config import TurboQuantConfig

__all__ = ["TurboQuant", "TurboQuantConfig"]


class TurboQuant(QuantizerFacts):
    """Quantise vectors to 1-8 bits a coordinate, near the best possible error, with no training.

    Each vector is rotated by a fixed random rotation, every coordinate is rounded to the Lloyd-Max
    codebook of the known density of rotated coordinates, and the codes are packed beside one
    float32 (algorithm 1 of arXiv:2504.19874).

    Parameters
    ----------
    config : TurboQuantConfig, optional
        All settings at once.
    **settings
        Or any of them by keyword: ``TurboQuant(head_dim=128, bits=4)``.

    Raises
    ------
    TypeError
        If both are given, or a setting has an unknown name or the wrong type.
    ValueError
        If a setting is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from turboquant_np import TurboQuant
    >>> x = np.random.default_rng(0).standard_normal((1000, 128)).astype(np.float32)
    >>> tq = TurboQuant(head_dim=128, bits=4)
    >>> packed, norms = tq.encode(x)
    >>> packed.shape, packed.dtype, norms.shape
    ((1000, 64), dtype('uint8'), (1000,))
    >>> error = tq.decode(packed, norms, dtype=np.float32) - x
    >>> round(float((error**2).sum() / (x**2).sum()), 4)
    0.0093
    """

    # -- encode and decode -------------------------------------------------------------------------

    def encode(
        self, x: Any, *, out: tuple[Any, Any] | None = None, check_finite: bool = True
    ) -> tuple[Any, Any]:
        """Quantise vectors.

        Parameters
        ----------
        x : array, shape [..., head_dim]
            float16, bfloat16, float32 or float64, on a CPU or a CUDA device, with any strides and
            any number of leading axes.  float64 is rounded to float32 first.
        out : (packed, norms), optional
            C-contiguous arrays of the result's shapes and dtypes to write into.
        check_finite : bool, default True
            Raise on NaN, infinity, and norms beyond float32.  On a GPU this waits for the result;
            when switched off such a vector gets the scale NaN or infinity and decodes to no finite
            value.

        Returns
        -------
        packed : array, uint8, shape [..., packed_dim]
            Codes, first coordinate in the high bits.
        norms : array, float32, shape [...]
            The stored scale of each vector.

        Raises
        ------
        TypeError
            If `x` is no array or not floating point.
        ValueError
            If the last axis is not head_dim long, or a value is NaN or infinite (the first is
            named).
        OverflowError
            If the scale of a vector exceeds the largest float32.

        Notes
        -----
        If an error is raised because of values, the contents of `out` are unspecified.

        Examples
        --------
        >>> import numpy as np
        >>> from turboquant_np import TurboQuant
        >>> tq = TurboQuant(head_dim=4, bits=2)
        >>> packed, norms = tq.encode(np.array([[1.0, 2.0, 2.0, 4.0]], np.float32))
        >>> packed.shape, norms.tolist()
        ((1, 1), [5.0])
        """
        vectors, give_back = _arrays.take_in(x, "x")
        check_vectors(self._spec, vectors, "x")
        backend = self._backend_for(vectors)
        batch = vectors.shape[:-1]
        if out is None:
            packed = backend.empty((*batch, self.packed_dim), np.dtype(np.uint8), vectors)
            norms = backend.empty(batch, np.dtype(np.float32), vectors)
        else:
            if not isinstance(out, tuple) or len(out) != 2:
                raise TypeError("out must be a tuple (packed, norms)")
            shape = (*batch, self.packed_dim)
            packed = take_in_out(out[0], shape, ("uint8",), "out[0]", vectors)
            norms = take_in_out(out[1], batch, ("float32",), "out[1]", vectors)
        backend.encode(self._spec, _arrays.native(vectors), packed, norms)
        if check_finite and (row := backend.first_non_finite(norms)) is not None:
            raise value_error(vectors, row)
        result = give_back(packed), give_back(norms)  # torch orders its stream behind ours here
        return result if out is None else out

    def decode(self, packed: Any, norms: Any, *, dtype: Any = None, out: Any = None) -> Any:
        """Restore vectors.

        Parameters
        ----------
        packed : array, uint8, shape [..., packed_dim]
        norms : array, float32, shape [...]
            As returned by `encode`.
        dtype : dtype-like, optional
            float16, bfloat16, float32 or float64; by default the quantiser's `dtype` (float16).
            Values beyond the range of a narrow dtype become infinite.
        out : array, shape [..., head_dim], optional
            C-contiguous array to write into; its dtype is the output dtype.

        Returns
        -------
        array, shape [..., head_dim]

        Raises
        ------
        TypeError
            If `packed` is not uint8 or `norms` not float32.
        ValueError
            If shapes do not fit each other or this quantiser.

        Examples
        --------
        >>> import numpy as np
        >>> from turboquant_np import TurboQuant
        >>> tq = TurboQuant(head_dim=64, bits=8)
        >>> x = np.linspace(-1, 1, 64, dtype=np.float32)
        >>> decoded = tq.decode(*tq.encode(x))
        >>> decoded.dtype, bool(abs(decoded - x).max() < 0.02)
        (dtype('float16'), True)
        """
        codes, scales, give_back = take_in_packed(self._spec, packed, norms)
        backend = self._backend_for(codes)
        shape = (*scales.shape, self.head_dim)
        if out is None:
            wanted = self.dtype if dtype is None else _arrays.float_dtype(dtype)
            vectors = backend.empty(shape, wanted, codes)
        else:
            vectors = take_in_out(out, shape, _arrays.FLOAT_NAMES, "out", codes)
            if dtype is not None and _arrays.float_dtype(dtype) != vectors.dtype:
                raise ValueError(f"dtype is {dtype} but out has dtype {vectors.dtype}; give one")
        backend.decode(self._spec, codes, scales, vectors)
        result = give_back(vectors)
        return result if out is None else out

    def inner_products(self, query: Any, packed: Any, norms: Any, *, out: Any = None) -> Any:
        """Inner products of queries with packed vectors, without decoding them.

        The query is rotated once; each score is then a sum over looked-up centroids.  Equals
        ``numpy.inner(query, decode(packed, norms))`` to float32 accuracy.

        Parameters
        ----------
        query : array, shape [*m, head_dim]
        packed : array, uint8, shape [*n, packed_dim]
        norms : array, float32, shape [*n]
        out : array, float32, shape [*m, *n], optional

        Returns
        -------
        array, float32, shape [*m, *n]

        Raises
        ------
        TypeError, ValueError
            As `encode` and `decode`.

        Examples
        --------
        >>> import numpy as np
        >>> from turboquant_np import TurboQuant
        >>> x = np.eye(3, 64, dtype=np.float32)
        >>> tq = TurboQuant(head_dim=64, bits=6)
        >>> tq.inner_products(x[0], *tq.encode(x)).round(1).tolist()
        [1.0, 0.0, 0.0]
        """
        queries, _ = _arrays.take_in(query, "query")
        check_vectors(self._spec, queries, "query")
        codes, scales, give_back = take_in_packed(self._spec, packed, norms)
        check_same_place(queries, "query", codes, "packed")
        backend = self._backend_for(codes)
        shape = (*queries.shape[:-1], *scales.shape)
        scores = (
            backend.empty(shape, np.dtype(np.float32), codes)
            if out is None
            else take_in_out(out, shape, ("float32",), "out", codes)
        )
        backend.inner_products(self._spec, _arrays.native(queries), codes, scales, scores)
        result = give_back(scores)
        return result if out is None else out

    def topk(
        self, query: Any, packed: Any, norms: Any, k: int, *, offsets: Any = None
    ) -> tuple[Any, Any]:
        """The k largest inner products of every query with packed vectors, and where they are.

        Scores are made and dropped block by block, so memory does not grow with n.

        Parameters
        ----------
        query : array, shape [*m, head_dim]
        packed : array, uint8, shape [n, packed_dim]
        norms : array, float32, shape [n]
        k : int
            From 1 to n.
        offsets : array, floating point, shape [n], optional
            Added to the scores of each vector, as float32, before they are compared.

        Returns
        -------
        scores : array, float32, shape [*m, k]
            Largest first; NaN, of vectors encoded unchecked, last.
        indices : array, int64, shape [*m, k]
            Rows of `packed`; of equal scores the lower row comes first.

        Raises
        ------
        TypeError, ValueError
            As `inner_products`; if `packed` has more axes, `k` is not from 1 to n, or `offsets` do
            not fit `norms`.

        Notes
        -----
        Scores are those of `inner_products` to float32 accuracy: sums over blocks of other sizes
        may be rounded otherwise.

        Examples
        --------
        >>> import numpy as np
        >>> from turboquant_np import TurboQuant
        >>> x = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
        >>> tq = TurboQuant(head_dim=64, bits=4, scale="unbiased")
        >>> scores, indices = tq.topk(x[[7, 2]], *tq.encode(x), k=3)
        >>> scores.shape, indices[:, 0].tolist()
        ((2, 3), [7, 2])
        """
        queries, _ = _arrays.take_in(query, "query")
        check_vectors(self._spec, queries, "query")
        codes, scales, give_back = take_in_packed(self._spec, packed, norms)
        check_same_place(queries, "query", codes, "packed")
        if codes.ndim != 2:
            raise ValueError(
                f"packed must have shape [n, packed_dim], got {codes.shape}; reshape it and norms"
            )
        k = _topk.check_k(k, len(codes))
        added = None if offsets is None else _topk.take_in_offsets(offsets, scales)
        rows = queries.reshape(math.prod(queries.shape[:-1]), self.head_dim)
        shape = (*queries.shape[:-1], k)
        best, found = _topk.search(self, rows, codes, scales, added, k)
        return give_back(best.reshape(shape)), give_back(found.reshape(shape))

    # -- self-tests --------------------------------------------------------------------------------

    def validate(
        self, num_vectors: int = 10_000, device: str | None = None, *, seed: int = 0
    ) -> dict[str, Any]:
        """Measure the error on random unit vectors and set it beside theory.

        Parameters
        ----------
        num_vectors : int
            At least 2.
        device : {"cpu", "cuda"}, optional
            By default the quantiser's device, or "cpu" if that is "auto".
        seed : int
            Seed of the vectors (unrelated to that of the rotation).

        Returns
        -------
        dict
            See `turboquant_np.validation.validate`.
        """
        return validation.validate(self, num_vectors, device, seed)

    def benchmark(
        self,
        num_vectors: int = 32_768,
        warmup: int = 10,
        iters: int = 100,
        device: str | None = None,
    ) -> dict[str, Any]:
        """Time `encode` and `decode` on float16 vectors (median of `iters` calls).

        Returns
        -------
        dict
            See `turboquant_np.validation.benchmark`.
        """
        return validation.benchmark(self, num_vectors, warmup, iters, device)

    def _backend_for(self, array: Any) -> _backend.Backend:
        place = _backend.device_of(array)
        if self.device not in ("auto", place):
            kind = {"cpu": "NumPy array in host memory", "cuda": "CuPy array on a GPU"}[place]
            raise ValueError(
                f"this quantiser has device={self.device!r}, got a {kind}; "
                "move the array or use device='auto'"
            )
        return _backend.backend_for(array, self.config.backend)
