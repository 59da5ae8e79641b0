"""Attention in 8-bit integers beside float32 and torch, and its bytes beside what memory gives.

Bursts of calls take turns, as in attention_beside_torch.py.

    python docs/scripts/attention_in_int8.py [CONTEXT ...]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from attention_beside_torch import DIM, GROUP, KV_HEADS, PAGE, PAUSE, torch_calls

from turboquant_np import TQPagedAttention, TurboQuant
from turboquant_np.bench.rooflines import HostRooflines


def packed_call(context: int, bits: int, compute: Any) -> tuple[Callable[[], Any], int]:
    """A call on a cache in memory, and the bytes it reads."""
    rng = np.random.default_rng(0)
    tq, blocks = TurboQuant(head_dim=DIM, bits=bits), context // PAGE
    attention = TQPagedAttention(tq, KV_HEADS * GROUP, compute=compute)
    shape = (blocks, PAGE, KV_HEADS, tq.packed_dim)
    k, v = (rng.integers(0, 256, shape, np.uint8) for _ in range(2))
    k_norms, v_norms = (rng.uniform(5, 12, shape[:3]).astype(np.float32) for _ in range(2))
    query = rng.standard_normal((1, KV_HEADS * GROUP, DIM), np.float32)
    tables, lens = rng.permutation(blocks)[None], np.array([context])
    num_bytes = sum(x.nbytes for x in (k, v, k_norms, v_norms))
    return lambda: attention(query, k, k_norms, v, v_norms, tables, lens), num_bytes


def compare(context: int, bits: int, threads: int) -> str:
    os.environ["TURBOQUANT_NP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    in_int8, num_bytes = packed_call(context, bits, "int8")
    roofline = HostRooflines(num_bytes, threads).read()
    calls: dict[str, Callable[[], Any]] = {
        "int8": in_int8,
        "float32": packed_call(context, bits, "float32")[0],
        "bfloat16": torch_calls(context, torch.bfloat16, 1)[0],
        "read": roofline.call,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for burst in range(6 if context > 8192 else 12):
        for name, call in calls.items():
            time.sleep(PAUSE)
            for i in range(4 if context > 8192 else 8):
                start = time.perf_counter()
                call()
                if burst and i:
                    seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(s)) for name, s in seconds.items()}
    figures = " | ".join(
        f"{1e3 * median[name]:.2f} ms ({1e3 * min(seconds[name]):.2f})"
        for name in ("int8", "float32", "bfloat16")
    )
    speed, limit = num_bytes / median["int8"], roofline.amount / median["read"]
    return (
        f"| {threads}, {context}, {bits} | {figures} | {median['bfloat16'] / median['int8']:.1f} | "
        f"{1e-9 * speed:.1f} of {1e-9 * limit:.1f} GB/s ({speed / limit:.0%}) |"
    )


def main() -> None:
    """All contexts, or those that are named."""
    contexts = list(map(int, sys.argv[1:])) or [8192, 65536, 262144]
    for threads, context in product((1, 2), contexts):
        for bits in (4, 3, 2) if context == 8192 else (4, 2):
            print(compare(context, bits, threads), flush=True)


if __name__ == "__main__":
    main()
