"""`save`, `load` and `open`: one quantised array, one file."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import npz, safetensors
from .atomic import atomic_write
from .container import Region, RowSink, array_bytes
from .metadata import Metadata, StorageError, checksum, rotation_array
from .quantized_array import QuantizedArray

FORMATS: dict[str, Any] = {".npz": npz, ".safetensors": safetensors}
VERIFY_BYTES_AT_ONCE = 2**20

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], object]
Get = Callable[["Contents", Region], npt.NDArray[Any]]


def save(path: PathLike, quantized: QuantizedArray) -> None:
    """Write a quantised array to a file.

    The file appears under its name only when it is complete; an older one of that name is replaced.

    Parameters
    ----------
    path : path-like
        Ends in .npz, which `numpy.load` can read, or in .safetensors, which needs the `io` extra.
    quantized : QuantizedArray

    Raises
    ------
    ValueError
        If the path ends otherwise.
    TypeError
        If `quantized` is no QuantizedArray.
    ImportError
        If the path ends in .safetensors and the library is missing.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import turboquant_np as tqn
    >>> x = np.random.default_rng(0).standard_normal((1000, 128))
    >>> quantized = tqn.QuantizedArray.encode(x, tqn.TurboQuant(head_dim=128, bits=3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tqn.save(f"{folder}/x.npz", quantized)
    ...     restored = tqn.load(f"{folder}/x.npz")
    >>> bool((restored.decode() == quantized.decode()).all())
    True
    """
    if not isinstance(quantized, QuantizedArray):
        raise TypeError(
            f"save writes a QuantizedArray, got {type(quantized).__name__}; "
            "make one with QuantizedArray(packed, norms, quantizer)"
        )
    metadata = Metadata.describe(quantized.quantizer, quantized.dtype, quantized.shape)
    with writing(path, metadata, rotation_array(quantized.quantizer)) as sink:
        sink.append(quantized.packed, quantized.norms)


def load(path: PathLike, *, backend: str = "auto") -> QuantizedArray:
    """Read a quantised array into memory, with all checksums verified.

    Parameters
    ----------
    path : path-like
        Of a file made by `save` or `encode_npy`.
    backend : str
        Of the quantiser, see `TurboQuantConfig`.

    Returns
    -------
    QuantizedArray

    Raises
    ------
    StorageError
        If the file is damaged, cut off, foreign, or of a newer format version (a ValueError).
    OSError
        If the file cannot be read.
    ImportError
        If the path ends in .safetensors and the library is missing.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import turboquant_np as tqn
    >>> quantized = tqn.QuantizedArray.encode(np.eye(64), tqn.TurboQuant(head_dim=64))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tqn.save(f"{folder}/x.npz", quantized)
    ...     tqn.load(f"{folder}/x.npz")
    QuantizedArray(shape=(64, 64), dtype=float64, bits=4, nbytes=2304)
    """
    with reading(path) as contents:
        return _assemble(contents, _read_array, backend)


def open(
    path: PathLike,
    *,
    verify: bool = False,
    backend: str = "auto",
    progress: Progress | None = None,
) -> QuantizedArray:
    """Open a quantised array without reading it: codes and scales are memory-mapped.

    Index the result to decode some of its vectors; only their bytes are read.

    Parameters
    ----------
    path : path-like
        Of a file made by `save` or `encode_npy`.
    verify : bool, default False
        Read the whole file once and verify the checksums of codes and scales.  Metadata, sizes and
        the rotation matrix are always verified.
    backend : str
        Of the quantiser, see `TurboQuantConfig`.
    progress : callable, optional
        Called with (bytes_done, bytes_total) during verification.

    Returns
    -------
    QuantizedArray
        Its `packed` and `norms` are read-only.

    Raises
    ------
    StorageError
        As `load`.
    OSError
        If the file cannot be read.

    Notes
    -----
    The file must not be changed in place while the array is in use; `save` and `encode_npy` replace
    files, which is safe.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import turboquant_np as tqn
    >>> x = np.random.default_rng(0).standard_normal((1000, 128))
    >>> quantized = tqn.QuantizedArray.encode(x, tqn.TurboQuant(head_dim=128, bits=3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tqn.save(f"{folder}/x.npz", quantized)
    ...     rows = tqn.open(f"{folder}/x.npz")[500:510].decode()
    >>> rows.shape
    (10, 128)
    """
    with reading(path) as contents:
        if verify:
            verify_checksums(contents, progress)
        return _assemble(contents, _map_array, backend)


@dataclass(frozen=True)
class Contents:
    """An open file and what its headers say: the metadata, and where the arrays lie."""

    file: io.BufferedReader
    metadata: Metadata
    regions: tuple[Region, ...]


@contextmanager
def reading(path: PathLike) -> Iterator[Contents]:
    """Open a file and check its headers.  Errors about the file, in the block too, name it.

    Raises
    ------
    StorageError, OSError
        As `load`.
    """
    path = Path(path)
    layout = _format_of(path)
    with path.open("rb") as file:
        try:
            metadata, regions = layout.read_layout(file)
            size = os.fstat(file.fileno()).st_size
            if any(r.offset + r.array.nbytes > size for r in regions):
                raise StorageError("the file is cut off")
            yield Contents(file, metadata, regions)
        except StorageError as error:
            raise StorageError(f"{path}: {error}") from error


def verify_checksums(contents: Contents, progress: Progress | None = None) -> None:
    """Read all arrays of a file and compare their checksums, in bounded memory.

    Parameters
    ----------
    contents : Contents
    progress : callable, optional
        Called with (bytes_done, bytes_total).

    Raises
    ------
    StorageError
        If one differs.
    """
    total = sum(region.array.nbytes for region in contents.regions)
    done = 0
    for region in contents.regions:
        crc32, left = checksum(b""), region.array.nbytes
        contents.file.seek(region.offset)
        while left:
            data = contents.file.read(min(left, VERIFY_BYTES_AT_ONCE))
            if not data:
                raise StorageError("the file is cut off")
            crc32 = checksum(data, crc32)
            left -= len(data)
            done += len(data)
            if progress is not None:
                progress(done, total)
        _compare(contents, region, crc32)


@contextmanager
def writing(
    path: PathLike, metadata: Metadata, rotation: npt.NDArray[np.int32] | None
) -> Iterator[RowSink]:
    """Write a file by appending rows to the sink; it appears complete or not at all."""
    layout = _format_of(Path(path))
    if rotation is not None:
        metadata = replace(metadata, crc32={"rotation": checksum(array_bytes(rotation))})
    with atomic_write(path) as file, layout.writing(file, metadata, rotation) as sink:
        yield sink


def _assemble(contents: Contents, get: Get, backend: str) -> QuantizedArray:
    arrays = {
        region.array.name: (_read_array if region.array.name == "rotation" else get)(
            contents, region
        )
        for region in contents.regions
    }
    quantizer = contents.metadata.make_quantizer(arrays.get("rotation"), backend)
    return QuantizedArray(arrays["packed"], arrays["norms"], quantizer, contents.metadata.dtype)


def _read_array(contents: Contents, region: Region) -> npt.NDArray[Any]:
    array = np.empty(region.array.shape, region.array.dtype)
    data = array_bytes(array)
    contents.file.seek(region.offset)
    if contents.file.readinto(data) != len(data):
        raise StorageError("the file is cut off")
    _compare(contents, region, checksum(data))
    return array


def _map_array(contents: Contents, region: Region) -> npt.NDArray[Any]:
    if region.array.nbytes == 0:  # an empty region cannot be mapped
        return np.empty(region.array.shape, region.array.dtype)
    mapped = mmap.mmap(contents.file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, np.uint8, region.array.nbytes, region.offset)
    array = data.view(region.array.dtype).reshape(region.array.shape)
    return array if array.flags.aligned else array.copy()  # unaligned: another program wrote it


def _compare(contents: Contents, region: Region, crc32: str) -> None:
    name = region.array.name
    stated = contents.metadata.crc32[name]
    if crc32 != stated:
        raise StorageError(
            f"the array {name!r} is damaged: its checksum is {crc32}, the metadata say {stated}"
        )


def _format_of(path: Path) -> Any:
    if path.suffix not in FORMATS:
        raise ValueError(f"the file name must end in {' or '.join(FORMATS)}, got {str(path)!r}")
    return FORMATS[path.suffix]
