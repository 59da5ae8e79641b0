"""The benchmark: its arithmetic, with clocks that are made up, and one short real run."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np.bench import peers, worker
from turboquant_np.bench.codec import Case, CodecBench, codec_cases
from turboquant_np.bench.goals import goals
from turboquant_np.bench.peers import PEERS, Peer, compare, installed_peers
from turboquant_np.bench.report import report
from turboquant_np.bench.rooflines import HostRooflines, matrix_product
from turboquant_np.bench.timing import Call, alternate, host_seconds
from turboquant_np.bench.worker import Options, measure_in_process, usable_cores
from turboquant_np.cli import main
from turboquant_np.theory import expected_mse

TINY = 0.01  # megabytes

# -- timing --------------------------------------------------------------------------------------


def test_calls_take_turns_and_the_median_counts() -> None:
    called: list[str] = []
    clock = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}

    def timer(call: Call) -> float:
        call()
        return next(clock[called[-1]])

    calls = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times = alternate(calls, timer, min_rounds=3, min_seconds=0)
    assert times == {"a": 2.0, "b": 5.0}
    assert called == ["a", "b"] * 4, "a round that is not timed, then three"


def test_rounds_go_on_until_enough_time_has_passed() -> None:
    numbers = count()
    alternate({"x": lambda: next(numbers)}, lambda call: call() * 0 + 0.01, min_seconds=0.095)
    assert next(numbers) == 1 + 10
    numbers = count()
    alternate({"x": lambda: next(numbers)}, lambda call: call() * 0.0, max_rounds=7)
    assert next(numbers) == 1 + 7


def test_host_seconds_measures_time() -> None:
    import time

    assert 0.02 <= host_seconds(lambda: time.sleep(0.02)) < 1


# -- rooflines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_rooflines_touch_every_byte(threads: int) -> None:
    rooflines = HostRooflines(4096, threads)
    assert (rooflines.read_bytes, rooflines.copy_bytes) == (4096, 8192)
    rooflines.read()
    rooflines.copy()
    targets = [target for _, target in rooflines._parts]
    assert sum(target.size for target in targets) == 1024
    assert all((target == 1).all() for target in targets)


def test_matrix_product() -> None:
    assert (matrix_product(3, 5, np.ones(1))() == np.full((3, 5), 5.0)).all()


# -- codec ---------------------------------------------------------------------------------------


def test_rates_and_shares_follow_from_bytes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "turboquant_np.bench.codec.alternate", lambda calls, timer: {"ours": 2e-3, "best": 1e-3}
    )
    bench = CodecBench("cpu", threads=1, megabytes=1, backend="reference")
    encode, decode = bench.measure(Case(head_dim=128, bits=4, rounds=3))
    rows = 2**20 // 512
    assert (encode.operation, decode.operation) == ("encode", "decode")
    assert encode.vectors == decode.vectors == rows
    assert encode.mvec_s == pytest.approx(rows / 2e-3 / 1e6)
    moved = rows * (512 + 64 + 4)
    assert encode.rate == decode.rate == pytest.approx(moved / 2e-3 / 1e9)
    assert encode.share == pytest.approx(moved / 2e-3 / (2**20 / 1e-3))
    assert decode.share == pytest.approx(moved / 2e-3 / (2 * 2**20 / 1e-3))
    assert (encode.roofline, decode.roofline) == ("read", "copy")


def test_haar_is_compared_with_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "turboquant_np.bench.codec.alternate", lambda calls, timer: {"ours": 2e-3, "best": 1e-3}
    )
    bench = CodecBench("cpu", threads=1, megabytes=0.25, backend="reference")
    for result in bench.measure(Case(head_dim=64, bits=4, rounds=0)):
        assert result.roofline == "dgemm"
        assert result.vectors == 2**18 // 256 // 8
        assert result.rate == pytest.approx(2 * result.vectors * 64**2 / 2e-3 / 1e9)
        assert result.share == pytest.approx(0.5)


def test_half_precision_vectors_have_half_the_bytes() -> None:
    bench = CodecBench("cpu", threads=1, megabytes=0.125, backend="reference")
    for result in bench.measure(Case(head_dim=64, bits=2, rounds=1, dtype="float16")):
        assert result.vectors == 2**17 // 128
        assert result.seconds > 0
        assert result.rate == pytest.approx(result.vectors * (128 + 16 + 4) / result.seconds / 1e9)


def test_vectors_are_gaussian_and_fill_the_rows() -> None:
    x = CodecBench("cpu", 1, TINY).vectors(32, "float32", 5000)
    assert x.shape == (5000, 32)
    assert x.dtype == np.float32
    assert abs(float(x[4096:].mean())) < 6 / np.sqrt(904 * 32)
    assert float(x.std()) == pytest.approx(1, abs=0.02)


def test_full_covers_every_setting_and_the_default_what_the_goals_need() -> None:
    full, quick = codec_cases(full=True), codec_cases(full=False)
    assert {case.head_dim for case in full} == {64, 128, 256, 768, 1536}
    assert {case.rounds for case in full} == {0, 1, 3}
    assert {case.dtype for case in full} == {"float32", "float16"}
    assert len(set(full)) == len(full)
    assert {Case(128, 4, 3), Case(128, 4, 1), Case(128, 4, 0)} <= set(quick) < set(full)


# -- peers ---------------------------------------------------------------------------------------


def test_peers_are_compared_on_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peers, "alternate", lambda calls: {"theirs": 8e-3, "three": 2e-3, "one": 1e-3}
    )
    seen = []

    def encoder(x: Any, bits: int) -> Call:
        seen.append((x.shape, x.dtype, bits))
        return lambda: None

    bench = CodecBench("cpu", threads=1, megabytes=1, backend="reference")
    result = compare(Peer("slow", "numpy", encoder), 256, 3, bench)
    assert result is not None
    assert seen == [((1024, 256), np.float32, 3)]
    assert result.version == np.__version__
    assert result.peer_mvec_s == pytest.approx(1024 / 8e-3 / 1e6)
    assert result.ratio_3_rounds == pytest.approx(4)
    assert result.ratio_1_round == pytest.approx(8)


def test_a_peer_without_that_bit_width_is_left_out() -> None:
    def encoder(x: Any, bits: int) -> Call:
        raise ValueError("no such bits")

    bench = CodecBench("cpu", 1, TINY, "reference")
    assert compare(Peer("narrow", "numpy", encoder), 64, 7, bench) is None


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def encoder(x: Any, bits: int) -> Call:
        raise ImportError("no module")

    there = Peer("there", "numpy", lambda x, bits: lambda: None)
    monkeypatch.setattr(peers, "PEERS", (Peer("absent", "absent", encoder), there))
    assert installed_peers() == [there]


def test_faiss_encodes_as_well_as_theory_says() -> None:
    """The adapter must drive the peer well, or the comparison would not be fair."""
    faiss = pytest.importorskip("faiss")
    rng = np.random.Generator(np.random.PCG64(11))
    x = rng.standard_normal((4000, 128)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    codes = {peer.name: peer.encoder(x, 4)() for peer in PEERS if peer.distribution == "faiss-cpu"}
    assert {c.shape for c in codes.values()} == {(4000, 64)}
    quantizer = faiss.ScalarQuantizer(128, faiss.ScalarQuantizer.QT_4bit_tqmse)
    quantizer.train(x)
    rotation = faiss.RandomRotationMatrix(128, 128)
    rotation.init(1)
    decoded = {
        "faiss tqmse, no rotation": quantizer.decode(codes["faiss tqmse, no rotation"]),
        "faiss tqmse + rotation": rotation.reverse_transform(
            quantizer.decode(codes["faiss tqmse + rotation"])
        ),
    }
    for restored in decoded.values():
        error = ((restored - x) ** 2).sum(axis=1)
        assert abs(error.mean() - expected_mse(128, 4)) < 6 * error.std() / np.sqrt(len(error))


@pytest.mark.parametrize(
    "peer", [p for p in PEERS if p.distribution != "faiss-cpu"], ids=lambda peer: peer.name
)
def test_other_peers_encode(peer: Peer) -> None:
    pytest.importorskip(peer.distribution.replace("-", "_"))
    x = np.random.Generator(np.random.PCG64(12)).standard_normal((100, 64)).astype(np.float32)
    encode = peer.encoder(x, 4)
    encode()
    encode()
    with pytest.raises(ValueError, match="8-bit"):
        peer.encoder(x, 8)


# -- processes -----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    with worker._confined_to(1):
        assert len(os.sched_getaffinity(0)) == 1
        assert usable_cores() == 1
    assert os.sched_getaffinity(0) == before


def test_a_process_that_fails_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended with code 1"):
        measure_in_process(Options(backend="no-such", megabytes=TINY), threads=1)
    assert "unknown backend 'no-such'" in capfd.readouterr().err


# -- goals and report ----------------------------------------------------------------------------


def line(operation: str, **changes: Any) -> dict[str, Any]:
    """One line of the codec, as the document has it."""
    return {
        "operation": operation,
        "head_dim": 128,
        "bits": 4,
        "rounds": 3,
        "dtype": "float32",
        "threads": 1,
        "vectors": 1000,
        "seconds": 1e-4,
        "mvec_s": 10.0,
        "roofline": "read",
        "rate": 5.0,
        "roofline_rate": 10.0,
        "share": 0.5,
    } | changes


def document(**sections: Any) -> dict[str, Any]:
    start = {"import_seconds": 0.1, "first_encode_seconds": 3.0}
    empty = {"codec": [], "peers": [], "startup": start, "validation": [], "goals": []}
    about = {
        "machine": "A machine",
        "cores": 2,
        "date": "2026-11-23",
        "versions": {},
        "backend": {},
    }
    memory = [{"model": "M", "float16": 2000, "4 bits": 500}]
    return empty | {"about": about, "memory": memory} | sections


def test_goals_are_met_missed_or_not_measured() -> None:
    codec = [
        line("encode", mvec_s=13.0),
        line("encode", threads=2, mvec_s=20.0),
        line("encode", rounds=1, mvec_s=99.0),
        line("encode", rounds=0, share=0.9),
        line("decode", rounds=0, share=0.7),
    ]
    ratios = {"bits": 4, "threads": 1, "ratio_3_rounds": 11.0, "ratio_1_round": 19.0}
    compared = [{"peer": "turbovec add", "head_dim": 128} | ratios]
    found = {goal.what: goal for goal in goals(document(codec=codec, peers=compared))}
    assert found["encode, 3 Hadamard rounds"].measured == 13.0
    assert found["encode, 3 Hadamard rounds"].met is True
    assert found["decode"].met is None
    assert found["encode, 2 cores over 1"].measured == pytest.approx(20 / 13)
    assert found["encode, 2 cores over 1"].met is False
    assert found["Haar, of the float64 matrix product"].measured == 0.7
    assert found["encode over turbovec add, d = 128, 3 rounds"].met is True
    assert found["encode over turbovec add, d = 128, 1 round"].met is False
    assert found["encode over turbovec add, d = 768, 3 rounds"].met is None
    assert found["import"].met is True
    assert found["first encode, kernels cached"].met is False


def test_report_puts_bit_widths_side_by_side() -> None:
    codec = [
        line("encode"),
        line("encode", bits=2, mvec_s=0.01234, share=0.251),
        line("decode", rounds=0, share=0.7, mvec_s=0.5),
    ]
    text = report(document(codec=codec))
    lines = [" ".join(found.split()) for found in text.splitlines()]
    assert "encode 128 float32 3 1 0.0123 (25%) 10.0 (50%)" in lines
    assert "decode 128 float32 1 0.500 (70%)" in lines
    assert "d dtype rounds threads 2 bit 4 bit" in lines
    assert "Measured in turns with them: read 10.0 GB/s (1 thread)" in text
    assert "other libraries" not in text
    assert "Goals" not in text


# -- the command ---------------------------------------------------------------------------------


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    json_file, plot_file = tmp_path / "bench.json", tmp_path / "bench.svg"
    settings = ["--device", "cpu", "--backend", "reference", "--megabytes", str(TINY)]
    outputs = ["--json", str(json_file), "--plot", str(plot_file)]
    assert main(["bench", *settings, *outputs]) == 0
    out = capsys.readouterr().out
    found = json.loads(json_file.read_text())
    assert {row["threads"] for row in found["codec"]} == {1, min(2, usable_cores()), usable_cores()}
    assert all(row["seconds"] > 0 and row["roofline_rate"] > 0 for row in found["codec"])
    assert [row["passed"] for row in found["validation"]] == [True] * 8
    assert 0 < found["startup"]["import_seconds"] < 30
    assert found["memory"][0] == {
        "model": "Llama-3.1-8B",
        "float16": 131_072,
        "4 bits": 34_816,
        "3 bits": 26_624,
        "2 bits": 18_432,
    }
    assert found["about"]["options"]["megabytes"] == TINY
    assert f"encode, 3 Hadamard rounds {'':>10}" in out
    assert out.endswith(f"Plot: {plot_file}\n")
    assert ElementTree.parse(plot_file).getroot().tag.endswith("svg")


@pytest.mark.parametrize("passed", [True, False])
def test_wrong_errors_are_a_failure(
    passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"head_dim": 128, "bits": 4, "mse": 0.02, "mse_expected": 0.0093, "deviation": 99.0}
    judged = row | {"passed": passed, "why": "" if passed else "far off"}
    monkeypatch.setattr(
        "turboquant_np.bench.run.run", lambda options: document(validation=[judged])
    )
    assert main(["bench", "--device", "cpu"]) == (0 if passed else 1)
    assert ("PASS" if passed else "FAIL: far off") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--megabytes", "0"], "--megabytes must be positive, got 0.0"),
        (["--device", "cuda", "--peers"], "--peers compares on the CPU: add --device cpu"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"turboquant-np: error: {message}\n"
