"""What needs no clock: errors beside theory, sizes of caches, longest contexts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .. import TurboQuant
from ..commands.validate import judge
from ..memory import MODELS, kv_bytes_per_token, longest_context
from .options import Options

__all__ = ["contexts", "memory", "validation"]

FORMATS = {"float16": None, "4 bits": 4, "3 bits": 3, "2 bits": 2}
GPU_GIGABYTES = (24, 80)


def head_dims(options: Options) -> tuple[int, ...]:
    """Of the vectors that are validated."""
    return (64, 80, 128, 256) if options.full else (128,)


def validation(options: Options) -> list[dict[str, Any]]:
    """Error of random vectors beside theory: the same judgement as ``turboquant-np validate``."""
    return [
        {"head_dim": head_dim} | asdict(judge(_validate(options, head_dim, bits), "norm"))
        for head_dim in head_dims(options)
        for bits in range(1, 9)
    ]


def _validate(options: Options, head_dim: int, bits: int) -> dict[str, Any]:
    tq = TurboQuant(head_dim=head_dim, bits=bits, backend=options.backend)
    return tq.validate(num_vectors=10_000, device=options.device)


def memory() -> list[dict[str, Any]]:
    """Bytes of keys and values per token."""
    return [
        {"model": model.name}
        | {name: kv_bytes_per_token(model, bits) for name, bits in FORMATS.items()}
        for model in MODELS
    ]


def contexts() -> list[dict[str, Any]]:
    """Tokens that fit beside the weights, on GPUs of two sizes; 0 if the weights do not fit."""
    return [
        {"model": model.name, "gpu_gb": size}
        | {name: longest_context(model, bits, size) for name, bits in FORMATS.items()}
        for size in GPU_GIGABYTES
        for model in MODELS
    ]
