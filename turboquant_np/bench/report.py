"""The document of a benchmark as text for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from ..commands.table import format_table, significant
from . import report_peers
from .cells import Row, seconds, section_of, share, short, threads

__all__ = ["report"]

LEGEND = (
    "In brackets: the share of what the machine could do at best, and what limits it: r reading or "
    "c copying memory\n(bytes that must move, over what was measured in turns), m fused "
    "multiply-adds in registers, t a float16\nmatrix product on tensor cores, p a float64 matrix "
    "product"
)
ALWAYS_ALIKE = {  # limits that are always measured with the same size, unlike products; their units
    "read": ("GB/s", 1e9),
    "copy": ("GB/s", 1e9),
    "multiply-add": ("G/s", 1e9),
    "tensor cores": ("T/s", 1e12),
}
DISTURBED = 1.5  # the highest over the lowest of a limit that is always measured alike


def report(document: dict[str, Any]) -> str:
    """All sections, goals last."""
    lines = document["lines"]
    sections = [
        about(document["about"]),
        rooflines(lines),
        codec(lines),
        attention(lines),
        launches(document["launches"]),
        append(lines),
        growth(document["growth"]),
        report_peers.codec(document["peers"]),
        report_peers.attention(document["peers"]),
        report_peers.missing(document["missing"]),
        startup(document["startup"]),
        validation(document["validation"]),
        memory(document["memory"]),
        contexts(document["contexts"]),
        goals(document["goals"]),
    ]
    return "\n\n".join(section for section in sections if section)


def about(found: Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    backend = ", ".join(
        f"{name} {fact}" for name, fact in found["backend"].items() if name not in found["versions"]
    )
    return f"{found['machine']}, {found['cores']} cores, {found['date']}\n{versions}\n{backend}"


# -- lines -----------------------------------------------------------------------------------------


def rooflines(lines: Iterable[Row]) -> str:
    """Medians of what was measured in turns with all lines, by number of threads."""
    rates: dict[tuple[str, str], list[float]] = {}
    for row in lines:
        for name, rate in row["rooflines"].items():
            rates.setdefault((threads(row), name), []).append(rate)
    if not rates:
        return ""
    table = format_table(
        ["threads", "limit", "median", "lowest", "highest", ""],
        [
            [
                where,
                name,
                *(significant(f(found) / size) for f in (median, min, max)),
                unit,
            ]
            for (where, name), found in rates.items()
            for unit, size in [ALWAYS_ALIKE.get(name, ("G/s", 1e9))]
        ],
    )
    text = f"Limits of the machine, measured in turns with everything below\n\n{table}"
    disturbed = [
        f"{name} ({where})"
        for (where, name), found in rates.items()
        if name in ALWAYS_ALIKE and max(found) > DISTURBED * min(found)
    ]
    if disturbed:
        text += (
            f"\n\nSomething else used the machine at times: {', '.join(disturbed)} varied by more "
            f"than {DISTURBED:g}. Repeat when it is quiet."
        )
    return text


def _wide(rows: Iterable[Row], axes: tuple[str, ...], cell: Callable[[Row], str]) -> str:
    """A table with one line for each combination of `axes` and one column for each bit width."""
    table: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        line = tuple(threads(row) if axis == "threads" else str(row[axis]) for axis in axes)
        table.setdefault(line, {})[row["bits"]] = cell(row)
    bits = sorted({b for cells in table.values() for b in cells})
    return format_table(
        [*map(short, axes), *(f"{b} bit" for b in bits)],
        [[*line, *(cells.get(b, "") for b in bits)] for line, cells in table.items()],
    )


def codec(lines: Iterable[Row]) -> str:
    rows = sorted(
        section_of(lines, "codec"),
        key=lambda row: (not row["rounds"], row["threads"], row["operation"] == "decode"),
    )
    if not rows:
        return ""

    def cell(row: Row) -> str:
        return f"{significant(row['items_per_second'] / 1e6)} ({share(row)})"

    named = [row | {"rotation": _rotation(row)} for row in rows]
    axes = ("operation", "head_dim", "dtype", "rotation", "threads")
    return f"Codec: million vectors per second\n{LEGEND}\n\n{_wide(named, axes, cell)}"


def _rotation(row: Row) -> str:
    rounds = row["rounds"]
    return f"{rounds} round{'s' if rounds > 1 else ''}" if rounds else "Haar"


def attention(lines: Iterable[Row]) -> str:
    rows = section_of(lines, "attention")
    if not rows:
        return ""
    on_gpu = any("copy" in row["rooflines"] for row in rows)
    table = format_table(
        [
            "",
            "threads",
            "batch",
            "context",
            "query\ntokens",
            "heads",
            "d",
            "bits",
            "page",
            "query",
            "time",
            "GB/s",
            "TFLOP/s",
            "of the limit",
            *(["of a copy"] if on_gpu else []),
        ],
        [
            [
                row["operation"],
                threads(row),
                str(row["batch"]),
                f"{row['context']:,}",
                str(row["query_len"]),
                f"{row['kv_heads'] * row['group']}/{row['kv_heads']}",
                str(row["head_dim"]),
                _bits(row),
                f"{row['block_size']} {row['order']}",
                row["dtype"],
                seconds(row["seconds"]),
                significant(row["bytes_per_second"] / 1e9),
                significant(2 * row["operations_per_second"] / 1e12),
                share(row),
                *([_of_copy(row)] if on_gpu else []),
            ]
            for row in rows
        ],
    )
    return f"Attention on packed pages in random order, all of a call included\n{LEGEND}\n\n{table}"


def _of_copy(row: Row) -> str:
    """Bytes a second over those that a copy reads and writes."""
    copy = row["rooflines"].get("copy")
    return f"{row['bytes_per_second'] / copy:.0%}" if copy else ""


def _bits(row: Row) -> str:
    both = (row["key_bits"], row["value_bits"])
    return str(both[0]) if both[0] == both[1] else f"{both[0]}/{both[1]}"


def launches(rows: list[Row]) -> str:
    if not rows:
        return ""
    table = format_table(
        [
            "",
            "batch",
            "context",
            "bits",
            "page",
            "in a graph",
            "in a loop",
            "more",
            "a call returns\nafter",
        ],
        [
            [
                row["operation"],
                str(row["batch"]),
                f"{row['context']:,}",
                _bits(row),
                f"{row['block_size']} {row['order']}",
                seconds(row["graph_seconds"]),
                seconds(row["loop_seconds"]),
                seconds(row["loop_seconds"] - row["graph_seconds"]),
                seconds(row["host_seconds"]),
            ]
            for row in rows
        ],
    )
    return (
        f"Steps called from Python, {rows[0]['calls']} in a row and the last one waited for, "
        f"beside the same in a CUDA graph\n\n{table}"
    )


def append(lines: Iterable[Row]) -> str:
    rows = section_of(lines, "append")
    if not rows:
        return ""
    table = format_table(
        [
            "",
            "threads",
            "sequences",
            "new tokens\nof each",
            "bits",
            "dtype",
            "time",
            "GB/s",
            "of the limit",
        ],
        [
            [
                row["operation"],
                threads(row),
                str(row["sequences"]),
                str(row["new_tokens"]),
                str(row["bits"]),
                row["dtype"],
                seconds(row["seconds"]),
                significant(row["bytes_per_second"] / 1e9),
                share(row),
            ]
            for row in rows
        ],
    )
    return f"New tokens into a paged cache, one layer, 8 kv heads of 128\n\n{table}"


def growth(rows: list[Row]) -> str:
    if not rows:
        return ""
    table = format_table(
        [
            "time against",
            "",
            "from",
            "to",
            "slope",
            "steepest\npart",
            "expected\nat most",
            "verdict",
            "",
        ],
        [
            [
                row["sweep"],
                row["operation"],
                f"{row['from']:,}",
                f"{row['to']:,}",
                f"{row['slope']:.2f}",
                f"{row['steepest']:.2f}",
                f"{row['expected']:.2f}",
                _growth_verdict(row),
                row["why"],
            ]
            for row in rows
        ],
    )
    return f"How time grows: exponents p of time = c * x^p, fitted to logarithms\n\n{table}"


def _growth_verdict(row: Row) -> str:
    if row["superlinear"]:
        return "SUPERLINEAR"
    if row["steep"]:
        start, stop = row["steepest_between"]
        return f"steep from {start:,} to {stop:,}"
    return "ok"


# -- without a clock -------------------------------------------------------------------------------


def startup(found: Row) -> str:
    if not found:
        return ""
    return (
        f"Start: import {found['import_seconds']:.2f} s, "
        f"first encode of a process {found['first_encode_seconds']:.2f} s (kernels cached)"
    )


def validation(rows: list[Row]) -> str:
    if not rows:
        return ""
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
    if not rows:
        return ""
    sizes = [name for name in rows[0] if name != "model"]
    table = format_table(
        ["model", *sizes], [[row["model"], *(f"{row[s]:,}" for s in sizes)] for row in rows]
    )
    return f"KV cache: bytes per token, scales included\n\n{table}"


def contexts(rows: list[Row]) -> str:
    if not rows:
        return ""
    sizes = [name for name in rows[0] if name not in ("model", "gpu_gb")]
    table = format_table(
        ["model", "GPU\nGB", *sizes],
        [
            [
                row["model"],
                str(row["gpu_gb"]),
                *(f"{row[s]:,}" if row[s] else "-" for s in sizes),
            ]
            for row in rows
        ],
    )
    return f"Longest context in tokens, beside 4-bit weights, 90 % of the memory used\n\n{table}"


def goals(rows: list[Row]) -> str:
    if not rows:
        return ""
    verdicts = {True: "met", False: "missed", None: "not measured"}
    table = format_table(
        ["", "goal", "measured", ""],
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
