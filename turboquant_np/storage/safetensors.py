"""The .safetensors format, with the `io` extra.

Tensors ``packed``, ``norms`` and, for a rotation matrix of the user, ``rotation``; the JSON text is
the entry ``turboquant_np`` of the file's metadata.  The header is padded to a multiple of 64 bytes.

The safetensors library checks what is read.  It cannot write tensors piece by piece, so the header
(8 bytes of length, then JSON) is written here.
"""

from __future__ import annotations

import importlib
import io
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from .._extras import missing_extra
from .container import Region, RowSink, Write, array_bytes, match_arrays
from .metadata import ArrayInfo, Metadata, StorageError

ALIGNMENT = 64
METADATA_KEY = "turboquant_np"
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}


@contextmanager
def writing(
    file: io.BufferedRandom, metadata: Metadata, rotation: npt.NDArray[np.int32] | None
) -> Iterator[RowSink]:
    """Write a file; rows go into the sink inside the block."""
    _library()  # what could not be read back is not written
    offsets = _offsets(metadata)
    start = len(_header(metadata))  # does not depend on the checksums

    def write_at(name: str) -> Write:
        position = start + offsets.get(name, 0)

        def write(data: Any) -> None:
            nonlocal position
            file.seek(position)
            position += file.write(data)

        return write

    if rotation is not None:
        write_at("rotation")(array_bytes(rotation))
    sink = RowSink(metadata, write_at("packed"), write_at("norms"))
    yield sink
    file.seek(0)
    file.write(_header(sink.finish()))


def read_layout(file: io.BufferedReader) -> tuple[Metadata, tuple[Region, ...]]:
    """The metadata of an open file, and where its arrays lie; reads the header only.

    Raises
    ------
    StorageError
        If it is no such file, or damaged.
    ImportError
        Without the safetensors library.
    """
    texts, entries, start = read_header(file)
    if METADATA_KEY not in texts:
        raise StorageError(f"the file has no metadata called {METADATA_KEY}")
    metadata = Metadata.from_json(texts[METADATA_KEY])
    regions = [_region(name, entry, start) for name, entry in entries.items()]
    return metadata, match_arrays(regions, metadata)


def read_header(file: io.BufferedReader) -> tuple[dict[str, str], dict[str, Any], int]:
    """The header of an open file: its texts, the entry of each tensor, and where the data start.

    Raises
    ------
    StorageError, ImportError
        As `read_layout`.
    """
    library = _library()
    try:
        with library.safe_open(file.name, framework="numpy"):
            pass  # the header is sound: known dtypes, no gaps, no overlaps, of the file's length
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    except Exception as error:  # SafetensorError and errors of its JSON parser
        raise StorageError(f"not a readable .safetensors file: {error}") from error
    return header.pop("__metadata__", None) or {}, header, 8 + length


def _region(name: str, entry: dict[str, Any], start: int) -> Region:
    dtype = DTYPES.get(entry["dtype"], np.dtype("V"))  # void: one that fits no metadata
    array = ArrayInfo(name, dtype, tuple(entry["shape"]))
    return Region(array, start + entry["data_offsets"][0])


def _offsets(metadata: Metadata) -> dict[str, int]:
    """Where each array starts in the data; four-byte elements come first, and so are aligned."""
    offsets, position = {}, 0
    for array in metadata.arrays:
        offsets[array.name] = position
        position += array.nbytes
    return offsets


def _header(metadata: Metadata) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: metadata.to_json()}}
    offsets = _offsets(metadata)
    letters = {dtype: name for name, dtype in DTYPES.items()}
    for array in metadata.arrays:
        start = offsets[array.name]
        entries[array.name] = {
            "dtype": letters[array.dtype],
            "shape": array.shape,
            "data_offsets": [start, start + array.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _library() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise missing_extra("a .safetensors file", "io", error) from error
