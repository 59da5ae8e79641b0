"""The picture of the demo: error against bits, measured beside theory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from . import CommandError

if TYPE_CHECKING:
    from .demo import Row

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#555555"


def draw(rows: Sequence[Row], path: str) -> Path:
    """Write the figure; the suffix of the path decides the format.

    Raises
    ------
    CommandError
        If matplotlib does not know the format.
    """
    target = Path(path)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in known:
        raise CommandError(f"--plot writes {', '.join(sorted(known))}; got {path!r}")
    vectors, attention = figure.subplots(1, 2)
    bits = [row.bits for row in rows]

    vectors.fill_between(
        bits,
        [row.lower_bound for row in rows],
        [row.upper_bound for row in rows],
        color=GREY,
        alpha=0.15,
        lw=0,
        label="between the paper's lower and upper bound",
    )
    vectors.plot(
        bits, [row.expected_error for row in rows], color=GREY, lw=1.5, label="theory, for any data"
    )
    vectors.plot(
        bits,
        [row.key_error for row in rows],
        "o",
        color=BLUE,
        ms=11,
        mfc="none",
        mew=2,
        label="real keys",
    )
    vectors.plot(
        bits, [row.value_error for row in rows], "x", color=ORANGE, ms=8, mew=2, label="real values"
    )
    vectors.set_title("Error of the vectors, relative to their squared length")

    attention.plot(bits, [row.kl for row in rows], "o-", color=BLUE, label="KL of softmax, nats")
    attention.plot(
        bits,
        [row.kl_with_key_offset for row in rows],
        "o--",
        color=BLUE,
        mfc="white",
        label="the same, mean key subtracted before encoding",
    )
    attention.plot(
        bits,
        [row.output_error for row in rows],
        "s-",
        color=GREEN,
        label="squared error of the output, relative",
    )
    attention.set_title("What attention sees")

    for axes in (vectors, attention):
        axes.set_yscale("log")
        axes.set_xlabel("bits per coordinate (bytes per vector, times smaller than float16)")
        axes.xaxis.set_major_locator(FixedLocator(bits))
        axes.set_xticks(
            bits,
            [f"{row.bits}\n{row.bytes_per_vector} B\n{row.ratio_to_float16:.1f}x" for row in rows],
        )
        axes.grid(axis="y", color="#dddddd", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left")
    figure.suptitle("TurboQuant on keys and values of SmolLM2-135M-Instruct", fontweight="bold")
    figure.savefig(target, dpi=150)
    return target.resolve()
