"""What the file formats share: where arrays lie, and what passes through on the way into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .metadata import ArrayInfo, Metadata, StorageError, checksum

Write = Callable[[Any], Any]


@dataclass(frozen=True)
class Region:
    """The bytes of one array in a file."""

    array: ArrayInfo
    offset: int


class RowSink:
    """Takes encoded rows in order, hands their bytes on, and counts and checksums them.

    Parameters
    ----------
    metadata : Metadata
        Of all rows together.
    write_packed, write_norms : callable
        Take bytes.
    """

    def __init__(self, metadata: Metadata, write_packed: Write, write_norms: Write) -> None:
        self._metadata = metadata
        self._write = {"packed": write_packed, "norms": write_norms}
        self._crc32 = {name: checksum(b"") for name in self._write}
        self._nbytes = dict.fromkeys(self._write, 0)

    def append(self, packed: Any, norms: Any) -> None:
        """Take the next rows, of any leading shape."""
        for name, array in {"packed": packed, "norms": norms}.items():
            data = array_bytes(array)
            self._write[name](data)
            self._crc32[name] = checksum(data, self._crc32[name])
            self._nbytes[name] += len(data)

    def finish(self) -> Metadata:
        """The metadata with the checksums, once all rows are in."""
        expected = {a.name: a.nbytes for a in self._metadata.arrays if a.name in self._nbytes}
        if self._nbytes != expected:
            raise ValueError(
                f"the rows written make {self._nbytes} bytes, the shape needs {expected}"
            )
        return replace(self._metadata, crc32=self._metadata.crc32 | self._crc32)


def array_bytes(array: Any) -> memoryview:
    """The bytes of an array in C order, little-endian; a copy only where that differs."""
    array = np.ascontiguousarray(array.get() if hasattr(array, "get") else array)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return memoryview(little.reshape(-1).view(np.uint8))


def match_arrays(regions: Iterable[Region], metadata: Metadata) -> tuple[Region, ...]:
    """The regions, if they are exactly the arrays that the metadata promise.

    Raises
    ------
    StorageError
        If one is missing, too many, or has another dtype or shape.
    """
    regions = tuple(regions)
    found = {region.array for region in regions}
    if found != set(metadata.arrays):
        raise StorageError(
            f"the arrays do not fit the metadata: found {_listing(found)}, "
            f"expected {_listing(metadata.arrays)}"
        )
    return regions


def _listing(arrays: Iterable[ArrayInfo]) -> str:
    return ", ".join(sorted(f"{a.name} {a.dtype.str} {list(a.shape)}" for a in arrays))
