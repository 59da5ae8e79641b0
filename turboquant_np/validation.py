"""Self-tests of a quantiser: measured error beside theory, and a quick timing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ._backend import backend_for

if TYPE_CHECKING:
    from .quantizer import TurboQuant

__all__ = ["benchmark", "validate"]


def validate(tq: TurboQuant, num_vectors: int, device: str | None, seed: int) -> dict[str, Any]:
    """Encode and decode random unit vectors; see `TurboQuant.validate`.

    Returns
    -------
    dict
        ``bits``, ``head_dim``, ``num_vectors``; ``mse`` (mean squared error of a unit vector),
        ``mse_standard_error`` (of that mean), ``mse_expected`` (exact, for a Haar rotation and the
        scale "norm"), ``mse_theory_lower``,
        ``mse_theory_upper``, ``mse_ratio_to_lower``; ``ip_mse`` and ``ip_bias`` (mean squared error
        and mean error of inner products of pairs of vectors), ``ip_slope`` (mean of <decoded, x>,
        1 if unbiased); ``max_abs_error``; ``compression_vs_fp16``, ``compression_vs_fp8``;
        ``backend``; ``triton_active`` (always False).
    """
    if num_vectors < 2:
        raise ValueError(f"num_vectors must be at least 2, got {num_vectors}")
    rng = np.random.Generator(
        np.random.PCG64([0x7462, seed])
    )  # unrelated to the rotation's MT19937
    x = rng.standard_normal((num_vectors, tq.head_dim), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    on_device = _to_device(x, device or tq.device)
    decoded = _to_host(tq.decode(*tq.encode(on_device), dtype=np.float32)).astype(np.float64)
    exact = x.astype(np.float64)
    error = decoded - exact
    partner = np.roll(exact, 1, axis=0)
    ip_error = np.einsum("nd,nd->n", error, partner)
    squared_error = np.einsum("nd,nd->n", error, error)
    mse = float(squared_error.mean())
    return {
        "bits": tq.bits,
        "head_dim": tq.head_dim,
        "num_vectors": num_vectors,
        "mse": mse,
        "mse_standard_error": float(squared_error.std(ddof=1)) / num_vectors**0.5,
        "mse_expected": tq.mse_total,
        "mse_theory_lower": tq.theory_lower,
        "mse_theory_upper": tq.theory_upper,
        "mse_ratio_to_lower": mse / tq.theory_lower,
        "ip_mse": float((ip_error**2).mean()),
        "ip_bias": float(ip_error.mean()),
        "ip_slope": float(np.einsum("nd,nd->n", decoded, exact).mean()),
        "max_abs_error": float(np.abs(error).max()),
        "compression_vs_fp16": tq.compression_ratio(),
        "compression_vs_fp8": tq.compression_ratio_vs_fp8(),
        "backend": backend_for(on_device, tq.config.backend).name,
        "triton_active": False,
    }


def benchmark(
    tq: TurboQuant, num_vectors: int, warmup: int, iters: int, device: str | None
) -> dict[str, Any]:
    """Median time of `encode` and `decode` of float16 vectors; see `TurboQuant.benchmark`.

    Returns
    -------
    dict
        ``bits``, ``num_vectors``, ``encode_us``, ``decode_us``, ``encode_throughput_mvec_s``,
        ``decode_throughput_mvec_s``, ``backend``, ``device``, ``triton_active`` (always False).
    """
    if num_vectors < 1 or iters < 1:
        raise ValueError(f"num_vectors and iters must be positive, got {num_vectors} and {iters}")
    rng = np.random.Generator(np.random.PCG64([0x7462, 1]))
    x = rng.standard_normal((num_vectors, tq.head_dim), dtype=np.float32).astype(np.float16)
    vectors = _to_device(x, device or tq.device)
    encoded = tq.encode(vectors)
    encode = _median_seconds(lambda: tq.encode(vectors), vectors, warmup, iters)
    decode = _median_seconds(lambda: tq.decode(*encoded, dtype=np.float16), vectors, warmup, iters)
    return {
        "bits": tq.bits,
        "num_vectors": num_vectors,
        "encode_us": encode * 1e6,
        "decode_us": decode * 1e6,
        "encode_throughput_mvec_s": num_vectors / encode / 1e6,
        "decode_throughput_mvec_s": num_vectors / decode / 1e6,
        "backend": backend_for(vectors, tq.config.backend).name,
        "device": "cpu" if isinstance(vectors, np.ndarray) else f"cuda:{vectors.device.id}",
        "triton_active": False,
    }


def _to_device(x: Any, device: str) -> Any:
    if device in ("auto", "cpu"):
        return x
    if device.partition(":")[0] != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "device='cuda' needs CuPy: pip install 'turboquant-np[cuda12]'"
        ) from error
    return cupy.asarray(x)


def _to_host(x: Any) -> Any:
    return x.get() if hasattr(x, "get") else x


def _median_seconds(call: Any, array: Any, warmup: int, iters: int) -> float:
    synchronize = (lambda: None) if isinstance(array, np.ndarray) else array.device.synchronize
    seconds = []
    for i in range(warmup + iters):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
