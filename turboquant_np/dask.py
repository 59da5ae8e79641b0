"""TurboQuant on Dask arrays, for when one memory or one machine is too small.

The functions are those of `TurboQuant`, lazy, on dask arrays whose chunks are NumPy or CuPy arrays.
Chunks must hold whole vectors.  Needs the `dask` extra; a distributed cluster also needs this
package on every worker and on the scheduler.  See docs/how-to/dask.md.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import numpy as np

from . import _arrays
from ._checks import check_vectors
from ._extras import missing_extra
from ._spec import FORMAT_VERSION
from ._topk import check_k, largest
from .quantizer import TurboQuant

try:
    import dask.array as da
    from dask.array.utils import meta_from_array
    from dask.base import tokenize
    from dask.delayed import Delayed, delayed

    from ._dask_checks import check_array, check_packed, check_quantizer, check_query
except ImportError as error:
    raise missing_extra(__name__, "dask", error) from error

__all__ = ["check_workers", "decode", "encode", "inner_products", "topk"]

MERGE_AT_ONCE = 16  # partial results that one task of topk merges


def encode(x: da.Array, quantizer: TurboQuant) -> tuple[da.Array, da.Array]:
    """Quantise vectors, chunk by chunk.

    Parameters
    ----------
    x : dask array, shape [..., head_dim]
        Of floating point; one chunk along the last axis.
    quantizer : TurboQuant

    Returns
    -------
    packed : dask array, uint8, shape [..., packed_dim]
    norms : dask array, float32, shape [...]
        Compute or store both in one call (``dask.compute(packed, norms)``), so that every chunk is
        read and encoded once.

    Raises
    ------
    TypeError, ValueError
        At once, if `x` is no dask array, not floating point, or a vector is spread over chunks;
        while computing, as `TurboQuant.encode`.

    Examples
    --------
    >>> import dask.array as da
    >>> import turboquant_np.dask as tqd
    >>> from turboquant_np import TurboQuant
    >>> x = da.random.default_rng(0).standard_normal((1000, 64), chunks=(250, 64))
    >>> packed, norms = tqd.encode(x, TurboQuant(head_dim=64, bits=4))
    >>> packed.chunks, norms.dtype
    (((250, 250, 250, 250), (32,)), dtype('float32'))
    """
    check_quantizer(quantizer)
    check_array(x, "x", quantizer.head_dim)
    check_vectors(quantizer._spec, x, "x")
    both = x.map_blocks(
        _encode_block,
        quantizer=_shared(quantizer),
        token="turboquant-encode",
        dtype=object,
        meta=_meta(x, x.ndim),
    )
    packed = both.map_blocks(
        itemgetter(0),
        token="turboquant-packed",
        dtype=np.uint8,
        chunks=(*x.chunks[:-1], (quantizer.packed_dim,)),
        meta=_meta(x, x.ndim, np.uint8),
    )
    columns = both.map_blocks(
        itemgetter(1),
        token="turboquant-norms",
        dtype=np.float32,
        chunks=(*x.chunks[:-1], (1,)),
        meta=_meta(x, x.ndim, np.float32),
    )
    return packed, columns[..., 0]


def decode(
    packed: da.Array, norms: da.Array, quantizer: TurboQuant, *, dtype: Any = None
) -> da.Array:
    """Restore vectors, chunk by chunk.

    Parameters
    ----------
    packed : dask array, uint8, shape [..., packed_dim]
    norms : dask array, float32, shape [...]
        As `encode` returns them.
    quantizer : TurboQuant
    dtype : dtype-like, optional
        By default the quantiser's `dtype`.

    Returns
    -------
    dask array, shape [..., head_dim]

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit each other or the quantiser.

    Examples
    --------
    >>> import dask.array as da
    >>> import turboquant_np.dask as tqd
    >>> from turboquant_np import TurboQuant
    >>> tq = TurboQuant(head_dim=64, bits=4)
    >>> x = da.random.default_rng(0).standard_normal((1000, 64), chunks=(250, 64))
    >>> restored = tqd.decode(*tqd.encode(x, tq), tq, dtype="float32")
    >>> bool((((restored - x) ** 2).sum() < 0.01 * (x**2).sum()).compute())
    True
    """
    check_packed(packed, norms, quantizer)
    wanted = quantizer.dtype if dtype is None else _arrays.float_dtype(dtype)
    axes = tuple(range(packed.ndim))
    return da.blockwise(
        _decode_block,
        axes,
        packed,
        axes,
        norms,
        axes[:-1],
        quantizer=_shared(quantizer),
        vector_dtype=wanted,
        token="turboquant-decode",
        adjust_chunks={axes[-1]: quantizer.head_dim},
        dtype=wanted,
        meta=_meta(packed, packed.ndim, wanted),
    )


def inner_products(
    query: Any, packed: da.Array, norms: da.Array, quantizer: TurboQuant
) -> da.Array:
    """Inner products of queries with packed vectors, without decoding them.

    Parameters
    ----------
    query : NumPy, CuPy or dask array, shape [*m, head_dim]
        On the same device as the chunks of `packed`.
    packed : dask array, uint8, shape [*n, packed_dim]
    norms : dask array, float32, shape [*n]
    quantizer : TurboQuant

    Returns
    -------
    dask array, float32, shape [*m, *n]

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit each other or the quantiser, or live on different devices.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import turboquant_np.dask as tqd
    >>> from turboquant_np import TurboQuant
    >>> tq = TurboQuant(head_dim=64, bits=6)
    >>> x = da.from_array(np.eye(3, 64, dtype=np.float32), chunks=(2, 64))
    >>> tqd.inner_products(np.eye(1, 64), *tqd.encode(x, tq), tq).compute().round(1).tolist()
    [[1.0, 0.0, 0.0]]
    """
    query = check_query(query, packed, norms, quantizer)
    m, n = query.ndim - 1, packed.ndim - 1
    return da.blockwise(
        _inner_products_block,
        tuple(range(m + n)),
        *_query_and_packed(query, packed, norms),
        token="turboquant-inner-products",
        quantizer=_shared(quantizer),
        dtype=np.float32,
        meta=_meta(packed, m + n, np.float32),
    )


def topk(
    query: Any, packed: da.Array, norms: da.Array, quantizer: TurboQuant, k: int
) -> tuple[da.Array, da.Array]:
    """The k largest inner products of every query with packed vectors, and where they are.

    Parameters
    ----------
    query : NumPy, CuPy or dask array, shape [*m, head_dim]
    packed : dask array, uint8, shape [n, packed_dim]
    norms : dask array, float32, shape [n]
    quantizer : TurboQuant
    k : int
        From 1 to n.

    Returns
    -------
    scores : dask array, float32, shape [*m, k]
        Largest first.
    indices : dask array, int64, shape [*m, k]
        Rows of `packed`; of equal scores the lower row comes first.

    Raises
    ------
    TypeError, ValueError
        As `inner_products`; if n is unknown, or k not from 1 to n.

    Notes
    -----
    A task is `TurboQuant.topk` of one chunk of queries and one chunk of vectors, which holds the
    scores of few of them at a time.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import numpy as np
    >>> import turboquant_np.dask as tqd
    >>> from turboquant_np import TurboQuant
    >>> tq = TurboQuant(head_dim=64, bits=6)
    >>> x = da.from_array(np.eye(10, 64, dtype=np.float32), chunks=(3, 64))
    >>> query = np.eye(10, 64)[[7, 2]]
    >>> scores, indices = dask.compute(*tqd.topk(query, *tqd.encode(x, tq), tq, k=1))
    >>> indices.tolist()
    [[7], [2]]
    """
    query = check_query(query, packed, norms, quantizer)
    if packed.ndim != 2:
        raise ValueError(f"packed must have shape [n, packed_dim], got {packed.shape}; reshape it")
    if math.isnan(norms.shape[0]):
        raise ValueError(
            "the number of vectors is unknown; call compute_chunk_sizes() on packed and norms"
        )
    k, m = check_k(k, norms.shape[0]), query.ndim - 1
    axes = tuple(range(m + 1))
    rows = da.arange(norms.shape[0], chunks=norms.chunks, dtype=np.int64)
    metas = _meta(packed, m + 1, np.float32), _meta(packed, m + 1, np.int64)

    def best(function: Any, *arrays: Any, **settings: Any) -> tuple[da.Array, da.Array]:
        both = da.blockwise(
            function,
            axes,
            *arrays,
            k=k,
            **settings,
            token="turboquant-topk",
            adjust_chunks={m: lambda length: min(k, length)},
            dtype=object,
            meta=_meta(packed, m + 1),
        )
        scores, indices = (
            both.map_blocks(itemgetter(i), dtype=meta.dtype, meta=meta)
            for i, meta in enumerate(metas)
        )
        return scores, indices

    operands = (*_query_and_packed(query, packed, norms), rows, (m,))
    scores, indices = best(_topk_block, *operands, quantizer=_shared(quantizer))
    while scores.numblocks[-1] > 1:
        parts = scores.chunks[-1]
        merged = tuple(
            sum(parts[i : i + MERGE_AT_ONCE]) for i in range(0, len(parts), MERGE_AT_ONCE)
        )
        scores, indices = (a.rechunk({m: merged}) for a in (scores, indices))
        scores, indices = best(_largest, scores, axes, indices, axes)
    return scores, indices


def check_workers(client: Any) -> None:
    """Raise unless every worker of a cluster has this package, with the same numeric format.

    Worth a call before long work: a worker without the package cannot even read the tasks sent to
    it, and distributed only reports, after some time, that workers died.

    Parameters
    ----------
    client : distributed.Client

    Raises
    ------
    RuntimeError
        If the package is missing or another one somewhere; says where.

    Examples
    --------
    >>> from distributed import Client
    >>> import turboquant_np.dask as tqd
    >>> with Client(processes=False, dashboard_address=None) as client:
    ...     tqd.check_workers(client)
    """
    found = client.run(eval, _FORMAT_VERSION_THERE, on_error="return")
    wrong = {where: what for where, what in found.items() if what != FORMAT_VERSION}
    if wrong:
        listing = "; ".join(
            f"{where}: {what if isinstance(what, Exception) else f'format version {what}'}"
            for where, what in sorted(wrong.items())
        )
        raise RuntimeError(
            f"{len(wrong)} of {len(found)} workers lack turboquant-np with format version "
            f"{FORMAT_VERSION} ({listing}); install it there: pip install 'turboquant-np[dask]'"
        )


_FORMAT_VERSION_THERE = "__import__('turboquant_np').FORMAT_VERSION"


# -- what runs on a chunk ------------------------------------------------------------------------


def _encode_block(x: Any, *, quantizer: TurboQuant) -> tuple[Any, Any]:
    packed, norms = quantizer.encode(x)
    return packed, norms[..., None]


def _decode_block(packed: Any, norms: Any, *, quantizer: TurboQuant, vector_dtype: Any) -> Any:
    return quantizer.decode(packed, norms, dtype=vector_dtype)


def _inner_products_block(query: Any, packed: Any, norms: Any, *, quantizer: TurboQuant) -> Any:
    return quantizer.inner_products(_single(query), _single(packed), norms)


def _topk_block(
    query: Any, packed: Any, norms: Any, rows: Any, *, quantizer: TurboQuant, k: int
) -> tuple[Any, Any]:
    query = _single(query)
    if not len(norms):
        empty = np.empty((*query.shape[:-1], 0), np.float32, like=norms)
        return empty, empty.astype(np.int64)
    scores, found = quantizer.topk(query, _single(packed), norms, min(k, len(norms)))
    return scores, found + int(rows[0])


def _largest(scores: Any, indices: Any, *, k: int) -> tuple[Any, Any]:
    """The k largest scores along the last axis, largest first, and their indices."""
    best, positions = largest(scores, min(k, scores.shape[-1]))
    return best, np.take_along_axis(indices, positions, axis=-1)


def _single(block: Any) -> Any:
    """The block inside the nested lists that blockwise passes for axes that do not come out."""
    while isinstance(block, list):
        (block,) = block
    return block


# -- parts of a graph ----------------------------------------------------------------------------


def _shared(quantizer: TurboQuant) -> Delayed:
    """The quantiser as a node of the graph: each worker gets it once, however large its matrix."""
    return delayed(quantizer, name=f"turboquant-{tokenize(quantizer.config)}", traverse=False)


def _meta(like: da.Array, ndim: int, dtype: Any = object) -> Any:
    if dtype is object:  # of tuples; never seen by the caller
        return np.empty((0,) * ndim, object)
    return meta_from_array(like._meta, ndim=ndim, dtype=dtype)


def _query_and_packed(query: da.Array, packed: da.Array, norms: da.Array) -> tuple[Any, ...]:
    """Arguments of blockwise: result axes 0 .. m+n-1, and two more that do not come out."""
    m, n = query.ndim - 1, packed.ndim - 1
    query_axes, packed_axes = tuple(range(m)), tuple(range(m, m + n))
    return (
        *(query, (*query_axes, m + n)),
        *(packed, (*packed_axes, m + n + 1)),
        *(norms, packed_axes),
    )
