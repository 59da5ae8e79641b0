"""A codec pipeline for Zarr that decodes straight into the array Zarr returns; opt-in by `enable`.

See docs/how-to/zarr.md for when it pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._extras import missing_extra

try:
    import zarr
    from zarr.abc.store import SupportsSyncStore
    from zarr.core.buffer import cpu
    from zarr.core.codec_pipeline import BatchedCodecPipeline
    from zarr.core.common import concurrent_map
    from zarr.registry import register_ndbuffer, register_pipeline

    from ._zarr_threads import in_threads
    from .zarr import TurboQuantCodec, is_rows
except ImportError as error:
    raise missing_extra(__name__, "zarr", error) from error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import NDBuffer

__all__ = ["ReusedNDBuffer", "TurboQuantPipeline", "enable"]


@dataclass(frozen=True)
class TurboQuantPipeline(BatchedCodecPipeline):  # type: ignore[misc]
    """Zarr's usual pipeline, with a shorter way for arrays whose only codec is ``turboquant``.

    Rows of a chunk that lie together in the array Zarr returns are decoded in that place, where the
    usual pipeline copies them to.  Several chunks at once, in memory or files, are read and written
    by several threads, each of which takes care of whole chunks.  What is stored and what is read
    are the same bits as with the usual pipeline, which still serves all other arrays, and arrays on
    a GPU.
    """

    async def read(
        self, batch_info: Iterable[Any], out: NDBuffer, drop_axes: tuple[int, ...] = ()
    ) -> Any:
        """Read chunks into `out`; parameters and result are Zarr's."""
        batch, codec, array = list(batch_info), self.array_bytes_codec, out.as_ndarray_like()
        if not self._is_ours(array):
            return await super().read(batch, out, drop_axes)

        def finish(decoded: NDBuffer | None, place: Any, spec: ArraySpec, at: Any) -> Any:
            if decoded is None:
                out[at] = 0 if spec.fill_value is None else spec.fill_value
                return {"status": "missing"}
            if place is None:
                out[at] = decoded.squeeze(axis=drop_axes) if drop_axes else decoded
            return {"status": "present"}

        async def read_one(getter: Any, spec: ArraySpec, selection: Any, at: Any, _: bool) -> Any:
            place = _place(array, at, selection, spec)
            decoded = await codec._decode_partial_single(getter, selection, spec, place)
            return finish(decoded, place, spec, at)

        def read_one_sync(item: Any) -> Any:
            getter, spec, selection, at, _ = item
            place = _place(array, at, selection, spec)
            decoded = codec._decode_partial_sync(getter, selection, spec, place)
            return finish(decoded, place, spec, at)

        if len(batch) == 1:
            return (await read_one(*batch[0]),)
        if _is_sync(batch):
            return tuple(await in_threads(read_one_sync, batch))
        return tuple(await concurrent_map(batch, read_one, zarr.config.get("async.concurrency")))

    async def write(
        self, batch_info: Iterable[Any], value: NDBuffer, drop_axes: tuple[int, ...] = ()
    ) -> None:
        """Write `value` to chunks; parameters are Zarr's."""
        batch, codec = list(batch_info), self.array_bytes_codec

        def arguments(setter: Any, spec: ArraySpec, selection: Any, at: Any, _: bool) -> Any:
            return setter, value[at] if value.shape else value, selection, spec

        if not self._is_ours(value.as_ndarray_like()):
            await super().write(batch, value, drop_axes)
        elif len(batch) == 1:
            await codec._encode_partial_single(*arguments(*batch[0]))
        elif _is_sync(batch):
            await in_threads(lambda item: codec._encode_partial_sync(*arguments(*item)), batch)
        else:
            await super().write(batch, value, drop_axes)

    def _is_ours(self, array: Any) -> bool:
        alone = not self.array_array_codecs and not self.bytes_bytes_codecs
        ours = isinstance(self.array_bytes_codec, TurboQuantCodec)
        return alone and ours and isinstance(array, np.ndarray)


def _place(array: Any, at: Any, selection: Any, spec: ArraySpec) -> Any:
    """array[at] if what is selected of a chunk can be decoded into it, else None."""
    basic = isinstance(at, tuple) and all(isinstance(s, slice) for s in at)
    if not basic or not is_rows(selection, spec.shape):
        return None
    place, dtype = array[at], spec.dtype.to_native_dtype()
    fits = place.ndim == len(spec.shape) and place.flags.c_contiguous
    return place if fits and place.dtype == dtype and dtype.isnative else None


def _is_sync(batch: list[Any]) -> bool:
    """Whether the store can be used from any thread, without the event loop."""
    store = getattr(batch[0][0], "store", None) if batch else None
    return isinstance(store, SupportsSyncStore) and getattr(store, "_supports_sync_io", True)


class ReusedNDBuffer(cpu.NDBuffer):  # type: ignore[misc]
    """Zarr's array on a CPU; a large result lies in memory that earlier ones have left.

    Otherwise the system zeroes every page of it, which takes as long as decoding.
    """

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any, order: str = "C") -> Any:
        """An uninitialised array."""
        from .backends.cpu import empty  # here because it imports Numba

        if order != "C" or np.dtype(dtype).kind not in "biufc":
            return super().empty(shape, dtype, order)
        return cls(empty(tuple(shape), np.dtype(dtype), None))


def enable() -> Any:
    """Let arrays that are created or opened from now on use `TurboQuantPipeline`.

    Results of reading are `ReusedNDBuffer` for as long, unless other buffers are configured (those
    of a GPU).

    Returns
    -------
    zarr.config.set
        The change lasts, or ends with a ``with`` block.

    Examples
    --------
    >>> import zarr
    >>> import turboquant_np.zarr_pipeline
    >>> from turboquant_np.zarr import TurboQuantCodec
    >>> with turboquant_np.zarr_pipeline.enable():
    ...     z = zarr.create_array(
    ...         zarr.storage.MemoryStore(), shape=(1000, 64), chunks=(250, 64), dtype="float32",
    ...         serializer=TurboQuantCodec(bits=4), compressors=None,
    ...     )
    >>> z[:500].shape
    (500, 64)
    """
    settings = {"codec_pipeline.path": _path(TurboQuantPipeline)}
    if zarr.config.get("ndbuffer") == zarr.config.defaults[0]["ndbuffer"]:
        settings["ndbuffer"] = _path(ReusedNDBuffer)
    return zarr.config.set(settings)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


register_pipeline(TurboQuantPipeline)
register_ndbuffer(ReusedNDBuffer)
