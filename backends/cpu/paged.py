"""Encoding into the blocks of a paged cache: encode, then scatter."""

from __future__ import annotations

from typing import Any

from turboquant_np._spec import CodecSpec

from ..reference.paged import scatter
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
