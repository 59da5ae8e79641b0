"""Bits for each layer's keys and values, by what few bits in one layer alone do to the output.

`sensitivity` and `allocate_bits` know nothing of the model: for your own one, write what
`log_probabilities` does here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .caches import make_cache
from .model import Model
from .tokenizer import ChatTokenizer

__all__ = ["allocate_bits", "log_probabilities", "print_layer_bits", "sensitivity"]

Floats = npt.NDArray[np.float64]
LogProbabilities = Callable[[list[int], list[int]], Any]

FEW_BITS, MANY_BITS = 2, 8
CHUNK = 64  # tokens of a step, which see their neighbours as they are


def log_probabilities(
    model: Model, ids: list[int], key_bits: list[int], value_bits: list[int]
) -> Any:
    """Of each next token, for a text read through a cache: float32 [tokens, vocabulary]."""
    cache = make_cache(
        model.config,
        "turboquant",
        max_sequences=1,
        max_tokens=len(ids),
        key_bits=key_bits,
        value_bits=value_bits,
        device="cpu" if model.xp is np else "cuda",
    )
    sequence, parts = cache.allocate(), []
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        step = cache.begin_step([sequence], [len(part)])

        def attend(layer: int, q: Any, k: Any, v: Any, step: Any = step) -> Any:
            step.append(layer, k, v)
            return step.attend(layer, q)

        hidden = model.forward(np.array(part), start + np.arange(len(part)), attend)
        logits = model.logits(hidden).astype(np.float32)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= model.xp.log(model.xp.exp(logits).sum(axis=1, keepdims=True))
        parts.append(logits)
    return model.xp.concatenate(parts)


def sensitivity(
    measure: LogProbabilities, layers: int, progress: Callable[[str], None] = lambda _: None
) -> Floats:
    """Mean KL of the next token's distribution when one layer's keys, or values, have few bits.

    Parameters
    ----------
    measure : callable
        Log-probabilities [tokens, vocabulary] of a calibration text, given the bits of each layer's
        keys and of each layer's values.
    layers : int
    progress : callable, optional
        Gets a line for each measurement.

    Returns
    -------
    float64 [2, layers], in nats
        Keys, values: with 2 bits in that place and 8 in all others.
    """
    exact = measure([MANY_BITS] * layers, [MANY_BITS] * layers)
    found = np.empty((2, layers))
    for side, layer in np.ndindex(2, layers):
        bits = np.full((2, layers), MANY_BITS)
        bits[side, layer] = FEW_BITS
        logs = measure(*bits.tolist())
        found[side, layer] = float((np.exp(exact) * (exact - logs)).sum(axis=1).mean())
        progress(f"{('keys', 'values')[side]} of layer {layer}: KL {found[side, layer]:.5f}")
    return found


def allocate_bits(
    sensitivity: Floats, *, mean_bits: float, at_bits: int = FEW_BITS, least: int = 1, most: int = 8
) -> npt.NDArray[np.int64]:
    """Bits of each part that make the sum of their KLs least, at a mean number of bits.

    Parameters
    ----------
    sensitivity : float, any shape
        KL when that part alone has `at_bits` bits; a quarter of it for each further bit.
    mean_bits : float
    at_bits, least, most : int

    Returns
    -------
    int, shape of `sensitivity`

    Examples
    --------
    >>> allocate_bits(np.array([16.0, 1.0, 1.0]), mean_bits=3).tolist()
    [5, 2, 2]
    """
    bits = np.full(sensitivity.shape, least)
    for _ in range(round(sensitivity.size * (mean_bits - least))):
        gain = np.where(bits < most, sensitivity * 4.0 ** (at_bits - bits), -np.inf)
        bits.flat[gain.argmax()] += 1
    return bits


def print_layer_bits(model: Model, options: argparse.Namespace) -> None:
    """Measure a text and print the options that give each layer its bits."""
    text = Path(options.text).read_text("utf-8")
    ids = ChatTokenizer(options.weights).encode(text)[: options.text_tokens]
    found = sensitivity(
        partial(log_probabilities, model, ids),
        model.config.layers,
        partial(print, file=sys.stderr, flush=True),
    )
    for side, bits in zip(
        ("key", "value"), allocate_bits(found, mean_bits=options.choose_bits), strict=True
    ):
        print(f"--{side}-bits {','.join(map(str, bits))}")
