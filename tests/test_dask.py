"""Dask arrays: the same bits on every scheduler, lazily, with the right metas; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.testing import assert_bits_equal

dask = pytest.importorskip("dask", reason="needs the dask extra")
da = pytest.importorskip("dask.array", reason="needs the dask extra")
distributed = pytest.importorskip("distributed", reason="needs the dask extra")

import turboquant_np.dask as tqd  # noqa: E402

ORTHOGONAL = np.linalg.qr(np.random.default_rng(5).standard_normal((64, 64)))[0]


@pytest.fixture(scope="module")
def x() -> Any:
    return np.random.default_rng(7).standard_normal((1000, 64)).astype("f4")


@pytest.fixture(scope="module")
def query() -> Any:
    return np.random.default_rng(8).standard_normal((5, 64)).astype("f4")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A client of two worker processes with one thread each."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def tq() -> TurboQuant:
    return TurboQuant(head_dim=64, bits=3)


def best(scores: Any, k: int) -> Any:
    """The k largest by a stable sort of everything."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


# -- the same bits everywhere ----------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_every_scheduler_gives_the_bits_of_the_quantiser(
    scheduler: str, x: Any, query: Any, tq: TurboQuant
) -> None:
    direct = tq.encode(x)
    with dask.config.set(scheduler=scheduler, num_workers=2):
        packed, norms = tqd.encode(da.from_array(x, chunks=(300, 64)), tq)
        restored = tqd.decode(packed, norms, tq, dtype="float32")
        scores = tqd.inner_products(query, packed, norms, tq)
        results = dask.compute(packed, norms, restored, scores)
    expected = (*direct, tq.decode(*direct, dtype="float32"), tq.inner_products(query, *direct))
    for result, right in zip(results[:3], expected[:3], strict=True):
        assert_bits_equal(result, right)
    np.testing.assert_allclose(results[3], expected[3], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rotation", ["hadamard", "haar", ORTHOGONAL], ids=str)
def test_a_cluster_of_processes(rotation: Any, cluster: Any, x: Any, query: Any) -> None:
    tq = TurboQuant(head_dim=64, bits=3, rotation=rotation)
    packed, norms = tqd.encode(da.from_array(x, chunks=(130, 64)), tq)
    _, indices = tqd.topk(query, packed, norms, tq, 4)
    results = [f.result() for f in cluster.compute([packed, norms, indices])]
    direct = tq.encode(x)
    assert_bits_equal(results[0], direct[0])
    assert_bits_equal(results[1], direct[1])
    assert results[2].tolist() == best(tq.inner_products(query, *direct), 4).tolist()


def test_a_worker_without_the_package(cluster: Any) -> None:
    tqd.check_workers(cluster)
    address = sorted(cluster.scheduler_info()["workers"])[0]
    hide = (
        "import sys; keep = {k: m for k, m in sys.modules.items() if k.startswith('turboquant_np')}"
        "\nsys.turboquant_np_hidden = keep\nfor k in keep: sys.modules[k] = None"
    )
    cluster.run(exec, hide, workers=[address])
    try:
        with pytest.raises(RuntimeError, match=rf"1 of 2 workers lack .*{address}.*pip install"):
            tqd.check_workers(cluster)
    finally:
        cluster.run(
            exec, "import sys; sys.modules.update(sys.turboquant_np_hidden)", workers=[address]
        )
    tqd.check_workers(cluster)


def test_an_error_in_a_worker_says_what_is_wrong(cluster: Any, x: Any, tq: TurboQuant) -> None:
    bad = x.copy()
    bad[700, 5] = np.inf
    packed, _ = tqd.encode(da.from_array(bad, chunks=(500, 64)), tq)
    with pytest.raises(ValueError, match=r"x\[200, 5\] is inf"):  # counted within the chunk
        cluster.compute(packed).result()


# -- lazily, in bounded memory ---------------------------------------------------------------------


def test_nothing_runs_before_compute_and_every_chunk_once(tq: TurboQuant) -> None:
    calls: list[Any] = []

    def load(block: Any) -> Any:
        calls.append(block.shape)
        return block

    x = da.ones((600, 64), chunks=(200, 64)).map_blocks(load, dtype="f8", meta=np.empty((0, 0)))
    packed, norms = tqd.encode(x, tq)
    tqd.topk(np.ones(64), packed, norms, tq, 3)
    assert calls == []
    dask.compute(packed, norms, scheduler="synchronous")
    assert calls == [(200, 64)] * 3


def test_the_quantiser_stands_once_in_the_graph(tq: TurboQuant, x: Any) -> None:
    packed, _ = tqd.encode(da.from_array(x, chunks=(10, 64)), tq)
    shared = [
        key
        for key in dict(packed.dask)
        if str(key).startswith("turboquant-") and not isinstance(key, tuple)
    ]
    assert len(shared) == 1


def test_from_zarr_to_zarr(tmp_path: Path, x: Any, tq: TurboQuant) -> None:
    zarr = pytest.importorskip("zarr", reason="needs the zarr extra")
    from turboquant_np.zarr import TurboQuantCodec

    source = zarr.create_array(tmp_path / "in", data=x, chunks=(300, 64))
    target = zarr.create_array(
        tmp_path / "out",
        shape=x.shape,
        chunks=(300, 64),
        dtype="f4",
        serializer=TurboQuantCodec(bits=3),
        compressors=None,
    )
    da.from_zarr(source).store(target, lock=False)
    direct = tq.encode(x)
    assert_bits_equal(target[:], tq.decode(*direct, dtype="float32"))

    packed, norms = tqd.encode(da.from_zarr(source), tq)
    outputs = [
        zarr.create_array(tmp_path / "packed", shape=packed.shape, chunks=(300, 24), dtype="u1"),
        zarr.create_array(tmp_path / "norms", shape=norms.shape, chunks=(300,), dtype="f4"),
    ]
    da.store([packed, norms], outputs, lock=False)
    assert_bits_equal(outputs[0][:], direct[0])
    assert_bits_equal(outputs[1][:], direct[1])


# -- shapes, dtypes, metas -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((64,), (64,)), ((10, 64), (10, 64)), ((6, 10, 3, 64), (4, 5, 2, 64)), ((0, 64), (1, 64))],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_any_number_of_axes(shape: Any, chunks: Any, dtype: str, tq: TurboQuant) -> None:
    x = np.random.default_rng(3).standard_normal(shape).astype(dtype)
    packed, norms = tqd.encode(da.from_array(x, chunks=chunks), tq)
    restored = tqd.decode(packed, norms, tq)
    direct = tq.encode(x)
    for array, right in zip((packed, norms, restored), (*direct, tq.decode(*direct)), strict=True):
        assert (array.shape, array.dtype) == (right.shape, right.dtype)
        assert (type(array._meta), array._meta.ndim) == (np.ndarray, right.ndim)
        assert array._meta.dtype == right.dtype
        computed = array.compute()
        assert computed.dtype == right.dtype
        assert_bits_equal(np.asarray(computed), right)


def test_chunks_keep_their_kind(x: Any, tq: TurboQuant) -> None:
    """Metas follow the chunks' library, so that CuPy chunks are announced as CuPy."""

    class Foreign(np.ndarray):
        pass

    chunked = da.from_array(x.view(Foreign), chunks=(500, 64), asarray=False)
    packed, norms = tqd.encode(chunked, tq)
    restored = tqd.decode(packed, norms, tq)
    assert {type(a._meta) for a in (packed, norms, restored)} == {Foreign}


@pytest.mark.parametrize("query_shape", [(64,), (1, 64), (3, 2, 64)], ids=str)
def test_inner_products_of_any_shape(query_shape: Any, x: Any, tq: TurboQuant) -> None:
    query = np.random.default_rng(9).standard_normal(query_shape).astype("f2")
    direct = tq.encode(x.reshape(50, 20, 64))
    packed, norms = tqd.encode(da.from_array(x.reshape(50, 20, 64), chunks=(20, 9, 64)), tq)
    scores = tqd.inner_products(query, packed, norms, tq)
    expected = tq.inner_products(query, *direct)
    assert (scores.shape, scores.dtype, scores._meta.ndim) == (expected.shape, "f4", expected.ndim)
    np.testing.assert_allclose(scores.compute(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [1, 7, 250, 1000])
@pytest.mark.parametrize("chunk", [1000, 333, 13])
def test_topk_equals_a_sort_of_everything(
    k: int, chunk: int, x: Any, query: Any, tq: TurboQuant
) -> None:
    packed, norms = tqd.encode(da.from_array(x, chunks=(chunk, 64)), tq)
    lazy = da.from_array(query, chunks=(2, 64))
    scores, indices = dask.compute(
        *tqd.topk(lazy, packed, norms, tq, k), tqd.inner_products(lazy, packed, norms, tq)
    )[:2]
    everything = tqd.inner_products(lazy, packed, norms, tq).compute()
    assert indices.dtype == np.int64
    assert scores.dtype == np.float32
    assert_bits_equal(indices, best(everything, k))
    assert_bits_equal(scores, np.take_along_axis(everything, indices, axis=-1))


def test_of_equal_scores_the_lower_rows_win(tq: TurboQuant) -> None:
    packed, norms = tqd.encode(da.zeros((100, 64), chunks=(7, 64)), tq)
    scores, indices = tqd.topk(np.ones((1, 64)), packed, norms, tq, 40)
    assert not scores.any().compute()
    assert indices.compute().tolist() == [list(range(40))]


def test_topk_with_empty_chunks(x: Any, query: Any, tq: TurboQuant) -> None:
    lazy = da.from_array(x[:40], chunks=((0, 25, 0, 0, 15), (64,)))
    _, indices = tqd.topk(query, *tqd.encode(lazy, tq), tq, 30)
    assert_bits_equal(indices.compute(), tq.topk(query, *tq.encode(x[:40]), 30)[1])


# -- refused ---------------------------------------------------------------------------------------


def test_arrays_that_are_not_lazy(x: Any, tq: TurboQuant) -> None:
    with pytest.raises(TypeError, match=r"x must be a dask array, got numpy.ndarray"):
        tqd.encode(x, tq)
    packed, norms = tq.encode(x)
    with pytest.raises(TypeError, match="packed must be a dask array"):
        tqd.decode(packed, norms, tq)
    with pytest.raises(TypeError, match="norms must be a dask array"):
        tqd.decode(da.from_array(packed), norms, tq)
    with pytest.raises(TypeError, match="quantizer must be a TurboQuant, got int"):
        tqd.encode(da.from_array(x), 3)  # type: ignore[arg-type]


def test_vectors_spread_over_chunks(x: Any, tq: TurboQuant) -> None:
    with pytest.raises(ValueError, match=r"cut into \(32, 32\); use x.rechunk\(\{1: -1\}\)"):
        tqd.encode(da.from_array(x, chunks=(100, 32)), tq)


def test_vectors_of_another_dtype_or_length(x: Any, tq: TurboQuant) -> None:
    with pytest.raises(TypeError, match=r"x must be float16.* got int64"):
        tqd.encode(da.ones((10, 64), dtype="i8"), tq)
    with pytest.raises(ValueError, match="Expected last dim 64, got 65"):
        tqd.encode(da.ones((10, 65)), tq)
    with pytest.raises(ValueError, match="at least one axis"):
        tqd.encode(da.ones(()), tq)


def test_packed_and_norms_that_do_not_fit(x: Any, tq: TurboQuant) -> None:
    packed, norms = tqd.encode(da.from_array(x, chunks=(100, 64)), tq)
    with pytest.raises(ValueError, match="packed must end in an axis of 32 bytes"):
        tqd.decode(packed, norms, TurboQuant(head_dim=64, bits=4))
    with pytest.raises(ValueError, match="norms must have the shape and chunks of packed"):
        tqd.decode(packed, norms.rechunk(50), tq)
    with pytest.raises(ValueError, match="norms must have the shape and chunks of packed"):
        tqd.decode(packed, norms[:, None], tq)
    with pytest.raises(TypeError, match="packed must be uint8 and norms float32"):
        tqd.decode(packed.astype("i4"), norms, tq)
    with pytest.raises(ValueError, match="Expected last dim 64, got 32"):
        tqd.inner_products(np.ones((2, 32)), packed, norms, tq)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k must be from 1 to the 1000 vectors, got 0"),
        (1001, ValueError, "k must be from 1 to the 1000 vectors"),
        (2.0, TypeError, "k must be an integer"),
    ],
)
def test_impossible_k(
    k: Any, error: type[Exception], message: str, x: Any, query: Any, tq: TurboQuant
) -> None:
    packed, norms = tqd.encode(da.from_array(x, chunks=(100, 64)), tq)
    with pytest.raises(error, match=message):
        tqd.topk(query, packed, norms, tq, k)


def test_topk_of_an_unknown_number_of_vectors(x: Any, query: Any, tq: TurboQuant) -> None:
    lazy = da.from_array(x, chunks=(100, 64))
    packed, norms = tqd.encode(lazy[lazy[:, 0] > 0], tq)
    assert packed.compute().shape == ((x[:, 0] > 0).sum(), 24)
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        tqd.topk(query, packed, norms, tq, 3)


def test_arrays_in_different_memories(
    x: Any, query: Any, tq: TurboQuant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen before anything runs, from the metas alone."""

    class OnGpu(np.ndarray):
        device: Any = SimpleNamespace(id=0)

    from turboquant_np import _backend

    monkeypatch.setattr(_backend, "device_of", lambda a: "cuda" if isinstance(a, OnGpu) else "cpu")
    chunked = da.from_array(x.view(OnGpu), chunks=(500, 64), asarray=False)
    packed, norms = tqd.encode(chunked, tq)
    with pytest.raises(ValueError, match="query and packed must live in the same memory"):
        tqd.inner_products(query, packed, norms, tq)
    on_host = da.ones(1000, chunks=500, dtype="f4")
    with pytest.raises(ValueError, match="norms and packed must live in the same memory"):
        tqd.decode(packed, on_host, tq)
