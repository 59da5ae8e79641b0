"""How the benchmark takes times, and what it holds them against."""

from __future__ import annotations

import time
from itertools import count

import numpy as np
import pytest

from turboquant_np.bench.multiply_add import OPERATIONS_PER_ROUND, multiply_add, vector_width
from turboquant_np.bench.rooflines import HostRooflines
from turboquant_np.bench.timing import Call, HostClock, Runner, alternate

# -- timing --------------------------------------------------------------------------------------


def test_calls_take_turns_and_the_median_counts() -> None:
    called: list[str] = []
    clock = {"a": iter([0.0, 1.0, 9.0, 2.0]), "b": iter([0.0, 5.0, 4.0, 6.0])}

    def runner(name: str) -> Runner:
        def seconds() -> float:
            called.append(name)
            return next(clock[name])

        return Runner(seconds, "calls")

    times = alternate({name: runner(name) for name in "ab"}, min_rounds=3, min_seconds=0)
    assert times == {"a": 2.0, "b": 5.0}
    assert called == ["a", "b"] * 4, "a round that does not count, then three"


def test_rounds_go_on_until_enough_time_has_passed() -> None:
    numbers = count()
    alternate({"x": Runner(lambda: next(numbers) * 0 + 0.01, "calls")}, min_seconds=0.095)
    assert next(numbers) == 1 + 10
    numbers = count()
    alternate({"x": Runner(lambda: next(numbers) * 0.0, "calls")}, max_rounds=7)
    assert next(numbers) == 1 + 7


def test_the_host_clock_measures_one_step_after_the_other() -> None:
    called: list[str] = []

    def step(name: str, seconds: float) -> Call:
        def call() -> None:
            called.append(name)
            time.sleep(seconds)

        return call

    runner = HostClock(least_seconds=0).prepare([step("long", 0.03), step("short", 0.0)])
    assert called == []
    long, short, again = (runner.seconds() for _ in range(3))
    assert called == ["long", "short", "long"]
    assert min(long, again) >= 0.03
    assert short < 0.03
    assert runner.timed == "calls"


def test_short_steps_are_called_for_a_while_and_the_time_is_that_of_one() -> None:
    called: list[int] = []

    def step() -> None:
        called.append(1)
        time.sleep(1e-3)

    seconds = HostClock(least_seconds=0.05).prepare([step]).seconds()
    assert 2 <= len(called) <= 50
    assert seconds >= 1e-3
    assert seconds * len(called) >= 0.05


# -- rooflines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_rooflines_touch_every_byte(threads: int) -> None:
    rooflines = HostRooflines(4096, threads)
    assert (rooflines.read().amount, rooflines.copy().amount) == (4096, 8192)
    rooflines.read().call()
    rooflines.copy().call()
    targets = [target for _, target in rooflines._parts]
    assert sum(target.size for target in targets) == 1024
    assert all((target == 1).all() for target in targets)


def test_the_matrix_product() -> None:
    product = HostRooflines(4, 1).float64_product(3, 5)
    assert (product.call() == np.full((3, 5), 5.0)).all()
    assert product.amount == 3 * 25


def test_multiply_adds_are_done_as_often_as_said() -> None:
    """The lane that is returned follows x -> 0.999 x + 0.001 in each chain, from 0, 1, 2, ..."""
    chains = np.arange(OPERATIONS_PER_ROUND, dtype=np.float64)
    for rounds in (1, 7, 500):
        values = chains.copy()
        for _ in range(rounds):
            values = 0.999 * values + 0.001
        assert multiply_add(rounds) == pytest.approx(values.sum(), rel=1e-4)
    assert vector_width() in (4, 8, 16)
    roofline = HostRooflines(4, 2).multiply_add()
    assert roofline is not None
    assert roofline.amount % (2 * OPERATIONS_PER_ROUND * vector_width()) == 0


def test_multiply_adds_take_time_in_proportion() -> None:
    clock = HostClock()
    runners = {
        str(n): clock.prepare([lambda n=n: multiply_add(n)])  # type: ignore[misc]
        for n in (100_000, 800_000)
    }
    seconds = alternate(runners, min_rounds=9)
    assert 4 < seconds["800000"] / seconds["100000"] < 16
