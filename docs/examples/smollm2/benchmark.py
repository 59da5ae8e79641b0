"""Time decoding with caches that are already long."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from .caches import Cache, make_cache
from .generate import Batch
from .model import Model

__all__ = ["fill", "print_benchmark"]

WARM_UP = 3
ROUND = 16  # steps; a cache with pages of 16 tokens packs one in each round
MOST_ROUNDS, ENOUGH_SECONDS = 8, 4.0


def fill(model: Model, cache: Cache, tokens: int, seed: int) -> int:
    """A sequence of random keys and values: reading as long a text would take minutes on a CPU.

    How fast attention is does not depend on the numbers.  Keys have the norms of the model's own.
    """
    xp, c = model.xp, model.config
    random = xp.random.default_rng(seed)
    sequence = cache.allocate()
    while tokens:
        count = min(tokens, 512)
        step = cache.begin_step([sequence], [count], pack_first=True)
        for layer in range(c.layers):
            shape = (count, c.kv_heads, c.head_dim)
            keys, values = (random.standard_normal(shape, dtype=np.float32) for _ in "kv")
            step.append(layer, (keys * 2).astype(model.dtype), values.astype(model.dtype))
        tokens -= count
    return sequence


def time_decoding(model: Model, cache: Cache, context: int, count: int) -> dict[str, Any]:
    """`count` sequences of about `context` tokens, one more token each in every step."""
    steps = WARM_UP + ROUND * MOST_ROUNDS
    if context <= steps + 2:
        raise ValueError(f"contexts must be above {steps + 2} tokens, got {context}")
    batch = Batch(model, cache)
    for seed in range(count):
        sequence = fill(model, cache, context - steps - 2, seed)
        batch.submit([1 + seed], sequence=sequence, max_new_tokens=steps + 1)
    for _ in range(WARM_UP):
        batch.step()
    times: list[float] = []
    while len(times) < MOST_ROUNDS and sum(times) < ENOUGH_SECONDS:
        start = time.perf_counter()
        for _ in range(ROUND):
            batch.step()  # its tokens come to the host, so nothing is left running
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times) / ROUND
    stats = cache.stats()
    return {
        "ms/step": 1e3 * seconds,
        "tokens/s": count / seconds,
        "bytes/token": stats["used_bytes"] / stats["stored_tokens"],
        "MB": stats["used_bytes"] / 1e6,
    }


def print_benchmark(model: Model, options: argparse.Namespace) -> None:
    """A row for each cache, context and batch."""
    bits = "/".join(
        f"{np.mean(b):.2g} by layer" if isinstance(b, list) else str(b)
        for b in (options.key_bits, options.value_bits)
    )
    if options.compute != "float32":
        bits += f" in {options.compute}"
    print("| cache | context | batch | ms a step | tokens/s | bytes a token | cache in MB |")
    print("|-|-|-|-|-|-|-|")
    for kind in ("float", "turboquant"):
        for context in options.contexts:
            for count in options.batches:
                cache = make_cache(
                    model.config,
                    kind,
                    max_sequences=count,
                    max_tokens=context,
                    key_bits=options.key_bits,
                    value_bits=options.value_bits,
                    device=options.device,
                    compute=options.compute,
                    dtype=model.dtype,
                )
                row = time_decoding(model, cache, context, count)
                name = f"{model.dtype}" if kind == "float" else f"turboquant {bits}"
                print(
                    f"| {name} | {context} | {count} | {row['ms/step']:.1f} "
                    f"| {row['tokens/s']:.1f} | {row['bytes/token']:.0f} | {row['MB']:.0f} |",
                    flush=True,
                )
