"""Search over codes: errors of scores against theory, recall, `topk`, the benchmark."""

from __future__ import annotations

import importlib.util
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant, _topk
from turboquant_np.testing import assert_bits_equal
from turboquant_np.theory import expected_mse

SCRIPTS = Path(__file__).parent.parent / "docs" / "scripts"


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench_search = load_script("bench_search")


def clustered(count: int, d: int, seed: int, clusters: int = 50) -> Any:
    """Unit vectors around random centres, about 0.6 the cosine of two in one cluster."""
    rng = np.random.default_rng([seed, d])
    centres = rng.standard_normal((clusters, d))
    x = centres[rng.integers(clusters, size=count)] + 0.8 * rng.standard_normal((count, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def split(x: Any, queries: int) -> tuple[Any, Any]:
    return x[queries:], x[:queries]


def nearest(scores: Any, k: int = 10) -> Any:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def recall(found: Any, true: Any) -> float:
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, true, strict=True)]))


def scores_of(x: Any, queries: Any, **settings: Any) -> Any:
    tq = TurboQuant(head_dim=x.shape[1], **settings)
    return tq.inner_products(queries, *tq.encode(x))


# -- scores ----------------------------------------------------------------------------------------


def error_variance(exact: Any, d: int, bits: int) -> Any:
    """Of an unbiased score of unit vectors under a Haar rotation, to first order in 1/d.

    The restored vector is x and something perpendicular to it of squared length D / (1 - D), in a
    direction that is uniform; a query sees of that what is perpendicular to x.
    """
    error = expected_mse(d, bits)
    return error / (1 - error) * (1 - exact**2) / (d - 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_unbiased_scores_have_the_variance_of_theory(bits: int) -> None:
    d = 128
    x, queries = split(clustered(1100, d, seed=1), 100)
    exact = queries.astype(np.float64) @ x.T.astype(np.float64)
    squares, rotations = [], 6
    for seed in range(rotations):
        error = scores_of(x, queries, bits=bits, scale="unbiased", rotation="haar", seed=seed)
        z = (error - exact) / np.sqrt(error_variance(exact, d, bits))
        assert abs(z.mean()) < 6 / np.sqrt(len(x))  # scores of one vector err together
        squares.append(np.mean(z**2))
    assert np.mean(squares) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("d", "bits"), [(64, 1), (64, 2), (64, 4), (384, 1), (384, 3)])
@pytest.mark.parametrize("clusters", [50, 4200])
def test_recall_is_what_that_variance_predicts(d: int, bits: int, clusters: int) -> None:
    """Gaussian noise on exact scores, instead of codes, loses as many neighbours.

    In clusters codes lose fewer: vectors that lie together err together, and keep their order.
    """
    x, queries = split(clustered(4200, d, seed=2, clusters=clusters), 200)
    exact = queries.astype(np.float64) @ x.T.astype(np.float64)
    true = nearest(exact)
    noise = np.random.default_rng(3).standard_normal((3, *exact.shape))
    noisy = exact + noise * np.sqrt(error_variance(exact, d, bits))
    predicted = np.mean([recall(nearest(scores), true) for scores in noisy])
    measured = np.mean(
        [
            recall(nearest(scores_of(x, queries, bits=bits, scale="unbiased", seed=s)), true)
            for s in range(3)
        ]
    )
    assert predicted - 0.02 < measured < predicted + (0.05 if clusters < 4200 else 0.02)


def test_recall_on_clusters(backend: str) -> None:
    x, queries = split(clustered(5200, 64, seed=4), 200)
    true = nearest(queries @ x.T)
    least = {1: 0.36, 2: 0.57, 3: 0.74, 4: 0.84, 5: 0.91, 6: 0.945, 7: 0.965, 8: 0.98}
    measured = {
        bits: recall(
            nearest(scores_of(x, queries, bits=bits, scale="unbiased", backend=backend)), true
        )
        for bits in least
    }
    assert all(measured[bits] > least[bits] for bits in least), measured


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_norm_as_scale_costs_recall(bits: int) -> None:
    """What a vector shrinks by differs from vector to vector."""
    x, queries = split(clustered(5200, 50, seed=5), 200)
    true = nearest(queries @ x.T)
    measured = {
        scale: recall(nearest(scores_of(x, queries, bits=bits, scale=scale)), true)
        for scale in ("norm", "mse", "unbiased")
    }
    assert measured["unbiased"] > measured["norm"] + 0.02
    assert measured["mse"] == pytest.approx(measured["unbiased"], abs=0.02)


def test_a_mean_that_dominates_is_better_subtracted() -> None:
    """That changes no exact ranking; with the exact products with the mean added, all the more."""
    offset = np.random.default_rng(6).standard_normal(64).astype(np.float32) / 4
    x, queries = split(clustered(5200, 64, seed=7) + offset, 200)
    true, mean = nearest(queries @ x.T), x.mean(axis=0)
    assert recall(nearest((queries - mean) @ (x - mean).T + x @ mean), true) > 0.999
    plain = scores_of(x, queries, bits=2, scale="unbiased")
    centred = scores_of(x - mean, queries, bits=2, scale="unbiased")
    around = scores_of(x - mean, queries - mean, bits=2, scale="unbiased") + x @ mean
    found = [recall(nearest(scores), true) for scores in (plain, centred, around)]
    assert found[0] + 0.1 < found[1] < found[2] - 0.05, found


# -- topk ------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven queries at once, with 40 rows first and then 40, 80, 142, 142, ..."""
    monkeypatch.setattr(_topk, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(_topk, "FIRST_ROWS", 40)
    monkeypatch.setattr(_topk, "SCORES_AT_ONCE", 1000)


def assert_sorts(
    tq: TurboQuant, queries: Any, packed: Any, scales: Any, k: int, offsets: Any = None
) -> None:
    """`topk` is a stable sort of all scores."""
    everything = tq.inner_products(queries, packed, scales)
    if offsets is not None:
        everything = everything + offsets.astype(np.float32)
    expected = np.argsort(-everything, axis=-1, kind="stable")[..., :k]
    scores, found = tq.topk(queries, packed, scales, k, offsets=offsets)
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)
    assert_bits_equal(found, expected)
    assert_bits_equal(scores, np.take_along_axis(everything, expected, axis=-1))


@pytest.mark.parametrize("k", [1, 10, 39, 40, 41, 200, 1000])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (), (20,)], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_topk_sorts_all_scores(k: int, shape: tuple[int, ...]) -> None:
    x = clustered(1000, 32, seed=8)
    x[500:600] = x[:100]  # equal scores
    queries = clustered(20, 32, seed=9)[: max(1, int(np.prod(shape)))].reshape(*shape, 32)
    tq = TurboQuant(head_dim=32, bits=3, scale="unbiased", backend="reference")
    packed, scales = tq.encode(x)
    assert_sorts(tq, queries, packed, scales, k)
    offsets = np.random.default_rng(10).standard_normal(1000)
    assert_sorts(tq, queries, packed, scales, k, offsets.astype(np.float16))


@pytest.mark.parametrize("n", [1, 39, 40, 41, 79, 80, 81, 160, 302, 303])
@pytest.mark.usefixtures("small_blocks")
def test_topk_at_the_ends_of_blocks(n: int) -> None:
    x, queries = clustered(n, 32, seed=11), clustered(7, 32, seed=12)
    tq = TurboQuant(head_dim=32, bits=4, backend="reference")
    for order in (slice(None), np.argsort(x @ queries[0]), np.argsort(-(x @ queries[0]))):
        packed, scales = tq.encode(x[order])
        for k in {1, min(n, 20), n}:
            assert_sorts(tq, queries, packed, scales, k)


@pytest.mark.usefixtures("small_blocks")
def test_of_equal_scores_topk_takes_the_lowest_rows() -> None:
    tq = TurboQuant(head_dim=32, bits=4, backend="reference")
    packed, scales = tq.encode(np.ones((500, 32)))
    _, found = tq.topk(np.stack((np.ones(32), -np.ones(32), np.zeros(32))), packed, scales, 60)
    assert found.tolist() == [list(range(60))] * 3


@pytest.mark.usefixtures("small_blocks")
def test_topk_puts_nan_last() -> None:
    x = clustered(300, 32, seed=13)
    bad = np.r_[0, 5:60, 170, 299]
    x[bad] = np.nan
    tq = TurboQuant(head_dim=32, bits=4, backend="reference")
    packed, scales = tq.encode(x, check_finite=False)
    assert_sorts(tq, clustered(3, 32, seed=14), packed, scales, 10)
    scores, found = tq.topk(clustered(3, 32, seed=14), packed, scales, 300)
    assert_bits_equal(found[:, -len(bad) :], np.broadcast_to(bad, (3, len(bad))))
    assert np.isfinite(scores[:, : -len(bad)]).all()


def test_topk_on_a_fast_backend() -> None:
    """Blocks of other sizes may round otherwise, so scores are compared, not places."""
    x, queries = clustered(6000, 50, seed=15), clustered(1100, 50, seed=16)
    tq = TurboQuant(head_dim=50, bits=4, scale="unbiased", backend="cpu")
    packed, scales = tq.encode(x)
    everything = tq.inner_products(queries, packed, scales)
    values, found = tq.topk(queries, packed, scales, 30)
    best = -np.sort(-everything, axis=1)[:, :30]
    np.testing.assert_allclose(values, best, rtol=0, atol=1e-5)
    there = np.take_along_axis(everything, found, axis=1)
    np.testing.assert_allclose(values, there, rtol=0, atol=1e-5)
    again = tq.topk(queries, packed, scales, 30)
    assert_bits_equal(again[0], values)
    assert_bits_equal(again[1], found)


def test_topk_holds_few_scores() -> None:
    tq = TurboQuant(head_dim=32, bits=1, backend="cpu")
    packed, scales = tq.encode(np.random.default_rng(17).standard_normal((300_000, 32), "f4"))
    queries = np.random.default_rng(18).standard_normal((100, 32))
    tq.topk(queries, packed, scales, 10)
    tracemalloc.start()
    try:
        tq.topk(queries, packed, scales, 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20  # all scores would take 114 MiB


def test_topk_of_no_queries() -> None:
    tq = TurboQuant(head_dim=32, bits=4, backend="reference")
    encoded = tq.encode(np.ones((10, 32)))
    scores, found = tq.topk(np.ones((3, 0, 32)), *encoded, 4)
    assert (scores.shape, found.shape) == ((3, 0, 4), (3, 0, 4))
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)


def test_topk_gives_back_the_library_of_the_codes() -> None:
    torch = pytest.importorskip("torch")
    tq = TurboQuant(head_dim=32, bits=4, backend="reference")
    x = torch.from_numpy(clustered(50, 32, seed=19))
    scores, found = tq.topk(x[:3], *tq.encode(x), 2)
    assert (scores.dtype, found.dtype) == (torch.float32, torch.int64)
    assert found[:, 0].tolist() == [0, 1, 2]


def test_largest_among_awkward_scores() -> None:
    scores = np.array([[1, -0.0, np.nan, 0, np.inf, 1, -np.inf, -1, 1, 1e-45, -np.nan, -1e-45]])
    scores = scores.astype(np.float32)
    order = [4, 0, 5, 8, 9, 1, 3, 11, 7, 6, 2, 10]
    for k in range(1, scores.size + 1):
        values, positions = _topk.largest(scores, k)
        assert positions.tolist() == [order[:k]]
        assert_bits_equal(values, scores[:, order[:k]])


TQ = TurboQuant(head_dim=32, bits=4, backend="reference")
PACKED, NORMS = TQ.encode(np.ones((10, 32)))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "k must be from 1 to the 10 vectors, got 0", {"k": 0}),
        (ValueError, "k must be from 1 to the 10 vectors, got 11", {"k": 11}),
        (ValueError, "from 1 to the 0 vectors", {"packed": PACKED[:0], "norms": NORMS[:0]}),
        (TypeError, "k must be an integer, got 2.0", {"k": 2.0}),
        (TypeError, "k must be an integer, got True", {"k": True}),
        (ValueError, "Expected last dim 32, got 31", {"query": np.ones((2, 31))}),
        (TypeError, "query must be float16", {"query": np.ones((2, 32), int)}),
        (ValueError, "norms must have the shape of packed", {"norms": NORMS[:9]}),
        (TypeError, "norms must be float32", {"norms": NORMS.astype(np.float16)}),
        (
            ValueError,
            r"packed must have shape \[n, packed_dim\], got \(2, 5, 16\)",
            {"packed": PACKED.reshape(2, 5, 16), "norms": NORMS.reshape(2, 5)},
        ),
        (ValueError, r"packed must have shape", {"packed": PACKED[0], "norms": NORMS[0]}),
        (ValueError, r"offsets must have the shape of norms, \(10,\)", {"offsets": NORMS[:9]}),
        (TypeError, "offsets must be float16.* got int64", {"offsets": np.arange(10)}),
    ],
)
def test_topk_refuses(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    good = {"query": np.ones((2, 32)), "packed": PACKED, "norms": NORMS, "k": 3}
    assert TQ.topk(**good)[1].tolist() == [[0, 1, 2]] * 2
    with pytest.raises(error, match=message):
        TQ.topk(**(good | arguments))


# -- the benchmark ---------------------------------------------------------------------------------


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="the benchmark compares with faiss")
    path = tmp_path / "search.json"
    for _ in range(2):
        bench_search.measure("sample", path, only_bits={4, 32})
    entry = json.loads(path.read_text())["sample"]
    assert len(entry["rounds"]) == 2
    results = {result["family"]: result for result in entry["rounds"][0]}
    assert results["float32"]["recall@10"] == 1
    assert results["float32"]["bytes"] == 256
    ours, norm = results["TurboQuant"], results["TurboQuant, norm"]
    assert ours["bytes"] == 32 + 4
    assert results["faiss tqmse"]["bytes"] == 32
    assert results["faiss tqmse"]["recall@10"] == pytest.approx(norm["recall@10"], abs=0.06)
    assert results["faiss EDEN"]["recall@10"] == pytest.approx(ours["recall@10"], abs=0.06)
    assert ours["recall@10 in 100"] >= ours["recall@10"] > 0.85
    capsys.readouterr()
    bench_search.tables(path, plot=None)
    assert "| faiss tqmse | 4 | 32.0 |" in capsys.readouterr().out
