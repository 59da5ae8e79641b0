"""Attention over the few tokens that a cache keeps in full precision, in array operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._arrays import widen

__all__ = ["hidden_keys", "window_attention"]

Float32s = npt.NDArray[np.float32]


def hidden_keys(key_positions: Any, query_positions: Any, sliding_window: int) -> Float32s:
    """What is added to scores: -inf where a query must not look, else 0.

    Parameters
    ----------
    key_positions : int [S, F]
        Position of each key; -1 where there is none.
    query_positions : int [S, L]
    sliding_window : int
        0 for none.

    Returns
    -------
    float32 [S, 1, L, 1, F]
    """
    position, key_position = query_positions[:, :, None], key_positions[:, None, :]
    visible = (key_position >= 0) & (key_position <= position)
    if sliding_window:
        visible &= key_position > position - sliding_window
    hidden = np.where(visible, np.float32(0), np.float32(-np.inf))
    return hidden[:, None, :, None, :]


def window_attention(
    query: Float32s,
    keys: Any,
    values: Any,
    hidden: Float32s,
    *,
    scale: float,
    logits_soft_cap: float,
    sinks: Float32s | None,
    beside: tuple[Float32s, Float32s] | None,
) -> Float32s:
    """Attention with a mask, merged with attention to other tokens.

    Parameters
    ----------
    query : float32 [S, L, kv_heads, group, d]
    keys, values : float [S, F, kv_heads, d]
        Finite, even where they are hidden.
    hidden : float32 [S, 1, L, 1, F]
        See `hidden_keys`.
    scale : float
    logits_soft_cap : float
        0 for none.
    sinks : float32 [kv_heads, group], optional
        Logits without a value.
    beside : (out, lse), optional
        Attention to other tokens and its log-sum-exp: float32 [S, L, kv_heads, group, d] and
        [S, L, kv_heads, group].

    Returns
    -------
    float32 [S, L, kv_heads, group, d]
        Zeros where nothing is seen.
    """
    num_seqs, length, kv_heads, group, d = query.shape
    tokens = keys.shape[1]
    rows = query.transpose(0, 2, 1, 3, 4).reshape(num_seqs, kv_heads, length * group, d)
    columns = widen(keys).transpose(0, 2, 3, 1)
    scores = rows * np.float32(scale) @ columns
    if logits_soft_cap:
        scores = np.float32(logits_soft_cap) * np.tanh(scores / np.float32(logits_soft_cap))
    scores = scores.reshape(num_seqs, kv_heads, length, group, tokens)
    scores += hidden
    top = scores.max(axis=-1, initial=-np.inf)
    others = [] if sinks is None else [sinks[None, :, None, :]]
    if beside is not None:
        others.append(beside[1].transpose(0, 2, 1, 3))
    for logits in others:
        top = np.maximum(top, logits)
    top[np.isneginf(top)] = 0
    scores -= top[..., None]
    weights = np.exp(scores, out=scores)
    total = weights.sum(axis=-1)
    for logits in others:
        share = np.exp(logits - top)
        total += share
    matrix = weights.reshape(num_seqs, kv_heads, length * group, tokens)
    mixed: Float32s = matrix @ widen(values).transpose(0, 2, 1, 3)
    mixed = mixed.reshape(num_seqs, kv_heads, length, group, d)
    if beside is not None:
        mixed += share[..., None] * beside[0].transpose(0, 2, 1, 3, 4)
    total[total == 0] = 1
    mixed /= total[..., None]
    return mixed.transpose(0, 2, 1, 3, 4)
