"""The codec ``turboquant`` for Zarr format 3, with the `zarr` extra.

Zarr finds it by its entry point: whoever opens a store needs this package installed, and imports
nothing.  See docs/how-to/zarr.md.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import FLOAT_NAMES
from ._chunks import SCALE_BYTES, ChunkSettings
from ._extras import missing_extra

try:
    from zarr.abc.codec import ArrayBytesCodec
    from zarr.abc.codec import ArrayBytesCodecPartialDecodeMixin as PartialDecode
    from zarr.abc.codec import ArrayBytesCodecPartialEncodeMixin as PartialEncode
    from zarr.abc.store import OffsetByteRequest, RangeByteRequest
    from zarr.core.common import parse_named_configuration

    from ._zarr_threads import compute, operation
except ImportError as error:
    raise missing_extra(__name__, "zarr", error) from error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from zarr.abc.store import ByteGetter, ByteRequest, ByteSetter
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

__all__ = ["TurboQuantCodec"]

NAME = "turboquant"


class _Serializer(ArrayBytesCodec, PartialDecode, PartialEncode):  # type: ignore[misc]
    """What Zarr expects of a serializer that reads and writes parts of chunks."""


@dataclass(frozen=True, kw_only=True)
class TurboQuantCodec(ChunkSettings, _Serializer):
    """Store float arrays as TurboQuant codes: the serializer of a Zarr array.

    Vectors lie along the last axis.  As long as no compressor follows (codes are close to random,
    so there is nothing left to compress), reading some rows of a chunk reads and decodes only
    those, and writing some leaves the codes of the others as they are.

    Parameters
    ----------
    head_dim : int, optional
        Length of a vector; must divide the last axis of the array and of its chunks.  By default
        a vector is the whole last axis (in a shard, that of an inner chunk).
    bits : int
        Bits per value, 1 to 8.
    seed : int
        Seed of the rotation.
    rotation : {"hadamard", "haar"}
    hadamard_rounds : int
    scale : {"norm", "mse", "unbiased"}
    format_version : int
        Of the numeric format; there is one so far.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of range; when an array is created, if its dtype is not float16,
        float32 or float64, its fill value not 0, or a vector would be cut by the edge of a chunk.
    StorageError
        While reading: if a chunk is damaged, or the store needs a newer release.

    Examples
    --------
    >>> import numpy as np
    >>> import zarr
    >>> from turboquant_np.zarr import TurboQuantCodec
    >>> x = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    >>> z = zarr.create_array(
    ...     zarr.storage.MemoryStore(), shape=x.shape, chunks=(250, 64), dtype=x.dtype,
    ...     serializer=TurboQuantCodec(bits=4), compressors=None,
    ... )
    >>> z[:] = x
    >>> z.nbytes_stored() < x.nbytes / 6
    True
    >>> bool(((z[:] - x) ** 2).sum() < 0.01 * (x**2).sum())
    True
    """

    is_fixed_size = True

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make one from the codec's entry in ``zarr.json``."""
        _, configuration = parse_named_configuration(data, NAME, require_configuration=False)
        codec: Self = cls.from_settings(configuration or {})
        return codec

    def to_dict(self) -> dict[str, Any]:
        """The codec's entry in ``zarr.json``."""
        settings = self.to_settings()
        return {"name": NAME, "configuration": {k: v for k, v in settings.items() if v is not None}}

    # -- checks when an array is created or opened ----------------------------------------------

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Check dtype, fill value and shape, and fill in head_dim if it was not given."""
        _check_dtype(array_spec.dtype)
        if array_spec.fill_value is not None and not array_spec.fill_value == 0:
            raise ValueError(
                f"fill_value must be 0, got {array_spec.fill_value}: only zero vectors are stored "
                "exactly, and a partly written chunk is filled up with it; pass fill_value=0.0"
            )
        if not array_spec.shape or array_spec.shape[-1] == 0:
            raise ValueError(
                f"vectors need a last axis of length >= 2, got an array of shape {array_spec.shape}"
            )
        codec = self if self.head_dim else replace(self, head_dim=array_spec.shape[-1])
        codec.encoded_size(array_spec.shape)  # raises if head_dim does not divide the last axis
        return codec

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Check that no vector is cut by the edge of a chunk."""
        _check_dtype(dtype)
        chunk_shape = getattr(chunk_grid, "chunk_shape", None)
        if chunk_shape is None:
            raise ValueError(
                f"the codec {NAME!r} needs a regular chunk grid, got {type(chunk_grid).__name__}"
            )
        head_dim = self.head_dim or shape[-1]
        if shape[-1] % head_dim or chunk_shape[-1] % head_dim:
            raise ValueError(
                f"vectors of {head_dim} values would be cut: the last axis of the array (shape "
                f"{shape}) and of its chunks (shape {tuple(chunk_shape)}) must be multiples of "
                "head_dim; choose chunks that hold the whole last axis, or give the head_dim of "
                "the parts you want quantised"
            )

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Bytes of an encoded chunk."""
        return self.encoded_size(chunk_spec.shape)

    # -- encode and decode ------------------------------------------------------------------------

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        data = self.encode_chunk(chunk_array.as_ndarray_like())
        return chunk_spec.prototype.buffer.from_array_like(data)

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        chunk = self.decode_chunk(
            chunk_bytes.as_array_like(), chunk_spec.shape, chunk_spec.dtype.to_native_dtype()
        )
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(chunk)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._encode_sync, chunk_array, chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    # Zarr's usual pipeline calls the asynchronous methods, its FusedCodecPipeline the others.

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: Any, chunk_spec: ArraySpec, out: Any = None
    ) -> NDBuffer | None:
        prototype = chunk_spec.prototype
        requests = self._byte_requests(selection, chunk_spec.shape)
        with operation():
            if len(requests) == 1:
                parts = [await byte_getter.get(prototype, *requests)]
            else:
                parts = await asyncio.gather(*(byte_getter.get(prototype, r) for r in requests))
            arguments = parts, selection, chunk_spec, out
            return await compute(self._decode_parts, *arguments, nbytes=_nbytes(chunk_spec))

    def _decode_partial_sync(
        self, byte_getter: Any, selection: Any, chunk_spec: ArraySpec, out: Any = None
    ) -> NDBuffer | None:
        requests = self._byte_requests(selection, chunk_spec.shape)
        parts = [
            byte_getter.get_sync(prototype=chunk_spec.prototype, byte_range=r) for r in requests
        ]
        return self._decode_parts(parts, selection, chunk_spec, out)

    def _byte_requests(self, selection: Any, shape: tuple[int, ...]) -> list[ByteRequest | None]:
        """What to read of a chunk: all of it, or the codes of some rows and their scales."""
        rows, _ = _rows_read(selection[0], shape[0])
        if len(shape) == 1 or len(rows) == shape[0]:
            return [None]
        vectors_per_row = math.prod(shape[1:]) // self.quantizer.head_dim
        row_bytes = vectors_per_row * self.quantizer.packed_dim
        row_scale_bytes = vectors_per_row * SCALE_BYTES
        # The scales are read to the end of the chunk, so that a chunk of another size is noticed.
        return [
            RangeByteRequest(rows.start * row_bytes, rows.stop * row_bytes),
            OffsetByteRequest(shape[0] * row_bytes + rows.start * row_scale_bytes),
        ]

    def _decode_parts(
        self, parts: Sequence[Buffer | None], selection: Any, chunk_spec: ArraySpec, out: Any
    ) -> NDBuffer | None:
        """The selected part of a chunk, from the bytes that `_byte_requests` asked for.

        Parameters
        ----------
        out : array of the shape of what is selected, or None
            To decode into: C-contiguous, native dtype; only for selections that `is_rows` allows.
        """
        present = [part.as_array_like() for part in parts if part is not None]
        if len(present) < len(parts):
            return None
        shape, dtype = chunk_spec.shape, chunk_spec.dtype.to_native_dtype()
        if len(present) == 1:
            chunk = self.decode_chunk(present[0], shape, dtype, out)
        else:
            codes, scales = present
            rows, shifted = _rows_read(selection[0], shape[0])
            chunk = self.decode_rows(codes, scales, rows, shape, dtype, out)
            selection = (shifted, *selection[1:])
        decoded = chunk_spec.prototype.nd_buffer.from_ndarray_like(chunk)
        return decoded[selection] if out is None else decoded

    async def _encode_partial_single(
        self, byte_setter: ByteSetter, chunk_array: NDBuffer, selection: Any, chunk_spec: ArraySpec
    ) -> None:
        with operation():
            old = None
            if not _is_whole(selection, chunk_spec.shape):
                old = await byte_setter.get(chunk_spec.prototype)
            arguments = old, chunk_array.as_ndarray_like(), selection, chunk_spec
            data = await compute(self._encode_update, *arguments, nbytes=_nbytes(chunk_spec))
            if data is None:
                await byte_setter.delete()
            else:
                await byte_setter.set(data)

    def _encode_partial_sync(
        self, byte_setter: Any, chunk_array: NDBuffer, selection: Any, chunk_spec: ArraySpec
    ) -> None:
        old = None
        if not _is_whole(selection, chunk_spec.shape):
            old = byte_setter.get_sync(prototype=chunk_spec.prototype)
        data = self._encode_update(old, chunk_array.as_ndarray_like(), selection, chunk_spec)
        if data is None:
            byte_setter.delete_sync()
        else:
            byte_setter.set_sync(data)

    def _encode_update(
        self, old: Buffer | None, values: Any, selection: Any, chunk_spec: ArraySpec
    ) -> Buffer | None:
        """The bytes of a chunk after an assignment to `selection`; None if only zeros are left."""
        shape, dtype = chunk_spec.shape, chunk_spec.dtype.to_native_dtype()
        if values.shape == shape and _is_whole(selection, shape):
            data = self.encode_chunk(values)
        elif old is None:
            chunk = np.zeros(shape, dtype, like=values)
            _assign(chunk, selection, values)
            data = self.encode_chunk(chunk)
        else:
            chunk = self.decode_chunk(old.as_array_like(), shape, dtype)
            _assign(chunk, selection, values)
            touched = np.zeros(shape, bool, like=values)
            touched[selection] = True
            data = self.keep_untouched(self.encode_chunk(chunk), old.as_array_like(), touched)
        if not chunk_spec.config.write_empty_chunks and self.is_zero(data, shape):
            return None
        return chunk_spec.prototype.buffer.from_array_like(data)


def _nbytes(chunk_spec: ArraySpec) -> int:
    size: int = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
    return size


def _is_whole(selection: Any, shape: tuple[int, ...]) -> bool:
    return all(
        isinstance(s, slice) and range(n)[s] == range(n)
        for s, n in zip(selection, shape, strict=True)
    )


def is_rows(selection: Any, shape: tuple[int, ...]) -> bool:
    """Whether a selection of a chunk is one that decoding gives without a cut afterwards.

    That is the whole chunk or, where vectors are not along the first axis, consecutive rows of it.
    """
    if len(shape) == 1:
        return _is_whole(selection, shape)
    rows, *others = selection
    consecutive = isinstance(rows, slice) and rows.step in (None, 1)
    return consecutive and _is_whole(others, shape[1:])


def _assign(chunk: Any, selection: Any, values: Any) -> None:
    """chunk[selection] = values, where `values` may lack axes of length 1."""
    if values.ndim:
        values = values.reshape(chunk[selection].shape)
    chunk[selection] = values


def _rows_read(selected: Any, length: int) -> tuple[range, Any]:
    """The rows from the first to the last that are selected, and the selection counted from there.

    Parameters
    ----------
    selected : slice, int or array of int
        Along an axis of `length`.
    """
    if isinstance(selected, slice):
        wanted = range(length)[selected]
        start, stop = (wanted[0], wanted[-1] + 1) if wanted else (0, 0)
        return range(start, stop), slice(0, stop - start, wanted.step)
    start, stop = int(np.min(selected)), int(np.max(selected)) + 1
    return range(start, stop), selected - start


def _check_dtype(dtype: Any) -> None:
    native = dtype.to_native_dtype()
    if native.name not in FLOAT_NAMES:
        raise TypeError(f"the codec {NAME!r} stores {', '.join(FLOAT_NAMES)} arrays, got {native}")
