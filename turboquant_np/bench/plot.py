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
    """Speed against bits with three rounds, for each number of threads."""
    settings = {"head_dim": 128, "dtype": "float32", "rounds": 3}
    rows = [row for row in rows if settings.items() <= row.items()]
    for operation, colour in (("encode", BLUE), ("decode", ORANGE)):
        for marker, threads in zip("os^", sorted({row["threads"] for row in rows}), strict=False):
            line = sorted(
                (row["bits"], row["mvec_s"])
                for row in rows
                if (row["operation"], row["threads"]) == (operation, threads)
            )
            where = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
            axes.plot(
                *zip(*line, strict=True), color=colour, marker=marker, label=f"{operation}{where}"
            )
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.set_xlabel("bits per coordinate")
    axes.set_ylabel("million vectors per second")
    axes.set_title("Codec, 3 Hadamard rounds")
    axes.legend(frameon=False, ncols=2, loc="upper right")
    _tidy(axes, "y")


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
    _tidy(axes, "x")


def _tidy(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
