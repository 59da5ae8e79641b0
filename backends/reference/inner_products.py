"""Scores against packed vectors, in float64: what faster backends are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec

from .codec import decode


def inner_products(spec: CodecSpec, query: Any, packed: Any, scales: Any, scores: Any) -> None:
    unit = np.empty((*scales.shape, spec.head_dim), np.float32)
    decode(spec, packed, np.ones_like(scales), unit)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.inner(query.astype(np.float64), unit.astype(np.float64))
        scores[...] = exact * scales
