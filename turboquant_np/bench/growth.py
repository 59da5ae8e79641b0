"""How the cost grows: one setting varies, everything else stays, and a power law is fitted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from . import attention, codec
from .fits import fit
from .workbench import Row, Task, Workbench

__all__ = ["SWEEPS", "Sweep", "memory_to_use", "slopes", "steady_seconds", "tasks"]

TOLERANCE = 0.15  # of a slope, for noise and for caches that are outgrown
STEEP = 0.5  # of a part between neighbours, which is noisier


@dataclass(frozen=True)
class Sweep:
    """One setting that varies.

    Attributes
    ----------
    name : str
        The setting, as lines call it.
    operations : tuple of str
    per_item : bool
        Whether the time of an item (a vector) is fitted, not that of a call.
    expected : float
        The largest exponent that is no surprise.
    why : str
    """

    name: str
    operations: tuple[str, ...]
    per_item: bool
    expected: float
    why: str


SWEEPS = {
    "context": Sweep("context", ("step",), False, 1.0, "every token is read once"),
    "batch": Sweep("batch", ("step",), False, 1.0, "sequences do not share pages"),
    "bits of a cache": Sweep("key_bits", ("step",), False, 1.0, "bytes read grow with the bits"),
    "vectors": Sweep("items", ("encode", "decode"), False, 1.0, "rows do not interact"),
    "length": Sweep(
        "head_dim", ("encode", "decode"), True, 1.25, "powers of two; d log d additions"
    ),
    "other lengths": Sweep(
        "head_dim", ("encode", "decode"), True, 1.25, "two transforms for each round"
    ),
    "bits": Sweep("bits", ("encode", "decode"), True, 1.0, "a search and packing of so many bits"),
    "threads": Sweep(
        "threads", ("encode", "decode", "step"), True, 0.0, "-1 would be a perfect speed-up"
    ),
}


def memory_to_use(device: str) -> int:
    """Bytes that a case may take: a quarter of what is free."""
    if device == "cuda":
        import cupy

        free: int = cupy.cuda.runtime.memGetInfo()[0]
        return free // 4
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError, AttributeError):  # not a POSIX system that tells
        return 2**30


def points(
    bench: Workbench, *, threads_only: bool
) -> Iterator[tuple[str, attention.AttentionCase | codec.Case, int | None]]:
    """Sweep, case and number of vectors of each line; see `tasks`."""
    base = attention.AttentionCase()
    vector = codec.Case(128, 4, 3)
    if bench.device == "cuda":
        base = replace(base, dtype="float16", order="head")
        vector = replace(vector, dtype="float16")
    yield "threads", vector, None
    yield "threads", replace(base, context=16384), None
    if threads_only:
        return
    full, cuda = bench.options.full, bench.device == "cuda"
    contexts = [2**k for k in range(10, 21 if full or cuda else 19, 2)]
    sizes = {"context": [replace(base, context=n) for n in contexts]}
    batches = [1, 4, 16, 64, 256] if full or cuda else [1, 4, 16, 64]
    sizes["batch"] = [replace(base, context=1024, batch=n) for n in batches]
    sizes["bits of a cache"] = [attention.with_bits(base, bits) for bits in range(1, 9)]
    room = memory_to_use(bench.device)
    for name, cases in sizes.items():
        for case in cases:
            if 2 * case.batch * case.context * case.kv_heads * (case.head_dim // 2 + 4) <= room:
                yield name, case, None
    for rows in [4**k for k in range(11 if full or cuda else 10)]:
        if rows * 128 * 8 <= room:
            yield "vectors", vector, rows
    for name, first in (("length", 64), ("other lengths", 96)):
        for d in (first * 2**k for k in range(5)):
            yield name, replace(vector, head_dim=d), None
    for bits in range(1, 9):
        yield "bits", replace(vector, bits=bits), None


def tasks(bench: Workbench, *, threads_only: bool) -> Iterable[Task]:
    """All sweeps, or with `threads_only` the lines that differ between numbers of threads alone."""
    for sweep, case, rows in points(bench, threads_only=threads_only):
        if isinstance(case, codec.Case):
            yield _encode(bench, sweep, case, rows)
        else:
            yield _attend(bench, sweep, case)


def _attend(bench: Workbench, sweep: str, case: attention.AttentionCase) -> Task:
    return lambda: [attention.measure(bench, case, "growth") | {"sweep": sweep}]


def _encode(bench: Workbench, sweep: str, case: codec.Case, rows: int | None) -> Task:
    return lambda: [
        row | {"sweep": sweep} for row in codec.measure(bench, case, rows, section="growth")
    ]


def steady_seconds(rows: list[Row]) -> list[float]:
    """Times as they would be if the machine had always run at its usual speed.

    While one point of a sweep is measured the machine may be slower than while another is: by as
    much as the roofline that limits the call was slower than its median, in turns with the call.
    """
    rates: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        rates.setdefault((row["threads"], row["limit"]), []).append(row["rooflines"][row["limit"]])
    usual = {key: median(found) for key, found in rates.items()}
    return [
        row["seconds"] * row["rooflines"][row["limit"]] / usual[row["threads"], row["limit"]]
        for row in rows
    ]


def slopes(lines: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """The fitted growth of every sweep that has two points or more.

    Where small calls cost a constant, a slope below the expected one is no loss; ``superlinear``
    says that the slope is above it, ``steep`` that the part between two neighbours is.

    What is fitted are times at the machine's usual speed, see `steady_seconds`; for threads, which
    change that speed, it is the times as they are.
    """
    rows = [row for row in lines if row["section"] == "growth"]
    steady = steady_seconds(rows)
    for title, sweep in SWEEPS.items():
        for operation in sweep.operations:
            points = sorted(
                (
                    row[sweep.name],
                    (row["seconds"] if title == "threads" else seconds)
                    / (row["items"] if sweep.per_item else 1),
                )
                for row, seconds in zip(rows, steady, strict=True)
                if (row["sweep"], row["operation"]) == (title, operation)
            )
            if len({x for x, _ in points}) < 2:
                continue
            growth = fit(*zip(*points, strict=True))
            yield {
                "sweep": title,
                "operation": operation,
                "from": points[0][0],
                "to": points[-1][0],
                "slope": growth.slope,
                "steepest": growth.steepest,
                "steepest_between": list(growth.between),
                "expected": sweep.expected,
                "why": sweep.why,
                "superlinear": growth.slope > sweep.expected + TOLERANCE,
                "steep": growth.steepest > sweep.expected + STEEP,
            }
