"""Threads: ranges of rows for kernels that release the GIL.

A queue and Python threads that wait for it serve the whole process.  Chunks are claimed one by one,
by the caller as well, so a caller never waits for work nobody has begun; inside a worker everything
runs inline.  That makes concurrent and nested calls safe, and after a fork the child begins with
threads of its own.  Results do not depend on how rows are divided, because rows do not interact.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import NamedTuple

from .linger import WAITS, boxes
from .simd import CACHE_LINE

ENVIRONMENT_VARIABLE = "TURBOQUANT_NP_NUM_THREADS"
GRAIN = 1 << 16  # elements below which a piece of work isn't worth a thread
PIECES_PER_THREAD = 4
MOST_LINGERING = 64  # threads

Task = Callable[[int, int], None]

_in_worker = threading.local()


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


@contextmanager
def alone() -> Iterator[None]:
    """Within it this thread computes by itself: for callers who have divided their work already."""
    before = getattr(_in_worker, "active", False)
    _in_worker.active = True
    try:
        yield
    finally:
        _in_worker.active = before


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
        with alone():
            while (piece := next(claims)) < pieces:  # next() is atomic under the GIL
                task(bounds[piece], bounds[piece + 1])

    helpers = [_Helper(work) for _ in range(min(threads, pieces) - 1)]
    _pool.submit(helpers)
    try:
        work()
    finally:
        for helper in helpers:
            helper.wait()


def helpers_worth(elements: int) -> int:
    """How many other threads a piece of work of that size is worth."""
    if elements < 2 * GRAIN or getattr(_in_worker, "active", False):
        return 0
    return min(num_threads(), elements // GRAIN) - 1


class Loan(NamedTuple):
    """Threads that wait to be hired by a kernel, see linger.emit_hire."""

    first_box: int  # its address
    box_count: int
    wanted: int


NO_LOAN = Loan(0, 0, 0)


def lend(work: Callable[[], None], helpers: int) -> Loan:
    """Have other threads call `work` as well: some that sleep, and those that a kernel hires.

    Nobody waits for them, so they may come when all is done.  End with `take_back`.
    """
    if not helpers:
        return NO_LOAN
    return _pool.lend(_Volunteer(work), helpers)


def own_box() -> int:
    """Address of the box where this thread may wait to be hired; 0 if it has none."""
    box: int = getattr(_in_worker, "box", 0)
    return box


def take_back() -> None:
    """Forget the work that was lent out last."""
    _pool.posted = None


class _Volunteer:
    """Calls a function that need not be called; who looks for more such work afterwards."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def __call__(self) -> None:
        with suppress(Exception):  # memory, perhaps; others do the work
            self._work()


class _Helper:
    """Calls a function once, unless somebody no longer waits for that by then."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._begun, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def __call__(self) -> None:
        if self._begun.acquire(blocking=False):
            try:
                self._work()
            except BaseException as error:
                self._error = error
            finally:
                self._done.release()

    def wait(self) -> None:
        """Return when the function has; if it has not begun it never will."""
        if not self._begun.acquire(blocking=False):
            self._done.acquire()
            if self._error is not None:
                raise self._error


class _Pool:
    """Threads that call what they find in a queue; there are as many as were ever asked for."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock, self._size = threading.Lock(), 0
        self._boxes = boxes(MOST_LINGERING)
        self._first_box = int(self._boxes.__array_interface__["data"][0])
        self.posted: _Volunteer | None = None  # for those who are hired

    def submit(self, calls: Sequence[Callable[[], None]]) -> None:
        """Have each called by some thread; without threads (while Python ends) by none."""
        if self._size < len(calls):
            self._grow(len(calls))
        if self._size:
            for call in calls:
                self._queue.put(call)

    def lend(self, work: _Volunteer, helpers: int) -> Loan:
        count = min(self._size, MOST_LINGERING)
        waiting = min(self._boxes[:count, 0].tolist().count(WAITS), helpers)
        if waiting:
            self.posted = work
        if waiting < helpers:
            self.submit([work] * (helpers - waiting))
        return Loan(self._first_box, count, waiting)

    def _grow(self, size: int) -> None:
        with self._lock:
            while self._size < size:
                serve = partial(self._serve, self._size)
                thread = threading.Thread(target=serve, name="turboquant_np", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads: callers do the work
                    return
                self._size += 1

    def _serve(self, number: int) -> None:
        call: Callable[[], None] | None = None
        if number < MOST_LINGERING:
            _in_worker.box = self._first_box + CACHE_LINE * number
        while True:
            if call is None:
                call = self._queue.get()
            call()
            call = None  # and with it the memory it keeps
            if number < MOST_LINGERING and self._boxes[number, 1]:
                self._boxes[number, 1] = 0
                call = self.posted


def _start_anew() -> None:
    """In a forked child the threads do not exist, and their lock may be held by one of them."""
    global _pool
    _pool = _Pool()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
