"""Check and time attention on a GPU in one go: python tests/cuda/run_attention_on_gpu.py [options].

Correctness is against the float64 reference on the same bytes.  Times are those of a whole step
(query rotation, scores, value sum, merge, inverse rotation), per launch of a CUDA graph whose steps
read different pages, far more than the L2 cache holds.  Prints tables, writes every figure as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from attention_problems import KINDS, check_many  # type: ignore[import-not-found]

from turboquant_np import TurboQuant
from turboquant_np._attention_checks import AttentionBatch
from turboquant_np.bench.rooflines import CudaRooflines
from turboquant_np.bench.timing import CudaClock, alternate
from turboquant_np.fused_attention import TQPagedAttention
from turboquant_np.kv_cache import PagedKVCache

gpu_attention = importlib.import_module("turboquant_np.backends.cuda.attention")
gpu_scratch = importlib.import_module("turboquant_np.backends.cuda.attention_scratch")


class Step:
    """Decoding steps over a pool of pages in random order, for timing."""

    def __init__(
        self,
        bits: tuple[int, int],
        batch: int,
        context: int,
        group: int,
        *,
        kv_heads: int = 8,
        head_dim: int = 128,
        head_major: bool = True,
        pool_bytes: float = 1.5e9,
        query_len: int = 1,
        rotation: str = "hadamard",
        page: int = 16,
    ) -> None:
        random = cupy.random.default_rng(1)
        self.quantizers = [
            TurboQuant(head_dim=head_dim, bits=b, seed=s, rotation=rotation)
            for b, s in zip(bits, (3, 4), strict=True)
        ]
        width = context // page
        page_bytes = page * kv_heads * sum(q.packed_dim + 4 for q in self.quantizers)
        self.bytes = batch * width * page_bytes
        self.sets = int(min(64, max(2, -(-pool_bytes // self.bytes))))
        num_blocks = batch * width * self.sets
        pages = (num_blocks, kv_heads, page) if head_major else (num_blocks, page, kv_heads)
        cache = []
        for q in self.quantizers:
            packed = random.integers(0, 256, (*pages, q.packed_dim), dtype=np.uint8)
            norms = random.random(pages, dtype=np.float32) + 0.5
            norms *= np.float32(head_dim**0.5)
            cache += [packed, norms]
        self.cache = [a.swapaxes(1, 2) if head_major else a for a in cache]
        order = np.random.default_rng(2).permutation(num_blocks).astype(np.int32)
        self.tables = [cupy.asarray(t) for t in order.reshape(self.sets, batch, width)]
        self.lens = cupy.full(batch, context, np.int32)
        shape = (batch, query_len, kv_heads * group, head_dim)
        self.query = random.standard_normal(shape, dtype=np.float32).astype(np.float16)
        self.out, self.lse = cupy.empty_like(self.query), cupy.empty(shape[:-1], np.float32)

    def batch(self, i: int) -> AttentionBatch:
        d = self.query.shape[-1]
        heads = self.query.shape[2]
        return AttentionBatch(
            query=self.query.reshape(-1, heads, d),
            query_start_loc=None,
            query_len=self.query.shape[1],
            query_positions=None,
            k_packed=self.cache[0],
            k_norms=self.cache[1],
            v_packed=self.cache[2],
            v_norms=self.cache[3],
            block_tables=self.tables[i % self.sets],
            context_lens=self.lens,
            scale=d**-0.5,
            logits_soft_cap=0.0,
            sliding_window=0,
            sinks=None,
            key_offset=None,
            out=self.out.reshape(-1, heads, d),
            lse=self.lse.reshape(-1, heads),
        )

    def launches(self, i: int) -> list[Callable[[], None]]:
        k, v = (q._spec for q in self.quantizers)
        launches: list[Callable[[], None]] = gpu_attention.prepare(k, v, self.batch(i))
        return launches


def graph_microseconds(steps: list[Callable[[], Any]], stream: Any, repeats: int = 12) -> float:
    """Median time per step of a captured graph of all steps."""
    for step in steps:
        step()
    stream.synchronize()
    stream.begin_capture()
    for step in steps:
        step()
    graph = stream.end_capture()
    for _ in range(2):
        graph.launch(stream)
    times = []
    for _ in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return float(statistics.median(times)) / len(steps) * 1e3


def run_all(launches: list[Callable[[], None]]) -> None:
    for launch in launches:
        launch()


def time_step(copy: float, stream: Any, parts: bool, **settings: Any) -> dict[str, Any]:
    step = Step(**settings)
    count = max(4, min(step.sets, 40))
    prepared = [step.launches(i) for i in range(count)]
    us = graph_microseconds([partial(run_all, launches) for launches in prepared], stream)
    result = {**settings, "us": us, "of copy": step.bytes / us * 1e6 / copy, "GB": step.bytes / 1e9}
    if parts:
        result["parts us"] = [
            graph_microseconds([p[k] for p in prepared], stream) for k in range(len(prepared[0]))
        ]
    del step, prepared
    cupy.get_default_memory_pool().free_all_blocks()
    return result


def time_cache_step(batch: int, context: int, stream: Any) -> dict[str, Any]:
    """One decoding step of a layer of PagedKVCache with its default windows, at 4 bits."""
    blocks = batch * (context // 16 + 2)
    cache = PagedKVCache(1, 8, 128, num_blocks=blocks, max_sequences=batch, device="cuda")
    sequences = [cache.allocate() for _ in range(batch)]
    random = cupy.random.default_rng(3)
    for count in (context, 1):
        step = cache.begin_step(sequences, [count] * batch, pack_first=True)
        x = random.standard_normal((batch * count, 8, 128), dtype=np.float32).astype(np.float16)
        step.append(0, x, x)
    query = random.standard_normal((batch, 32, 128), dtype=np.float32).astype(np.float16)
    attend = partial(step.attend, 0, query)
    attend()
    us = graph_microseconds([attend] * 4, stream)
    stream.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        attend()
    host = (time.perf_counter() - start) / 50 * 1e6
    return {"batch": batch, "context": context, "us": us, "host us": host}


def time_prefill(stream: Any, **settings: Any) -> dict[str, Any]:
    """A causal prefill: all tokens of a sequence are query tokens."""
    n = settings["context"]
    result = time_step(1.0, stream, True, batch=1, query_len=n, pool_bytes=1, **settings)
    del result["of copy"], result["GB"]  # arithmetic is what it does
    heads = 8 * settings["group"]
    operations = 4 * settings.get("head_dim", 128) * heads * n * (n + 1) / 2
    return {**result, "TFLOP/s": operations / result["us"] / 1e6}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of device-to-device copies of 2 GiB."""
    copy = CudaRooflines(2**31).copy()
    runners = {"copy": CudaClock().prepare([copy.call], graph=False)}
    return copy.amount / alternate(runners)["copy"]


def check_graph(stream: Any) -> bool:
    """Lengths and tables change between replays; the graph gives what a fresh call gives."""
    step = Step((4, 3), 3, 640, 4, pool_bytes=1)
    attend = TQPagedAttention(step.quantizers[0], 32, value_quantizer=step.quantizers[1])
    tables, lens = step.tables[0].copy(), step.lens.copy()
    arguments = (step.query, *step.cache, tables, lens)
    attend(*arguments)
    stream.synchronize()
    stream.begin_capture()
    out = attend(*arguments)
    graph = stream.end_capture()
    same = True
    for n, i in (([1, 640, 0], 0), ([77, 300, 640], 1), ([0, 0, 0], 0)):
        lens[:] = cupy.asarray(n, np.int32)
        tables[:] = step.tables[i]
        graph.launch(stream)
        stream.synchronize()
        got = out.get()
        same &= got.tobytes() == attend(*arguments).get().tobytes()
    return bool(same)


def scratch_share(bits: int, group: int) -> float:
    """Scratch memory of a step at 128k tokens over the bytes of the packed cache."""
    step = Step((bits, bits), 1, 131072, group, pool_bytes=1)
    pool = cupy.get_default_memory_pool()
    gpu_scratch.buffers.clear()
    before = pool.used_bytes()
    step.launches(0)
    return float((pool.used_bytes() - before) / step.bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("cuda_attention.json"))
    parser.add_argument("--variants", type=int, default=48)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--skip", nargs="*", default=[], choices=["check", "time", "more", "steps"])
    parser.add_argument("--parts", action="store_true", help="time each launch of a step, too")
    options = parser.parse_args()
    # `with`, for Stream.use() does not survive a `with` of another stream
    with cupy.cuda.Stream(non_blocking=True) as stream:
        sys.exit(run(options, stream))


def run(options: argparse.Namespace, stream: Any) -> bool:
    """What the options ask for, on `stream`; whether a check failed."""
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    report: dict[str, Any] = {
        "gpu": properties["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": list(cupy.cuda.nvrtc.getVersion()),
        "cupy": cupy.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(report, flush=True)
    failed = False
    if "check" not in options.skip:
        checks = check_many(
            options.kinds, options.variants, options.problems, options.seed, options.seconds
        )
        report["checks"] = checks
        failed |= bool(checks["failed"])
        print({**checks, "failed": len(checks["failed"])}, *checks["failed"][:8], sep="\n")
        report["graph replays equal calls"] = check_graph(stream)
        failed |= not report["graph replays equal calls"]
        report["scratch share"] = {
            f"{bits} bits, group {group}": scratch_share(bits, group)
            for bits in (2, 3, 4, 8)
            for group in (4, 8)
        }
        for name in ("graph replays equal calls", "scratch share"):
            print(name, report[name], flush=True)
        options.json.write_text(json.dumps(report, indent=1))
    if "time" not in options.skip:
        copy = report["copy bytes/s"] = copy_bandwidth()
        print(f"copy {copy / 1e12:.3f} TB/s", flush=True)
        shapes = [(32, 8192, 4), (1, 8192, 4)]
        if "more" not in options.skip:
            shapes += [(64, 2048, 4), (8, 32768, 4), (1, 131072, 4), (32, 8192, 8), (4, 4096, 4)]
        timed = [
            {"bits": (b, b), "batch": n, "context": c, "group": g}
            for b in (4, 3, 2, 8)
            for n, c, g in shapes
        ]
        if "more" not in options.skip:
            base = {"bits": (4, 4), "batch": 32, "context": 8192, "group": 4}
            timed += [
                {**base, "head_major": False},
                {**base, "page": 32},
                {**base, "page": 32, "bits": (8, 8)},
                {**base, "batch": 128, "context": 2048},
                {**base, "bits": (4, 2)},
                {**base, "rotation": "haar"},
                {**base, "query_len": 2},
                {**base, "query_len": 4},
                {**base, "query_len": 8},
                *({**base, "head_dim": 64, "bits": (b, b)} for b in (4, 3, 2, 8)),
                {**base, "head_dim": 64, "batch": 1},
                {**base, "head_dim": 64, "query_len": 8},
                *({**base, "head_dim": 96, "bits": (b, b)} for b in (4, 3, 2, 5, 6, 8)),
                {**base, "head_dim": 96, "head_major": False},
                *({**base, "head_dim": 256, "bits": (b, b)} for b in (4, 3, 2)),
                *({**base, "bits": (b, b)} for b in (5, 6, 7)),
                {**base, "bits": (5, 5), "batch": 64, "context": 2048},
                {**base, "query_len": 16},
                {**base, "query_len": 8, "bits": (2, 2)},
                {**base, "query_len": 8, "rotation": "haar"},
                {**base, "query_len": 8, "batch": 1, "context": 131072},
                {**base, "kv_heads": 1, "batch": 256},
            ]
        report["times"] = []
        for settings in timed if "steps" not in options.skip else []:
            result = time_step(copy, stream, options.parts, **settings)
            report["times"].append(result)
            rest = {k: v for k, v in result.items() if k not in ("us", "of copy", "GB", "parts us")}
            parts = " ".join(f"{p:.1f}" for p in result.get("parts us", []))
            print(f"{result['us']:8.1f} us {result['of copy']:6.1%}  {rest}  {parts}", flush=True)
            options.json.write_text(json.dumps(report, indent=1))
        report["prefill"] = []
        for settings in (
            {"bits": (4, 4), "context": 8192, "group": 4},
            {"bits": (2, 2), "context": 8192, "group": 4},
            {"bits": (8, 8), "context": 8192, "group": 4},
            {"bits": (4, 4), "context": 1024, "group": 4},
            {"bits": (4, 4), "context": 8192, "group": 4, "head_dim": 64},
        ):
            report["prefill"].append(time_prefill(stream, **settings))
            print(report["prefill"][-1], flush=True)
        if "steps" not in options.skip:
            report["cache steps"] = [time_cache_step(n, 8192, stream) for n in (32, 1)]
            print(*report["cache steps"], sep="\n", flush=True)
        options.json.write_text(json.dumps(report, indent=1))
    return failed


if __name__ == "__main__":
    main()
