"""Pictures of a benchmark, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .growth import steady_seconds

__all__ = ["PLOTS", "draw"]

Row = dict[str, Any]
Document = dict[str, Any]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")
GREY = "#999999"
MARKERS = "os^Dvphx"
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


def draw(document: Document, path: str) -> list[Path]:
    """Write every picture there is data for, beside each other: NAME-roofline.svg and so on.

    Parameters
    ----------
    document : dict
        As `run` returns it.
    path : str
        NAME.svg; the suffix decides the format.

    Returns
    -------
    list of Path
        Absolute.
    """
    target = Path(path).resolve()
    written = []
    for name, plot in PLOTS.items():
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.subplots()
        if not plot(axes, document):
            continue
        axes.grid(color="#dddddd", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        about = document["about"]
        axes.set_title(f"{axes.get_title()}\n{about['machine']}, {about['date']}", fontsize=10)
        written.append(target.with_name(f"{target.stem}-{name}{target.suffix or '.svg'}"))
        figure.savefig(written[-1], dpi=120)
    return written


def _most_threads(rows: Iterable[Row]) -> list[Row]:
    """Those of the process with most threads, and how many these are is the same for all."""
    rows = list(rows)
    most = max((row["threads"] for row in rows), default=0)
    return [row for row in rows if row["threads"] == most]


def _threads(rows: list[Row]) -> str:
    count = rows[0]["threads"]
    return f"{count} thread{'s' if count > 1 else ''}" if count else "GPU"


def _style(i: int) -> dict[str, Any]:
    """Of the i-th curve."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _plain(axis: Axis) -> None:
    """Numbers instead of powers of ten, several in each decade."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high > 50 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())


def _logarithmic(axes: Axes, x: str, y: str) -> None:
    """Labels of an axis of powers of two, and of one of seconds."""
    axes.xaxis.set_major_formatter(PLAIN)
    _plain(axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


# -- roofline --------------------------------------------------------------------------------------


def roofline(axes: Axes, document: Document) -> bool:
    """Operations a second against operations a byte, below what the machine allows."""
    lines = [row for row in document["lines"] if row["operations"] and row["section"] != "growth"]
    rows = [row for row in _most_threads(lines) if row.get("rounds", 3)]
    if not rows:
        return False

    def rate(*names: str) -> float | None:
        found = [row["rooflines"][n] for row in rows for n in names if n in row["rooflines"]]
        return median(found) if found else None

    bandwidth = rate("read") or rate("copy")
    peaks = {name: rate(name) for name in ("multiply-add", "tensor cores")}
    ceiling, peak = next((found for found in peaks.items() if found[1]), ("", None))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["operation"], []).append(row)
    intensities = [row["operations"] / row["moved_bytes"] for row in rows]
    x = [min(intensities) / 3, max(intensities) * 3]
    if bandwidth:
        knee = min(x[1], peak / bandwidth) if peak else x[1]
        axes.plot([x[0], knee], [x[0] * bandwidth / 1e9, knee * bandwidth / 1e9], color=GREY, lw=2)
        axes.annotate(
            f"memory, {bandwidth / 1e9:.0f} GB/s",
            (x[0], x[0] * bandwidth / 1e9),
            (10, -2),
            textcoords="offset points",
            color="#555555",
            fontsize=8,
        )
        if peak and knee < x[1]:
            axes.plot([knee, x[1]], [peak / 1e9] * 2, color=GREY, lw=2)
            axes.annotate(
                f"{ceiling}, {peak / 1e9:,.0f} G/s",
                (x[1], peak / 1e9 * 1.06),
                ha="right",
                color="#555555",
                fontsize=8,
            )
    for i, (name, found) in enumerate(groups.items()):
        axes.scatter(
            [row["operations"] / row["moved_bytes"] for row in found],
            [row["operations_per_second"] / 1e9 for row in found],
            s=28,
            label=name,
            zorder=3,
            **_style(i),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)
    axes.set_xlabel("operations (a fused multiply-add is one) per byte moved")
    axes.set_ylabel("billion operations per second")
    axes.set_title(f"What limits each call, {_threads(rows)}")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return True


# -- time against one setting ----------------------------------------------------------------------


def _against(
    axes: Axes,
    rows: list[Row],
    setting: str,
    label: Callable[[Row], str],
    value: Callable[[Row], float],
    *,
    linear: bool = True,
) -> bool:
    """One curve for each label with two points or more, and a dashed line of slope 1 if asked for.

    Of a curve's points at the same x the last counts.
    """
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        curves.setdefault(label(row), {})[row[setting]] = value(row)
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    for i, (name, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points.items()), strict=True)
        axes.plot(x, y, label=name, markersize=4, **_style(i))
    if curves:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        limits = axes.get_ylim()
        if linear:
            x, y = zip(*sorted(max(curves.values(), key=len).items()), strict=True)
            axes.plot(x, [y[-1] * at / x[-1] for at in x], "--", color=GREY, lw=1, label="slope 1")
        axes.set_ylim(limits)
        axes.legend(frameon=False, fontsize=8)
    return bool(curves)


def _steps(document: Document, sweep: str, **fixed: Any) -> list[Row]:
    """Decoding steps of the section growth or else of attention."""
    base = {"operation": "step", "head_dim": 128, "kv_heads": 8, "group": 4} | fixed
    grown = [row for row in _grown(document) if base.items() <= row.items()]
    grown = [row for row in grown if row["sweep"] == sweep]
    lines = [row for row in document["lines"] if base.items() <= row.items()]
    return _most_threads(grown or [row for row in lines if row["section"] == "attention"])


def _grown(document: Document) -> list[Row]:
    """Lines of the section growth, with the times that slopes are fitted to."""
    rows = [row for row in document["lines"] if row["section"] == "growth"]
    times = steady_seconds(rows)
    return [row | {"seconds": time} for row, time in zip(rows, times, strict=True)]


def _peer_times(document: Document, setting: str, like: list[Row], **fixed: Any) -> list[Row]:
    """Their steps with as many threads as those `like` which they are drawn."""
    if not like:
        return []
    base = {"section": "attention", "operation": "step", "threads": like[0]["threads"]} | fixed
    return [
        {setting: row[setting], "label": row["peer"], "seconds": row["peer_seconds"]}
        for row in document["peers"]
        if base.items() <= row.items()
    ]


def _label(row: Row) -> str:
    return str(row.get("label") or f"{row['key_bits']} bits")


def context(axes: Axes, document: Document) -> bool:
    """Time of a step against the length of the context."""
    rows = [row for row in _steps(document, "context", batch=1) if _same_bits(row)]
    title = f"Attention step, one sequence, 32/8 heads of 128, {_threads(rows)}" if rows else ""
    rows += _peer_times(document, "context", rows, batch=1)
    if not _against(axes, rows, "context", _label, lambda row: row["seconds"] * 1e3):
        return False
    _logarithmic(axes, "tokens of context", "milliseconds a step")
    axes.set_title(title)
    return True


def batch(axes: Axes, document: Document) -> bool:
    """Time of a step against the number of sequences."""
    rows = [row for row in _steps(document, "batch", context=1024) if _same_bits(row)]
    title = "Attention step, contexts of 1024 tokens, 32/8 heads of 128"
    title += f", {_threads(rows)}" if rows else ""
    rows += _peer_times(document, "batch", rows, context=1024)
    if not _against(axes, rows, "batch", _label, lambda row: row["seconds"] * 1e3):
        return False
    _logarithmic(axes, "sequences", "milliseconds a step")
    axes.set_title(title)
    return True


def _same_bits(row: Row) -> bool:
    return bool(row["key_bits"] == row["value_bits"] and row["query_len"] == 1)


def _sweep_plot(
    sweeps: tuple[str, ...],
    setting: str,
    per_item: bool,
    x: str,
    title: str,
    *,
    linear: bool = True,
) -> Any:
    """Curves of one or more sweeps; those after the first are called by their name."""

    def label(row: Row) -> str:
        first = row["sweep"] == sweeps[0]
        return str(row["operation"]) if first else f"{row['operation']}, {row['sweep']}"

    def plot(axes: Axes, document: Document) -> bool:
        rows = [row for row in _grown(document) if row["sweep"] in sweeps]
        scale = 1e9 if per_item else 1e3

        def value(row: Row) -> float:
            return float(row["seconds"] * scale / (row["items"] if per_item else 1))

        if not _against(axes, rows, setting, label, value, linear=linear):
            return False
        _logarithmic(axes, x, "nanoseconds a vector" if per_item else "milliseconds a call")
        if not linear:
            axes.set_yscale("linear")
            axes.set_ylim(0)
        axes.set_title(title)
        return True

    return plot


def threads(axes: Axes, document: Document) -> bool:
    """Speed with several threads over that with one."""
    rows = [row for row in document["lines"] if row.get("sweep") == "threads"]
    alone = {row["operation"]: row["seconds"] for row in rows if row["threads"] == 1}
    rows = [row for row in rows if row["operation"] in alone]
    counts = sorted({row["threads"] for row in rows})
    if len(counts) < 2:
        return False
    for i, name in enumerate(alone):
        points = sorted(
            (r["threads"], alone[name] / r["seconds"]) for r in rows if r["operation"] == name
        )
        axes.plot(*zip(*points, strict=True), label=name, **_style(i))
    axes.plot(counts, counts, "--", color=GREY, lw=1, label="perfect")
    axes.set_xticks(counts)
    axes.set_ylim(0)
    axes.set_xlabel("threads")
    axes.set_ylabel("times as fast as one thread")
    axes.set_title("Speed-up, d = 128, 4 bits; step: context of 16,384")
    axes.legend(frameon=False, fontsize=8)
    return True


# -- codec -----------------------------------------------------------------------------------------


def codec(axes: Axes, document: Document) -> bool:
    """Speed against bits with three rounds, for each number of threads."""
    dtype = "float16" if document["about"]["options"]["device"] == "cuda" else "float32"
    settings = {"section": "codec", "head_dim": 128, "dtype": dtype, "rounds": 3}
    rows = [row for row in document["lines"] if settings.items() <= row.items()]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = f"{row['operation']}, {_threads([row])}"
        curves.setdefault(name, []).append((row["bits"], row["items_per_second"] / 1e6))
    for i, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*sorted(points), strict=True), label=name, **_style(i))
    if not curves:
        return False
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.set_xlabel("bits per coordinate")
    axes.set_ylabel("million vectors per second")
    axes.set_title(f"Codec, d = 128, {dtype}, three Hadamard rounds")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    return True


def peers(axes: Axes, document: Document) -> bool:
    """Bars of encoding speed on one core, ours above."""
    settings = {"section": "codec", "operation": "encode", "head_dim": 128, "bits": 4}
    rows = [row for row in document["peers"] if settings.items() <= row.items()]
    least = min((row["threads"] for row in rows), default=0)
    rows = [row for row in rows if row["threads"] == least]
    if not rows:
        return False
    ours: dict[str, list[float]] = {}
    theirs: dict[str, float] = {}
    for row in rows:
        ours.setdefault(f"turboquant_np, {row['ours']}", []).append(row["our_seconds"])
        theirs[row["peer"]] = row["items"] / row["peer_seconds"] / 1e6
    items = rows[0]["items"]
    bars = {name: items / median(found) / 1e6 for name, found in ours.items()} | theirs
    names, speeds = zip(*sorted(bars.items(), key=lambda bar: bar[1]), strict=True)
    drawn = axes.barh(names, speeds, color=[COLOURS[0] if n in ours else GREY for n in names])
    axes.bar_label(drawn, [f"{speed:.3g}" for speed in speeds], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("million vectors per second (logarithmic)")
    axes.set_title(f"Encoding, d = 128, 4 bits, float32, {_threads(rows)}")
    return True


PLOTS = {
    "roofline": roofline,
    "context": context,
    "batch": batch,
    "codec": codec,
    "peers": peers,
    "vectors": _sweep_plot(
        ("vectors",), "items", False, "vectors", "Codec, d = 128, 4 bits, three rounds"
    ),
    "length": _sweep_plot(
        ("length", "other lengths"),
        "head_dim",
        True,
        "length of a vector",
        "Codec, 4 bits, three rounds",
    ),
    "bits": _sweep_plot(
        ("bits",), "bits", True, "bits per coordinate", "Codec, d = 128", linear=False
    ),
    "threads": threads,
}
