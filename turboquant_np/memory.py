"""How large a KV cache is, and how long a context fits: every byte counted, scales included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .packing import packed_size

__all__ = ["MODELS", "ModelShape", "kv_bytes_per_token", "longest_context", "memory_report"]

MIB = 1024**2
SCALE_BYTES = 4
BITS_PER_WEIGHT = 4.5  # 4-bit weights with their scales, as such models are served on one GPU


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a KV cache.

    Attributes
    ----------
    name : str
    num_layers, num_kv_heads, head_dim : int
        Every layer keeps num_kv_heads keys and as many values of length head_dim for each token.
    weight_gb : float
        Size of the weights in units of 1e9 bytes; used by `longest_context` alone.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weight_gb: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.weight_gb < 0:
            raise ValueError(f"weight_gb must not be negative, got {self.weight_gb}")


def _model(
    name: str, num_layers: int, num_kv_heads: int, head_dim: int, billion_parameters: float
) -> ModelShape:
    return ModelShape(
        name, num_layers, num_kv_heads, head_dim, billion_parameters * BITS_PER_WEIGHT / 8
    )


# From the published config.json files.  Only models whose layers all attend to the whole context:
# with sliding windows or linear attention the cache is smaller than this arithmetic says.
MODELS = (
    _model("Llama-3.1-8B", 32, 8, 128, 8.03),
    _model("Llama-3.1-70B", 80, 8, 128, 70.55),
    _model("Llama-3.2-1B", 16, 8, 64, 1.24),
    _model("Llama-3.2-3B", 28, 8, 128, 3.21),
    _model("Mistral-7B", 32, 8, 128, 7.25),
    _model("Mistral-Small-24B", 40, 8, 128, 23.57),
    _model("Phi-4", 40, 10, 128, 14.66),
    _model("Qwen2.5-7B", 28, 4, 128, 7.62),
    _model("Qwen3-8B", 36, 8, 128, 8.19),
    _model("Qwen3-30B-A3B", 48, 4, 128, 30.53),
    _model("Qwen3-32B", 64, 8, 128, 32.76),
)


def kv_bytes_per_token(model: ModelShape, bits: int | None) -> int:
    """Bytes of keys and values for one token of context.

    Parameters
    ----------
    model : ModelShape
    bits : int or None
        1 to 8, with one float32 scale for each vector; None is float16.

    Raises
    ------
    ValueError, TypeError
        If `bits` is out of range or not an integer.

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
    """Tokens of one sequence that fit beside the weights; 0 if the weights alone do not.

    Parameters
    ----------
    model : ModelShape
    bits : int or None
        As for `kv_bytes_per_token`.
    gpu_memory_gb : float
        In units of 1e9 bytes.
    utilisation : float
        The share of it that weights and cache may take; activations need the rest.

    Raises
    ------
    ValueError
        If the memory is not positive or `utilisation` not within (0, 1].

    Examples
    --------
    >>> from turboquant_np.memory import ModelShape, longest_context
    >>> model = ModelShape("mine", num_layers=32, num_kv_heads=8, head_dim=128, weight_gb=4.5)
    >>> longest_context(model, None, 32.0), longest_context(model, 4, 32.0)
    (185394, 697954)
    """
    if not gpu_memory_gb > 0:
        raise ValueError(f"gpu_memory_gb must be positive, got {gpu_memory_gb}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {utilisation}")
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

    Examples
    --------
    >>> from turboquant_np.memory import memory_report
    >>> memory_report(128, 4, 40_000)["fp16_mb"]
    5000.0
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
