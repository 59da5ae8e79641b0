"""The benchmark: its arithmetic, with clocks that are made up, and short real runs."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import TQPagedAttention
from turboquant_np.bench import append, attention, codec, growth, workbench, worker
from turboquant_np.bench.attention import AttentionCase, Problem
from turboquant_np.bench.codec import Case, codec_cases, transform_operations
from turboquant_np.bench.fits import fit
from turboquant_np.bench.goals import goals
from turboquant_np.bench.options import GROWTH, QUICK_SECTIONS, SECTIONS, Options, usable_cores
from turboquant_np.bench.report import report
from turboquant_np.bench.timing import Runner
from turboquant_np.bench.workbench import Line, Work, Workbench
from turboquant_np.bench.worker import measure_in_process
from turboquant_np.cli import main

TINY = 0.01  # megabytes


def tiny(**settings: Any) -> Workbench:
    return Workbench(Options(megabytes=TINY, backend="reference", **settings), threads=1)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes 2 ms, whatever it is compared with 1 ms."""

    def clock(runners: dict[str, Runner]) -> dict[str, float]:
        return {name: 2e-3 if name == "ours" else 1e-3 for name in runners}

    monkeypatch.setattr(workbench, "alternate", clock)


# -- lines ---------------------------------------------------------------------------------------


def test_the_limit_is_the_roofline_that_asks_for_most_time() -> None:
    work = Work(moved_bytes=1000, memory="read", operations=6000)
    rooflines = {"read": 1e6, "multiply-add": 2e6}  # 1 ms and 3 ms
    line = Line("codec", "encode", {"bits": 4}, 1, 10, 4e-3, "calls", work, rooflines)
    assert line.limit == "multiply-add"
    assert line.share == pytest.approx(0.75)
    row = line.row()
    assert row["bits"] == 4
    assert row["items_per_second"] == pytest.approx(2500)
    assert row["bytes_per_second"] == pytest.approx(250_000)
    assert row["operations_per_second"] == pytest.approx(1.5e6)
    slower_memory = rooflines | {"read": 1e5}
    line = Line("codec", "encode", {}, 1, 10, 4e-3, "calls", work, slower_memory)
    assert line.limit == "read"
    assert line.share == pytest.approx(2.5)


@pytest.mark.usefixtures("made_up")
def test_codec_lines_count_bytes_and_operations() -> None:
    bench = Workbench(Options(megabytes=1, backend="reference"), threads=1)
    encode, decode = codec.measure(bench, Case(head_dim=128, bits=4, rounds=3))
    rows = 2**20 // 512
    assert (encode["operation"], decode["operation"]) == ("encode", "decode")
    assert encode["items"] == decode["items"] == rows
    moved = rows * (512 + 64 + 4)
    assert encode["moved_bytes"] == decode["moved_bytes"] == moved
    assert encode["bytes_per_second"] == pytest.approx(moved / 2e-3)
    assert encode["rooflines"]["read"] == pytest.approx(2**20 / 1e-3)
    assert decode["rooflines"]["copy"] == pytest.approx(2 * 2**20 / 1e-3)
    additions = 3 * 128 * 7
    assert encode["operations"] == rows * (additions + 128 * 6)
    assert decode["operations"] == rows * (additions + 128 * 2)
    for row, memory in ((encode, "read"), (decode, "copy")):
        least = {memory: moved, "multiply-add": row["operations"]}
        times = {name: amount / row["rooflines"][name] for name, amount in least.items()}
        assert row["share"] == pytest.approx(max(times.values()) / 2e-3)
        assert row["limit"] == max(times, key=times.__getitem__)


@pytest.mark.usefixtures("made_up")
def test_haar_is_compared_with_the_matrix_product() -> None:
    bench = Workbench(Options(megabytes=0.25, backend="reference"), threads=1)
    for row in codec.measure(bench, Case(head_dim=64, bits=4, rounds=0)):
        assert row["limit"] == "float64 product"
        assert row["items"] == 2**18 // 256 // 8
        assert row["operations"] == row["items"] * 64**2
        assert row["share"] == pytest.approx(0.5)


def test_operations_of_transforms_that_are_not_powers_of_two() -> None:
    assert transform_operations(64, 1) == 64 * 6
    # two transforms of 64 and two butterflies of 32 pairs
    assert transform_operations(96, 1) == 2 * (64 * 6 + 2 * 32)


def test_half_precision_vectors_have_half_the_bytes() -> None:
    bench = Workbench(Options(megabytes=0.125, backend="reference"), threads=1)
    for row in codec.measure(bench, Case(head_dim=64, bits=2, rounds=1, dtype="float16")):
        assert row["items"] == 2**17 // 128
        assert row["moved_bytes"] == row["items"] * (128 + 16 + 4)
        assert row["seconds"] > 0


def test_vectors_are_gaussian_and_fill_the_rows() -> None:
    x = codec.vectors(tiny(), 32, "float32", 5000)
    assert x.shape == (5000, 32)
    assert x.dtype == np.float32
    assert abs(float(x[4096:].mean())) < 6 / np.sqrt(904 * 32)
    assert float(x.std()) == pytest.approx(1, abs=0.02)


def test_full_covers_every_setting_and_the_default_what_the_goals_need() -> None:
    full, quick = codec_cases(full=True), codec_cases(full=False)
    assert {64, 128, 256, 768, 1536} < {case.head_dim for case in full}
    assert {case.rounds for case in full} == {0, 1, 3}
    assert {case.dtype for case in full} == {"float32", "float16"}
    assert len(set(full)) == len(full)
    assert {Case(128, 4, 3), Case(128, 4, 1), Case(128, 4, 0)} <= set(quick) < set(full)


# -- attention -----------------------------------------------------------------------------------

SMALL = AttentionCase(batch=2, context=40, head_dim=64, kv_heads=2, value_bits=3)


def test_steps_read_different_pages_and_every_page_once() -> None:
    bench = Workbench(Options(megabytes=0.05, backend="reference"), threads=1)
    problem = Problem(bench, SMALL)
    assert problem.sets == -(-bench.num_bytes // problem.cache_bytes) > 1
    pages = np.concatenate([table.ravel() for table in problem.tables])
    assert sorted(pages) == list(range(problem.sets * 2 * 3))
    assert len(problem.steps()) == problem.sets
    results = {step().tobytes() for step in problem.steps()}
    assert len(results) == problem.sets


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("query_len", [1, 5])
def test_a_step_is_attention_to_the_decoded_vectors(order: str, query_len: int) -> None:
    """So peers that get these vectors compute the same."""
    case = AttentionCase(**vars(SMALL) | {"order": order, "query_len": query_len})
    problem = Problem(tiny(), case)
    out = problem.steps()[0]().reshape(2, query_len, 2, 4, 64)
    keys, values = (x.astype(np.float64) for x in problem.decoded(0, "float32"))
    assert keys.shape == (2, 40, 2, 64)
    query = problem.query.reshape(2, query_len, 2, 4, 64).astype(np.float64)
    scores = np.einsum("blkgd,bckd->blkgc", query, keys) / 8
    visible = np.arange(40) <= 40 - query_len + np.arange(query_len)[:, None]
    weights = np.exp(scores) * visible[:, None, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("blkgc,bckd->blkgd", weights, values)
    assert np.linalg.norm(out - expected) < 2e-5 * np.linalg.norm(expected)
    assert case.visible == visible.sum()


@pytest.mark.usefixtures("made_up")
def test_attention_lines_count_bytes_and_operations() -> None:
    row = attention.measure(tiny(), SMALL)
    assert (row["section"], row["operation"]) == ("attention", "step")
    vectors = 2 * 48 * 2  # whole pages of 16 tokens
    assert row["moved_bytes"] == vectors * (32 + 4 + 24 + 4) + 2 * (2 * 8 * 64 * 4)
    assert row["operations"] == 2 * (2 * 8) * 40 * 64
    assert row["items"] == 2
    prefill = AttentionCase(**vars(SMALL) | {"query_len": 40})
    row = attention.measure(tiny(), prefill)
    assert row["operation"] == "prefill"
    assert row["operations"] == 2 * (2 * 8) * (40 * 41 // 2) * 64


@pytest.mark.usefixtures("made_up")
def test_append_fills_one_slot_for_each_sequence() -> None:
    row = append.measure_slots(tiny(), 5, 4, "float32")
    assert (row["operation"], row["items"], row["sets"]) == ("encode_paged", 5, 1)
    assert row["moved_bytes"] == 2 * 5 * 8 * (512 + 64 + 4)


def test_append_to_a_cache_runs_past_its_end() -> None:
    row = append.measure_cache(tiny(), 1, 4, "float32")
    assert (row["operation"], row["items"]) == ("PagedKVCache.append", 16)
    assert row["seconds"] > 0


# -- growth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7])
def test_slopes_of_power_laws_are_found(exponent: float) -> None:
    x = [1, 2, 5, 40, 1000]
    found = fit(x, [3e-6 * at**exponent for at in x])
    assert found.slope == pytest.approx(exponent)
    assert found.steepest == pytest.approx(exponent)


def test_noise_hardly_moves_a_slope_and_a_knee_shows() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    x = 2.0 ** np.arange(10)
    noisy = x * np.exp(rng.normal(0, 0.05, 10))
    assert fit(x.tolist(), noisy.tolist()).slope == pytest.approx(
        1, abs=6 * 0.05 / np.log(2) / np.sqrt(82.5)
    )
    found = fit([4, 1, 2], [12, 1, 2])
    assert found.steepest == pytest.approx(np.log2(6))
    assert found.between == (2, 4)
    with pytest.raises(ValueError, match="two points or more, got 1 and 1"):
        fit([1], [1])


def grown(x: Sequence[int], seconds: Sequence[float]) -> list[dict[str, Any]]:
    row = {"section": GROWTH, "sweep": "context", "operation": "step", "items": 1, "threads": 1}
    row |= {"limit": "read", "rooflines": {"read": 1e9}}
    return [row | {"context": c, "seconds": s} for c, s in zip(x, seconds, strict=True)]


def test_a_slow_moment_of_the_machine_does_not_look_like_growth() -> None:
    rows = grown([1, 2, 4, 8], [1, 2, 4, 24])
    rows[-1]["rooflines"] = {"read": 1e9 / 3}
    (found,) = growth.slopes(rows)
    assert found["slope"] == pytest.approx(1)
    assert growth.steady_seconds(rows) == pytest.approx([1, 2, 4, 8])
    for threads, row in enumerate(rows, 1):
        row |= {"sweep": "threads", "threads": threads}
    (found,) = growth.slopes(rows)
    assert found["slope"] > 1, "more threads read faster: nothing is corrected"


def test_a_superlinear_path_is_called_so() -> None:
    (linear,) = growth.slopes(grown([1, 2, 4], [1, 2, 4]))
    assert (linear["superlinear"], linear["steep"]) == (False, False)
    (square,) = growth.slopes(grown([1, 2, 4], [1, 4, 16]))
    assert square["superlinear"] is True
    assert square["slope"] == pytest.approx(2)
    (knee,) = growth.slopes(grown([1, 8, 64, 128], [4, 4.5, 30, 120]))
    assert (knee["superlinear"], knee["steep"], knee["steepest_between"]) == (
        False,
        True,
        [64, 128],
    )
    assert list(growth.slopes(grown([1], [1]))) == []


def test_growth_covers_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors: list[tuple[Case, int | None]] = []
    steps: list[AttentionCase] = []

    def record(bench: Workbench, case: Any, rows: int | None = None, section: str = "") -> Any:
        assert section == GROWTH
        vectors.append((case, rows))
        return []

    def record_step(bench: Workbench, case: AttentionCase, section: str) -> dict[str, Any]:
        assert section == GROWTH
        steps.append(case)
        return {}

    monkeypatch.setattr(codec, "measure", record)
    monkeypatch.setattr(attention, "measure", record_step)
    monkeypatch.setattr(growth, "memory_to_use", lambda device: 2**33)
    bench = Workbench(Options(megabytes=TINY, full=True), threads=1)
    for task in growth.tasks(bench, threads_only=False):
        task()
    contexts = {case.context for case in steps}
    assert (min(contexts), max(contexts)) == (1024, 2**20)
    assert {case.batch for case in steps} == {1, 4, 16, 64, 256}
    assert {case.key_bits for case in steps} == set(range(1, 9))
    assert {64, 96, 128, 1024, 1536} < {case.head_dim for case, _ in vectors}
    assert {case.bits for case, _ in vectors} == set(range(1, 9))
    assert {1, 4**10} < {rows for _, rows in vectors}
    assert len(list(growth.tasks(bench, threads_only=True))) == 2

    steps.clear()
    monkeypatch.setattr(growth, "memory_to_use", lambda device: 2**26)
    for task in growth.tasks(bench, threads_only=False):
        task()
    assert max(case.context * case.batch for case in steps) == 2**14, "what memory allows"


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
    settings = {"head_dim": 128, "bits": 4, "rounds": 3, "dtype": "float32"}
    work = Work(1000, "read", 1)
    found = Line("codec", operation, settings, 1, 1000, 1e-4, "calls", work, {"read": 2e7})
    return found.row() | changes


def document(**changes: Any) -> dict[str, Any]:
    about = {
        "machine": "A machine",
        "cores": 2,
        "date": "2026-11-23",
        "versions": {},
        "backend": {},
        "options": {"device": "cpu", "sections": list(QUICK_SECTIONS)},
    }
    empty: dict[str, list[Any]] = {
        name: []
        for name in (
            "lines",
            "launches",
            "peers",
            "missing",
            "growth",
            "validation",
            "memory",
            "contexts",
            "goals",
        )
    }
    startup = {"import_seconds": 0.1, "first_encode_seconds": 3.0}
    return {"about": about, "startup": startup} | empty | changes


def test_goals_are_met_missed_or_not_measured() -> None:
    lines = [
        line("encode", items_per_second=15e6),
        line("encode", threads=2, items_per_second=20e6),
        line("encode", rounds=1, items_per_second=99e6),
        line("encode", rounds=0, share=0.9),
        line("decode", rounds=0, share=0.7),
    ]
    peer = {"peer": "turbovec add", "operation": "encode", "head_dim": 128, "bits": 4}
    ratios = [
        peer | {"threads": 1, "ours": ours, "ratio": ratio}
        for ours, ratio in (("3 rounds", 11.0), ("1 round", 19.0))
    ]
    found = {goal.what: goal for goal in goals(document(lines=lines, peers=ratios))}
    assert found["encode, 3 Hadamard rounds, one core"].measured == 15.0
    assert found["encode, 3 Hadamard rounds, one core"].met is True
    assert found["decode, 3 Hadamard rounds, one core"].met is None
    assert found["encode, 2 cores over 1"].measured == pytest.approx(20 / 15)
    assert found["encode, 2 cores over 1"].met is False
    assert found["Haar, of the float64 matrix product"].measured == 0.7
    assert found["encode over turbovec add, d = 128, 3 rounds"].met is True
    assert found["encode over turbovec add, d = 128, 1 round"].met is False
    assert found["encode over turbovec add, d = 768, 3 rounds"].met is None
    assert found["import"].met is True
    assert found["first encode, kernels cached"].met is False


def test_the_multiply_add_goal_is_of_that_limit_even_where_memory_binds() -> None:
    about = document()["about"] | {"options": {"device": "cpu", "sections": ["attention"]}}
    step = {"section": "attention", "operation": "step", "threads": 2, "limit": "read"}
    step |= {"rooflines": {"read": 4e10, "multiply-add": 2e11}, "share": 0.5}
    rows = [{**step, **vars(AttentionCase()), "operations_per_second": 6e10}]
    found = {goal.what: goal for goal in goals(document(about=about, lines=rows))}
    goal = found["attention step, 2 cores, of the multiply-add peak"]
    assert goal.measured == pytest.approx(0.3)


def test_goals_of_a_gpu() -> None:
    about = document()["about"] | {"options": {"device": "cuda", "sections": list(SECTIONS)}}
    case = vars(AttentionCase(batch=32, dtype="float16"))
    step = {"section": "attention", "operation": "step", "threads": 0}
    step |= {"rooflines": {"read": 2.9e12, "copy": 2.5e12}, "bytes_per_second": 2.4e12}
    lines = [
        {**step, **case, "seconds": 1e-4},
        {**step, **case, "batch": 1, "seconds": 12e-6},
    ]
    found = {goal.what: goal for goal in goals(document(about=about, lines=lines))}
    assert found["batch 32 x 8192, 4 bits, of a copy"].measured == pytest.approx(0.96)
    assert found["batch 32 x 8192, 4 bits, of a copy"].met is True
    assert found["batch 1 x 8192, 4 bits"].met is False
    assert found["batch 1 x 8192, 4 bits"].measured == pytest.approx(12)
    assert found["encode, rounds: 1, of a device copy"].met is None


def test_report_puts_bit_widths_side_by_side() -> None:
    lines = [
        line("encode", items_per_second=10e6, share=0.5),
        line("encode", bits=2, items_per_second=0.01234e6, share=0.251),
        line("decode", rounds=0, share=0.7, items_per_second=0.5e6),
    ]
    text = report(document(lines=lines))
    found = [" ".join(line.split()) for line in text.splitlines()]
    assert "encode 128 float32 3 rounds 1 0.0123 (25% r) 10.0 (50% r)" in found
    assert "decode 128 float32 Haar 1 0.500 (70% r)" in found
    assert "d dtype rotation threads 2 bit 4 bit" in found
    assert "1 read 0.0200 0.0200 0.0200 GB/s" in found
    assert "other libraries" not in text
    assert "Goals" not in text


@pytest.mark.parametrize(("rates", "said"), [((10e9, 14e9), False), ((10e9, 16e9), True)])
def test_report_says_that_the_machine_was_disturbed(rates: tuple[float, float], said: bool) -> None:
    lines = [line("encode", rooflines={"read": rate}) for rate in rates]
    assert ("Something else used the machine" in report(document(lines=lines))) is said


def test_report_says_what_is_superlinear() -> None:
    rows = list(growth.slopes(grown([1, 2, 4], [1, 4, 16])))
    text = " ".join(report(document(growth=rows)).split())
    assert "context step 1 4 2.00 2.00 1.00 SUPERLINEAR" in text


# -- the command ---------------------------------------------------------------------------------


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    json_file, plot_file = tmp_path / "bench.json", tmp_path / "bench.svg"
    settings = ["--device", "cpu", "--backend", "reference", "--megabytes", str(TINY)]
    asked = ["--section", "codec", "validation", "memory", "startup"]
    outputs = ["--json", str(json_file), "--plot", str(plot_file)]
    assert main(["bench", *settings, *asked, *outputs]) == 0
    out = capsys.readouterr().out
    found = json.loads(json_file.read_text())
    assert found["schema"] == 2
    assert {row["threads"] for row in found["lines"]} == {1, min(2, usable_cores()), usable_cores()}
    for row in found["lines"]:
        assert row["section"] == "codec"
        assert row["seconds"] > 0
        assert row["share"] > 0
        assert row["limit"] in row["rooflines"]
        assert row["bytes_per_second"] == pytest.approx(row["moved_bytes"] / row["seconds"])
    assert [row["passed"] for row in found["validation"]] == [True] * 8
    assert 0 < found["startup"]["import_seconds"] < 30
    assert found["memory"][0] == {
        "model": "Llama-3.1-8B",
        "float16": 131_072,
        "4 bits": 34_816,
        "3 bits": 26_624,
        "2 bits": 18_432,
    }
    assert found["contexts"][0]["4 bits"] > 3 * found["contexts"][0]["float16"] > 0
    assert found["about"]["options"]["megabytes"] == TINY
    assert "encode, 3 Hadamard rounds" in out
    plots = sorted(tmp_path.glob("bench-*.svg"))
    assert [path.name for path in plots] == ["bench-codec.svg", "bench-roofline.svg"]
    assert all(f"Plot: {path}" in out for path in plots)
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in plots)


def test_json_goes_to_standard_output_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--section", "memory", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["about"]["options"]["sections"] == ["memory"]
    assert found["lines"] == found["validation"] == []
    assert len(found["memory"]) > 5


def test_every_plot_is_drawn_from_growth(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from turboquant_np.bench.plot import PLOTS, draw

    limit = {"limit": "read", "rooflines": {"read": 1e9}}
    step = {"section": GROWTH, "operation": "step", "threads": 1, "items": 1} | limit
    case = vars(AttentionCase())
    base = {"section": GROWTH, "threads": 1, "dtype": "float32", "rounds": 3} | limit
    lines = [
        *({**step, **case, "sweep": "context", "context": c, "seconds": c / 1e6} for c in (1, 9)),
        *(
            {**step, **case, "context": 1024, "sweep": "batch", "batch": b, "seconds": b / 1e6}
            for b in (1, 9)
        ),
        *(
            {**step, **case, "context": 16384, "sweep": "threads", "threads": t, "seconds": 1 / t}
            for t in (1, 2)
        ),
        *(
            {**base, "operation": "encode", "sweep": sweep, "items": n, "head_dim": n, "bits": n,
             "seconds": n / 1e6}
            for sweep in ("vectors", "length", "other lengths", "bits")
            for n in (2, 8)
        ),
    ]  # fmt: skip
    for row in lines:
        row |= {"operations": 0}
    written = draw(document(lines=lines), str(tmp_path / "x.svg"))
    drawn = {path.stem.removeprefix("x-") for path in written}
    assert drawn == PLOTS.keys() - {"roofline", "codec", "peers"}


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


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--megabytes", "0"]) == 2
    message = "--megabytes must be positive, got 0.0"
    assert capsys.readouterr().err == f"turboquant-np: error: {message}\n"
    with pytest.raises(SystemExit):
        main(["bench", "--section", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_attention_of_the_benchmark_is_the_public_one() -> None:
    assert isinstance(Problem(tiny(), SMALL).attention, TQPagedAttention)
