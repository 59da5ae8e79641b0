"""How large a KV cache is, and how long a context fits: every byte counted, scales included."""

from __future__ import annotations

from typing import Any, NamedTuple

from .packing import packed_size

__all__ = ["MODELS", "ModelShape", "kv_bytes_per_token", "longest_context", "memory_report"]

MIB = 1024**2
SCALE_BYTES = 4


class ModelShape(NamedTuple):
    """What decides the size of a model's KV cache; weight_gb is the size of its weights in 1e9
    B."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weight_gb: float


# Weights at 4 bits per parameter, as such models are served on one GPU.
MODELS = (
    ModelShape("Llama-3.1-8B", 32, 8, 128, 4.5),
    ModelShape("Llama-3.1-70B", 80, 8, 128, 39.0),
    ModelShape("Mistral-7B", 32, 8, 128, 4.1),
)


def kv_bytes_per_token(model: ModelShape, bits: int | None) -> int:
    """Bytes of keys and values for one token; bits=None is float16.

    Examples
    --------
    >>> from turboquant_np.memory import MODELS, kv_bytes_per_token
    >>> kv_bytes_per_token(MODELS[0], None), kv_bytes_per_token(MODELS[0], 4)
    (131072, 34816)
    """
    vector = 2 * model.head_dim if bits is None else packed_size(model.head_dim, bits) + SCALE_BYTES
    return 2 * model.num_layers * model.num_kv_heads * vector


def longest_context(
    model: ModelShape, bits: int | None, gpu_memory_gb: float, utilisation: float = 0.9
) -> int:
    """Tokens of one sequence that fit beside the weights (1 GB = 1e9 bytes; 0 if none do).

    Examples
    --------
    >>> from turboquant_np.memory import MODELS, longest_context
    >>> longest_context(MODELS[0], None, 32.0), longest_context(MODELS[0], 4, 32.0)
    (185394, 697955)
    """
    free = (gpu_memory_gb * utilisation - model.weight_gb) * 1e9
    return max(0, int(free // kv_bytes_per_token(model, bits)))


def memory_report(
    head_dim: int, bits: int, seq_len: int, num_layers: int = 32, num_kv_heads: int = 8
) -> dict[str, Any]:
    """Size of a KV cache in MiB at float16, 8 bits and `bits` bits; see `TurboQuant.memory_report`.

    Raises
    ------
    ValueError
        If a count is negative.
    """
    counts = {"seq_len": seq_len, "num_layers": num_layers, "num_kv_heads": num_kv_heads}
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    vectors = 2 * seq_len * num_layers * num_kv_heads
    vector_bytes = packed_size(head_dim, bits) + SCALE_BYTES
    return {
        "config": f"TQ{bits} d={head_dim} seq={seq_len} L={num_layers} H={num_kv_heads}",
        "fp16_mb": vectors * 2 * head_dim / MIB,
        "fp8_mb": vectors * head_dim / MIB,
        f"tq{bits}_mb": vectors * vector_bytes / MIB,
        "ratio_vs_fp16": 2 * head_dim / vector_bytes,
        "ratio_vs_fp8": head_dim / vector_bytes,
    }
