"""Compare the cuda backend with the cpu backend over many random vectors, bit for bit.

    python tests/cuda/compare_on_gpu.py [--vectors 100000000] [--processes 8]

Vectors are made on the GPU from a counter, so that a run can be repeated: ordinary numbers at all
magnitudes, random bit patterns, subnormal numbers, sparse rows, rows of two values, rows that share
an exponent; nothing but finite ones.  What the GPU encodes must equal what the CPU encodes, and
what it decodes from that, what the CPU decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import cupy
import cupyx  # type: ignore[import-untyped]
import ml_dtypes
import numpy as np

from turboquant_np import TurboQuant

CHUNK_BYTES = 1 << 28  # of vectors at a time, on the GPU and in pinned memory
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
MANTISSA_BITS = {"float16": 10, "bfloat16": 7, "float32": 23}

_HASH = """
__device__ unsigned long long hash(unsigned long long x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
"""
# About normal numbers times a power of two for each row.
_ordinary = cupy.ElementwiseKernel(
    "uint64 seed, int32 d, float32 spread",
    "float32 x",
    """
    unsigned long long h = hash(seed + i), r = hash(~seed - i / d);
    float sum = (h & 0xffff) + (h >> 16 & 0xffff) + (h >> 32 & 0xffff) + (h >> 48);
    x = (sum - 131070.0f) * exp2f((float)(r >> 40) / 8388608.0f * spread - spread - 15.0f);
    """,
    "ordinary",
    preamble=_HASH,
)
# The bits of a row of another kind in the place of six of eight.
_special = cupy.ElementwiseKernel(
    "uint64 seed, int32 d, int32 mantissa, T ordinary",
    "T bits",
    """
    const int width = 8 * sizeof(T);
    const unsigned long long h = hash(seed * 3 + i), r = hash(~(seed * 3) - i / d);
    const unsigned top = 1u << (width - 1), exponents = top - (1u << mantissa);
    const unsigned any = (unsigned)(h >> 32) >> (32 - width);
    const unsigned of_row = (unsigned)(r >> 32) >> (32 - width);
    unsigned b = ordinary;
    switch (r % 8) {
      case 2: b = any; break;                                     // any magnitudes
      case 3: b = any & (top | (4u << mantissa) - 1); break;      // subnormal and tiny
      case 4: b = h % 16 ? b & top : b; break;                    // sparse, with both zeros
      case 5: b = any & top | of_row & ~top; break;               // two values
      case 6: b = any & ~exponents | of_row & exponents; break;   // one exponent
      case 7: b = h % 64 ? b : any; break;                        // outliers
    }
    if ((b & exponents) == exponents) b ^= 1u << mantissa << (h >> 8 & 1);  // finite
    bits = (T)b;
    """,
    "special",
    preamble=_HASH,
)


@dataclass(frozen=True)
class Kind:
    """Settings of a quantiser, dtypes, and the share of all vectors that it gets."""

    settings: dict[str, Any]
    dtype: str
    out: str
    share: float


def kind(share: float, d: int, bits: int, dtype: str, out: str, **settings: Any) -> Kind:
    return Kind({"head_dim": d, "bits": bits, **settings}, dtype, out, share)


F16, BF16, F32 = DTYPES
ONE = {"hadamard_rounds": 1}
KINDS = [
    *(kind(4, 128, bits, F16, F16) for bits in range(1, 9)),
    kind(4, 128, 2, BF16, BF16, **ONE),
    kind(4, 128, 4, BF16, F32, **ONE),
    kind(3, 128, 4, F32, F16, scale="mse"),
    kind(3, 128, 6, F32, F32, hadamard_rounds=5),
    kind(2, 128, 3, BF16, F16, scale="unbiased"),
    kind(10, 64, 4, F16, F16),
    kind(4, 64, 3, BF16, F16, scale="mse"),
    kind(4, 64, 5, F32, BF16, scale="unbiased"),
    kind(4, 64, 1, F16, F32, **ONE),
    kind(8, 32, 2, F16, F16),
    kind(2, 80, 3, BF16, BF16),
    kind(3, 96, 4, F16, F16, scale="unbiased"),
    kind(3, 100, 4, F16, F16),
    kind(1, 100, 3, F32, BF16, scale="mse"),
    kind(2, 112, 7, F32, F32),
    kind(2, 192, 4, F16, F16),
    kind(2, 256, 2, BF16, F16),
    kind(0.5, 384, 3, F32, F32),
    kind(0.5, 576, 4, F16, F16),
    kind(0.5, 768, 4, F16, F16),
    kind(0.5, 1024, 8, BF16, F32, **ONE),
    kind(0.3, 1536, 3, F16, BF16),
    kind(1, 7, 3, F32, F32),
    kind(1, 127, 4, F16, F16),
    kind(0.5, 200, 5, BF16, F32, scale="mse"),
    kind(0.3, 1000, 4, F16, F16),
    kind(4, 128, 4, F16, F16, rotation="haar"),
    kind(2, 128, 3, F32, F32, rotation="haar", scale="mse"),
    kind(3, 64, 2, BF16, F16, rotation="haar"),
    kind(2, 64, 8, F16, F32, rotation="haar", scale="unbiased"),
    kind(2, 96, 5, F32, BF16, rotation="haar"),
    kind(1, 192, 4, F16, F16, rotation="haar"),
    kind(0.3, 80, 4, BF16, BF16, rotation="haar"),
    kind(0.3, 256, 4, F16, F16, rotation="haar"),
]


def vectors(n: int, d: int, dtype: str, seed: int) -> Any:
    """[n, d] finite vectors of all kinds on the GPU."""
    ordinary = cupy.empty((n, d), np.float32)
    spread = 12.0 if dtype == F16 else 100.0
    _ordinary(np.uint64(seed), np.int32(d), np.float32(spread), ordinary)
    bits = ordinary.astype(DTYPES[dtype]).view(f"u{DTYPES[dtype].itemsize}")
    _special(np.uint64(seed), np.int32(d), np.int32(MANTISSA_BITS[dtype]), bits, bits)
    return bits.view(DTYPES[dtype])


def pinned(shape: tuple[int, ...], dtype: Any) -> Any:
    """Host memory that copies fast, of any dtype."""
    dtype = np.dtype(dtype)
    return cupyx.empty_pinned(shape, f"u{dtype.itemsize}").view(dtype)


def rows_that_differ(got: Any, want: Any) -> int:
    """Rows with a bit that differs; `want` lies on the host.  Any NaN equals any NaN."""
    unsigned = f"u{got.itemsize}"
    on_gpu = cupy.empty(got.shape, unsigned)
    on_gpu.set(want.view(unsigned))
    differs = got.view(unsigned) != on_gpu
    if not differs.any():
        return 0
    if got.dtype.kind != "u":
        exact = np.float32 if got.itemsize < 8 else np.float64
        values = on_gpu.view(got.dtype).astype(exact)
        differs &= ~(cupy.isnan(values) & cupy.isnan(got.astype(exact)))
    return int(differs.reshape(len(got), -1).any(axis=1).sum())


def compare(kind: Kind, count: int, seed: int) -> dict[str, Any]:
    """`count` vectors of one kind, in chunks."""
    tq, cpu = TurboQuant(**kind.settings), TurboQuant(**kind.settings, backend="cpu")
    d = tq.head_dim
    dtype, out = DTYPES[kind.dtype], DTYPES[kind.out]
    at_once = min(count, max(1, CHUNK_BYTES // (d * max(dtype.itemsize, out.itemsize))))
    x_memory, back_memory = pinned((at_once, d), dtype), pinned((at_once, d), out)
    codes_memory = pinned((at_once, tq.packed_dim), np.uint8)
    scales_memory = pinned((at_once,), np.float32)
    wrong = {"codes": 0, "scales": 0, "decoded": 0}
    start = time.perf_counter()
    for first in range(0, count, at_once):
        n = min(at_once, count - first)
        x = vectors(n, d, kind.dtype, (seed << 40) + first * d)
        host, back = x_memory[:n], back_memory[:n]
        codes, scales = codes_memory[:n], scales_memory[:n]
        unsigned = f"u{dtype.itemsize}"
        x.view(unsigned).get(out=host.view(unsigned))
        packed, stored = tq.encode(x, check_finite=False)
        del x
        with np.errstate(all="ignore"):
            cpu.encode(host, out=(codes, scales), check_finite=False)
            cpu.decode(codes, scales, out=back)
        wrong["codes"] += rows_that_differ(packed, codes)
        wrong["scales"] += rows_that_differ(stored, scales)
        packed.set(codes)
        stored.set(scales)
        decoded = tq.decode(packed, stored, dtype=out)
        wrong["decoded"] += rows_that_differ(decoded, back)
        del packed, stored, decoded
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()
    seconds = round(time.perf_counter() - start, 2)
    dtypes = f"{kind.dtype} -> {kind.out}"
    return {**kind.settings, "dtypes": dtypes, "vectors": count, "seconds": seconds, **wrong}


def compare_part(total: int, part: int, parts: int) -> None:
    """Every `parts`-th kind from number `part` on; one line of JSON for each."""
    shares = sum(k.share for k in KINDS)
    for seed, each in list(enumerate(KINDS))[part::parts]:
        print(json.dumps(compare(each, -int(-total * each.share // shares), seed)), flush=True)


def compare_all(total: int, processes: int) -> list[dict[str, Any]]:
    """`total` vectors of all kinds; several processes, since most of the time goes into compiling.

    Raises
    ------
    RuntimeError
        If a process fails.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = os.environ | {
        "TURBOQUANT_NP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
    }
    command = [sys.executable, __file__, "--vectors", str(total), "--part"]
    running = [
        subprocess.Popen(
            [*command, str(i), str(processes)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(processes)
    ]
    lines = []
    for process in running:
        lines += [json.loads(line) for line in process.communicate()[0].splitlines()]
        if process.returncode:
            raise RuntimeError(f"a process ended with {process.returncode}")
    return sorted(lines, key=lambda line: (line["head_dim"], line["bits"]))


def rows_wrong(lines: list[dict[str, Any]]) -> int:
    return sum(line["codes"] + line["scales"] + line["decoded"] for line in lines)


def show(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        print("  ".join(f"{key}={value}" for key, value in line.items()))
    compared = sum(line["vectors"] for line in lines)
    print(f"{compared:,} vectors encoded and decoded, {rows_wrong(lines)} rows differ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=100_000_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        compare_part(options.vectors, *options.part)
        return
    lines = compare_all(options.vectors, options.processes)
    show(lines)
    sys.exit(rows_wrong(lines) > 0)


if __name__ == "__main__":
    main()
