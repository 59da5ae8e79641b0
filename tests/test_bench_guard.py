"""The guard against losing speed: it passes what is fast, and fails what is slow."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.bench import guard
from turboquant_np.bench.attention import Problem
from turboquant_np.bench.guard import CHECKS, Check
from turboquant_np.bench.options import Options
from turboquant_np.bench.workbench import Workbench


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(Options(megabytes=1), threads=1)


def scripted(*values: float) -> tuple[Check, Iterator[float]]:
    left = iter(values)
    return Check("scripted", 0.5, lambda bench: next(left)), left


def test_a_check_that_misses_its_floor_is_measured_again(bench: Workbench) -> None:
    lines: list[str] = []
    check, left = scripted(0.1, 0.2, 0.6, 0.9)
    assert guard.guard(bench, [check], report=lines.append)
    assert next(left) == 0.9, "measured until it passed, not further"
    assert lines[0].startswith("ok")
    assert "0.10, then 0.20, then 0.60 (at least 0.50)" in lines[0]


def test_three_misses_are_a_failure_of_the_whole(bench: Workbench) -> None:
    lines: list[str] = []
    slow, left = scripted(0.1, 0.2, 0.3, 0.9)
    fast, _ = scripted(0.7)
    assert not guard.guard(bench, [slow, fast], report=lines.append)
    assert next(left) == 0.9, "three attempts, not more"
    assert [line.split()[0] for line in lines] == ["TOO", "ok"]


def test_encode_made_slower_fails(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real check of encode, with a TurboQuant that takes 30 times as long."""
    check = next(check for check in CHECKS if check.what == "encode, 3 rounds")
    assert guard.guard(bench, [check], report=lambda line: None)
    encode = TurboQuant.encode

    def slow(self: TurboQuant, *args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = encode(self, *args, **kwargs)  # type: ignore[arg-type]
        time.sleep(30 * (time.perf_counter() - start))
        return result

    monkeypatch.setattr(TurboQuant, "encode", slow)
    assert not guard.guard(bench, [check], report=lambda line: None)


def test_growth_that_is_quadratic_fails(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(check for check in CHECKS if "linear" in check.what)

    def steps(self: Problem) -> list[object]:
        return [lambda: time.sleep((self.case.context / 4096) ** 2 * 1e-4)]

    monkeypatch.setattr(Problem, "steps", steps)
    assert not guard.guard(bench, [check], report=lambda line: None)


def test_every_check_measures_something(bench: Workbench) -> None:
    """With short inputs, so no floors here; every figure is a positive number."""
    values = [check.measure(bench) for check in CHECKS]
    assert all(np.isfinite(value) and value > 0 for value in values)


def test_checks_ask_for_half_of_what_is_measured_at_most() -> None:
    assert len({check.what for check in CHECKS}) == len(CHECKS)
    assert all(0 < check.floor <= 0.5 for check in CHECKS)
