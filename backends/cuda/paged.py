"""Encoding straight into the blocks of a paged cache."""

from __future__ import annotations

from typing import Any

from turboquant_np._spec import CodecSpec

from .codec import alignment_of, encode_rows
from .launch import Target
from .layout import rows_of


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
    with keys.device:
        if keys.size == 0 or k_norms.size == 0:
            return
        sides = []
        for spec, vectors, packed, norms in (
            (key_spec, keys, k_packed, k_norms),
            (value_spec, values, v_packed, v_norms),
        ):
            rows = rows_of(vectors, alignment_of(spec, vectors), merge=False)
            num_blocks, block_size, _ = norms.shape
            target = Target(
                packed.data.ptr,
                packed.strides[:3],
                norms.data.ptr,
                norms.strides,
                slot_mapping,
                num_blocks * block_size,
                block_size,
            )
            sides.append((spec, rows, target))
        encode_rows(sides)
