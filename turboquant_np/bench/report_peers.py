"""The tables of a benchmark that put other libraries beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..commands.table import format_table, significant
from .cells import Row, seconds, section_of, short, threads

__all__ = ["attention", "codec", "missing"]

TO_DIFFER = 0.1  # relative difference of two results that is more than their precisions explain


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


def codec(peers: Iterable[Row]) -> str:
    """Encoding and decoding of the same vectors."""
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


def attention(peers: Iterable[Row]) -> str:
    """Steps and prefills over the same keys and values."""
    rows = section_of(peers, "attention")
    rows.sort(key=lambda r: (r["operation"] == "prefill", r["threads"], r["context"], r["batch"]))
    if not rows:
        return ""
    named = [row | {"results": _agreement(row), "timed": _timed(row)} for row in rows]
    axes = ["peer", "version", "operation", "batch", "context", "query_heads", "threads"]
    table = _beside(
        named,
        [*axes, "results", "timed"],
        lambda row: _time(row, "peer_seconds"),
        lambda row: _time(row, "our_seconds"),
        "",
    )
    return (
        "Attention beside other libraries: the same vectors, decoded to their dtype, in turns, "
        f"medians\n\n{table}"
    )


def _time(row: Row, key: str) -> str:
    """Of a prefill, what it does a second too."""
    text = seconds(row[key])
    if row["operation"] != "prefill" or "operations" not in row:  # which files used not to have
        return text
    rate = significant(2 * row["operations"] / row[key] / 1e12).rstrip(".")
    return f"{text} ({rate} TFLOP/s)"


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
    """What was not compared, and why."""
    if not rows:
        return ""
    table = format_table(
        ["section", "library", "why"],
        [[row["section"], row["peer"], row["missing"]] for row in rows],
    )
    return f"Not compared\n\n{table}"
