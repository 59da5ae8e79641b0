"""The .npz format: a zip of .npy arrays, not compressed, so that they can be memory-mapped.

``numpy.load`` reads it: ``packed``, ``norms``, for a rotation matrix of the user ``rotation``, and
``metadata``, the JSON text as a 0-d array of bytes.  Array data start at multiples of 64 bytes.
"""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .container import Region, RowSink, array_bytes, match_arrays
from .metadata import ArrayInfo, Metadata, StorageError

ALIGNMENT = 64
SPOOL_IN_MEMORY = 2**22  # scales beyond this wait in a temporary file for the codes to end
MAX_METADATA_BYTES = 2**16

LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and extra fields
ZIP64_EXTRA_BYTES = 20
PADDING_EXTRA_ID = 0xD935  # "zipalign": an extra field that only moves the data


@contextmanager
def writing(
    file: io.BufferedRandom, metadata: Metadata, rotation: npt.NDArray[np.int32] | None
) -> Iterator[RowSink]:
    """Write a file; rows go into the sink inside the block."""
    arrays = {array.name: array for array in metadata.arrays}
    folder = Path(file.name).parent
    with (
        zipfile.ZipFile(file, "w") as archive,
        tempfile.SpooledTemporaryFile(SPOOL_IN_MEMORY, dir=str(folder)) as norms,
    ):
        if rotation is not None:
            with _member(archive, arrays["rotation"]) as member:
                member.write(array_bytes(rotation))
        with _member(archive, arrays["packed"]) as member:
            sink = RowSink(metadata, member.write, norms.write)
            yield sink
            metadata = sink.finish()
        with _member(archive, arrays["norms"]) as member:
            norms.seek(0)
            shutil.copyfileobj(norms, member)
        text = metadata.to_json().encode()
        with _member(archive, ArrayInfo("metadata", np.dtype(f"S{len(text)}"), ())) as member:
            member.write(text)


@contextmanager
def _member(archive: zipfile.ZipFile, array: ArrayInfo) -> Iterator[Any]:
    """A member with its .npy header written; the data start aligned."""
    info = zipfile.ZipInfo(f"{array.name}.npy")  # dated 1980: equal arrays make equal files
    info.create_system = 3
    start = archive.fp.tell() if archive.fp else 0
    start += LOCAL_HEADER_BYTES + len(info.filename) + ZIP64_EXTRA_BYTES
    padding = -(start + 4) % ALIGNMENT
    info.extra = struct.pack("<HH", PADDING_EXTRA_ID, padding) + bytes(padding)
    header = io.BytesIO()  # its length is a multiple of 64
    np.lib.format.write_array_header_1_0(
        header, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    )
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(header.getvalue())
        yield member


def read_layout(file: io.BufferedReader) -> tuple[Metadata, tuple[Region, ...]]:
    """The metadata of an open file, and where its arrays lie; reads headers only.

    Raises
    ------
    StorageError
        If it is no such file, or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            regions = {r.array.name: r for r in (_region(archive, i) for i in archive.infolist())}
            if len(regions) != len(archive.infolist()):
                raise StorageError("the zip file names a member twice")
            text = regions.pop("metadata", None)
            if text is None or text.array.nbytes > MAX_METADATA_BYTES:
                raise StorageError("there is no metadata.npy as this library writes it")
            content = archive.read("metadata.npy")  # zipfile checks the CRC
    except StorageError:
        raise
    except Exception as error:  # zipfile stumbles over damage in many ways, struct.error for one
        raise StorageError(f"not a readable .npz file: {error}") from error
    metadata = Metadata.from_json(content[-text.array.nbytes :])
    return metadata, match_arrays(regions.values(), metadata)


def _region(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Region:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise StorageError(f"{info.filename} is compressed; this library writes it uncompressed")
    with archive.open(info) as member:  # checks that the local header names this member
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise StorageError(f"{info.filename} has .npy version {version}, expected (1, 0)")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        header_bytes = member.tell()
    array = ArrayInfo(info.filename.removesuffix(".npy"), dtype, shape)
    if dtype.hasobject or fortran_order:
        raise StorageError(f"{info.filename} holds Python objects or Fortran order")
    if header_bytes + array.nbytes != info.file_size:
        raise StorageError(f"{info.filename} has another size than its header says")
    return Region(array, _data_start(archive, info) + header_bytes)


def _data_start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Offset of a member's first byte: the zip directory says only where its local header is."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset + LOCAL_HEADER_BYTES - 4)
    name_bytes, extra_bytes = struct.unpack("<HH", archive.fp.read(4))
    return info.header_offset + LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)
