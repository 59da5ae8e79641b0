"""Comparisons with other libraries: on the same data, in turns, and nothing left out in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from turboquant_np.bench import codec_peers, peers
from turboquant_np.bench.attention import AttentionCase, Problem
from turboquant_np.bench.attention_peers import ATTENTION_PEERS, beside
from turboquant_np.bench.codec_peers import CODEC_PEERS, encode_beside
from turboquant_np.bench.options import Options
from turboquant_np.bench.peers import Peer, peer_tasks, why_missing
from turboquant_np.bench.report import report
from turboquant_np.bench.run import sort_rows
from turboquant_np.bench.timing import Runner
from turboquant_np.bench.workbench import Workbench
from turboquant_np.theory import expected_mse

from .test_bench import document


@pytest.fixture
def bench() -> Workbench:
    return Workbench(Options(megabytes=1, backend="reference", peers=True), threads=1)


def unit_vectors(rows: int, d: int) -> Any:
    x = np.random.Generator(np.random.PCG64(11)).standard_normal((rows, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# -- what is compared ----------------------------------------------------------------------------


def test_peers_encode_the_same_vectors_in_turns_with_ours(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[list[str]] = []

    def clock(runners: dict[str, Runner]) -> dict[str, float]:
        turns.append(list(runners))
        times = {"3 rounds": 2e-3, "1 round": 1e-3}
        return {name: times.get(name, 8e-3) for name in runners}

    monkeypatch.setattr(peers, "alternate", clock)
    seen = []

    def calls(x: Any, bits: int) -> dict[str, Any]:
        seen.append((x.shape, x.dtype, bits))
        return {"encode": lambda: None, "decode": lambda: None}

    slow = Peer("slow", "numpy", "numpy", ("cpu",), calls)
    rows = encode_beside(bench, slow, 256, 3)
    assert seen == [((1024, 256), np.float32, 3)]
    assert turns == [["3 rounds", "1 round", "slow"]] * 2
    assert [(row["operation"], row["ours"]) for row in rows] == [
        ("encode", "3 rounds"),
        ("encode", "1 round"),
        ("decode", "3 rounds"),
        ("decode", "1 round"),
    ]
    assert [row["ratio"] for row in rows] == pytest.approx([4, 8, 4, 8])
    assert {row["version"] for row in rows} == {np.__version__}
    assert {row["items"] for row in rows} == {1024}
    text = " ".join(report(document(peers=rows)).split())
    assert "slow " + np.__version__ + " encode 256 3 1 0.128 0.512 4.00 1.02 8.00" in text


def test_a_peer_without_that_bit_width_has_no_rows(bench: Workbench) -> None:
    def calls(x: Any, bits: int) -> dict[str, Any]:
        raise ValueError("no such bits")

    assert encode_beside(bench, Peer("narrow", "numpy", "numpy", ("cpu",), calls), 64, 7) == []


# -- what is missing -----------------------------------------------------------------------------


def nothing(*_: Any) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        (Peer("a", "no-such-thing-1", "numpy", ("cpu",), nothing), "not installed: pip install"),
        (Peer("b", "numpy", "no_such_module", ("cpu",), nothing), "import no_such_module fails"),
        (Peer("c", "numpy", "numpy", ("cuda",), nothing), "works on GPUs only"),
    ],
)
def test_missing_peers_are_listed_with_the_reason(
    bench: Workbench, peer: Peer, reason: str
) -> None:
    def none(bench: Workbench, peer: Peer) -> Any:
        raise AssertionError("a missing peer must not be run")

    rows = [row for task in peer_tasks(bench, "codec", [peer], none) for row in task()]
    assert [(row["section"], row["peer"]) for row in rows] == [("codec", peer.name)]
    assert reason in rows[0]["missing"]
    found = sort_rows(rows * 2)
    assert found["missing"] == rows, "said once, however many processes found it"
    assert reason in report(document(**found))


def test_a_peer_that_is_there_is_not_missing() -> None:
    assert why_missing(Peer("n", "numpy", "numpy", ("cpu",), nothing), "cpu") is None


def test_a_peer_that_fails_does_not_end_the_benchmark(bench: Workbench) -> None:
    def failing() -> list[dict[str, Any]]:
        raise OSError("its cache\nis full")

    peer = Peer("broken", "numpy", "numpy", ("cpu",), nothing)
    (task,) = peer_tasks(bench, "attention", [peer], lambda bench, peer: [failing])
    assert task() == [
        {"section": "attention", "peer": "broken", "missing": "failed: OSError: its cache"}
    ]


def test_every_peer_asked_for_is_known() -> None:
    names = {peer.distribution for peer in (*CODEC_PEERS, *ATTENTION_PEERS)}
    assert names == {
        "faiss-cpu",
        "turbovec",
        "turbo-quant-lite",
        "rabitqlib",
        "aither-kvcache",
        "torch",
        "flashinfer-python",
    }


# -- adapters drive their libraries well ---------------------------------------------------------


def test_faiss_encodes_as_well_as_theory_says() -> None:
    pytest.importorskip("faiss")
    x = unit_vectors(4000, 128)
    for calls in (codec_peers.faiss_rotated, codec_peers.faiss_plain):
        found = calls(x, 4)
        assert found["encode"]().shape == (4000, 64)
        error = ((found["decode"]() - x) ** 2).sum(axis=1)
        assert abs(error.mean() - expected_mse(128, 4)) < 6 * error.std() / np.sqrt(len(error))
    uniform = codec_peers.faiss_uniform(x, 4)
    assert uniform["encode"]().shape == (4000, 64)
    # a grid from the least to the largest of 4000, 9 sigma at most, in 15 steps
    error = ((uniform["decode"]() - x) ** 2).sum(axis=1).mean()
    assert expected_mse(128, 4) < error < (9 / 15) ** 2 / 12
    rabitq = codec_peers.faiss_rabitq(x, 1)["encode"]()
    assert rabitq.shape[0] == 4000
    assert rabitq.shape[1] >= 128 // 8


def test_aither_kvcache_decodes_what_it_encodes() -> None:
    pytest.importorskip("turboquant")
    x = unit_vectors(500, 64)
    found = codec_peers.aither_kvcache(x, 4)
    found["encode"]()
    error = ((found["decode"]().float().numpy() - x) ** 2).sum(axis=1)
    assert error.mean() == pytest.approx(expected_mse(64, 4), rel=0.1)


@pytest.mark.parametrize("name", ["turbovec add", "turbo-quant-lite", "rabitqlib"])
def test_other_peers_encode(name: str) -> None:
    peer = next(peer for peer in CODEC_PEERS if peer.name == name)
    pytest.importorskip(peer.module)
    encode = peer.calls(unit_vectors(100, 64), 4)["encode"]
    encode()
    encode()


@pytest.mark.parametrize("peer", ATTENTION_PEERS[:2], ids=lambda peer: peer.name)
@pytest.mark.parametrize("query_len", [1, 96])
def test_torch_attends_to_the_same_vectors(peer: Peer, query_len: int) -> None:
    pytest.importorskip("torch")
    bench = Workbench(Options(megabytes=0.1), threads=1)
    case = AttentionCase(batch=2, context=96, head_dim=64, kv_heads=2, query_len=query_len)
    rows = beside(bench, peer, case)
    assert {row["ours"] for row in rows} == {"4 bits"} | (
        {"3 bits", "2 bits"} if query_len == 1 else set()
    )
    assert rows[0]["difference"] < (1e-5 if "32" in peer.name else 2e-2)
    assert {row["operation"] for row in rows} == {"step" if query_len == 1 else "prefill"}
    assert "agree to" in report(document(peers=rows))


def test_results_that_differ_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    bench = Workbench(Options(megabytes=0.1), threads=1)

    def calls(problem: Problem) -> list[Any]:
        return [lambda: torch.ones(2, 1, 8, 64)]

    peer = Peer("wrong", "torch", "torch", ("cpu",), calls)
    rows = beside(bench, peer, AttentionCase(batch=2, context=32, head_dim=64, kv_heads=2))
    assert rows[0]["difference"] > 0.1
    assert "DIFFER" in report(document(peers=rows))


def test_a_case_a_peer_cannot_do_has_no_rows() -> None:
    bench = Workbench(Options(megabytes=0.1), threads=1)
    several = AttentionCase(context=32, query_len=4, head_dim=64, kv_heads=2)
    assert beside(bench, Peer("x", "numpy", "numpy", ("cpu",), _refuses), several) == []


def _refuses(problem: Problem) -> list[Any]:
    raise ValueError("cannot")
