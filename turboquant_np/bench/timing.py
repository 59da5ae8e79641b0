"""Median times of calls that take turns, so that a busy neighbour slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

__all__ = ["Call", "Timer", "alternate", "cuda_seconds", "host_seconds"]

Call = Callable[[], Any]
Timer = Callable[[Call], float]


def host_seconds(call: Call) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Call) -> float:
    """Seconds between two CUDA events around one call, on the current stream."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3


def alternate(
    calls: Mapping[str, Call],
    timer: Timer = host_seconds,
    *,
    min_rounds: int = 5,
    max_rounds: int = 50,
    min_seconds: float = 0.1,
) -> dict[str, float]:
    """Median seconds of each call.

    Parameters
    ----------
    calls : mapping of str to callable
        Each is called once before anything is timed; then they take turns, one call a round.
    timer : callable
        Seconds of one call.
    min_rounds, max_rounds : int
    min_seconds : float
        Rounds go on until all calls together have taken this long.

    Examples
    --------
    >>> from turboquant_np.bench.timing import alternate
    >>> times = alternate({"sum": lambda: sum(range(1000)), "nothing": lambda: None}, min_rounds=9)
    >>> times["sum"] > times["nothing"] > 0
    True
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    total = 0.0
    for done in range(max_rounds):
        if done >= min_rounds and total >= min_seconds:
            break
        for name, call in calls.items():
            seconds[name].append(timer(call))
            total += seconds[name][-1]
    return {name: median(times) for name, times in seconds.items()}
