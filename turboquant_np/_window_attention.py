"""Attention over the few tokens that a cache keeps in full precision, in array operations."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["window_attention"]


def window_attention(
    xp: Any,
    query: Any,
    keys: Any,
    values: Any,
    key_positions: Any,
    query_positions: Any,
    *,
    scale: float,
    logits_soft_cap: float,
    sliding_window: int,
    sinks: Any,
) -> tuple[Any, Any]:
    """Causal attention with explicit positions.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    query : float32 [S, L, kv_heads, group, d]
    keys, values : float [S, F, kv_heads, d]
    key_positions : int [S, F]
        Position of each key; -1 where there is none.
    query_positions : int [S, L]
    logits_soft_cap, sliding_window : 0 for none
    sinks : float32 [kv_heads, group] or None

    Returns
    -------
    out : float32 [S, L, kv_heads, group, d]
    lse : float32 [S, L, kv_heads, group]
    """
    num_seqs, length, kv_heads, group, d = query.shape
    tokens = keys.shape[1]
    rows = query.transpose(0, 2, 1, 3, 4).reshape(num_seqs, kv_heads, length * group, d)
    columns = keys.astype(np.float32).transpose(0, 2, 3, 1)
    scores = (rows @ columns).reshape(num_seqs, kv_heads, length, group, tokens)
    scores *= np.float32(scale)
    if logits_soft_cap:
        scores = np.float32(logits_soft_cap) * xp.tanh(scores / np.float32(logits_soft_cap))
    position, key_position = query_positions[:, :, None], key_positions[:, None, :]
    visible = (key_position >= 0) & (key_position <= position)
    if sliding_window:
        visible &= key_position > position - sliding_window
    visible = visible[:, None, :, None, :]
    minus_infinity = np.float32(-np.inf)
    scores = xp.where(visible, scores, minus_infinity)
    top = xp.full(scores.shape[:-1], minus_infinity) if not tokens else scores.max(axis=-1)
    if sinks is not None:
        sinks = sinks[None, :, None, :]
        top = xp.maximum(top, sinks)
    base = xp.where(xp.isfinite(top), top, np.float32(0))
    weights = xp.exp(scores - base[..., None])
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + xp.exp(sinks - base)
    nothing = total == 0
    safe = xp.where(nothing, np.float32(1), total)
    lse = xp.where(nothing, minus_infinity, base + xp.log(safe))
    weights /= safe[..., None]
    there = (key_positions >= 0)[..., None, None]
    finite = xp.where(there, values, values.dtype.type(0)).astype(np.float32)  # 0 * NaN is NaN
    mixed = weights.reshape(num_seqs, kv_heads, length * group, tokens) @ finite.transpose(
        0, 2, 1, 3
    )
    out = mixed.reshape(num_seqs, kv_heads, length, group, d).transpose(0, 2, 1, 3, 4)
    return out, lse.transpose(0, 2, 1, 3)
