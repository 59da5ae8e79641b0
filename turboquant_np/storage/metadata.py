"""The JSON text in every file: which codec made the codes, of what array, and their checksums.

``{"bits": 4, "crc32": {"metadata": "7f3a0c51", "norms": ..., "packed": ...}, "dtype": "float32",
"format": "turboquant_np", "format_version": 1, "hadamard_rounds": 3, "head_dim": 128,
"rotation": "hadamard", "scale": "norm", "seed": 42, "shape": [1000, 128]}``

* ``format_version`` is that of the numeric format (docs/format.md).
* ``seed`` and ``hadamard_rounds`` are null where the rotation has none.
* ``crc32`` has the CRC-32 of the bytes of every array, as 8 hexadecimal digits; the one called
  "metadata" is that of this text without it, with sorted keys and no spaces.
* With the rotation "matrix" the file also holds the array ``rotation``, int32 [head_dim, head_dim]:
  the matrix times 2**24, exactly.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _arrays
from .._spec import FORMAT_VERSION
from ..config import ROTATION_KINDS, TurboQuantConfig
from ..packing import packed_size
from ..quantizer import TurboQuant
from ..rotation import MATRIX_FRACTION_BITS, DenseRotation, HadamardRotation

FORMAT = "turboquant_np"
UNKNOWN_CRC32 = "00000000"


class StorageError(ValueError):
    """A file that is damaged, foreign, or written by a newer version."""


@dataclass(frozen=True)
class ArrayInfo:
    """Name, dtype and shape of one array of a file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Metadata:
    """The fields of the JSON text; `dtype` and `shape` are those of the original array."""

    bits: int
    dtype: str
    hadamard_rounds: int | None
    head_dim: int
    rotation: str
    scale: str
    seed: int | None
    shape: tuple[int, ...]
    crc32: dict[str, str] = field(default_factory=dict)

    @classmethod
    def describe(
        cls, quantizer: TurboQuant, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> Metadata:
        """The metadata of an array of `dtype` and `shape`, its checksums still unknown."""
        rotation = quantizer._spec.rotation
        return cls(
            bits=quantizer.bits,
            dtype=dtype.name,
            hadamard_rounds=rotation.rounds if isinstance(rotation, HadamardRotation) else None,
            head_dim=quantizer.head_dim,
            rotation=rotation.kind,
            scale=quantizer.config.scale,
            seed=None if rotation.seed is None else int(rotation.seed) % 2**32,
            shape=shape,
        )

    @property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        """The arrays that belong to this text, in the order in which files hold them."""
        d, batch = self.head_dim, self.shape[:-1]
        matrix = [ArrayInfo("rotation", np.dtype("<i4"), (d, d))]
        return (
            *(matrix if self.rotation == "matrix" else []),
            ArrayInfo("norms", np.dtype("<f4"), batch),
            ArrayInfo("packed", np.dtype(np.uint8), (*batch, packed_size(d, self.bits))),
        )

    def to_json(self) -> str:
        """The text, always of the same length whatever the checksums are."""
        record = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        crc32 = {array.name: self.crc32.get(array.name, UNKNOWN_CRC32) for array in self.arrays}
        record["crc32"] = crc32
        record["crc32"] = {**crc32, "metadata": checksum(_canonical(record))}
        return _canonical(record)

    @classmethod
    def from_json(cls, text: str | bytes) -> Metadata:
        """Parse and check the text.

        Raises
        ------
        StorageError
            If it is not the text of a file of this library, damaged, or of a newer version.
        """
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"the metadata are not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise StorageError(f"the metadata are not those of a {FORMAT} file")
        version = record.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise StorageError(
                f"the file has format version {version}, this release reads up to "
                f"{FORMAT_VERSION}; upgrade turboquant-np"
            )
        crc32 = record.get("crc32")
        if not isinstance(crc32, dict) or "metadata" not in crc32:
            raise StorageError("the metadata have no checksum")
        stated = crc32.pop("metadata")
        if stated != checksum(_canonical(record)):
            raise StorageError("the metadata are damaged: their checksum does not match")
        return cls._from_record(record)

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> Metadata:
        known = {"format", "format_version", *(f.name for f in fields(cls))}
        if known != set(record):
            raise StorageError(
                f"the metadata must have the fields {', '.join(sorted(known))}, "
                f"got {', '.join(sorted(record))}"
            )
        shape, d = record["shape"], record["head_dim"]
        counts_only = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not counts_only or shape[-1:] != [d]:
            raise StorageError(f"the shape must be a list ending in head_dim = {d}, got {shape}")
        if record["rotation"] not in (*ROTATION_KINDS, "matrix"):
            raise StorageError(f"unknown rotation {record['rotation']!r}")
        if record["format_version"] != FORMAT_VERSION or record["dtype"] not in _arrays.FLOAT_NAMES:
            raise StorageError(
                f"unknown format version {record['format_version']} or dtype {record['dtype']}"
            )
        del record["format"], record["format_version"]
        metadata = cls(**{**record, "shape": tuple(shape)})
        try:
            metadata._settings()
            arrays = metadata.arrays
        except (TypeError, ValueError) as error:
            raise StorageError(f"the metadata name impossible settings: {error}") from error
        if set(metadata.crc32) != {array.name for array in arrays}:
            raise StorageError(f"the metadata have checksums of {', '.join(metadata.crc32)}")
        return metadata

    def make_quantizer(
        self, rotation: npt.NDArray[np.int32] | None, backend: str = "auto"
    ) -> TurboQuant:
        """The quantiser that decodes the codes; `rotation` is the array of that name, if any.

        Raises
        ------
        StorageError
            If the array is no rotation.
        """
        settings = self._settings() | {"backend": backend, "dtype": self.dtype}
        if rotation is not None:
            settings["rotation"] = rotation.astype(np.float64) * 2.0**-MATRIX_FRACTION_BITS
        try:
            return TurboQuant(**settings)
        except ValueError as error:
            raise StorageError(f"the metadata name impossible settings: {error}") from error

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "head_dim": self.head_dim,
            "bits": self.bits,
            "scale": self.scale,
        }
        if self.rotation in ROTATION_KINDS:
            settings |= {"rotation": self.rotation, "seed": self.seed}
        if self.hadamard_rounds is not None:
            settings["hadamard_rounds"] = self.hadamard_rounds
        TurboQuantConfig(**settings)  # raises if one is out of range
        return settings


def rotation_array(quantizer: TurboQuant) -> npt.NDArray[np.int32] | None:
    """The matrix of a quantiser that no seed describes, as fixed-point integers."""
    rotation = quantizer._spec.rotation
    if isinstance(rotation, DenseRotation) and rotation.kind == "matrix":
        return rotation.fixed.astype("<i4")
    return None


def checksum(data: Any, start: str = UNKNOWN_CRC32) -> str:
    """CRC-32 of text or bytes as 8 hexadecimal digits; `start` is that of the bytes before."""
    data = data.encode() if isinstance(data, str) else data
    return f"{zlib.crc32(data, int(start, 16)):08x}"


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))
