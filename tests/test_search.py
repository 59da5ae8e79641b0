"""Search over codes: errors of scores against theory, recall, the guide's `topk`, the benchmark."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
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


# -- the guide -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [40, 64, 999, 1000, 5000])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_topk_of_the_guide_sorts_all_scores(k: int, rows: int) -> None:
    x = clustered(1000, 32, seed=8)
    x[500:600] = x[:100]  # equal scores: the lower index comes first
    queries = clustered(7, 32, seed=9)
    tq = TurboQuant(head_dim=32, bits=3, scale="unbiased", backend="reference")
    packed, scales = tq.encode(x)
    expected = tq.inner_products(queries, packed, scales)
    scores, found = bench_search.topk(tq, queries, packed, scales, k, rows=rows)
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, found, axis=1))
    np.testing.assert_array_equal(scores, -np.sort(-expected, axis=1)[:, :k])
    np.testing.assert_array_equal(found, nearest(expected, k))


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
