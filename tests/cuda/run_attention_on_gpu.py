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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from turboquant_np import TurboQuant
from turboquant_np._attention_checks import AttentionBatch
from turboquant_np.bench.rooflines import CudaRooflines
from turboquant_np.bench.timing import CudaClock, alternate
from turboquant_np.fused_attention import TQPagedAttention
from turboquant_np.kv_cache import PagedKVCache

gpu_attention = importlib.import_module("turboquant_np.backends.cuda.attention")
gpu_scratch = importlib.import_module("turboquant_np.backends.cuda.attention_scratch")
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Problem:
    """Random pages, a ragged batch over them, and arguments of one attention call."""

    def __init__(self, rng: np.random.Generator, **settings: Any) -> None:
        d, block_size, kv_heads = (settings[k] for k in ("head_dim", "block_size", "kv_heads"))
        group, query_len = settings["group"], settings["query_len"]
        most, num_seqs = settings["max_context"], settings["num_seqs"]
        kinds = dict(zip(("k", "v"), settings["rotations"], strict=True))
        quantizers = {
            name: (settings[f"{name}_bits"], kinds[name], seed)
            for name, seed in (("k", 3), ("v", 4))
        }
        self.quantizers = {
            name: TurboQuant(head_dim=d, bits=bits, rotation=rotation, seed=seed)
            for name, (bits, rotation, seed) in quantizers.items()
        }
        self.query_heads = kv_heads * group
        table_width = -(-most // block_size)
        num_blocks = num_seqs * table_width + 2
        lens = rng.integers(0, most + 1, num_seqs)
        lens[rng.integers(num_seqs)] = most
        if num_seqs > 2:
            lens[rng.integers(num_seqs)] = 0
        tables = np.full((num_seqs, table_width), 2**30)
        arrays: dict[str, Any] = {}
        for name, quantizer in self.quantizers.items():
            shape = (num_blocks, block_size, kv_heads)
            codes = rng.integers(0, 256, (*shape, quantizer.packed_dim), np.uint8)
            arrays[f"{name}_packed"] = codes
            arrays[f"{name}_norms"] = np.full(shape, np.nan, np.float32)
        free = iter(rng.permutation(num_blocks))
        decades = 1 if settings["dtype"] == "float16" else 6  # of which the result keeps its digits
        scales = {"k": np.sqrt(d), "v": 10.0 ** rng.uniform(-decades, decades)}
        for s, n in enumerate(lens):
            for j in range(-(-int(n) // block_size)):
                block = tables[s, j] = next(free)
                used = min(block_size, int(n) - j * block_size)
                for name, scale in scales.items():
                    norms = scale * rng.uniform(0.5, 1.5, (used, kv_heads))
                    arrays[f"{name}_norms"][block, :used] = norms
        if settings["head_major"]:
            for name, array in arrays.items():
                arrays[name] = np.ascontiguousarray(array.swapaxes(1, 2))
        self.arrays = arrays
        self.head_major = settings["head_major"]
        integer = settings["integer"]
        self.inputs = [tables.astype(integer), lens.astype(integer)]
        self.options: dict[str, Any] = {}
        if settings["ragged"]:
            starts = np.concatenate([[0], np.cumsum(rng.integers(0, query_len + 1, num_seqs))])
            self.options["query_start_loc"] = starts.astype(integer)
            leading: tuple[int, ...] = (int(starts[-1]),)
        elif query_len > 1:
            leading = (num_seqs, query_len)
        else:
            leading = (num_seqs,)
        if settings["positions"]:
            positions = rng.integers(-3, lens + 40)
            self.options["query_positions"] = positions.astype(integer)
        self.query = rng.standard_normal((*leading, self.query_heads, d), np.float32)
        self.dtype = settings["dtype"]
        if settings["sinks"]:
            self.options["sinks"] = rng.standard_normal(self.query_heads, np.float32)
        if settings["key_offset"]:
            self.options["key_offset"] = rng.standard_normal((num_seqs, kv_heads, d), np.float32)
        for name in ("logits_soft_cap", "sliding_window", "scale"):
            self.options[name] = settings[name]

    def arguments(self, convert: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the call, arrays converted."""
        cache = []
        for name in ("k_packed", "k_norms", "v_packed", "v_norms"):
            array = convert(self.arrays[name])
            cache.append(array.swapaxes(1, 2) if self.head_major else array)
        options = {
            k: convert(v) if isinstance(v, np.ndarray) else v for k, v in self.options.items()
        }
        query = self.query
        if self.dtype == "bfloat16":
            import ml_dtypes

            query = query.astype(ml_dtypes.bfloat16)
        else:
            query = query.astype(self.dtype)
        return [convert(query), *cache, *map(convert, self.inputs)], options

    def attention(self, backend: str) -> TQPagedAttention:
        k, v = (TurboQuant(**_settings_of(q, backend)) for q in self.quantizers.values())
        return TQPagedAttention(k, self.query_heads, value_quantizer=v)


def _settings_of(quantizer: TurboQuant, backend: str) -> dict[str, Any]:
    config = quantizer.config
    return {
        "head_dim": quantizer.head_dim,
        "bits": quantizer.bits,
        "rotation": config.rotation,
        "seed": config.seed,
        "backend": backend,
    }


KINDS = ("any", "pages", "prefill")  # of problems: which kernels they are likely to run


def draw_variant(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    """What decides which kernels are compiled, but for the odd float64 query."""
    if kind == "prefill":
        group, query_len = [(1, 150), (4, 70), (5, 33), (8, 20), (71, 2)][rng.integers(5)]
        return {
            "group": group,
            "query_len": query_len,
            "rotations": [str(rng.choice(["hadamard", "hadamard", "haar"])) for _ in "kv"],
            "ragged": bool(rng.integers(2)),
            "head_dim": int(rng.choice([64, 96, 128, 128])),
            "k_bits": int(rng.integers(1, 9)),
            "v_bits": int(rng.integers(1, 9)),
            "block_size": int(rng.choice([1, 7, 16, 16, 32, 256])),
            "kv_heads": int(rng.choice([1, 3, 8])),
            "head_major": bool(rng.integers(2)),
        }
    if kind == "pages":
        bits = rng.choice([2, 3, 4, 4, 5, 6, 7, 8], 2)
        heads = int(rng.choice([1, 2, 4, 8, 16]))
        head_major = bool(heads == 16 or rng.integers(2))
        group, query_len = [(1, 1), (3, 1), (4, 1), (8, 1), (4, 3), (2, 8), (4, 8), (16, 4)][
            rng.choice(8, p=[0.1, 0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1])
        ]
        return {
            "group": group,
            "query_len": query_len,
            "rotations": ["hadamard", str(rng.choice(["hadamard", "hadamard", "haar"]))],
            "ragged": query_len > 1 and bool(rng.integers(2)),
            "head_dim": int(rng.choice([64, 96, 128, 128, 256])),
            "k_bits": int(bits[0]),
            "v_bits": int(bits[rng.integers(2)]),
            "block_size": int(rng.choice([16, 16, 32, 64])),
            "kv_heads": heads,
            "head_major": head_major,
        }
    return {
        "head_dim": int(
            rng.choice([32, 40, 64, 80, 96, 112, 128, 256, int(rng.integers(32, 257))])
        ),
        "k_bits": int(rng.integers(1, 9)),
        "v_bits": int(rng.integers(1, 9)),
        "block_size": int(rng.choice([1, 2, 7, 16, 32, 100, 128, 256])),
        "kv_heads": int(rng.choice([1, 2, 3, 8])),
        "head_major": bool(rng.integers(2)),
    }


def draw_problem(rng: np.random.Generator, variant: dict[str, Any], kind: str) -> dict[str, Any]:
    """Everything else."""
    query_len = int(rng.choice([1, 1, 2, 3, 5]))
    groups = [1, 4, 5, 8, 16, 71 if query_len == 1 else 7]
    return {
        "group": int(rng.choice(groups)),
        "query_len": query_len,
        "ragged": bool(rng.integers(3) == 0),
        "rotations": [str(rng.choice(["hadamard", "hadamard", "haar"])) for _ in "kv"],
        **variant,
        "num_seqs": int(rng.integers(1, 7)),
        "max_context": int(rng.choice([1, 15, 16, 100, 333, 700, 2000])),
        "dtype": str(rng.choice(DTYPES)),
        "integer": str(rng.choice(["int32", "int64"])),
        "positions": bool(rng.integers(3) == 0),
        "sinks": bool(rng.integers(2)),
        "key_offset": bool(rng.integers(2)),
        "logits_soft_cap": None
        if kind == "pages" or rng.integers(2)
        else float(rng.uniform(5, 50)),
        "sliding_window": None if rng.integers(2) else int(rng.integers(1, 300)),
        "scale": None if rng.integers(2) else float(rng.uniform(0.02, 0.15)),
    }


def relative_error(got: Any, want: Any) -> float:
    want = np.asarray(want, np.float64)
    size = float(np.linalg.norm(want))
    return float(np.linalg.norm(np.asarray(got, np.float64) - want)) / (size or 1.0)


def check(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One problem on the GPU (twice, into poisoned memory) and through the reference."""
    problem = Problem(np.random.default_rng(seed), **settings)
    arguments, options = problem.arguments(cupy.asarray)
    out = cupy.full_like(arguments[0], float("nan"))
    attend = problem.attention("cuda")
    _, lse = attend(*arguments, **options, out=out, return_lse=True)
    first = (out.get(), lse.get())
    again, lse = attend(*arguments, **options, return_lse=True)
    same = first[0].tobytes() == again.get().tobytes() and first[1].tobytes() == lse.get().tobytes()
    arguments, options = problem.arguments(np.asarray)
    want, want_lse = problem.attention("reference")(*arguments, **options, return_lse=True)
    sees = np.isfinite(want_lse)
    lse_error = float(np.abs(first[1][sees] - want_lse[sees]).max(initial=0.0))
    if not (np.isneginf(first[1]) == ~sees).all():
        lse_error = float("inf")
    error = relative_error(first[0], want)
    # bfloat16 rounds the result to 8 bits
    limit = 4e-3 if settings["dtype"] == "bfloat16" else 1e-3
    good = error <= limit and lse_error <= 1e-2 and same
    return {"error": error, "lse error": lse_error, "repeatable": same, "good": good, "seed": seed}


def check_many(
    kinds: Sequence[str], variants: int, problems: int, seed: int, seconds: float
) -> dict[str, Any]:
    """Problems of many kinds; kernels are compiled by several threads beforehand."""
    rng = np.random.default_rng(seed)
    drawn = []
    for i in range(variants):
        kind = kinds[i % len(kinds)]
        variant = draw_variant(rng, kind)
        drawn += [(draw_problem(rng, variant, kind), i * 1000 + p) for p in range(problems)]
    start = time.perf_counter()
    with ThreadPoolExecutor(14) as pool:
        list(pool.map(_compile_first, drawn[::problems]))
    compiled = time.perf_counter() - start
    results, start = [], time.perf_counter()
    order = [drawn[j] for i in range(problems) for j in range(i, len(drawn), problems)]
    for settings, problem_seed in order:
        if time.perf_counter() - start > seconds:
            break
        try:
            results.append({**settings, **check(settings, problem_seed)})
        except Exception as error:
            if "CUDA_ERROR" in str(error) or "cudaError" in str(error):
                print("FATAL", settings, error, flush=True)
                raise
            failure = {"good": False, "error": repr(error)[:500], "seed": problem_seed}
            results.append({**settings, **failure})
    bad = [r for r in results if not r["good"]]
    errors = sorted(
        r["error"] for r in results if r["good"] and r["dtype"] != "bfloat16" and r["error"] > 0
    )
    return {
        "problems": len(results),
        "compile s": compiled,
        "median error": errors[len(errors) // 2] if errors else None,
        "largest error": errors[-1] if errors else None,
        "failed": bad,
    }


def _compile_first(drawn: tuple[dict[str, Any], int]) -> None:
    """Run a variant once; only its compilation counts."""
    settings, seed = drawn
    try:
        small = {**settings, "max_context": 16, "num_seqs": 1}
        problem = Problem(np.random.default_rng(seed), **small)
        arguments, options = problem.arguments(cupy.asarray)
        problem.attention("cuda")(*arguments, **options)
    except Exception as error:
        print("compile", settings, repr(error)[:1000], flush=True)


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
