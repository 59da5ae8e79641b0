"""Median times of calls that take turns, so that a busy neighbour slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any, Protocol

__all__ = ["Call", "Clock", "CudaClock", "HostClock", "Runner", "alternate"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Runner:
    """Something ready to be timed.

    Attributes
    ----------
    seconds : callable
        Runs it and returns the seconds that one step took.
    timed : {"calls", "graph", "launches", "loop"}
        Calls on the host, the replay of a CUDA graph of all steps, all steps launched in a row
        between events, or in a loop by the clock of the host.
    """

    seconds: Callable[[], float]
    timed: str


class Clock(Protocol):
    """How calls are timed on a device."""

    def prepare(self, steps: Sequence[Call], *, graph: bool = True) -> Runner:
        """`steps` do the same work on different inputs, so that no cache keeps them.

        Without `graph` they are launched one by one where a CUDA graph would be possible: a copy in
        a graph is not done the way a copy by itself is, and reaches four fifths of its speed.
        """


class HostClock:
    """Wall-clock time; each time the next steps are called.

    Parameters
    ----------
    least_seconds : float
        Short steps are called one after the other for that long, as the first of them would tell
        mostly how long it takes to come back after something else had filled the caches.

    Examples
    --------
    >>> from turboquant_np.bench.timing import HostClock
    >>> called = []
    >>> steps = [lambda: called.append("a"), lambda: called.append("b")]
    >>> runner = HostClock(least_seconds=0).prepare(steps)
    >>> all(runner.seconds() >= 0 for _ in range(3)), called
    (True, ['a', 'b', 'a'])
    """

    def __init__(self, least_seconds: float = 2e-3) -> None:
        self.least_seconds = least_seconds

    def prepare(self, steps: Sequence[Call], *, graph: bool = True) -> Runner:
        turn = cycle(steps)

        def seconds() -> float:
            calls, elapsed = 0, 0.0
            start = time.perf_counter()
            while not calls or elapsed < self.least_seconds:
                next(turn)()
                calls += 1
                elapsed = time.perf_counter() - start
            return elapsed / calls

        return Runner(seconds, "calls")


class CudaClock:
    """Device time between two events around a CUDA graph of all steps, a stream of its own.

    What cannot be captured is launched step by step between the events; then a step that is shorter
    than its launch on the host shows the launch.

    Parameters
    ----------
    cuda : module, optional
        ``cupy.cuda``, or something that behaves like it.
    """

    def __init__(self, cuda: Any = None) -> None:
        if cuda is None:
            import cupy

            cuda = cupy.cuda
        self.cuda = cuda
        self.stream = cuda.Stream(non_blocking=True)

    def prepare(self, steps: Sequence[Call], *, graph: bool = True) -> Runner:
        self.cuda.Device().synchronize()  # inputs were made on other streams
        captured = self._capture(steps) if graph else None
        stream = self.stream

        def launch_all() -> None:
            with stream:
                for step in steps:
                    step()

        def seconds() -> float:
            start, stop = self.cuda.Event(), self.cuda.Event()
            start.record(stream)
            launch_all() if captured is None else captured.launch(stream)
            stop.record(stream)
            stop.synchronize()
            return float(self.cuda.get_elapsed_time(start, stop)) / 1e3 / len(steps)

        return Runner(seconds, "launches" if captured is None else "graph")

    def loops(self, steps: Sequence[Call], count: int) -> dict[str, Runner]:
        """`count` calls in a row by the clock of the host, `steps` again and again.

        Returns
        -------
        dict of str to Runner
            ``loop`` waits for the last one's result; ``host`` is the time until the last call has
            returned, and waits after that.
        """
        queue = list(islice(cycle(steps), count))
        stream = self.stream

        def run(waits: bool) -> float:
            start = time.perf_counter()
            with stream:
                for step in queue:
                    step()
            returned = time.perf_counter()
            stream.synchronize()
            return ((time.perf_counter() if waits else returned) - start) / count

        return {
            name: Runner(partial(run, waits), "loop")
            for name, waits in (("loop", True), ("host", False))
        }

    def _capture(self, steps: Sequence[Call]) -> Any:
        """A graph of all steps, or None if something in them cannot be captured."""
        with self.stream:
            for step in steps:  # compiles, fills pools of memory
                step()
            self.stream.synchronize()
            try:
                self.stream.begin_capture()
                for step in steps:
                    step()
                return self.stream.end_capture()
            except Exception:
                with suppress(Exception):  # the capture is invalid already; this ends it
                    self.stream.end_capture()
        self.stream = self.cuda.Stream(non_blocking=True)
        return None


def alternate(
    runners: Mapping[str, Runner],
    *,
    min_rounds: int = 5,
    max_rounds: int = 50,
    min_seconds: float = 0.1,
) -> dict[str, float]:
    """Median seconds of each runner.

    Parameters
    ----------
    runners : mapping of str to Runner
        Each runs once before anything counts; then they take turns, once a round.
    min_rounds, max_rounds : int
    min_seconds : float
        Rounds go on until all of them together have taken this long.

    Examples
    --------
    >>> from turboquant_np.bench.timing import HostClock, alternate
    >>> clock = HostClock()
    >>> calls = {"sum": lambda: sum(range(1000)), "nothing": lambda: None}
    >>> runners = {name: clock.prepare([call]) for name, call in calls.items()}
    >>> times = alternate(runners, min_rounds=9)
    >>> times["sum"] > times["nothing"] > 0
    True
    """
    for runner in runners.values():
        runner.seconds()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    total = 0.0
    for done in range(max_rounds):
        if done >= min_rounds and total >= min_seconds:
            break
        for name, runner in runners.items():
            seconds[name].append(runner.seconds())
            total += seconds[name][-1]
    return {name: median(times) for name, times in seconds.items()}
