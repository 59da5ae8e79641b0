"""Build, check and time the CUDA kernels in one go: python tests/cuda/run_on_gpu.py [options].

Prints tables and writes every figure as JSON.  Equality is bit for bit with the cpu backend.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_on_gpu  # type: ignore[import-not-found]
import cupy
import numpy as np

from turboquant_np import TurboQuant

HEAD_DIM = 128
NUM_VECTORS = 1 << 22


def same_bits(a: Any, b: Any) -> bool:
    """Equal bit for bit; any NaN equals any NaN."""
    a, b = cupy.asnumpy(a), cupy.asnumpy(b)
    if a.dtype.kind == "u":
        return bool((a == b).all())
    nan = np.isnan(a)
    if not (nan == np.isnan(b)).all():
        return False
    kind = np.dtype(f"u{a.itemsize}")
    return bool((a.view(kind) == b.view(kind))[~nan].all())


def special_rows(d: int, dtype: Any, seed: int) -> Any:
    """Rows of ordinary numbers and of every special kind."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((97, d)).astype(np.float32)
    with np.errstate(all="ignore"):
        info = np.finfo(np.float32) if dtype.name == "bfloat16" else np.finfo(dtype)
        big, small = float(info.max), float(info.smallest_subnormal)
        x = x.astype(np.float64)
        x[1] = 0
        x[2] = -0.0
        x[3] = 3.0
        x[4] = np.where(np.arange(d) % 2, 1.0, -1.0)
        x[5], x[5, d // 2] = 0, 7.0
        x[6], x[6, 0] = 0, small
        x[7] *= small * 8
        x[8] *= big / 16
        x[9] *= min(1e-30, 1.0)
        x[10] *= 1e18
        x[11] *= 1e-19
        x[12, d - 1] = np.nan
        x[13, 0] = np.inf
        x[14, d // 2] = -np.inf
        x[15] = big
        x[16, :] = np.exp(rng.uniform(-80, 80, d)) * rng.choice([-1, 1], d)
        x[17:40] *= np.exp(rng.uniform(-60, 60, 23))[:, None]
        return x.astype(np.float32).astype(dtype) if dtype.name == "bfloat16" else x.astype(dtype)


def check_variants(dims: list[int], seconds: float) -> dict[str, Any]:
    """Encode and decode of every kind against the cpu backend, as far as the time allows."""
    import ml_dtypes

    dtypes = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
    rotations: list[dict[str, Any]] = [
        {"hadamard_rounds": 3},
        {"hadamard_rounds": 1},
        {"rotation": "haar"},
    ]
    product = [
        (d, bits, scale, rotation)
        for d, bits, scale, rotation in itertools.product(
            dims, range(1, 9), ("norm", "mse", "unbiased"), range(3)
        )
        if d <= 256 or rotation < 2
    ]
    np.random.default_rng(5).shuffle(product)
    start, done, failed = time.perf_counter(), 0, []
    for count, (d, bits, scale, rotation) in enumerate(product):
        if time.perf_counter() - start > seconds:
            break
        d, bits = int(d), int(bits)
        settings = {
            "head_dim": d,
            "bits": bits,
            "scale": str(scale),
            **rotations[int(rotation)],
        }
        tq, expected = TurboQuant(**settings), TurboQuant(**settings, backend="cpu")
        for dtype in (dtypes[count % 4], dtypes[(count // 4) % 4]):
            x = special_rows(d, dtype, count)
            want = expected.encode(x, check_finite=False)
            got = tq.encode(cupy.asarray(x), check_finite=False)
            ok = [same_bits(g, w) for g, w in zip(got, want, strict=True)]
            for out in dtypes[count % 2 :: 2]:
                back = tq.decode(*map(cupy.asarray, want), dtype=out.name)
                with np.errstate(all="ignore"):
                    ok.append(same_bits(back, expected.decode(*want, dtype=out.name)))
            done += 1
            if not all(ok):
                failed.append({**settings, "dtype": dtype.name, "ok": ok})
    return {"variants": done, "of": 2 * len(product), "failed": failed}


def milliseconds(call: Callable[[], Any], repeats: int = 9, calls: int = 8) -> float:
    """Median device time of `call`, of several in a row so that none waits for the host."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) / calls)
    return float(statistics.median(times))


def host_microseconds(call: Callable[[], Any], calls: int = 300) -> float:
    """Host time of a call that only launches."""
    call()
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    cupy.cuda.Device().synchronize()
    return elapsed / calls * 1e6


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 1 GiB."""
    a = cupy.random.default_rng(0).integers(0, 255, 1 << 30, dtype=np.uint8)
    b = cupy.empty_like(a)
    return float(2 * a.nbytes / milliseconds(lambda: cupy.copyto(b, a)) * 1e3)


def time_codec(copy: float, n: int, dtype: Any = np.float16, **settings: Any) -> dict[str, Any]:
    """Encode and decode of n vectors into given arrays."""
    tq = TurboQuant(head_dim=settings.pop("head_dim", HEAD_DIM), **settings)
    d = tq.head_dim
    x = cupy.random.default_rng(1).standard_normal((n, d), dtype=np.float32).astype(dtype)
    out = tq.encode(x)
    back = cupy.empty_like(x)
    moved = x.nbytes + out[0].nbytes + out[1].nbytes
    result = {"d": d, "dtype": np.dtype(dtype).name, **settings}
    for name, call in (
        ("encode", lambda: tq.encode(x, out=out, check_finite=False)),
        ("decode", lambda: tq.decode(*out, out=back)),
    ):
        ms = milliseconds(call)
        result[name] = {"Gvec/s": n / ms / 1e6, "of copy": moved / ms * 1e3 / copy}
    return result


def time_inner_products(copy: float, n: int, queries: int, **settings: Any) -> dict[str, Any]:
    """Scores of `queries` float16 queries with n packed vectors."""
    tq = TurboQuant(head_dim=HEAD_DIM, **settings)
    random = cupy.random.default_rng(2)
    x = random.standard_normal((n, HEAD_DIM), dtype=np.float32).astype(np.float16)
    packed, norms = tq.encode(x)
    scores = cupy.empty((queries, n), np.float32)
    query = x[:queries].copy()
    ms = milliseconds(lambda: tq.inner_products(query, packed, norms, out=scores))
    moved = packed.nbytes + norms.nbytes + scores.nbytes
    timed = {"Gvec/s": n / ms / 1e6, "of copy": moved / ms * 1e3 / copy}
    return {**settings, "queries": queries, "inner_products": timed}


def time_launch() -> dict[str, Any]:
    """Host time of calls on 8 vectors with given outputs."""
    tq = TurboQuant(head_dim=HEAD_DIM, bits=4)
    x = cupy.ones((8, HEAD_DIM), np.float16)
    out, back = tq.encode(x), cupy.empty_like(x)
    return {
        "encode us": host_microseconds(lambda: tq.encode(x, out=out, check_finite=False)),
        "decode us": host_microseconds(lambda: tq.decode(*out, out=back)),
    }


def show(title: str, lines: list[dict[str, Any]]) -> None:
    print(f"-- {title}")
    for line in lines:
        cells = []
        for key, value in line.items():
            if isinstance(value, dict):
                cells.append(f"{key} {value['Gvec/s']:.2f} Gvec/s {value['of copy']:.0%}")
            else:
                cells.append(f"{key}={value}")
        print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("cuda_codec.json"))
    parser.add_argument("--check-seconds", type=float, default=60)
    parser.add_argument("--many", type=int, default=100_000_000)
    parser.add_argument("--processes", type=int, default=8, help="of the comparison of many")
    parser.add_argument("--skip", nargs="*", default=[], choices=["variants", "many", "time"])
    options = parser.parse_args()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    report: dict[str, Any] = {
        "gpu": properties["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": list(cupy.cuda.nvrtc.getVersion()),
        "cupy": cupy.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(report)
    failed = False
    if "variants" not in options.skip:
        dims = [64, 80, 96, 112, 128, 192, 256, 2, 3, 7, 16, 31, 100, 127, 255, 576, 1024]
        report["variants"] = check_variants(dims, options.check_seconds)
        failed |= bool(report["variants"]["failed"])
        print("variants", {**report["variants"], "failed": report["variants"]["failed"][:12]})
    if "many" not in options.skip:
        report["many"] = compare_on_gpu.compare_all(options.many, options.processes)
        failed |= compare_on_gpu.rows_wrong(report["many"]) > 0
        compare_on_gpu.show(report["many"])
    if "time" not in options.skip:
        copy = report["copy bytes/s"] = copy_bandwidth()
        print(f"copy {copy / 1e12:.3f} TB/s")
        report["codec"] = [
            time_codec(copy, NUM_VECTORS, bits=bits, hadamard_rounds=rounds)
            for rounds in (1, 3)
            for bits in (2, 3, 4, 8)
        ]
        report["codec"] += [
            time_codec(copy, NUM_VECTORS, np.float32, bits=4, hadamard_rounds=3),
            time_codec(copy, NUM_VECTORS, bits=4, scale="mse"),
            time_codec(copy, NUM_VECTORS, bits=4, scale="unbiased"),
        ]
        report["codec"] += [
            time_codec(copy, NUM_VECTORS * 128 // d, head_dim=d, bits=4)
            for d in (32, 64, 80, 96, 100, 112, 192, 256, 384, 576, 768, 1024, 1536)
        ]
        report["codec"] += [
            time_codec(copy, NUM_VECTORS * 128 // d, head_dim=d, bits=4, hadamard_rounds=1)
            for d in (768, 1536)
        ]
        report["codec"] += [
            time_codec(copy, NUM_VECTORS * 16 // d, head_dim=d, bits=4)
            for d in (127, 200, 300, 1000)
        ]
        report["haar"] = [
            time_codec(copy, NUM_VECTORS * 128 // d, head_dim=d, bits=4, rotation="haar")
            for d in (64, 96, 128, 192)
        ]
        report["haar"] += [
            time_codec(copy, NUM_VECTORS, rotation="haar", **settings)
            for settings in (
                {"bits": 2},
                {"bits": 3},
                {"bits": 8},
                {"bits": 4, "scale": "mse"},
                {"bits": 4, "dtype": np.float32},
            )
        ]
        report["haar"] += [
            time_codec(copy, NUM_VECTORS * 16 // d, head_dim=d, bits=4, rotation="haar")
            for d in (80, 256)
        ]
        report["inner_products"] = [
            time_inner_products(copy, NUM_VECTORS, queries, bits=bits)
            for queries in (1, 8)
            for bits in (2, 3, 4, 8)
        ]
        report["launch"] = [time_launch()]
        for part in ("codec", "haar", "inner_products", "launch"):
            show(part, report[part])
    options.json.write_text(json.dumps(report, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
