"""What stands in a cell of the benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..commands.table import significant

__all__ = ["Row", "seconds", "section_of", "share", "short", "threads"]

Row = dict[str, Any]
LETTERS = {
    "read": "r",
    "copy": "c",
    "multiply-add": "m",
    "tensor cores": "t",
    "float64 product": "p",
}


def threads(row: Row) -> str:
    """Of the CPU, how many."""
    return str(row["threads"]) if row["threads"] else "GPU"


def seconds(value: float) -> str:
    """Three digits and a unit.

    Examples
    --------
    >>> from turboquant_np.bench.cells import seconds
    >>> seconds(1.5), seconds(0.00123), seconds(4.56e-6)
    ('1.50 s', '1.23 ms', '4.56 us')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{significant(value / size).rstrip('.')} {unit}"
    return f"{significant(value / 1e-6).rstrip('.')} us"


def share(row: Row) -> str:
    """Of the limit, and the letter of that."""
    return f"{row['share']:.0%} {LETTERS[row['limit']]}"


def short(name: str) -> str:
    """How tables call a setting."""
    return {"operation": "", "head_dim": "d", "query_len": "query\ntokens"}.get(name, name)


def section_of(lines: Iterable[Row], name: str) -> list[Row]:
    """Its rows."""
    return [row for row in lines if row["section"] == name]
