"""What `PagedKVCache` does not do, simulated to see what it would bring.

A calibration text can tell which channels need more range; and the means that are removed before
packing can be more, or renewed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from quality_cache import SimulatedCache


def energies(model: Any, ids: Any, attend: Any) -> list[tuple[Any, Any, Any]]:
    """Mean squares of queries, keys and values by layer: [kv_heads, head_dim] each.

    Keys without their mean, as the cache encodes them.
    """
    found = []

    def recording(layer: int, q: Any, k: Any, v: Any) -> Any:
        heads, d = k.shape[1:]
        centred = k - k.mean(axis=0)
        by_kv_head = q.reshape(len(q), heads, -1, d)
        found.append(
            (
                (by_kv_head**2).mean(axis=(0, 2)),
                (centred**2).mean(axis=0),
                (v**2).mean(axis=0),
            )
        )
        return attend(layer, q, k, v)

    model.forward(ids, np.arange(len(ids)), recording)
    return found


def balanced(weights: Any, measured: list[tuple[Any, Any, Any]], xp: Any) -> Any:
    """Weights of the same model, whose keys and values lose less of what matters when quantised.

    A quantiser's error is the same in all channels.  Where q.k is wanted, a channel that carries
    k and q of mean squares K and Q is best scaled by (Q / K)^(1/4) in the keys and by its inverse
    in the queries; the two channels that RoPE turns into each other alike.  Likewise values and the
    columns of the output matrix.  Without a quantiser nothing changes.
    """
    c = weights.config
    group, d = c.heads // c.kv_heads, c.head_dim
    first_k, first_v = c.heads * d, (c.heads + c.kv_heads) * d
    layers = []
    for layer, (q2, k2, v2) in zip(weights.layers, measured, strict=True):
        pairs = [x.reshape(c.kv_heads, d // 2, 2).sum(axis=2) for x in (q2, k2)]
        key_gain = xp.repeat((pairs[0] / pairs[1]) ** 0.25, 2, axis=1)  # [kv_heads, d]
        output = layer.attn_output.reshape(c.kv_heads, group, d, -1)
        value_gain = ((output**2).sum(axis=(1, 3)) / v2) ** 0.25
        to_query = xp.repeat(1 / key_gain, group, axis=0).reshape(-1)
        qkv = layer.qkv.copy()
        qkv[:, :first_k] *= to_query
        qkv[:, first_k:first_v] *= key_gain.reshape(-1)
        qkv[:, first_v:] *= value_gain.reshape(-1)
        output = (output / value_gain[:, None, :, None]).reshape(layer.attn_output.shape)
        layers.append(replace(layer, qkv=qkv, attn_output=output))
    return replace(weights, layers=layers)


class MoreOffsets(SimulatedCache):
    """A cache that removes the mean of the values as well, or renews the mean of the keys.

    Parameters
    ----------
    renew : int
        Tokens after which there is a new key offset, the mean of the keys that are in full
        precision when the first page after it is packed; 0 for a single one.
    value_offset_tokens : int
        First values whose mean is removed.  Weights of a softmax add up to one, so adding it to
        the output is exact.
    """

    def __init__(
        self, *arguments: Any, renew: int = 0, value_offset_tokens: int = 0, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.renew, self.value_offset_tokens = renew, value_offset_tokens

    def key_offset(self, k: Any) -> Any:
        if not self.renew:
            return super().key_offset(k)
        there = self.windows.block_size + self.windows.recent_tokens
        tokens = k.shape[1]
        starts = range(0, tokens, self.renew)
        means = [k[:, a : a + there].mean(axis=1, keepdims=True) for a in starts]
        return self.xp.repeat(self.xp.concatenate(means, axis=1), self.renew, axis=1)[:, :tokens]

    def value_offset(self, v: Any) -> Any:
        if not self.value_offset_tokens:
            return super().value_offset(v)
        return v[:, : self.value_offset_tokens].mean(axis=1, keepdims=True)
