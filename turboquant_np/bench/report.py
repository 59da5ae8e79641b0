"""The document of a benchmark as text for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from ..commands.table import format_table, significant

__all__ = ["report"]

Row = dict[str, Any]
LETTERS = {"read": "r", "copy": "c", "multiply-add": "m", "float64 product": "p"}
LEGEND = (
    "In brackets: the share of what the machine could do at best, and what limits it: r reading or "
    "c copying memory\n(bytes that must move, over what was measured in turns), m fused "
    "multiply-adds in registers, p a float64 matrix product"
)
DISTURBED = 1.5  # the highest over the lowest of a limit that is always measured alike
TO_DIFFER = 0.1  # relative difference of two results that is more than their precisions explain


def report(document: dict[str, Any]) -> str:
    """All sections, goals last."""
    lines = document["lines"]
    sections = [
        about(document["about"]),
        rooflines(lines),
        codec(lines),
        attention(lines),
        append(lines),
        growth(document["growth"]),
        codec_peers(document["peers"]),
        attention_peers(document["peers"]),
        missing(document["missing"]),
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


# -- cells -----------------------------------------------------------------------------------------


def threads(row: Row) -> str:
    return str(row["threads"]) if row["threads"] else "GPU"


def seconds(value: float) -> str:
    """Three digits and a unit.

    Examples
    --------
    >>> from turboquant_np.bench.report import seconds
    >>> seconds(1.5), seconds(0.00123), seconds(4.56e-6)
    ('1.50 s', '1.23 ms', '4.56 us')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{significant(value / size).rstrip('.')} {unit}"
    return f"{significant(value / 1e-6).rstrip('.')} us"


def share(row: Row) -> str:
    return f"{row['share']:.0%} {LETTERS[row['limit']]}"


def short(name: str) -> str:
    """How tables call a setting."""
    return {"operation": "", "head_dim": "d", "query_len": "query\ntokens"}.get(name, name)


def section_of(lines: Iterable[Row], name: str) -> list[Row]:
    return [row for row in lines if row["section"] == name]


# -- lines -----------------------------------------------------------------------------------------


def rooflines(lines: Iterable[Row]) -> str:
    """Medians of what was measured in turns with all lines, by number of threads."""
    rates: dict[tuple[str, str], list[float]] = {}
    for row in lines:
        for name, rate in row["rooflines"].items():
            rates.setdefault((threads(row), name), []).append(rate)
    if not rates:
        return ""
    # always of the same size, unlike products
    units = {"read": "GB/s", "copy": "GB/s", "multiply-add": "G/s"}
    table = format_table(
        ["threads", "limit", "median", "lowest", "highest", ""],
        [
            [
                where,
                name,
                *(significant(f(found) / 1e9) for f in (median, min, max)),
                units.get(name, "G/s"),
            ]
            for (where, name), found in rates.items()
        ],
    )
    text = f"Limits of the machine, measured in turns with everything below\n\n{table}"
    disturbed = [
        f"{name} ({where})"
        for (where, name), found in rates.items()
        if name in units and max(found) > DISTURBED * min(found)
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
            "of the limit",
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
                share(row),
            ]
            for row in rows
        ],
    )
    return f"Attention on packed pages in random order, all of a call included\n{LEGEND}\n\n{table}"


def _bits(row: Row) -> str:
    both = (row["key_bits"], row["value_bits"])
    return str(both[0]) if both[0] == both[1] else f"{both[0]}/{both[1]}"


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


# -- other libraries -------------------------------------------------------------------------------


def _beside(
    rows: list[Row],
    axes: Sequence[str],
    theirs: Callable[[Row], str],
    ours: Callable[[Row], str],
    unit: str,
) -> str:
    """A line for each comparison, a pair of columns for each of our variants."""
    variants = list(dict.fromkeys(row["ours"] for row in rows))
    table: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        line = tuple(threads(row) if axis == "threads" else str(row[axis]) for axis in axes)
        table.setdefault(line, {})[row["ours"]] = row
    header = [*map(short, axes), f"theirs{unit}"]
    for variant in variants:
        header += [f"ours, {variant}{unit}", "times\nfaster"]
    lines = []
    for line, cells in table.items():
        cell = next(iter(cells.values()))
        texts = [*line, theirs(cell)]
        for variant in variants:
            found = cells.get(variant)
            texts += [ours(found), f"{found['ratio']:.2f}"] if found else ["", ""]
        lines.append(texts)
    return format_table(header, lines)


def codec_peers(peers: Iterable[Row]) -> str:
    rows = section_of(peers, "codec")
    rows.sort(key=lambda r: (r["operation"] == "decode", r["threads"], r["head_dim"], r["bits"]))
    if not rows:
        return ""

    def speed(row: Row, key: str) -> str:
        return significant(row["items"] / row[key] / 1e6)

    table = _beside(
        rows,
        ("peer", "version", "operation", "head_dim", "bits", "threads"),
        lambda row: speed(row, "peer_seconds"),
        lambda row: speed(row, "our_seconds"),
        "\nMvec/s",
    )
    return f"Codec beside other libraries: float32, the same vectors, in turns, medians\n\n{table}"


def attention_peers(peers: Iterable[Row]) -> str:
    rows = section_of(peers, "attention")
    rows.sort(key=lambda r: (r["operation"] == "prefill", r["threads"], r["context"], r["batch"]))
    if not rows:
        return ""
    named = [row | {"results": _agreement(row), "timed": _timed(row)} for row in rows]
    axes = ["peer", "version", "operation", "batch", "context", "query_heads", "threads"]
    table = _beside(
        named,
        [*axes, "results", "timed"],
        lambda row: seconds(row["peer_seconds"]),
        lambda row: seconds(row["our_seconds"]),
        "",
    )
    return (
        "Attention beside other libraries: the same vectors, decoded to their dtype, in turns, "
        f"medians\n\n{table}"
    )


def _agreement(row: Row) -> str:
    difference = row["difference"]
    if difference is None:
        return "not compared"
    return "DIFFER" if difference > TO_DIFFER else f"agree to {difference:.0e}"


def _timed(row: Row) -> str:
    """How theirs was timed, and ours where that differs."""
    both = (row["peer_timed"], row["our_timed"])
    return both[0] if both[0] == both[1] else f"{both[0]}, ours {both[1]}"


def missing(rows: list[Row]) -> str:
    if not rows:
        return ""
    table = format_table(
        ["section", "library", "why"],
        [[row["section"], row["peer"], row["missing"]] for row in rows],
    )
    return f"Not compared\n\n{table}"


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
