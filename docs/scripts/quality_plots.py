"""Draw the figures of docs/benchmarks/quality.md and docs/explanation/choosing-bits.md."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from make_plots import BLUE, GREEN, GREY, ORANGE, RED
from quality_cache import Setting
from quality_results import FLOAT16_BYTES, TESTS, Results, bytes_per_token

CONTEXT = 8192
Points = list[tuple[float, float, str]]
"""(bytes for a token, loss of perplexity, label)."""


def label_of(setting: Setting) -> str:
    return f"{setting['key_bits']}/{setting['value_bits']}"


def points(results: Results, experiment: str, settings: list[Setting]) -> Points:
    """Sorted by bytes."""
    found = [
        (
            bytes_per_token(setting, CONTEXT),
            results.at_context(experiment, setting, CONTEXT, TESTS).loss,
            label_of(setting) if "key_bits" in setting else "",
        )
        for setting in settings
    ]
    return sorted(found)


def frontier(all_points: Points) -> Points:
    """Those that no other one beats in both bytes and loss."""
    best, kept = np.inf, []
    for point in sorted(all_points):
        if point[1] < best:
            best = point[1]
            kept.append(point)
    return kept


def by_layer(results: Results) -> Points:
    """Bits chosen for each layer, 2, 3 and 4 on average."""
    found = []
    for mean in (2, 3, 4):
        experiment = f"by layer, {mean} on average"
        for x, y, _ in points(results, experiment, results.settings(experiment)):
            found.append((x, y, f"{mean} on average"))
    return found


def draw_bytes(results: Results) -> Any:
    """Perplexity against bytes, every setting a point."""
    figure, axes = plt.subplots(figsize=(9.2, 5.6), layout="constrained")
    uniform = points(results, "bits", results.settings("bits"))
    floor = 1e-4  # what cannot be told from nothing

    def show(which: Points, marker: str, colour: str, name: str, **style: Any) -> None:
        xs, ys = [p[0] for p in which], [max(p[1], floor) for p in which]
        axes.plot(xs, ys, marker, color=colour, label=name, **style)

    show(uniform, "o", BLUE, "key bits / value bits, the cache's defaults", ms=5, alpha=0.45)
    best = frontier([p for p in uniform if p[1] > floor])
    show(best, "-", BLUE, "the best of them", lw=1.2)
    for x, y, text in best:
        axes.annotate(text, (x, y), (4, 5), textcoords="offset points", color=BLUE, fontsize=9)
    for recent, marker in ((32, "v"), (128, "^"), (256, "D")):
        tried = [s for s in results.settings("ablation") if s.get("recent_tokens") == recent]
        show(
            points(results, "ablation", [s for s in tried if len(s) == 3]),
            marker,
            GREEN,
            f"2/2, 3/3, 4/4 with {recent} recent tokens",
            ms=6,
            mfc="none",
        )
    bare = [s for s in results.settings("ablation") if len(s) == 5 and not s["sink_tokens"]]
    bare = [s for s in bare if not s["recent_tokens"] and not s["key_offset_tokens"]]
    show(
        points(results, "ablation", bare),
        "x",
        RED,
        "2/2, 3/3, 4/4 without windows and offset",
        ms=7,
        mew=2,
    )
    chosen = by_layer(results)
    show(chosen, "s-", ORANGE, "bits chosen for each layer by a calibration text", ms=6, lw=1.2)
    for x, y, text in chosen:
        axes.annotate(
            text, (x, y), (-7, -9), textcoords="offset points", ha="right", color=ORANGE, fontsize=9
        )
    axes.set_yscale("log")
    axes.set_xlim(left=2600)
    axes.set_ylim(bottom=floor * 0.8)
    axes.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["≤ 0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    axes.set_title(f"What bytes buy: tokens {CONTEXT // 2} to {CONTEXT} of each text")
    axes.set_ylabel("perplexity above that of the float cache")
    axes.set_xlabel(
        f"bytes for a token of context, everything counted (float16: {FLOAT16_BYTES:,})"
    )
    axes.legend(loc="upper right")
    return figure


def draw_needles(results: Results) -> Any:
    """Share of numbers found, by depth and length, for each setting."""
    settings: list[Setting | None] = []
    for record in results.needles:
        if record["setting"] not in settings:
            settings.append(record["setting"])
    lengths = sorted({record["tokens"] for record in results.needles})
    figure, all_axes = plt.subplots(
        1, len(settings), figsize=(11.5, 3.3), layout="constrained", sharey=True
    )
    for axes, setting in zip(all_axes, settings, strict=True):
        found = np.array(
            [results.found(tokens, setting) for tokens in lengths]
        )  # [lengths, depths]
        picture = axes.imshow(found.T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        title = "float" if setting is None else label_of(setting)
        axes.set_title(f"{title}: {found.mean():.0%}")
        axes.set_xticks(range(len(lengths)), [f"{tokens // 1024}k" for tokens in lengths])
        axes.grid(visible=False)
        depths = found.shape[1]
        axes.set_yticks([0, (depths - 1) / 2, depths - 1], ["beginning", "middle", "end"])
    all_axes[0].set_ylabel("where the number is hidden")
    figure.supxlabel("tokens of context", fontsize=10)
    bar = figure.colorbar(picture, ax=all_axes, label="found", ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    return figure


def draw_layers(results: Results) -> Any:
    """KL when one layer's keys, or values, alone are at 2 bits."""
    figure, axes = plt.subplots(figsize=(9.2, 3.2), layout="constrained")
    for side, (name, colour) in enumerate((("keys", BLUE), ("values", ORANGE))):
        layers, kls = [], []
        for setting in results.settings("layers"):
            bits = [pair[side] for pair in setting["layer_bits"]]
            if 2 in bits:
                (record,) = results.records("layers", setting)
                layers.append(bits.index(2))
                kls.append(sum(record["kl"]) / sum(record["count"]))
        axes.bar(np.array(layers) + 0.4 * side - 0.2, kls, 0.4, color=colour, label=name)
    axes.set_title("One layer at 2 bits, everything else at 8: KL of the next-token distribution")
    axes.set_xlabel("layer")
    axes.set_ylabel("KL, nats")
    axes.tick_params(axis="x", color=GREY)
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure
