"""Arrays larger than memory: encoded and decoded in blocks, from file to file."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import _arrays
from ..quantizer import TurboQuant
from .atomic import atomic_write
from .container import array_bytes
from .files import PathLike, Progress, open, writing
from .metadata import Metadata, rotation_array
from .quantized_array import QuantizedArray

__all__ = ["decode_npy", "encode_npy"]

BLOCK_BYTES = 2**22  # of float32 vectors; fits the caches that matter and keeps overheads small

Block = tuple[int | slice, ...]


def encode_npy(
    source: Any,
    destination: PathLike,
    quantizer: TurboQuant,
    *,
    dtype: Any = None,
    check_finite: bool = True,
    progress: Progress | None = None,
) -> None:
    """Quantise an array of any size into a file, in bounded memory.

    Parameters
    ----------
    source : path-like or array-like, shape [..., head_dim]
        A .npy file, or anything with `shape`, `dtype` and NumPy's basic indexing: a memory map, an
        HDF5 dataset, a Zarr array, another QuantizedArray.
    destination : path-like
        Ends in .npz or .safetensors; read it with `load` or `open`.
    quantizer : TurboQuant
    dtype : dtype-like, optional
        What the elements of the source are, of the same size as its own dtype.  Needed for
        "bfloat16", which .npy files keep as plain bytes.
    check_finite : bool, default True
        As in `TurboQuant.encode`.
    progress : callable, optional
        Called after each block with (rows_done, rows_total); a row is one vector.

    Raises
    ------
    TypeError
        If the source is not floating point.
    ValueError
        If the source is no .npy file, its vectors have another length than head_dim, or a value is
        NaN or infinite.
    OSError
        If a file cannot be read or written.  The destination is then as it was before.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import turboquant_np as tqn
    >>> x = np.random.default_rng(0).standard_normal((1000, 128), dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/x.npy", x)
    ...     tqn.encode_npy(f"{folder}/x.npy", f"{folder}/x.npz", tqn.TurboQuant(head_dim=128))
    ...     tqn.open(f"{folder}/x.npz")
    QuantizedArray(shape=(1000, 128), dtype=float32, bits=4, nbytes=68000)
    """
    array = map_npy(source) if isinstance(source, (str, os.PathLike)) else source
    stored = _element_dtype(np.dtype(array.dtype), dtype)
    shape = tuple(int(n) for n in array.shape)
    if not shape or shape[-1] != quantizer.head_dim:
        raise ValueError(
            f"the source must end in an axis of length {quantizer.head_dim} (head_dim), "
            f"got shape {shape}"
        )
    metadata = Metadata.describe(quantizer, stored, shape)
    done, total = 0, math.prod(shape[:-1])
    with writing(destination, metadata, rotation_array(quantizer)) as sink:
        for block in _blocks(shape):
            vectors = array[block]
            if not hasattr(vectors, "__dlpack__"):
                vectors = np.asarray(vectors)
            if vectors.dtype != stored:
                vectors = vectors.view(stored)
            try:
                packed, norms = quantizer.encode(vectors, check_finite=check_finite)
            except (ValueError, OverflowError) as error:
                raise type(error)(f"in x = source[{_subscript(block)}]: {error}") from error
            sink.append(packed, norms)
            _release(vectors)
            done += norms.size
            if progress is not None:
                progress(done, total)


def decode_npy(
    source: PathLike | QuantizedArray,
    destination: PathLike,
    *,
    dtype: Any = None,
    progress: Progress | None = None,
) -> None:
    """Restore a quantised array of any size into a .npy file, in bounded memory.

    Parameters
    ----------
    source : path-like or QuantizedArray
        A file made by `save` or `encode_npy`, whose checksums are verified first, or an
        array, such as some rows of an opened file.
    destination : path-like
        Ends in .npy.
    dtype : dtype-like, optional
        By default that of the array which was encoded.  bfloat16 is written as NumPy does, as plain
        bytes: view what `numpy.load` gives as ml_dtypes.bfloat16.
    progress : callable, optional
        Called after each block with (rows_done, rows_total); a row is one vector.

    Raises
    ------
    StorageError
        If the source is damaged; see `load`.
    ValueError
        If the destination has another ending.
    OSError
        If a file cannot be read or written.  The destination is then as it was before.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import turboquant_np as tqn
    >>> x = np.random.default_rng(0).standard_normal((1000, 128), dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tqn.encode_npy(x, f"{folder}/x.npz", tqn.TurboQuant(head_dim=128, bits=8))
    ...     tqn.decode_npy(f"{folder}/x.npz", f"{folder}/restored.npy")
    ...     restored = np.load(f"{folder}/restored.npy")
    >>> restored.dtype, bool(abs(restored - x).max() < 0.1)
    (dtype('float32'), True)
    """
    if Path(destination).suffix != ".npy":
        raise ValueError(f"the file name must end in .npy, got {str(destination)!r}")
    quantized = source if isinstance(source, QuantizedArray) else open(source, verify=True)
    wanted = quantized.dtype if dtype is None else _arrays.float_dtype(dtype)
    done, total = 0, math.prod(quantized.shape[:-1])
    header = {
        "descr": wanted.newbyteorder("<").str,
        "fortran_order": False,
        "shape": quantized.shape,
    }
    with atomic_write(destination) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in _blocks(quantized.shape):
            part = quantized[block]
            file.write(array_bytes(part.decode(dtype=wanted)))
            _release(part.packed)
            _release(part.norms)
            done += part.norms.size
            if progress is not None:
                progress(done, total)


def _blocks(shape: tuple[int, ...]) -> Iterator[Block]:
    """Indices of the leading axes that cut an array, in C order, into blocks of bounded size."""
    *batch, head_dim = shape
    if 0 in batch:
        return
    if not batch:
        yield ()
        return
    rows_at_once = max(1, BLOCK_BYTES // (4 * head_dim))
    axis = len(batch) - 1  # the axis to slice: whole sub-arrays behind it fit a block
    while axis > 0 and math.prod(batch[axis:]) <= rows_at_once:
        axis -= 1
    step = max(1, rows_at_once // math.prod(batch[axis + 1 :]))
    for outer in np.ndindex(*batch[:axis]):
        for start in range(0, batch[axis], step):
            yield (*outer, slice(start, min(start + step, batch[axis])))


def _subscript(block: Block) -> str:
    return ", ".join(f"{i.start}:{i.stop}" if isinstance(i, slice) else str(i) for i in block)


def map_npy(path: PathLike) -> Any:
    """Memory-map a .npy file, read-only; ValueError if it is none."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as a .npy file: {error}") from error


def _element_dtype(own: np.dtype[Any], said: Any) -> np.dtype[Any]:
    """The dtype of the elements: their own, or the one the caller says that the bytes have."""
    if said is None:
        if own.name not in _arrays.FLOAT_NAMES:
            remedy = (
                "pass dtype='bfloat16' if its bytes are those"
                if own.itemsize == 2
                else "convert it with astype(numpy.float32) if that loses nothing"
            )
            raise TypeError(
                f"the source must be {', '.join(_arrays.FLOAT_NAMES)}, got {own}; {remedy}"
            )
        return own
    dtype = _arrays.float_dtype(said)
    if own.name == dtype.name:
        return own
    if own.name in _arrays.FLOAT_NAMES or own.itemsize != dtype.itemsize:
        raise TypeError(f"the source has dtype {own}, whose elements cannot be {dtype}")
    return dtype


def _release(array: Any) -> None:
    """Let the system take back the pages of a memory map that were read; they count as ours else.

    Only for maps that cannot be written to: private copies of pages would be lost.
    """
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, memoryview):
        array = array.obj
    if isinstance(array, mmap.mmap) and memoryview(array).readonly:
        array.madvise(mmap.MADV_DONTNEED)
