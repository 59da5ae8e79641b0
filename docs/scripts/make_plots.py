"""Draw the figures of docs/explanation with what the library computes; see the pages there."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from turboquant_np import TurboQuant
from turboquant_np.theory import expected_mse, get_theory_bounds

OUT = Path(__file__).parent.parent / "explanation"

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9822b", "#3a9a6a", "#c0433f", "#8a8f98"

STYLE = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "turboquant_np",
}


def sample(name: str) -> Any:
    """[n, 64] unit vectors: the keys or values shipped with the package."""
    with np.load(str(files("turboquant_np.data") / "smollm2_kv.npz")) as data:
        x = data[name].astype(np.float32).reshape(-1, 64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def relative_error(x: Any, **settings: Any) -> float:
    """Mean squared error of unit vectors x: [n, d]."""
    tq = TurboQuant(head_dim=x.shape[1], **settings)
    error = tq.decode(*tq.encode(x), dtype=np.float32) - x
    return float((error.astype(np.float64) ** 2).sum(axis=1).mean())


def draw_error_against_bits() -> Any:
    bits = range(1, 9)
    lower, upper = np.array([get_theory_bounds(b) for b in bits]).T
    exact = np.array([expected_mse(64, b) for b in bits])
    measured = {
        name: [relative_error(sample(name), bits=b) for b in bits] for name in ("keys", "values")
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.7), layout="constrained")
    for axes, unit in ((left, 1.0), (right, lower)):
        axes.fill_between(bits, lower / unit, upper / unit, color=BLUE, alpha=0.10, lw=0)
        axes.plot(bits, upper / unit, color=BLUE, lw=1, ls="--", label="upper bound for TurboQuant")
        axes.plot(
            bits, lower / unit, color=RED, lw=1, ls="--", label="lower bound for any quantiser"
        )
        axes.plot(bits, exact / unit, color=GREY, lw=1.2, label="exact expectation")
        for (name, values), marker, color in zip(
            measured.items(), "o^", (BLUE, ORANGE), strict=True
        ):
            axes.plot(
                bits,
                np.array(values) / unit,
                marker,
                color=color,
                ms=5.5,
                label=f"measured, {name}",
            )
        axes.set_xlabel("bits per coordinate")
        axes.set_xticks(bits)
    left.set_yscale("log")
    left.set_title("squared error / squared norm")
    right.set_title("the same, divided by the lower bound")
    right.set_ylim(0.9, 3.0)
    left.legend(loc="lower left", fontsize=9)
    right.annotate("√3·π/2 = 2.72", (1.0, 2.72), (1.0, 2.80), color=BLUE, fontsize=9)
    right.annotate("1", (1.0, 1.0), (7.85, 1.04), color=RED, fontsize=9)
    return figure


def draw_coordinates() -> Any:
    """Key coordinates before and after the rotation, with the thresholds of 3 bits."""
    keys = sample("keys")
    rng = np.random.default_rng(1)
    rotated = np.concatenate(
        [
            keys @ TurboQuant(head_dim=64, seed=int(s)).rotation.T
            for s in rng.integers(2**32, size=8)
        ]
    )
    tq = TurboQuant(head_dim=64, bits=3)
    centroids, thresholds = tq.centroids * 8, tq.boundaries_inner * 8
    z = np.linspace(-4.6, 4.6, 400)
    normal = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.2, 3.5), layout="constrained", sharex=True, sharey=True
    )
    for axes, values, color in ((left, keys, ORANGE), (right, rotated, BLUE)):
        axes.hist(
            8 * values.ravel(),
            bins=np.linspace(-4.6, 4.6, 93),
            density=True,
            color=color,
            alpha=0.55,
        )
        axes.plot(z, normal, color="#30343a", lw=1.2, label="normal density")
        axes.set_xlabel("√d · coordinate")
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
    left.set_title("real keys, as they are")
    left.legend(loc="upper left", fontsize=9)
    right.set_title("after the rotation, with the cells of 3 bits")
    right.vlines(thresholds, 0, 0.5, color=RED, lw=0.9, ls=":", label="thresholds")
    right.plot(centroids, np.full(8, 0.012), "v", color=RED, ms=6, label="centroids")
    right.legend(loc="upper left", fontsize=9)
    left.set_ylim(0, 0.62)
    left.set_xlim(-4.6, 4.6)
    kept = np.abs(8 * keys) <= 4.6
    left.annotate(
        f"{100 * (1 - kept.mean()):.1f} % lie outside,\nas far as ±{8 * np.abs(keys).max():.1f}",
        (0.98, 0.72),
        xycoords="axes fraction",
        ha="right",
        fontsize=9,
        color="#4a4f57",
    )
    return figure


def rounds_inputs(d: int) -> dict[str, Any]:
    one_hot, two_hot, sparse = np.zeros((3, d), np.float32)
    one_hot[5] = 1
    two_hot[[3, 77]] = 1
    sparse[[1, 30, 64, 99]] = 1, -1, 1, 1
    constant = np.ones(d, np.float32)
    walsh = (1.0 - 2.0 * (np.arange(d) >> 2 & 1)).astype(np.float32)
    gaussian = np.random.default_rng(3).standard_normal(d).astype(np.float32)
    inputs = {
        "one-hot": one_hot,
        "two-hot": two_hot,
        "4-sparse": sparse,
        "constant": constant,
        "square wave": walsh,
        "Gaussian": gaussian,
    }
    return {name: x / np.linalg.norm(x) for name, x in inputs.items()}


def draw_rounds(seeds: int = 1000) -> Any:
    d = 128
    inputs = rounds_inputs(d)
    x = np.stack(list(inputs.values()))
    rng = np.random.default_rng(2)
    chosen = [int(s) for s in rng.integers(2**32, size=seeds)]
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.7), layout="constrained", sharey=True)
    for axes, bits in zip(panels, (2, 4), strict=True):
        haar = expected_mse(d, bits)
        for rounds, color, marker in ((1, RED, "o"), (2, ORANGE, "s"), (3, BLUE, "D")):
            errors = np.zeros(len(x))
            for seed in chosen:
                tq = TurboQuant(head_dim=d, bits=bits, seed=seed, hadamard_rounds=rounds)
                decoded = tq.decode(*tq.encode(x), dtype=np.float32)
                errors += ((decoded.astype(np.float64) - x) ** 2).sum(axis=1)
            y = np.arange(len(x))[::-1] + 0.22 * (2 - rounds)
            label = f"{rounds} round" + "s" * (rounds > 1)
            axes.plot(errors / seeds / haar, y, marker, color=color, ms=6, label=label)
        axes.axvline(1.0, color="#30343a", lw=1)
        bound = get_theory_bounds(bits)[1] / haar
        axes.axvline(bound, color=GREY, lw=1, ls="--")
        axes.annotate("bound of\ntheorem 1", (bound + 0.02, 0.1), color="#4a4f57", fontsize=8.5)
        axes.set_title(f"{bits} bits")
        axes.set_xlabel("mean squared error / that of a Haar rotation")
        axes.set_yticks(np.arange(len(x))[::-1], list(inputs))
        axes.set_xlim(0.2, 2.7)
    panels[0].legend(loc="center right", fontsize=9)
    return figure


def draw_scales(vectors: int = 40_000) -> Any:
    d, bits = 128, range(1, 7)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((vectors, d), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained")
    kinds = (("norm", GREY, "o"), ("mse", BLUE, "s"), ("unbiased", ORANGE, "D"))
    exact = x.astype(np.float64)
    of_norm: list[float] = []
    for kind, color, marker in kinds:
        slopes, errors = [], []
        for b in bits:
            tq = TurboQuant(head_dim=d, bits=b, scale=kind)
            decoded = tq.decode(*tq.encode(x), dtype=np.float32).astype(np.float64)
            slopes.append(float((decoded * exact).sum(axis=1).mean()))
            errors.append(float(((decoded - exact) ** 2).sum(axis=1).mean()))
        of_norm = of_norm or errors
        size = 8.5 if kind == "norm" else 5.5  # "mse" lies upon it
        style = {"color": color, "marker": marker, "ms": size, "lw": 1.2, "label": kind}
        left.plot(bits, slopes, **style)
        right.plot(bits[1:], [e / n for e, n in zip(errors, of_norm, strict=True)][1:], **style)
    left.set_title("slope of inner products, 1 is unbiased")
    left.set_ylim(0.6, 1.04)
    right.set_title("squared error, relative to scale “norm”")
    right.set_ylim(0.96, 1.14)
    for axes in (left, right):
        axes.set_xlabel("bits per coordinate")
    left.set_xticks(bits)
    right.set_xticks(bits[1:])
    left.legend(loc="lower right", fontsize=9)
    return figure


FIGURES = {
    "error_against_bits": draw_error_against_bits,
    "coordinates": draw_coordinates,
    "rounds": draw_rounds,
    "scales": draw_scales,
}


def main(out: Path = OUT, kind: str = "svg") -> None:
    mpl.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(out / f"{name}.{kind}", metadata=metadata)
            plt.close(figure)


if __name__ == "__main__":
    main()
