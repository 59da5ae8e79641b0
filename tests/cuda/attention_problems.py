"""Problems of attention, drawn from all that it takes: on a GPU, and through the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cupy
import numpy as np

from turboquant_np import TurboQuant
from turboquant_np.fused_attention import TQPagedAttention

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
