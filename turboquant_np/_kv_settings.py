"""What the constructor of a cache gets: sizes, and a quantiser of keys and of values per layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .codebook import check_bits
from .quantizer import TurboQuant

__all__ = ["array_library", "check_sizes", "default_scale", "describe_bits", "layer_quantizers"]

# Least value of each size.
LEAST = {
    "num_layers": 1,
    "num_kv_heads": 1,
    "num_blocks": 0,
    "num_full_blocks": 0,
    "block_size": 1,
    "max_sequences": 1,
    "sink_tokens": 0,
    "recent_tokens": 0,
    "key_offset_tokens": 0,
}


def check_sizes(**sizes: Any) -> None:
    """Raise unless all are integers and large enough."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < LEAST[name]:
            raise ValueError(f"{name} must be at least {LEAST[name]}, got {size}")


def layer_quantizers(
    side: str, quantizers: Any, bits: Any, num_layers: int, head_dim: int
) -> tuple[TurboQuant, ...]:
    """The quantiser of each layer; layers with equal bits share one.

    Parameters
    ----------
    side : {"key", "value"}
    quantizers : TurboQuant, or one for each layer, or None for default ones
    bits : int, or one for each layer
        Of default quantisers.
    num_layers, head_dim : int

    Raises
    ------
    TypeError, ValueError
        If something is no quantiser or no number of bits, or there is not one for each layer.
    """
    if quantizers is None:
        name = f"{side}_bits"
        widths = [check_bits(b) for b in _per_layer(bits, name, num_layers)]
        by_bits = {
            b: TurboQuant(head_dim=head_dim, bits=b, scale=default_scale(side, b))
            for b in sorted(set(widths))
        }
        return tuple(by_bits[b] for b in widths)
    name = f"{side}_quantizer"
    chosen = _per_layer(quantizers, name, num_layers)
    for quantizer in chosen:
        if not isinstance(quantizer, TurboQuant):
            raise TypeError(f"{name} must be a TurboQuant or one for each layer, got {quantizer!r}")
        if quantizer.head_dim != head_dim:
            raise ValueError(f"{name} has head_dim {quantizer.head_dim}, the cache {head_dim}")
    return tuple(chosen)


def _per_layer(given: Any, name: str, num_layers: int) -> list[Any]:
    """One for each layer, from one for all or as many as there are."""
    if isinstance(given, (str, bytes)) or not isinstance(given, (Sequence, np.ndarray)):
        return [given] * num_layers
    if len(given) != num_layers:
        raise ValueError(
            f"{name} must be one for all layers or one for each of the {num_layers}, "
            f"got {len(given)}"
        )
    return list(given)


def default_scale(side: str, bits: int) -> Any:
    """The scale with which attention loses least (docs: benchmarks, quality).

    Keys meet one query at a time, where errors of few bits weigh more than a bias does; values are
    averaged, which takes errors away and leaves the bias.
    """
    few = bits <= 2
    return "unbiased" if few == (side == "value") else "mse"


def describe_bits(quantizers: Iterable[TurboQuant]) -> str:
    """ "4" where all layers have the same bits, else "2-5 (3.1 on average)"."""
    bits = [quantizer.bits for quantizer in quantizers]
    if len(set(bits)) == 1:
        return str(bits[0])
    return f"{min(bits)}-{max(bits)} ({sum(bits) / len(bits):.2g} on average)"


def array_library(device: str) -> Any:
    """numpy or cupy."""
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "device='cuda' needs CuPy: pip install 'turboquant-np[cuda12]' (or cuda13)"
        ) from error
    return cupy
