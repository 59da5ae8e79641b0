"""Check and time variants of attention_pages: python tests/cuda/time_pages_trials.py [options].

A trial is a set of macros and numbers of warps and pages that attention_plan.TRIAL holds meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from run_attention_on_gpu import (  # type: ignore[import-not-found]
    Problem,
    Step,
    copy_bandwidth,
    gpu_attention,
    graph_microseconds,
    relative_error,
    run_all,
)

attention_plan = importlib.import_module("turboquant_np.backends.cuda.attention_plan")
Trial = dict[str, int]


def w(warps: int, sub: int, **macros: int) -> Trial:
    return {"warps": warps, "sub": sub, **macros}


def registers(keys: int, values: int = 0) -> Trial:
    return {"KEY_REGISTERS": keys, "VALUE_REGISTERS": values}


# (bits, head_dim): trials
TRIALS: dict[tuple[int, int], list[Trial]] = {
    (2, 128): [
        {},
        w(8, 4, **registers(1)),
        w(8, 4, **registers(2)),
        w(8, 4, **registers(2, 1)),
        w(8, 2),
        w(16, 1),
        w(16, 2),
        w(16, 1, **registers(1)),
        w(16, 1, **registers(2)),
        w(16, 2, **registers(1)),
        w(16, 2, **registers(2)),
        w(16, 1, **registers(2, 1)),
        w(16, 2, **registers(1, 1)),
        w(16, 1, COPY_ONCE=1),
        w(16, 1, **registers(2), COPY_ONCE=1),
        w(8, 4, COPY_ONCE=1),
        w(8, 4, ONLY_COPY=1),
        w(16, 1, ONLY_COPY=1),
    ],
    (3, 128): [
        {},
        w(8, 1),
        w(16, 1),
        w(16, 2),
        w(16, 1, COPY_ONCE=1),
        w(8, 2, COPY_ONCE=1),
        w(16, 1, ONLY_COPY=1),
    ],
    (4, 128): [
        {},
        w(8, 1),
        w(16, 1),
        w(8, 2, COPY_ONCE=1),
        w(16, 1, COPY_ONCE=1),
        w(8, 2, ONLY_COPY=1),
    ],
    (5, 128): [
        {},
        w(16, 1),
        w(8, 1),
        w(8, 1, PAIRS=1),
        w(8, 1, PAIRS=1, COPY_ONCE=1),
        w(8, 2, COPY_ONCE=1),
        w(16, 1, COPY_ONCE=1),
    ],
    (6, 128): [{}, w(16, 1)],
    (7, 128): [{}, w(16, 1)],
    (8, 128): [{}],
    (2, 64): [
        {},
        w(8, 4, **registers(1)),
        w(16, 2),
        w(16, 4),
        w(16, 2, **registers(1)),
        w(16, 4, **registers(1)),
        w(16, 2, **registers(1), COPY_ONCE=1),
        w(16, 2, ONLY_COPY=1),
    ],
    (3, 64): [{}, w(8, 2), w(16, 1), w(16, 2)],
    (4, 64): [{}, w(16, 1), w(16, 2)],
    (2, 256): [
        {},
        w(8, 2, **registers(2)),
        w(8, 2, **registers(4)),
        w(8, 1),
        w(8, 1, **registers(4)),
    ],
    (3, 256): [{}, w(8, 1)],
}
SHAPES = [(32, 8192, 4), (64, 2048, 4), (1, 8192, 4)]


def problems(bits: int, d: int) -> list[dict[str, Any]]:
    """Of one compiled variant."""
    rng = np.random.default_rng(bits * d)
    base = {
        "head_dim": d,
        "k_bits": bits,
        "v_bits": bits,
        "rotations": ["hadamard", "hadamard"],
        "block_size": 16,
        "kv_heads": 8,
        "head_major": True,
        "query_len": 1,
        "ragged": False,
        "logits_soft_cap": None,
        "dtype": "float16",
        "integer": "int32",
    }
    drawn = []
    for context, group in ((33, 4), (700, 8), (1500, 4), (1999, 3)):
        drawn.append(
            {
                **base,
                "group": group,
                "num_seqs": int(rng.integers(1, 7)),
                "max_context": context,
                "positions": bool(rng.integers(2)),
                "sinks": bool(rng.integers(2)),
                "key_offset": bool(rng.integers(2)),
                "sliding_window": None if rng.integers(2) else int(rng.integers(1, 300)),
                "scale": None,
            }
        )
    return drawn


wanted: dict[tuple[int, int, int], tuple[Any, Any, Any]] = {}


def check(bits: int, d: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """As run_attention_on_gpu.check; the reference runs once."""
    key = (bits, d, seed)
    if key not in wanted:
        problem = Problem(np.random.default_rng(seed), **settings)
        arguments, options = problem.arguments(np.asarray)
        reference = problem.attention("reference")
        wanted[key] = (problem, *reference(*arguments, **options, return_lse=True))
    problem, want, want_lse = wanted[key]
    arguments, options = problem.arguments(cupy.asarray)
    out = cupy.full_like(arguments[0], float("nan"))
    attend = problem.attention("cuda")
    _, lse = attend(*arguments, **options, out=out, return_lse=True)
    again, lse_again = attend(*arguments, **options, return_lse=True)
    same = out.get().tobytes() == again.get().tobytes()
    same &= lse.get().tobytes() == lse_again.get().tobytes()
    sees = np.isfinite(want_lse)
    lse_error = float(np.abs(lse.get()[sees] - want_lse[sees]).max(initial=0.0))
    error = relative_error(out.get(), want)
    good = error <= 1e-3 and lse_error <= 1e-2 and same
    return {"error": error, "lse error": lse_error, "repeatable": same, "good": good}


def use(trial: Trial) -> None:
    attention_plan.TRIAL.clear()
    attention_plan.TRIAL.update(trial)


def name_of(trial: Trial) -> str:
    return " ".join(f"{k}={v}" for k, v in trial.items()) or "as it is"


def wrong_on_purpose(trial: Trial) -> bool:
    return "COPY_ONCE" in trial or "ONLY_COPY" in trial


def compile_trial(bits: int, d: int, trial: Trial) -> str:
    """A line that says what went wrong, or nothing."""
    step = Step((bits, bits), 32, 8192, 4, head_dim=d, pool_bytes=1)
    try:
        use(trial)
        k, v = (q._spec for q in step.quantizers)
        batch = step.batch(0)
        shapes = gpu_attention.shapes_of(batch, gpu_attention._address, None)
        plan = gpu_attention.make_plan(k, v, shapes, 132, True, False)
    except Exception as error:
        return f"plan {bits} bits d={d} {name_of(trial)}: {error!r}"
    jobs.append((bits, d, trial, plan))
    return ""


jobs: list[tuple[int, int, Trial, Any]] = []


def compile_job(job: tuple[int, int, Trial, Any]) -> str:
    bits, d, trial, plan = job
    try:
        module = gpu_attention._compile(0, plan.source, tuple(plan.macros.items()), plan.options)
        attributes = module.get_function(plan.kernel)
        used = f"{attributes.num_regs} registers, {attributes.local_size_bytes} bytes local"
        return f"{bits} bits d={d} {name_of(trial)}: {used}"
    except Exception as error:
        return f"compile {bits} bits d={d} {name_of(trial)}: {error!r}"[:1500]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="BITSxHEAD_DIM, as 2x128")
    parser.add_argument("--json", type=Path, default=Path("trials.json"))
    parser.add_argument("--skip", nargs="*", default=[], choices=["check", "time"])
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument(
        "--profile", type=int, nargs="*", help="number of a trial: two launches of it"
    )
    options = parser.parse_args()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        sys.exit(run(options, stream))


def run(options: argparse.Namespace, stream: Any) -> bool:
    kinds = {
        k: t for k, t in TRIALS.items() if not options.only or f"{k[0]}x{k[1]}" in options.only
    }
    if options.profile is not None:
        (bits, d), trials = next(iter(kinds.items()))
        step = Step((bits, bits), 32, 8192, 4, head_dim=d, pool_bytes=1)
        for number in options.profile:
            use(trials[number])
            for i in range(2):
                run_all(step.launches(i))
            stream.synchronize()
        return False
    begin = time.perf_counter()
    for (bits, d), trials in kinds.items():
        for trial in trials:
            message = compile_trial(bits, d, trial)
            if message:
                print(message, flush=True)
    with ThreadPoolExecutor(14) as pool:
        print(*pool.map(compile_job, jobs), sep="\n", flush=True)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    report: dict[str, Any] = {"checks": [], "times": []}
    failed = False
    if "check" not in options.skip:
        for bits, d, trial, _ in jobs:
            if wrong_on_purpose(trial):
                continue
            use(trial)
            errors, bad = [], []
            for seed, settings in enumerate(problems(bits, d)):
                result = check(bits, d, seed, settings)
                errors.append(result["error"])
                if not result["good"]:
                    bad.append({**settings, **result})
            failed |= bool(bad)
            line = f"check {bits} bits d={d} {name_of(trial)}: errors " + " ".join(
                f"{e:.1e}" for e in errors
            )
            print(line, "BAD" if bad else "good", flush=True)
            report["checks"].append({"bits": bits, "d": d, **trial, "errors": errors, "bad": bad})
    if "time" not in options.skip:
        use({})
        copy = report["copy bytes/s"] = copy_bandwidth()
        print(f"copy {copy / 1e12:.3f} TB/s", flush=True)
        for (bits, d), trials in kinds.items():
            rows: list[list[str]] = [[name_of(t)] for t in trials]
            for batch, context, group in SHAPES:
                if time.perf_counter() - begin > options.seconds:
                    break
                step = Step((bits, bits), batch, context, group, head_dim=d)
                count = max(4, min(step.sets, 40))
                for trial, row in zip(trials, rows, strict=True):
                    if wrong_on_purpose(trial) and batch != 32:
                        continue
                    use(trial)
                    try:
                        prepared = [step.launches(i) for i in range(count)]
                        us = graph_microseconds([partial(run_all, p) for p in prepared], stream)
                    except Exception as error:
                        row.append(repr(error)[:100])
                        continue
                    row.append(f"{us:7.1f} us {step.bytes / us * 1e6 / copy:6.1%}")
                    report["times"].append(
                        {
                            "bits": bits,
                            "d": d,
                            "batch": batch,
                            "context": context,
                            "us": us,
                            **trial,
                        }
                    )
                del step
                cupy.get_default_memory_pool().free_all_blocks()
            print(f"-- {bits} bits, head_dim {d}: {SHAPES}")
            for number, row in enumerate(rows):
                print(f"{number:3d} {row[0]:60s}", *row[1:], flush=True)
            options.json.write_text(json.dumps(report, indent=1))
    options.json.write_text(json.dumps(report, indent=1))
    return failed


if __name__ == "__main__":
    main()
