"""Steps called from Python without a CUDA graph: what that adds, and what a call costs the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from .attention import AttentionCase, Problem
from .timing import CudaClock, alternate
from .workbench import Row, Task, Workbench

__all__ = ["measure", "tasks"]

CALLS = 128  # in a row; CUDA queues 1024 launches before one waits, and a call makes up to five


def cases() -> list[AttentionCase]:
    """A step that the device is busy with for longer than a call takes, and one of the shortest."""
    return [
        AttentionCase(batch=batch, context=8192, dtype="float16", order="head") for batch in (32, 1)
    ]


def measure(bench: Workbench, case: AttentionCase) -> Row:
    """Seconds of a step in a graph, of one called in a loop, and of a call that does not wait.

    All three take turns.  In the loop calls follow each other and the last is waited for, so where
    the device is slower than Python its time is that of a step and of the gap before the next one.
    """
    assert isinstance(bench.clock, CudaClock)
    problem = Problem(bench, case)
    steps = problem.steps()
    graph = bench.clock.prepare(steps)
    seconds = alternate({"graph": graph, **bench.clock.loops(steps, CALLS)})
    row = {
        "section": "attention",
        "operation": case.operation,
        **asdict(case),
        "sets": problem.sets,
        "calls": CALLS,
        "graph_seconds": seconds["graph"],
        "graph_timed": graph.timed,
        "loop_seconds": seconds["loop"],
        "host_seconds": seconds["host"],
    }
    del problem, steps, graph
    bench.free()
    return row


def tasks(bench: Workbench) -> Iterable[Task]:
    """All cases; none on a CPU, where a call is what is timed anyway."""
    if bench.device == "cuda":
        for case in cases():
            yield lambda case=case: [measure(bench, case)]  # type: ignore[misc]
