"""Attention in float64 on decoded keys and values: what the fused backends are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec

from .codec import decode

Floats = npt.NDArray[np.float64]


def attention(key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch) -> None:
    """Fill batch.out and batch.lse, one sequence and one key/value head at a time."""
    starts = batch.query_start_loc
    if starts is None:
        starts = np.arange(batch.num_seqs + 1) * batch.query_len
    for s in range(batch.num_seqs):
        tokens = slice(int(starts[s]), int(starts[s + 1]))
        position = int(batch.context_lens[s]) - (tokens.stop - tokens.start)
        if batch.query_positions is not None:
            position = int(batch.query_positions[s])
        keys = _gather(key_spec, batch.k_packed, batch.k_norms, batch, s)
        values = _gather(value_spec, batch.v_packed, batch.v_norms, batch, s)
        for h in range(batch.num_kv_heads):
            heads = slice(h * batch.group, (h + 1) * batch.group)
            query = batch.query[tokens, heads].astype(np.float64)
            offset = 0.0 if batch.key_offset is None else batch.key_offset[s, h].astype(np.float64)
            scores = batch.scale * (query @ (keys[:, h] + offset).T)
            sinks = None if batch.sinks is None else batch.sinks[heads].astype(np.float64)
            out, lse = _softmax_sum(batch, scores, values[:, h], sinks, position)
            batch.out[tokens, heads], batch.lse[tokens, heads] = out, lse


def _gather(spec: CodecSpec, packed: Any, norms: Any, batch: AttentionBatch, s: int) -> Floats:
    """[n, num_kv_heads, d] decoded vectors of the n tokens of sequence `s`, and of no other."""
    n = int(batch.context_lens[s])
    position = np.arange(n)
    where = batch.block_tables[s, position // batch.block_size], position % batch.block_size
    unit = np.empty((n, batch.num_kv_heads, spec.head_dim), np.float32)
    decode(spec, packed[where], np.ones(unit.shape[:-1], np.float32), unit)
    vectors: Floats = unit * norms[where][..., None].astype(np.float64)
    return vectors


def _softmax_sum(
    batch: AttentionBatch, scores: Floats, values: Floats, sinks: Floats | None, first: int
) -> tuple[Floats, Floats]:
    """scores [L, group, n], values [n, d] -> out [L, group, d], lse [L, group].

    first : position of the first of the L query tokens
    """
    length, _, n = scores.shape
    if batch.logits_soft_cap:
        scores = batch.logits_soft_cap * np.tanh(scores / batch.logits_soft_cap)
    position = first + np.arange(length)[:, None]
    visible = np.arange(n) <= position
    if batch.sliding_window:
        visible &= np.arange(n) > position - batch.sliding_window
    scores = np.where(visible[:, None, :], scores, -np.inf)
    if sinks is not None:
        scores = np.concatenate(
            [scores, np.broadcast_to(sinks[None, :, None], (*scores.shape[:2], 1))], axis=-1
        )
    top = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + np.where(np.isfinite(top), top, 0.0)[..., 0]
    share = weights[..., :n] / np.where(total == 0, 1.0, total)[..., None]
    return share @ values, lse
