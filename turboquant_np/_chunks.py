"""One chunk of a chunked store as bytes: what the Zarr and the numcodecs codec have in common.

The chunk, taken in C order, is n vectors of head_dim values.  Its bytes are

* ``n * packed_dim`` bytes: the packed codes of every vector, as `TurboQuant.encode` gives them;
* ``n * 4`` bytes: the scale of every vector, float32, little-endian.

There is no header: what it would say stands once for all chunks in the metadata of the store.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from . import _arrays
from ._spec import FORMAT_VERSION, ScaleKind
from .config import TurboQuantConfig
from .quantizer import TurboQuant
from .storage import StorageError

SCALE_BYTES = 4
SCALE_DTYPE = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """What the metadata of a store record: the settings that decide bits.

    Attributes
    ----------
    head_dim : int or None
        Length of a vector; must divide the last axis of a chunk.  None is all of the last axis.
    bits, seed, rotation, hadamard_rounds, scale
        As in `TurboQuantConfig`; rotation is "hadamard" or "haar", since matrices have no place
        in metadata.
    format_version : int
        Of the numeric format; stored so that a release too old for a store can say so.
    """

    head_dim: int | None = None
    bits: int = 4
    seed: int = 42
    rotation: str = "hadamard"
    hadamard_rounds: int = 3
    scale: ScaleKind = "norm"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise StorageError(
                f"the store has format version {self.format_version}, this release reads "
                f"{FORMAT_VERSION}; upgrade turboquant-np"
            )
        if not isinstance(self.rotation, str):
            raise TypeError(
                "a store can name a rotation but not hold a matrix; "
                f"rotation must be 'hadamard' or 'haar', got {type(self.rotation).__name__}"
            )
        self._config()  # raises if a setting is out of range
        for name in ("head_dim", "bits", "seed", "hadamard_rounds"):  # NumPy integers are no JSON
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))

    @classmethod
    def from_settings(cls, settings: Any) -> Any:
        """Make one from stored metadata.

        Raises
        ------
        StorageError
            If a setting is unknown or missing a value that this release understands.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise StorageError(
                f"unknown settings of the codec 'turboquant': {', '.join(unknown)} "
                f"(known: {', '.join(sorted(known))}); a newer turboquant-np may know them"
            )
        return cls(**settings)

    def to_settings(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @property
    def quantizer(self) -> TurboQuant:
        """The quantiser with these settings; made once."""
        if self.head_dim is None:
            raise ValueError("head_dim is not known before an array is created; give it")
        return _quantizer(self)

    def encoded_size(self, shape: tuple[int, ...]) -> int:
        """Bytes of an encoded chunk of `shape`."""
        return self._num_vectors(shape) * (self.quantizer.packed_dim + SCALE_BYTES)

    def encode_chunk(self, chunk: Any) -> Any:
        """A chunk as bytes.

        Parameters
        ----------
        chunk : NumPy or CuPy array
            Its last axis is a multiple of head_dim long.

        Returns
        -------
        array, uint8, 1-d
            Of the same library.
        """
        n = self._num_vectors(chunk.shape)
        quantizer = self.quantizer
        vectors = chunk.reshape(*chunk.shape[:-1], -1, quantizer.head_dim)  # a view, any strides
        # Codes and scales are written to their places: joining them later would copy all of them.
        data = np.empty(self.encoded_size(chunk.shape), np.uint8, like=chunk)
        split = n * quantizer.packed_dim
        packed = data[:split].reshape(*vectors.shape[:-1], quantizer.packed_dim)
        if split % SCALE_BYTES == 0 and SCALE_DTYPE.isnative:
            scales = data[split:].view(SCALE_DTYPE).reshape(vectors.shape[:-1])
            quantizer.encode(vectors, out=(packed, scales))
        else:  # scales would not be aligned, or not in this machine's byte order
            packed[...], norms = quantizer.encode(vectors)
            data[split:] = norms.astype(SCALE_DTYPE, copy=False).reshape(-1).view(np.uint8)
        return data

    def keep_untouched(self, new: Any, old: Any, touched: Any) -> Any:
        """Bytes of a chunk: `new` for vectors with a `touched` value, `old` for the others.

        Encoding what was decoded is no identity (the norm of a decoded vector is a little smaller),
        so vectors which an assignment does not reach must keep their codes and scales.

        Parameters
        ----------
        new, old : array, uint8, 1-d
            As `encode_chunk` gives them; `new` is changed in place.
        touched : array, bool, of the shape of the chunk
        """
        kept = ~touched.reshape(-1, self.quantizer.head_dim).any(axis=-1)
        split = len(kept) * self.quantizer.packed_dim
        for part in (slice(None, split), slice(split, None)):
            rows = new[part].reshape(len(kept), -1)
            rows[kept] = old[part].reshape(len(kept), -1)[kept]
        return new

    def is_zero(self, data: Any, shape: tuple[int, ...]) -> bool:
        """Whether every vector of an encoded chunk decodes to zeros: all scales are 0."""
        return not bool(data[self._num_vectors(shape) * self.quantizer.packed_dim :].any())

    def decode_chunk(self, data: Any, shape: tuple[int, ...], dtype: Any, out: Any = None) -> Any:
        """Undo `encode_chunk` for a chunk of `shape`.

        Parameters
        ----------
        data : NumPy or CuPy array, uint8, 1-d
        shape : tuple of int
        dtype : dtype
        out : array of `shape`, optional
            C-contiguous, of a native float dtype: decode into it.

        Raises
        ------
        StorageError
            If there are too many or too few bytes, or a scale is NaN or infinite.
        """
        n, size = self._num_vectors(shape), self.encoded_size(shape)
        self._check_size(data.size, size, shape)
        split = n * self.quantizer.packed_dim
        return self._decode(data[:split], data[split:], shape, dtype, out)

    def decode_rows(
        self,
        codes: Any,
        scales: Any,
        rows: range,
        shape: tuple[int, ...],
        dtype: Any,
        out: Any = None,
    ) -> Any:
        """Decode consecutive rows, along the first axis, of a chunk of `shape`.

        Parameters
        ----------
        codes : array, uint8, 1-d
            Those of `rows`.
        scales : array, uint8, 1-d
            Those from the start of `rows` to the end of the chunk.
        rows : range
        shape : tuple of int
        dtype : dtype
        out : array of the shape of these rows, optional
            As in `decode_chunk`.

        Raises
        ------
        StorageError
            As `decode_chunk`.
        """
        part, rest = (len(rows), *shape[1:]), (shape[0] - rows.start, *shape[1:])
        scale_bytes = self._num_vectors(part) * SCALE_BYTES
        part_size = self.encoded_size(part) - scale_bytes + self._num_vectors(rest) * SCALE_BYTES
        self._check_size(codes.size + scales.size, part_size, shape)
        return self._decode(codes, scales[:scale_bytes], part, dtype, out)

    def _check_size(self, size: int, expected: int, shape: tuple[int, ...]) -> None:
        if size != expected:
            raise StorageError(
                f"expected {expected} bytes of a chunk of shape {shape}, got {size}; the chunk is "
                f"damaged, or its shape or settings were changed ({self.to_settings()})"
            )

    def _decode(self, codes: Any, scales: Any, shape: tuple[int, ...], dtype: Any, out: Any) -> Any:
        norms = scales.copy().view(SCALE_DTYPE).astype(np.float32, copy=False)  # aligned, native
        if not bool(np.isfinite(norms).all()):
            raise StorageError("a scale in the chunk is NaN or infinite: the chunk is damaged")
        packed = codes.reshape(len(norms), self.quantizer.packed_dim)
        if out is not None:
            self.quantizer.decode(packed, norms, out=out.reshape(len(norms), -1))
            return out
        decoded = self.quantizer.decode(packed, norms, dtype=_arrays.float_dtype(dtype))
        return decoded.reshape(shape).astype(dtype, copy=False)

    def _config(self) -> TurboQuantConfig:
        settings = self.to_settings()
        names = ("bits", "seed", "rotation", "hadamard_rounds", "scale")
        return TurboQuantConfig(
            head_dim=TurboQuantConfig.head_dim if self.head_dim is None else self.head_dim,
            **{name: settings[name] for name in names},
        )

    def _num_vectors(self, shape: tuple[int, ...]) -> int:
        head_dim = self.quantizer.head_dim
        if not shape or shape[-1] % head_dim:
            raise ValueError(
                f"the last axis must be a multiple of head_dim = {head_dim} long, got shape {shape}"
            )
        return math.prod(shape) // head_dim


@lru_cache(maxsize=32)
def _quantizer(settings: ChunkSettings) -> TurboQuant:
    return TurboQuant(settings._config())
