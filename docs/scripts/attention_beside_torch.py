"""Attention on a packed cache beside torch on unpacked vectors, in one process on a CPU.

Bursts of calls take turns.  Before each burst there is a pause, until the threads of the library
that ran before have stopped waiting busily.  With more than one cache, calls go through them in
turn, as the layers of a model do, so that little is found in the processor's caches.

    python docs/scripts/attention_beside_torch.py
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from turboquant_np import TQPagedAttention, TurboQuant

KV_HEADS, GROUP, DIM, PAGE = 8, 4, 128, 16
PAUSE = 0.01  # seconds
Calls = list[Callable[[], Any]]


def packed_calls(context: int, bits: int, caches: int) -> Calls:
    rng = np.random.default_rng(0)
    tq = TurboQuant(head_dim=DIM, bits=bits)
    attention = TQPagedAttention(tq, KV_HEADS * GROUP)
    blocks = context // PAGE
    shape = (blocks, PAGE, KV_HEADS, tq.packed_dim)
    query = rng.standard_normal((1, KV_HEADS * GROUP, DIM), np.float32)
    tables, lens = rng.permutation(blocks)[None], np.array([context])

    def call() -> Callable[[], Any]:
        k, v = (rng.integers(0, 256, shape, np.uint8) for _ in range(2))
        k_norms, v_norms = (rng.uniform(5, 12, shape[:3]).astype(np.float32) for _ in range(2))
        return lambda: attention(query, k, k_norms, v, v_norms, tables, lens)

    return [call() for _ in range(caches)]


def torch_calls(context: int, dtype: torch.dtype, caches: int) -> Calls:
    query = torch.randn(1, KV_HEADS, GROUP, DIM, dtype=dtype)  # the group folded into rows

    def call() -> Callable[[], Any]:
        k, v = (torch.randn(1, KV_HEADS, context, DIM, dtype=dtype) for _ in range(2))
        return lambda: torch.nn.functional.scaled_dot_product_attention(query, k, v)

    return [call() for _ in range(caches)]


def compare(context: int, bits: int, threads: int, caches: int, bursts: int, length: int) -> str:
    """A line of medians and best times of all but each burst's first call."""
    os.environ["TURBOQUANT_NP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    contenders = {
        "packed": packed_calls(context, bits, caches),
        "float32": torch_calls(context, torch.float32, caches),
        "bfloat16": torch_calls(context, torch.bfloat16, caches),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for burst in range(bursts + 1):
        for name, calls in contenders.items():
            time.sleep(PAUSE)
            for i, call in enumerate(itertools.islice(itertools.cycle(calls), length)):
                start = time.perf_counter()
                call()
                if burst and i:
                    seconds[name].append(time.perf_counter() - start)
    figures = ", ".join(
        f"{name} {1e3 * np.median(s):.2f} (best {1e3 * min(s):.2f})" for name, s in seconds.items()
    )
    ratio = np.median(seconds["bfloat16"]) / np.median(seconds["packed"])
    return (
        f"{threads} threads, context {context}, {bits} bits, {caches} caches: {figures} ms; "
        f"bfloat16 / packed {ratio:.2f}"
    )


def main() -> None:
    for threads in (1, 2):
        for bits in (4, 3, 2, 8):
            print(compare(8192, bits, threads, caches=1, bursts=12, length=8), flush=True)
        print(compare(8192, 4, threads, caches=6, bursts=12, length=8), flush=True)
    print(compare(65536, 4, 2, caches=1, bursts=5, length=4), flush=True)


if __name__ == "__main__":
    main()
