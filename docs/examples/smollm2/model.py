"""The forward pass of a model of the llama family, on NumPy or CuPy arrays.

T is the number of tokens, of one sequence or of many: only attention knows which tokens belong
together, and attention is given to `Model.forward` by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .loader import Weights
from .operations import operations_for

__all__ = ["Attend", "Model"]

Attend = Callable[[int, Any, Any, Any], Any]
"""attend(layer, q, k, v): q [T, heads, head_dim], k and v [T, kv_heads, head_dim], q and k after
RoPE, to the attended values [T, heads, head_dim]."""


class Model:
    """Token embedding, layers of attention and SwiGLU, output matrix.

    Parameters
    ----------
    weights : Weights
    xp : module
        numpy or cupy, where the weights are.

    Examples
    --------
    Attention of a single sequence to itself, without a cache:

    >>> model = Model(load_weights(), np)  # doctest: +SKIP
    >>> hidden = model.forward(ids, np.arange(len(ids)), causal_attention)  # doctest: +SKIP
    >>> model.logits(hidden[-1:]).argmax()  # doctest: +SKIP
    """

    def __init__(self, weights: Weights, xp: Any = np) -> None:
        self.weights, self.xp, self.config = weights, xp, weights.config
        self.dtype = weights.embedding.dtype
        self._operations = operations_for(xp)
        c = self.config
        frequencies = c.rope_base ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        angles = np.arange(c.context)[:, None, None] * frequencies  # [context, 1, head_dim / 2]
        self._turns = xp.asarray(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))

    def forward(self, token_ids: Any, positions: Any, attend: Attend) -> Any:
        """Run all layers.

        Parameters
        ----------
        token_ids, positions : array-like, int [T]
            A position counts from the beginning of the token's own sequence.
        attend : callable
            Called once for each layer, in order; see `Attend`.

        Returns
        -------
        array, float32 [T, width]
            Normed last hidden states, for `logits`.

        Raises
        ------
        ValueError
            If a position is beyond the model's context; looked at on the host only.
        """
        xp, c, ops = self.xp, self.config, self._operations
        if isinstance(positions, np.ndarray) and positions.size and positions.max() >= c.context:
            raise ValueError(f"the model has {c.context} positions, got {positions.max()}")
        token_ids, positions = xp.asarray(token_ids), xp.asarray(positions)
        cos, sin = self._turns.take(positions, axis=1)  # [T, 1, head_dim / 2] each
        x = self.weights.embedding[token_ids].astype(np.float32)
        heads = (c.heads, c.kv_heads, c.kv_heads)
        first_k, first_v = c.heads, c.heads + c.kv_heads
        for number, layer in enumerate(self.weights.layers):
            normed = ops.rms_norm(x, layer.attn_norm, c.norm_eps, self.dtype)
            qkv = (normed @ layer.qkv).reshape(len(x), sum(heads), c.head_dim)
            ops.rope(qkv[:, :first_v], cos, sin)
            q, k, v = qkv[:, :first_k], qkv[:, first_k:first_v], qkv[:, first_v:]
            attended = attend(number, q, k, v).reshape(len(x), c.heads * c.head_dim)
            x += attended.astype(self.dtype, copy=False) @ layer.attn_output
            normed = ops.rms_norm(x, layer.ffn_norm, c.norm_eps, self.dtype)
            gate, up = xp.split(normed @ layer.gate_up, 2, axis=1)
            x += ops.swiglu(gate, up) @ layer.ffn_down
        return ops.rms_norm(x, self.weights.output_norm, c.norm_eps, np.float32)

    def logits(self, hidden: Any) -> Any:
        """[n, width] hidden states to [n, vocabulary] float32 scores of the next token."""
        scores = hidden.astype(self.dtype, copy=False) @ self.weights.embedding.T
        return scores.astype(np.float32, copy=False)
