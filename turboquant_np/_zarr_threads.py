"""Which threads compute for Zarr: the event loop's own, another, or many."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from zarr.core.config import config

SHORT = 1 << 24  # bytes of floats that are encoded or decoded in a few milliseconds

T = TypeVar("T")
R = TypeVar("R")

_loop = threading.local()  # .operations: begun, and not finished, on the event loop of this thread


@contextmanager
def operation() -> Iterator[None]:
    """One read or write of one chunk, from before its bytes are fetched; `compute` counts them."""
    _loop.operations = getattr(_loop, "operations", 0) + 1
    try:
        yield
    finally:
        _loop.operations -= 1


async def compute(function: Callable[..., R], *arguments: Any, nbytes: int) -> R:
    """What function(*arguments) returns; called within an `operation`.

    To another thread and back takes 0.15 ms, a fifth of what two CPUs take to decode 8 MB.  So the
    event loop computes itself while it has no other operation under way: for a chunk that is not
    too large, that is about as long as Zarr keeps it busy with copying what was decoded.

    Parameters
    ----------
    nbytes : int
        Of the floats that are encoded or decoded.
    """
    await asyncio.sleep(0)  # operations that were asked for together with this one begin here
    if _loop.operations == 1 and nbytes <= SHORT:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


async def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """[function(item) for item in items], on as many threads as Zarr would use.

    Where there is an item for every CPU, each is encoded or decoded by one thread: that takes no
    waiting for each other.  More threads than CPUs keep a slow disk busy.
    """
    from .backends.cpu.threads import alone, num_threads  # here because it imports Numba

    cpus = num_threads()
    waiting = deque(enumerate(items))
    results: dict[int, R] = {}

    def work() -> None:
        with alone() if len(items) >= cpus else nullcontext():
            while True:
                try:
                    index, item = waiting.popleft()
                except IndexError:
                    return
                try:
                    results[index] = function(item)
                except BaseException:
                    waiting.clear()
                    raise

    threads = min(len(items), max(config.get("async.concurrency"), cpus))
    await asyncio.gather(*(asyncio.to_thread(work) for _ in range(threads)))
    return [results[index] for index in range(len(items))]
