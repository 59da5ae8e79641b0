"""The picture of a benchmark: speed of the codec, and of its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw"]

Row = dict[str, Any]
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"


def draw(document: dict[str, Any], path: str) -> Path:
    """Write the figure; the suffix of the path decides the format."""
    compared = [
        row
        for row in document["peers"]
        if (row["head_dim"], row["bits"], row["threads"]) == (128, 4, 1)
    ]
    figure = Figure(figsize=(11, 4.2) if compared else (6, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
    _codec(axes[0], document["codec"])
    if compared:
        _peers(axes[1], compared)
    found = document["about"]
    figure.suptitle(f"turboquant_np, d = 128, float32: {found['machine']}", fontweight="bold")
    figure.savefig(path, dpi=150)
    return Path(path).resolve()


def _codec(axes: Any, rows: list[Row]) -> None:
    """Speed against bits, for each number of threads."""
    rows = [
        row
        for row in rows
        if row["head_dim"] == 128 and row["dtype"] == "float32" and row["rounds"]
    ]
    threads = sorted({row["threads"] for row in rows})
    for (operation, colour), count, rounds in (
        (style, count, rounds)
        for style in (("encode", BLUE), ("decode", ORANGE))
        for count in threads
        for rounds in (3, 1)
    ):
        line = sorted(
            (row["bits"], row["mvec_s"])
            for row in rows
            if (row["operation"], row["threads"], row["rounds"]) == (operation, count, rounds)
        )
        if len(line) < 2:
            continue
        where = f"{count} thread{'s' if count > 1 else ''}, " if count else ""
        axes.plot(
            *zip(*line, strict=True),
            color=colour,
            marker="o" if count == threads[0] else "s",
            mfc=colour if rounds == 3 else "white",
            ls="-" if rounds == 3 else "--",
            label=f"{operation}, {where}{rounds} round{'s' if rounds > 1 else ''}",
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bits per coordinate")
    axes.set_ylabel("million vectors per second")
    axes.set_title("Codec")
    axes.legend(frameon=False, fontsize="small")
    _tidy(axes)


def _peers(axes: Any, rows: list[Row]) -> None:
    """Bars of encoding speed on one core, ours above."""
    ours = rows[0]
    bars = [
        ("turboquant_np, 1 round", ours["ours_1_round_mvec_s"], BLUE),
        ("turboquant_np, 3 rounds", ours["ours_3_rounds_mvec_s"], BLUE),
        *((row["peer"], row["peer_mvec_s"], GREY) for row in rows),
    ][::-1]
    names, speeds, colours = zip(*bars, strict=True)
    drawn = axes.barh(names, speeds, color=colours)
    axes.bar_label(drawn, [f"{speed:.3g}" for speed in speeds], padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("million vectors per second, one core, 4 bits (logarithmic)")
    axes.set_title("Encoding, beside other libraries")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(axis="both", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
