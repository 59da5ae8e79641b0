"""Threads: ranges of rows for kernels that release the GIL.

One pool of Python threads serves the whole process.  Chunks are claimed one by one, by the caller
as well, so a caller never waits for work nobody has begun; inside a worker everything runs inline.
That makes concurrent and nested calls safe, and after a fork the child makes a pool of its own.
Results do not depend on how rows are divided, because rows do not interact.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

ENVIRONMENT_VARIABLE = "TURBOQUANT_NP_NUM_THREADS"
GRAIN = 1 << 16  # elements below which a piece of work isn't worth a thread
PIECES_PER_THREAD = 4

Task = Callable[[int, int], None]

_in_worker = threading.local()
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def num_threads() -> int:
    """CPUs this process may use, or what TURBOQUANT_NP_NUM_THREADS says.

    Raises
    ------
    ValueError
        If the variable is no positive whole number.
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not setting:
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if setting.isdecimal() and int(setting) >= 1:
        return int(setting)
    raise ValueError(
        f"{ENVIRONMENT_VARIABLE} must be a whole number >= 1, got {setting!r}; "
        "unset it to use every CPU of this process"
    )


def for_rows(rows: int, elements_per_row: int, task: Task) -> None:
    """Call task(start, stop) for ranges that cover 0..rows, on several threads if it pays."""
    threads = 1 if getattr(_in_worker, "active", False) else num_threads()
    pieces = min(PIECES_PER_THREAD * threads, rows * elements_per_row // GRAIN, rows)
    if threads == 1 or pieces < 2:
        task(0, rows)
        return
    bounds = [rows * i // pieces for i in range(pieces + 1)]
    claims = count()

    def work() -> None:
        _in_worker.active = True
        try:
            while (piece := next(claims)) < pieces:  # next() is atomic under the GIL
                task(bounds[piece], bounds[piece + 1])
        finally:
            _in_worker.active = False

    helpers = _submit(work, min(threads, pieces) - 1)
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def lend_helpers(work: Callable[[], None], elements: int) -> None:
    """Have other threads call `work` as well, if a piece of work of that size is worth it.

    Nobody waits for them, so they may come when all is done.
    """
    helpers = min(num_threads(), elements // GRAIN) - 1
    if helpers > 0 and not getattr(_in_worker, "active", False):
        _submit(work, helpers)


def _submit(work: Callable[[], None], helpers: int) -> list[Future[None]]:
    """Ask the pool to do `work` `helpers` times; the pool grows where it has to."""
    global _pool, _pool_size
    submitted: list[Future[None]] = []
    with _lock:
        if _pool is None or _pool_size < helpers:
            if _pool is not None:
                _pool.shutdown(wait=False)  # what it was given is still done
            _pool, _pool_size = ThreadPoolExecutor(helpers, "turboquant_np"), helpers
        try:
            for _ in range(helpers):
                submitted.append(_pool.submit(work))
        except RuntimeError:  # the interpreter is shutting down: the caller does the rest
            pass
    return submitted


def _forget_pool() -> None:
    """In a forked child the threads do not exist, and the lock may be held by one of them."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
