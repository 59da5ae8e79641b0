"""Encoding into the blocks of a paged cache: encode, then scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec

from .codec import encode


def encode_paged(
    key_spec: CodecSpec,
    value_spec: CodecSpec,
    keys: Any,
    values: Any,
    k_packed: Any,
    k_norms: Any,
    v_packed: Any,
    v_norms: Any,
    slot_mapping: Any,
) -> None:
    scatter(encode, key_spec, keys, k_packed, k_norms, slot_mapping)
    scatter(encode, value_spec, values, v_packed, v_norms, slot_mapping)


def scatter(
    encode: Callable[[CodecSpec, Any, Any, Any], None],
    spec: CodecSpec,
    vectors: Any,
    packed: Any,
    norms: Any,
    slot_mapping: Any,
) -> None:
    """Encode vectors and write those with a slot inside of the cache there."""
    num_blocks, block_size, heads, packed_dim = packed.shape
    inside = (slot_mapping >= 0) & (slot_mapping < num_blocks * block_size)
    kept = vectors[inside]
    codes = np.empty((len(kept), heads, packed_dim), np.uint8)
    scales = np.empty((len(kept), heads), np.float32)
    encode(spec, kept, codes, scales)
    block, offset = np.divmod(slot_mapping[inside], block_size)
    packed[block, offset] = codes
    norms[block, offset] = scales
