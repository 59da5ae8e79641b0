"""The benchmark's code for a GPU, run without one: with a made-up clock, and NumPy for CuPy."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from turboquant_np.bench import (
    append,
    attention,
    attention_peers,
    codec,
    compile_first,
    growth,
    launches,
    report,
    report_peers,
    rooflines,
)
from turboquant_np.bench.goals import goals
from turboquant_np.bench.options import SECTIONS, Options
from turboquant_np.bench.run import sort_rows
from turboquant_np.bench.timing import CudaClock
from turboquant_np.bench.workbench import Workbench


class FakeStream:
    """Runs a captured graph's steps again when it is launched; 1 ms passes with every step."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.captured: list[str] | None = None

    def __enter__(self) -> None:
        self.cuda.current.append(self)

    def __exit__(self, *_: object) -> None:
        self.cuda.current.pop()

    def synchronize(self) -> None:
        assert self.captured is None, "synchronised while capturing"

    def begin_capture(self) -> None:
        self.captured = []

    def end_capture(self) -> FakeGraph:
        captured, self.captured = self.captured, None
        if captured is None or "cannot be captured" in captured:
            raise RuntimeError("the capture is invalid")
        return FakeGraph(self.cuda, captured)


class FakeGraph:
    def __init__(self, cuda: FakeCuda, steps: list[str]) -> None:
        self.cuda, self.steps = cuda, steps

    def launch(self, stream: FakeStream) -> None:
        self.cuda.done += [f"replayed {step}" for step in self.steps]
        self.cuda.milliseconds += len(self.steps)


class FakeCuda:
    """As much of ``cupy.cuda`` as the clock uses."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.done: list[str] = []
        self.current: list[FakeStream] = []
        self.device_synchronised = 0

    def Stream(self, non_blocking: bool) -> FakeStream:
        assert non_blocking
        return FakeStream(self)

    def Device(self) -> Any:
        def synchronize() -> None:
            self.device_synchronised += 1

        attributes = {"MultiProcessorCount": 1}
        return types.SimpleNamespace(synchronize=synchronize, attributes=attributes)

    def Event(self) -> Any:
        event = types.SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda stream: setattr(event, "at", self.milliseconds)
        return event

    def get_elapsed_time(self, start: Any, stop: Any) -> float:
        return float(stop.at - start.at)

    def step(self, name: str, capturable: bool = True) -> Callable[[], None]:
        """A kernel launch on the current stream."""

        def launch() -> None:
            stream = self.current[-1]
            if stream.captured is not None:
                stream.captured.append(name if capturable else "cannot be captured")
                if not capturable:
                    raise RuntimeError("not permitted when the stream is capturing")
            else:
                self.done.append(name)
                self.milliseconds += 1

        return launch


def test_steps_are_captured_after_a_first_call_and_replayed_as_one_graph() -> None:
    cuda = FakeCuda()
    runner = CudaClock(cuda).prepare([cuda.step("a"), cuda.step("b")])
    assert cuda.done == ["a", "b"], "called once, so that everything is compiled"
    assert cuda.device_synchronised == 1
    assert runner.timed == "graph"
    assert runner.seconds() == pytest.approx(1e-3), "seconds of one step, not of both"
    assert cuda.done[2:] == ["replayed a", "replayed b"]


def test_what_cannot_be_captured_is_launched_and_said_to_be() -> None:
    cuda = FakeCuda()
    clock = CudaClock(cuda)
    before = clock.stream
    runner = clock.prepare([cuda.step("a"), cuda.step("b", capturable=False)])
    assert runner.timed == "launches"
    assert clock.stream is not before, "a stream whose capture failed is not used again"
    cuda.done.clear()
    assert runner.seconds() == pytest.approx(1e-3)
    assert cuda.done == ["a", "b"]
    assert clock.prepare([cuda.step("c")]).timed == "graph"


def test_without_a_graph_steps_are_launched() -> None:
    cuda = FakeCuda()
    runner = CudaClock(cuda).prepare([cuda.step("a"), cuda.step("b")], graph=False)
    assert (runner.timed, cuda.done) == ("launches", [])
    assert runner.seconds() == pytest.approx(1e-3)
    assert cuda.done == ["a", "b"]


# -- the sections, on NumPy arrays in the place of CuPy's ------------------------------------------


class NotAnArray:
    """No array is one, so the library takes NumPy arrays for what they are."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Workbench:
    cuda = FakeCuda()
    fake: Any = types.ModuleType("cupy")
    for name in ("tile", "asarray", "zeros", "full", "empty", "empty_like", "resize", "copyto"):
        setattr(fake, name, getattr(np, name))
    fake.ascontiguousarray, fake.matmul, fake.ones = np.ascontiguousarray, np.matmul, np.ones
    fake.ndarray, fake.cuda = NotAnArray, cuda
    fake.RawKernel = lambda source, name: lambda *_: None
    fake.random = types.SimpleNamespace(default_rng=np.random.default_rng)
    freed: list[int] = []
    pool = types.SimpleNamespace(free_all_blocks=lambda: freed.append(1))
    fake.get_default_memory_pool = lambda: pool
    monkeypatch.setitem(sys.modules, "cupy", fake)

    def elapsed(start: Any, stop: Any) -> float:
        return 2.0

    monkeypatch.setattr(cuda, "get_elapsed_time", elapsed)
    return Workbench(Options(device="cuda", backend="cpu", megabytes=0.25), threads=0)


def test_the_codec_is_compared_with_a_copy(bench: Workbench) -> None:
    rows = list(codec.measure(bench, codec.Case(128, 4, 1, "float16")))
    assert isinstance(bench.rooflines, rooflines.CudaRooflines)
    for row in rows:
        assert row["timed"] == "graph"
        assert row["threads"] == 0
        assert row["seconds"] == pytest.approx(2e-3 / 4), "four steps in the graph"
        moved = {"read": 2**18, "copy": 2 * 2**18}
        memories = {"encode": {"read", "copy"}, "decode": {"copy"}}[row["operation"]]
        assert row["rooflines"] == {m: pytest.approx(moved[m] / 2e-3) for m in memories}
        assert row["limit"] == ("read" if "read" in memories else "copy")
        limit = moved[row["limit"]] / 2e-3
        assert row["share"] == pytest.approx(row["moved_bytes"] / 5e-4 / limit)


def test_a_dense_rotation_is_compared_with_a_product_too(bench: Workbench) -> None:
    rows = list(codec.measure(bench, codec.Case(128, 4, 0, "float16")))
    assert {row["limit"] for row in rows} == {"float64 product"}


@pytest.mark.parametrize("order", ["token", "head"])
def test_attention_has_a_graph_of_four_steps_or_more(bench: Workbench, order: str) -> None:
    case = attention.AttentionCase(
        batch=2, context=512, head_dim=64, kv_heads=2, dtype="float16", order=order
    )
    problem = attention.Problem(bench, case)
    assert len(problem.steps()) == max(4, problem.sets)
    row = attention.measure(bench, case)
    assert row["timed"] == "graph"
    assert row["seconds"] == pytest.approx(2e-3 / len(problem.steps()))
    assert row["share"] == pytest.approx(row["bytes_per_second"] / row["rooflines"]["read"])


def test_several_tokens_are_compared_with_tensor_cores(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooflines, "TENSOR_SIDE", 16)
    case = attention.AttentionCase(
        context=48, head_dim=64, kv_heads=2, dtype="float16", query_len=48
    )
    assert attention.Problem(bench, case).sets == 1, "a prefill is no matter of memory"
    row = attention.measure(bench, case)
    assert row["operation"] == "prefill"
    assert row["operations"] == 2 * 8 * (48 * 49 // 2) * 64
    assert row["rooflines"]["tensor cores"] == pytest.approx(16**3 / 2e-3)
    assert row["limit"] == "tensor cores"
    text = report.attention([row])
    assert f"{row['share']:.0%} t" in text
    assert f"{2 * row['operations'] / row['seconds'] / 1e12:#.3g}" in text
    one = attention.measure(bench, replace(case, query_len=1))
    assert "tensor cores" not in one["rooflines"]


def test_a_loop_waits_for_its_last_call_only() -> None:
    cuda = FakeCuda()
    clock = CudaClock(cuda)
    waited: list[int] = []
    clock.stream.synchronize = lambda: waited.append(len(cuda.done))
    runners = clock.loops([cuda.step("a"), cuda.step("b")], 3)
    assert {runner.timed for runner in runners.values()} == {"loop"}
    for runner in (runners["loop"], runners["host"]):
        assert runner.seconds() > 0
    assert cuda.done == ["a", "b", "a"] * 2
    assert waited == [3, 6], "also where the wait is not timed, so that nothing piles up"


def test_a_loop_is_timed_with_its_wait_and_its_calls_without() -> None:
    cuda = FakeCuda()
    clock = CudaClock(cuda)
    clock.stream.synchronize = lambda: time.sleep(0.02)
    runners = clock.loops([cuda.step("a")], 2)
    assert runners["loop"].seconds() >= 0.01
    assert runners["host"].seconds() < 0.01


def test_launches_are_compared_with_a_graph(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "CALLS", 4)
    case = attention.AttentionCase(context=48, head_dim=64, kv_heads=2, dtype="float16")
    row = launches.measure(bench, case)
    assert row["graph_seconds"] == pytest.approx(2e-3 / row["sets"])
    assert row["loop_seconds"] > 0
    assert row["host_seconds"] > 0
    assert (row["graph_timed"], row["calls"]) == ("graph", 4)
    found = sort_rows([row, {"missing": "why"}, {"peer": "x"}, {"section": "codec"}])
    assert found["launches"] == [row]
    assert [len(rows) for rows in found.values()] == [1, 1, 1, 1]
    row |= {"graph_seconds": 110e-6, "loop_seconds": 117e-6, "host_seconds": 21.5e-6}
    line = report.launches([row]).splitlines()[-1]
    assert line.split()[-8:] == ["110", "us", "117", "us", "7.00", "us", "21.5", "us"]
    assert len(list(launches.tasks(bench))) == len(launches.cases())
    on_cpu = Workbench(Options(megabytes=0.01), threads=1)
    assert list(launches.tasks(on_cpu)) == []


def test_kernels_of_all_cases_are_compiled_first(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "memory_to_use", lambda device: 2**32)
    asked = replace(bench.options, sections=tuple(SECTIONS), full=True)
    every = Workbench(asked, threads=0)
    found = set(compile_first.cases(every))
    assert set(attention.attention_cases(full=True, device="cuda")) < found
    assert set(codec.codec_cases(full=True, device="cuda")) < found
    only = Workbench(replace(asked, sections=("memory",)), threads=0)
    assert list(compile_first.cases(only)) == []

    called: list[Any] = []

    class Problem:
        def __init__(self, bench: Workbench, case: Any) -> None:
            assert bench.num_bytes <= 2**20
            self.case = case

        def steps(self) -> list[Any]:
            called.append(self.case)
            raise MemoryError("what fails here fails again when it is measured")

    monkeypatch.setattr(attention, "Problem", Problem)
    compile_first.compile_first(Workbench(replace(asked, sections=("attention",)), threads=0))
    assert set(called) == set(attention.attention_cases(full=True, device="cuda"))
    case = codec.Case(64, 4, 3, "float16")
    monkeypatch.setattr(compile_first, "cases", lambda bench: [case, case])
    compile_first.compile_first(every)


def test_slots(bench: Workbench) -> None:
    row = append.measure_slots(bench, 4, 4, "float16")
    assert row["timed"] == "graph"
    assert row["seconds"] == pytest.approx(2e-3 / row["sets"])


def test_cases_for_a_gpu_are_those_of_the_goals() -> None:
    cases = attention.attention_cases(full=False, device="cuda")
    base = attention.AttentionCase(dtype="float16", order="head")
    for bits in (4, 3, 2):
        for batch, context in ((32, 8192), (64, 2048), (1, 131072), (1, 8192)):
            wanted = replace(attention.with_bits(base, bits), batch=batch, context=context)
            assert wanted in cases
    full = attention.attention_cases(full=True, device="cuda")
    assert set(cases) < set(full)
    quick = codec.codec_cases(full=False, device="cuda")
    assert set(quick) < set(codec.codec_cases(full=True, device="cuda"))
    assert {64, 96, 128, 256} <= {case.head_dim for case in full}
    assert {1, 2, 4, 8} <= {case.query_len for case in full}


def test_every_goal_of_a_gpu_is_measured_by_default() -> None:
    """By cases and comparisons as they are, with speeds that are made up."""
    rooflines = {"read": 4e12, "copy": 4e12}
    made_up = {"seconds": 1e-5, "bytes_per_second": 3.9e12, "rooflines": rooflines}
    lines: list[dict[str, Any]] = [
        {"section": "attention", "operation": case.operation, **vars(case), **made_up}
        for case in attention.attention_cases(full=False, device="cuda")
    ]
    lines += [
        {"section": "codec", "operation": operation, **vars(case), **made_up}
        for case in codec.codec_cases(full=False, device="cuda")
        for operation in ("encode", "decode")
    ]
    slots = {"section": "append", "operation": "encode_paged", "bits": 4, "dtype": "float16"}
    lines += [{**slots, "sequences": 256, **made_up}]
    called = {"loop_seconds": 1.5e-5, "graph_seconds": 1e-5}
    queued = [{"operation": c.operation, **vars(c), **called} for c in launches.cases()]
    peers = [
        {
            "peer": peer.name,
            "operation": case.operation,
            "batch": case.batch,
            "context": case.context,
            "query_heads": case.kv_heads * case.group,
            "ours": f"{bits} bits",
            "ratio": 0.6 if case.operation == "prefill" else 7.0,
        }
        for peer in attention_peers.ATTENTION_PEERS
        for case in attention_peers.cases(full=False, device="cuda")
        for bits in (4, 3, 2)
    ]
    peers[-1]["ratio"] = 0.1  # of no interest: not FlashInfer's
    options = {"device": "cuda", "sections": ["codec", "attention", "append"]}
    document = {"about": {"options": options}, "lines": lines, "launches": queued, "peers": peers}
    found = list(goals(document))
    assert [goal.what for goal in found if goal.measured is None] == []
    assert len({goal.what for goal in found}) == len(found)
    measured = {goal.what: goal.measured for goal in found}
    assert measured["batch 32 x 8192, added by a call without a graph"] == pytest.approx(5)
    assert measured["batch 32 x 8192, 8 query tokens over 1"] == 1
    assert measured["prefill of 8192 over FlashInfer float16"] == 0.6


def test_flashinfer_gets_pages_in_the_order_of_its_table(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for it gathers what the table says and attends; results must be ours."""
    torch = pytest.importorskip("torch")
    made: list[Any] = []

    class Wrapper:
        def __init__(self, workspace: Any, layout: str, use_tensor_cores: bool) -> None:
            assert layout == "NHD"
            made.append(self)

        def plan(self, indptr: Any, indices: Any, last: Any, *sizes: int, **dtypes: Any) -> None:
            self.indptr, self.indices, self.last, self.sizes = indptr, indices, last, sizes
            assert dtypes["q_data_type"] is torch.float16

        def run(self, query: Any, pages: Any) -> Any:
            heads, kv_heads, dim, size = self.sizes
            keys, values = (p[self.indices.long()].float() for p in pages)
            batch = len(self.indptr) - 1
            assert (self.last == size).all()
            k, v = (x.reshape(batch, -1, kv_heads, dim).transpose(1, 2) for x in (keys, values))
            q = query.float().reshape(batch, kv_heads, heads // kv_heads, dim)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return out.reshape(batch, heads, dim)

    fake = types.ModuleType("flashinfer")
    fake.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(attention_peers, "TORCH_DEVICE", {"cuda": "cpu", "cpu": "cpu"})
    monkeypatch.setattr(attention_peers, "on_current_stream", lambda call: call)
    case = attention.AttentionCase(
        batch=3, context=64, head_dim=64, kv_heads=2, dtype="float16", order="head"
    )
    problem = attention.Problem(bench, case)
    (first, *_) = attention_peers.flashinfer_decode(problem, "float16")
    with_ours = problem.steps()[0]()
    got = first().numpy()
    assert got.shape == (3, 1, 8, 64)
    difference = attention_peers.relative_difference(got[:, 0], with_ours)
    assert difference < 2e-3
    (first, *_) = attention_peers.flashinfer_decode(problem, "float8")
    assert 1e-3 < attention_peers.relative_difference(first().numpy()[:, 0], with_ours) < 0.1
    assert len(made) == 2


def test_flashinfer_gets_a_whole_prompt(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    asked: list[str] = []

    def prefill(query: Any, k: Any, v: Any, *, causal: bool, backend: str) -> Any:
        assert causal
        assert {x.dtype for x in (query, k, v)} == {torch.float16}
        asked.append(backend)
        q, k, v = (x.float().transpose(0, 1)[None] for x in (query, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    fake = types.ModuleType("flashinfer")
    fake.single_prefill_with_kv_cache = prefill  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(attention_peers, "TORCH_DEVICE", {"cuda": "cpu", "cpu": "cpu"})
    monkeypatch.setattr(attention_peers, "on_current_stream", lambda call: call)
    monkeypatch.setattr(rooflines, "TENSOR_SIDE", 16)
    case = attention.AttentionCase(
        context=48, head_dim=64, kv_heads=2, dtype="float16", order="head", query_len=48
    )
    problem = attention.Problem(bench, case)
    (call,) = attention_peers.flashinfer_prefill(problem, "fa3")
    got, ours = call().numpy(), problem.steps()[0]()
    assert got.shape == ours.shape == (1, 48, 8, 64)
    assert attention_peers.relative_difference(got, ours) < 2e-3
    assert set(asked) == {"fa3"}
    for other in (replace(case, query_len=1), replace(case, batch=2), replace(case, query_len=8)):
        with pytest.raises(ValueError, match="one whole prompt only"):
            attention_peers.flashinfer_prefill(attention.Problem(bench, other), "fa3")

    (sdpa,) = attention_peers.torch_sdpa(problem, "float16")
    assert attention_peers.relative_difference(sdpa().float().numpy(), ours) < 2e-3
    with pytest.raises(ValueError, match="writes all scores to memory"):
        attention_peers.torch_sdpa(problem, "float32")

    peer = next(p for p in attention_peers.ATTENTION_PEERS if "fa3" in p.name)
    monkeypatch.setattr("turboquant_np.bench.peers.version", lambda name: "0")
    monkeypatch.setattr(attention_peers, "NOT_COMPARABLE", (peer.name,))  # needs CuPy's arrays
    (row,) = attention_peers.beside(bench, peer, case)
    assert (row["operation"], row["ours"]) == ("prefill", "4 bits")
    assert row["operations"] == 2 * 8 * (48 * 49 // 2) * 64
    row |= {"operations": 550 * 10**9, "peer_seconds": 2e-3, "our_seconds": 4e-3}
    text = report_peers.attention([row])
    assert "2.00 ms (550 TFLOP/s)" in text
    assert "4.00 ms (275 TFLOP/s)" in text


def test_the_roofline_of_a_gpu_ends_at_its_tensor_cores() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from turboquant_np.bench.plot import roofline

    memories = {"read": 4e12, "copy": 4e12}
    base = {"section": "attention", "threads": 0, "moved_bytes": 10**8}
    lines = [
        {**base, "operation": "step", "operations": 10**9, "rooflines": memories},
        {
            **base,
            "operation": "prefill",
            "operations": 10**12,
            "rooflines": memories | {"tensor cores": 4e14},
        },
    ]
    for row in lines:
        row["operations_per_second"] = 1e12
    axes: Any = Figure().subplots()
    assert roofline(axes, {"lines": lines})
    assert [text.get_text() for text in axes.texts] == [
        "memory, 4000 GB/s",
        "tensor cores, 400,000 G/s",
    ]
    assert max(float(y) for line in axes.lines for y in line.get_ydata()) == 4e5
