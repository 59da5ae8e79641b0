"""Encode and decode, step by step as in docs/format.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec
from turboquant_np.packing import pack, unpack
from turboquant_np.rotation import DenseRotation

from .normalize import normalize_range
from .quantize import quantize, stored_scale
from .rotate import rotate, rotate_back, rotate_back_dense

ROWS_AT_ONCE = 4096  # bounds the temporaries; does not change a bit


def encode(spec: CodecSpec, vectors: Any, packed: Any, scales: Any) -> None:
    rows = vectors.reshape(-1, spec.head_dim)
    packed_rows, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x = rows[part].astype(np.float32)
        packed_rows[part], flat_scales[part] = _encode_rows(spec, x)


def _encode_rows(spec: CodecSpec, x: Any) -> tuple[Any, Any]:
    x, norms, exponents = normalize_range(x)
    finite = np.isfinite(norms)
    x = np.where(finite[:, None], x, np.float32(0))
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        factor = np.where(finite & (norms > 0), spec.encode_gain / norms, np.float32(0))
        z = rotate(spec.rotation, x) * factor[:, None]
        codes = quantize(spec, z)
        scale = np.ldexp(stored_scale(spec, z, codes, norms), exponents)
    codes = np.where(finite[:, None], codes, np.uint8(0))
    return pack(codes, spec.bits), scale


def decode(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
    packed_rows, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    out_rows = out.reshape(-1, spec.head_dim)
    for start in range(0, len(packed_rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        codes = unpack(packed_rows[part], spec.bits, spec.head_dim)
        if isinstance(spec.rotation, DenseRotation):
            unit = rotate_back_dense(spec.rotation, spec.centroids[codes], spec.decode_gain)
        else:
            unit = rotate_back(spec.rotation, spec.decode_table[codes])
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            out_rows[part] = (unit * flat_scales[part, None]).astype(out.dtype)
