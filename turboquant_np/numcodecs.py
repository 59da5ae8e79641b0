"""The codec ``turboquant`` for numcodecs, and so for Zarr format 2, with the `zarr` extra.

numcodecs finds it by its entry point.  For new stores Zarr format 3 is the better choice
(`turboquant_np.zarr`): it checks shapes when an array is created and reads parts of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ._arrays import FLOAT_NAMES
from ._chunks import ChunkSettings
from ._extras import missing_extra
from .storage import StorageError

try:
    from numcodecs.abc import Codec
    from numcodecs.compat import ensure_ndarray_like, ndarray_copy
except ImportError as error:
    raise missing_extra(__name__, "zarr", error) from error

__all__ = ["TurboQuantCodec"]


@dataclass(frozen=True, kw_only=True)
class TurboQuantCodec(ChunkSettings, Codec):  # type: ignore[misc]
    """Compress float arrays to TurboQuant codes.

    Parameters
    ----------
    head_dim : int
        Length of a vector; must divide the last axis of what is encoded.
    dtype : dtype-like
        Of the arrays: "<f4", "float16", ...
    bits, seed, rotation, hadamard_rounds, scale, format_version
        As in `turboquant_np.zarr.TurboQuantCodec`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of range, or an array has another dtype or last axis.
    StorageError
        While decoding, if the bytes are damaged or need a newer release.

    Examples
    --------
    >>> import numcodecs
    >>> import numpy as np
    >>> codec = numcodecs.get_codec({"id": "turboquant", "head_dim": 64, "bits": 8})
    >>> x = np.linspace(-1, 1, 640, dtype=np.float32).reshape(10, 64)
    >>> encoded = codec.encode(x)
    >>> encoded.nbytes, codec.decode(encoded).shape
    (680, (640,))
    """

    codec_id = "turboquant"

    dtype: Any = "<f4"

    def __post_init__(self) -> None:
        if self.head_dim is None:
            raise TypeError("head_dim, the length of a vector, must be given")
        super().__post_init__()
        native = np.dtype(self.dtype)
        if native.name not in FLOAT_NAMES:
            raise TypeError(f"dtype must be {', '.join(FLOAT_NAMES)}, got {self.dtype!r}")
        object.__setattr__(self, "dtype", native.str)

    def get_config(self) -> dict[str, Any]:
        """The settings and the codec's id, as JSON values."""
        return {"id": self.codec_id, **self.to_settings()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make one from `get_config`'s settings."""
        return cls.from_settings(config)

    def encode(self, buf: Any) -> Any:
        """Compress an array.

        Parameters
        ----------
        buf : array, shape [..., k * head_dim]
            In C order, of the codec's dtype.

        Returns
        -------
        array, uint8, 1-d
        """
        array = ensure_ndarray_like(buf)
        if array.dtype != np.dtype(self.dtype):
            raise TypeError(f"this codec encodes {np.dtype(self.dtype)} arrays, got {array.dtype}")
        if not array.flags.c_contiguous:
            raise ValueError("vectors lie along the last axis: the array must be in C order")
        return self.encode_chunk(array)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Restore the values that `encode` was given.

        Parameters
        ----------
        buf : bytes-like
        out : array, optional
            To write into.

        Returns
        -------
        array, 1-d
            Of the codec's dtype, or `out`.
        """
        data = ensure_ndarray_like(buf).reshape(-1).view(np.uint8)
        head_dim = self.quantizer.head_dim
        vector_bytes = self.encoded_size((head_dim,))
        if data.size % vector_bytes:
            raise StorageError(
                f"a vector takes {vector_bytes} bytes with {self.to_settings()}, got "
                f"{data.size} bytes; they are damaged or the settings were changed"
            )
        shape = (data.size // vector_bytes * head_dim,)
        return ndarray_copy(self.decode_chunk(data, shape, self.dtype), out)
