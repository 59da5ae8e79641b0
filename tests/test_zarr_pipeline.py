"""Our codec pipeline for Zarr: where it decodes to, on which threads, and what it leaves alone.

That it stores and reads the same bits as the usual one is tested in test_zarr.py.
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import StorageError, TurboQuant
from turboquant_np.testing import assert_bits_equal

zarr = pytest.importorskip("zarr", reason="needs the zarr extra")

from turboquant_np import _zarr_threads, zarr_pipeline  # noqa: E402
from turboquant_np.backends.cpu import threads  # noqa: E402
from turboquant_np.zarr import TurboQuantCodec  # noqa: E402
from turboquant_np.zarr_pipeline import TurboQuantPipeline  # noqa: E402

SHAPE, CHUNKS = (100, 64), (30, 64)


def create(store: Any = None, **settings: Any) -> Any:
    defaults = {
        "shape": SHAPE,
        "chunks": CHUNKS,
        "dtype": "float32",
        "serializer": TurboQuantCodec(head_dim=64, bits=4),
        "compressors": None,
    }
    store = zarr.storage.MemoryStore() if store is None else store
    with zarr_pipeline.enable():
        return zarr.create_array(store, **(defaults | settings))


@pytest.fixture(scope="module")
def x() -> Any:
    return np.random.default_rng(7).standard_normal(SHAPE, dtype=np.float32)


@pytest.fixture(scope="module")
def decoded(x: Any) -> Any:
    tq = TurboQuant(head_dim=64, bits=4)
    return tq.decode(*tq.encode(x), dtype=np.float32)


@pytest.fixture
def outs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arrays that chunks were decoded into; None where decoding made one of its own."""
    seen: list[Any] = []
    original = TurboQuantCodec._decode

    def spy(self: Any, codes: Any, scales: Any, shape: Any, dtype: Any, out: Any) -> Any:
        seen.append(out)
        return original(self, codes, scales, shape, dtype, out)

    monkeypatch.setattr(TurboQuantCodec, "_decode", spy)
    return seen


# -- switched on -----------------------------------------------------------------------------------


def test_it_is_used_within_a_block_or_from_now_on() -> None:
    usual = zarr.config.get("codec_pipeline.path")
    with zarr_pipeline.enable():
        inside = create()
    assert type(inside.async_array.codec_pipeline) is TurboQuantPipeline
    assert zarr.config.get("codec_pipeline.path") == usual
    with zarr.config.set({}):
        lasting = zarr_pipeline.enable()
        array = zarr.create_array(
            zarr.storage.MemoryStore(), shape=(4, 4), chunks=(2, 2), dtype="i4"
        )
        assert type(array.async_array.codec_pipeline) is TurboQuantPipeline
        lasting.__exit__(None, None, None)
    assert zarr.config.get("codec_pipeline.path") == usual


def test_an_array_sent_to_another_process_keeps_it(tmp_path: Path, x: Any, decoded: Any) -> None:
    array = create(tmp_path / "z")
    array[:] = x
    sent = pickle.loads(pickle.dumps(array))
    assert type(sent.async_array.codec_pipeline) is TurboQuantPipeline
    assert_bits_equal(sent[:], decoded)


# -- where it decodes to ---------------------------------------------------------------------------

IN_PLACE = [np.s_[:], np.s_[:30], np.s_[30:60], np.s_[5:95], np.s_[7:8], np.s_[98:]]
COPIED = [np.s_[3], np.s_[::2], np.s_[:, 5:], np.s_[40:50, 3], np.s_[10, 2]]


@pytest.mark.parametrize("selection", IN_PLACE, ids=str)
def test_rows_are_decoded_into_the_result(
    selection: Any, x: Any, decoded: Any, outs: list[Any]
) -> None:
    array = create()
    array[:] = x
    result = array[selection]
    assert outs
    assert all(np.shares_memory(out, result) for out in outs)
    assert_bits_equal(result, decoded[selection])


@pytest.mark.parametrize("selection", COPIED, ids=str)
def test_other_selections_are_copied_to_the_result(
    selection: Any, x: Any, decoded: Any, outs: list[Any]
) -> None:
    array = create()
    array[:] = x
    assert_bits_equal(np.asarray(array[selection]), decoded[selection])
    assert outs
    assert all(out is None for out in outs)


@pytest.mark.parametrize(
    "settings",
    [{"chunks": (30, 32), "serializer": TurboQuantCodec(head_dim=32)}, {"config": {"order": "F"}}],
    ids=["columns", "Fortran order"],
)
def test_chunks_that_do_not_lie_together_in_the_result(
    settings: dict[str, Any], x: Any, outs: list[Any]
) -> None:
    array = create(**settings)
    array[:] = x
    result = array[:]
    assert len(outs) == array.nchunks
    assert all(out is None for out in outs)
    tq = TurboQuant(head_dim=array.chunks[1], bits=4)
    vectors = x.reshape(100, -1, array.chunks[1])
    assert_bits_equal(
        np.ascontiguousarray(result), tq.decode(*tq.encode(vectors), dtype="f4").reshape(SHAPE)
    )


def test_another_byte_order_is_no_place_to_decode_into(
    x: Any, decoded: Any, outs: list[Any]
) -> None:
    array = create(dtype=">f4")
    array[:] = x
    assert_bits_equal(np.asarray(array[:]).astype("<f4"), decoded)
    assert all(out is None for out in outs)


def test_chunks_of_shards_are_decoded_into_the_shard(x: Any, decoded: Any, outs: list[Any]) -> None:
    array = create(chunks=(10, 64), shards=(50, 64))
    with zarr_pipeline.enable():  # Zarr makes the pipeline within shards when it needs it
        array[:] = x
        assert_bits_equal(array[:], decoded)
    assert len(outs) == 10
    assert not any(out is None for out in outs)


def test_a_place_of_the_callers(x: Any, decoded: Any) -> None:
    from zarr.core.buffer.cpu import NDBuffer

    array, wide = create(), np.full((100, 80), np.nan, np.float32)
    array[:60] = x[:60]  # the last chunk is missing
    array.get_basic_selection(out=NDBuffer(wide[:, :64]))
    assert_bits_equal(np.ascontiguousarray(wide[:60, :64]), decoded[:60])
    assert not wide[60:, :64].any()
    assert np.isnan(wide[:, 64:]).all()
    whole = np.full(SHAPE, np.nan, np.float32)
    array.get_basic_selection(out=NDBuffer(whole))
    assert_bits_equal(whole, np.concatenate([decoded[:60], np.zeros((40, 64), np.float32)]))


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="the system zeroes pages it gives")
def test_large_results_lie_in_memory_of_earlier_ones() -> None:
    with zarr_pipeline.enable():
        array = create(shape=(20_000, 64), chunks=(10_000, 64))
        first = array[:]
        address = first.ctypes.data
        del first
        gc.collect()
        again = array[:]
        assert again.ctypes.data == address
        assert not again.any()
        again[:] = 1
        other = array[:]  # `again` is still in use
        assert again.all()
        assert not other.any()


@pytest.mark.parametrize("dtype", ["i2", "bool", "c16", "datetime64[s]"])
def test_results_of_other_dtypes(dtype: str) -> None:
    values = np.zeros((5, 3), dtype)
    with zarr_pipeline.enable():
        array = zarr.create_array(zarr.storage.MemoryStore(), data=values, chunks=(2, 3))
        assert_bits_equal(array[:], values)


def test_buffers_that_are_configured_stay() -> None:
    usual = zarr.config.get("ndbuffer")
    with zarr_pipeline.enable():
        assert zarr.config.get("ndbuffer") != usual
    with zarr.config.set({"ndbuffer": "zarr.buffer.gpu.NDBuffer"}), zarr_pipeline.enable():
        assert zarr.config.get("ndbuffer") == "zarr.buffer.gpu.NDBuffer"
    assert zarr.config.get("ndbuffer") == usual


# -- on which threads ------------------------------------------------------------------------------


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads on which chunks were encoded and decoded."""
    names: list[str] = []
    for method in ("encode_chunk", "_decode"):
        original = getattr(TurboQuantCodec, method)

        def spy(*arguments: Any, original: Any = original) -> Any:
            names.append(threading.current_thread().name)
            return original(*arguments)

        monkeypatch.setattr(TurboQuantCodec, method, spy)
    return names


@pytest.mark.parametrize("ours", [True, False], ids=["our pipeline", "usual"])
def test_one_chunk_is_done_by_the_event_loop_itself(ours: bool, x: Any, workers: list[str]) -> None:
    array = create()
    if not ours:
        array = zarr.open_array(array.store)
    array[:30] = x[:30]
    array[5:20]
    assert workers == ["zarr_io"] * 2


def test_a_large_chunk_is_not(x: Any, workers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_zarr_threads, "SHORT", 30 * 64 * 4 - 1)
    array = create()
    array[:30] = x[:30]
    array[5:20]
    assert len(workers) == 2
    assert "zarr_io" not in workers


def test_operations_at_the_same_time_leave_the_event_loop(
    x: Any, decoded: Any, workers: list[str]
) -> None:
    array = create()

    async def both() -> Any:
        await asyncio.gather(
            array.async_array.setitem(slice(0, 30), x[:30]),
            array.async_array.setitem(slice(30, 60), x[30:60]),
        )
        return await asyncio.gather(
            array.async_array.getitem(slice(0, 30)), array.async_array.getitem(slice(30, 60))
        )

    assert_bits_equal(np.concatenate(asyncio.run(both())), decoded[:60])
    assert len(workers) == 4
    assert threading.current_thread().name not in workers


@pytest.mark.parametrize("store", ["memory", "files"])
def test_chunks_are_written_and_read_at_the_same_time(
    store: str, x: Any, decoded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each thread waits until another has a chunk, too."""
    pairs = threading.Barrier(2)
    for method in ("encode_chunk", "_decode"):
        original = getattr(TurboQuantCodec, method)

        def spy(*arguments: Any, original: Any = original) -> Any:
            pairs.wait(timeout=20)
            return original(*arguments)

        monkeypatch.setattr(TurboQuantCodec, method, spy)
    array = create(None if store == "memory" else tmp_path / "z")
    array[:] = x
    assert_bits_equal(array[:], decoded)


def test_with_a_chunk_for_every_cpu_each_is_decoded_by_one_thread(
    x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[bool] = []
    original = TurboQuantCodec._decode

    def spy(*arguments: Any) -> Any:
        alone.append(getattr(threads._in_worker, "active", False))
        return original(*arguments)

    array = create()
    array[:] = x
    monkeypatch.setattr(TurboQuantCodec, "_decode", spy)
    for cpus, expected in (("4", True), ("5", False)):
        monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", cpus)
        alone.clear()
        array[:]
        assert alone == [expected] * 4


def test_a_store_without_synchronous_methods(x: Any, decoded: Any) -> None:
    class Remote(zarr.storage.WrapperStore):  # type: ignore[misc,name-defined]
        _supports_sync_io = False

    array = create(Remote(zarr.storage.MemoryStore()))
    array[:] = x
    array[40:45] = x[:5]
    expected = decoded.copy()
    expected[40:45] = decoded[:5]
    assert_bits_equal(array[:], expected)
    assert_bits_equal(array[::7], expected[::7])


# -- errors ----------------------------------------------------------------------------------------


def test_after_an_error_no_further_chunk_is_begun() -> None:
    begun: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        if i == 0:
            raise StorageError("damaged")
        time.sleep(0.02)

    with pytest.raises(StorageError, match="damaged"):
        asyncio.run(_zarr_threads.in_threads(work, range(1000)))
    assert len(begun) < 100


def test_results_are_in_order() -> None:
    def work(i: int) -> int:
        time.sleep(0.01 * (i % 3))
        return i

    assert asyncio.run(_zarr_threads.in_threads(work, range(20))) == list(range(20))


# -- other arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"serializer": "auto", "compressors": "auto"},
        {"serializer": "auto", "compressors": None, "dtype": "int16"},
        {"filters": [zarr.codecs.TransposeCodec(order=(0, 1))]},
        {"compressors": [zarr.codecs.ZstdCodec()]},
    ],
    ids=["zstd", "int16", "transpose", "turboquant and zstd"],
)
def test_arrays_with_other_codecs_work_as_usual(settings: dict[str, Any], x: Any) -> None:
    array = create(**settings)
    values = (100 * x).astype(array.dtype)
    array[:] = values
    usual = zarr.create_array(
        zarr.storage.MemoryStore(),
        **(
            {"shape": SHAPE, "chunks": CHUNKS, "dtype": "float32", "compressors": None}
            | {"serializer": TurboQuantCodec(head_dim=64, bits=4)}
            | settings
        ),
    )
    usual[:] = values
    assert type(usual.async_array.codec_pipeline) is not TurboQuantPipeline
    for selection in (np.s_[:], np.s_[5:95], np.s_[::7, 3:9]):
        assert_bits_equal(array[selection], usual[selection])
