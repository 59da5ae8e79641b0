"""Write the golden files of caches; those of older versions are never written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from turboquant_np import PagedKVCache, TurboQuant

HERE = Path(__file__).parent
LAYERS, HEAD_DIM = 3, 8
MATRIX = np.kron([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], [[3, 4], [-4, 3]])

# name -> bits of the keys; version 1 knew one number for all layers
CASES: dict[str, Any] = {"v1_uniform.npz": 3, "v2_uniform.npz": 3, "v2_by_layer.npz": [4, 3, 4]}


def make_cache(name: str) -> PagedKVCache:
    """Two sequences that share pages, in all kinds of pages, with a rotation that has no seed."""
    values = TurboQuant(head_dim=HEAD_DIM, bits=2, scale="mse", rotation=MATRIX / 10)
    cache = PagedKVCache(
        LAYERS,
        1,
        HEAD_DIM,
        num_blocks=8,
        num_full_blocks=16,
        block_size=4,
        max_sequences=3,
        key_bits=CASES[name],
        value_quantizer=values,
        sink_tokens=3,
        recent_tokens=5,
        key_offset_tokens=6,
    )
    sequence = cache.allocate()
    shape = (2, LAYERS, 27, 1, HEAD_DIM)  # multiples of 1/8, which float16 holds
    tokens = ((np.arange(np.prod(shape)) * 37 % 113 - 40) / 8).astype(np.float32).reshape(shape)
    cache.append(sequence, *tokens[:, :, :22])
    cache.append(cache.fork(sequence), *tokens[:, :, 22:])
    return cache


def main() -> None:
    """Write the files of the current version."""
    for name in CASES:
        if not (HERE / name).exists():
            make_cache(name).save(HERE / name)


if __name__ == "__main__":
    main()
