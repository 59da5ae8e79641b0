"""The document of a benchmark as text for people."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from ..commands.table import format_table, significant

__all__ = ["report"]

Row = dict[str, Any]


def report(document: dict[str, Any]) -> str:
    """All sections, goals last."""
    sections = [
        about(document["about"]),
        codec(row for row in document["codec"] if row["rounds"]),
        haar(row for row in document["codec"] if not row["rounds"]),
        peers(document["peers"]),
        startup(document["startup"]),
        validation(document["validation"]),
        memory(document["memory"]),
        goals(document["goals"]),
    ]
    return "\n\n".join(section for section in sections if section)


def about(found: Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    backend = ", ".join(
        f"{name} {fact}" for name, fact in found["backend"].items() if name not in found["versions"]
    )
    return f"{found['machine']}, {found['cores']} cores, {found['date']}\n{versions}\n{backend}"


def _threads(row: Row) -> str:
    return str(row["threads"]) if row["threads"] else "GPU"


def _speed(row: Row) -> str:
    return f"{significant(row['mvec_s'])} ({row['share']:.0%})"


def _wide(rows: Iterable[Row], axes: tuple[str, ...]) -> str:
    """A table with one line for each combination of `axes` and one column for each bit width."""
    table: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        line = tuple(_threads(row) if axis == "threads" else str(row[axis]) for axis in axes)
        table.setdefault(line, {})[row["bits"]] = _speed(row)
    bits = sorted({b for cells in table.values() for b in cells})
    names = {"operation": "", "head_dim": "d"}
    return format_table(
        [*(names.get(axis, axis) for axis in axes), *(f"{b} bit" for b in bits)],
        [[*line, *(cells.get(b, "") for b in bits)] for line, cells in table.items()],
    )


def codec(rows: Iterable[Row]) -> str:
    rows = sorted(rows, key=lambda row: (row["threads"], row["operation"] == "decode"))
    if not rows:
        return ""
    axes = ("operation", "head_dim", "dtype", "rounds", "threads")
    return (
        "Codec: million vectors per second (share of the machine's memory bandwidth)\n"
        "encode: bytes read and written over the measured rate of reading; decode: of copying\n\n"
        + _wide(rows, axes)
        + f"\n\n{_bandwidths(rows)}"
    )


def _bandwidths(rows: list[Row]) -> str:
    """The rooflines, as medians over all lines."""
    rates: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        rates.setdefault((row["threads"], row["roofline"]), []).append(row["roofline_rate"])
    parts = []
    for (threads, roofline), measured in rates.items():
        where = f"{threads} thread{'s' if threads > 1 else ''}" if threads else "GPU"
        parts.append(f"{roofline} {median(measured):.1f} GB/s ({where})")
    return f"Measured in turns with them: {', '.join(parts)}"


def haar(rows: Iterable[Row]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    axes = ("operation", "head_dim", "dtype", "threads")
    return (
        "Haar rotation: million vectors per second (share of the rate of a float64 product)\n\n"
        + _wide(rows, axes)
    )


def peers(rows: list[Row]) -> str:
    if not rows:
        return ""
    rows = sorted(rows, key=lambda row: (row["threads"], row["head_dim"], row["bits"]))
    table = format_table(
        [
            "peer",
            "version",
            "d",
            "bits",
            "threads",
            "peer\nMvec/s",
            "ours, 3 rounds\nMvec/s",
            "times\nfaster",
            "ours, 1 round\nMvec/s",
            "times\nfaster",
        ],
        [
            [
                row["peer"],
                row["version"],
                str(row["head_dim"]),
                str(row["bits"]),
                _threads(row),
                significant(row["peer_mvec_s"]),
                significant(row["ours_3_rounds_mvec_s"]),
                f"{row['ratio_3_rounds']:.1f}",
                significant(row["ours_1_round_mvec_s"]),
                f"{row['ratio_1_round']:.1f}",
            ]
            for row in rows
        ],
    )
    return (
        f"Encoding beside other libraries: float32, the same vectors, in turns, medians\n\n{table}"
    )


def startup(found: Row) -> str:
    return (
        f"Start: import {found['import_seconds']:.2f} s, "
        f"first encode of a process {found['first_encode_seconds']:.2f} s (kernels cached)"
    )


def validation(rows: list[Row]) -> str:
    table = format_table(
        ["d", "bits", "squared error", "theory", "standard errors off", "verdict"],
        [
            [
                str(row["head_dim"]),
                str(row["bits"]),
                f"{row['mse']:#.4g}",
                f"{row['mse_expected']:#.4g}",
                f"{row['deviation']:+.1f}",
                "PASS" if row["passed"] else f"FAIL: {row['why']}",
            ]
            for row in rows
        ],
    )
    return f"Error of 10,000 random unit vectors beside theory\n\n{table}"


def memory(rows: list[Row]) -> str:
    sizes = [name for name in rows[0] if name != "model"]
    table = format_table(
        ["model", *sizes], [[row["model"], *(f"{row[s]:,}" for s in sizes)] for row in rows]
    )
    return f"KV cache: bytes per token, scales included\n\n{table}"


def goals(rows: list[Row]) -> str:
    if not rows:
        return ""
    verdicts = {True: "met", False: "missed", None: "not measured"}
    table = format_table(
        ["d = 128, float32, 4 bits, one core", "goal", "measured", ""],
        [
            [
                row["what"],
                f"{'<=' if row['at_most'] else '>='} {row['needed']:g} {row['unit']}",
                "" if row["measured"] is None else f"{row['measured']:.3g} {row['unit']}",
                verdicts[row["met"]],
            ]
            for row in rows
        ],
    )
    return f"Goals\n\n{table}"
