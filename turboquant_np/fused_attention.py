"""Attention over packed, paged keys and values, computed in the rotated domain.

The query is rotated once.  Scores are sums over looked-up centroids of the keys' codes, the
weighted values are summed as looked-up centroids too, and one inverse rotation ends a step: no
decompressed copy of the cache ever exists.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from . import _arrays, _backend
from ._attention_checks import check_attention
from ._attention_compute import attention_in, check_compute
from .quantizer import TurboQuant

__all__ = ["TQPagedAttention", "merge_attention"]


class TQPagedAttention:
    """Scaled dot-product attention that reads packed codes and scales only.

    Parameters
    ----------
    tq : TurboQuant
        The quantiser of the keys, and of the values unless `value_quantizer` is given.
    num_query_heads : int
        A multiple of the number of key/value heads; query head h reads key/value head
        ``h // (num_query_heads // num_kv_heads)``.
    value_quantizer : TurboQuant, optional
        For values with other bits, rotation or seed; its head_dim must be the same.
    compute : {"float32", "int8"}, default "float32"
        Arithmetic of the products.  "int8" is faster and rounds rotated queries, centroids and
        softmax weights to 8 bits, which adds little to the error of codes of 4 bits or fewer (see
        the explanation of attention).  It is for NumPy arrays, up to 4 bits, on processors
        with AVX-512 VNNI and VBMI; elsewhere calls raise ValueError.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or does not fit.

    Examples
    --------
    Two sequences of 5 and 20 tokens in a cache of 4 blocks of 16 tokens, 2 kv heads, 4 query heads:

    >>> import numpy as np
    >>> from turboquant_np import TurboQuant
    >>> from turboquant_np.fused_attention import TQPagedAttention
    >>> tq = TurboQuant(head_dim=64, bits=4)
    >>> rng = np.random.default_rng(0)
    >>> k, v = (tq.encode(rng.standard_normal((4, 16, 2, 64), np.float32)) for _ in range(2))
    >>> attention = TQPagedAttention(tq, num_query_heads=4)
    >>> query = rng.standard_normal((2, 4, 64), np.float32)
    >>> block_tables, context_lens = np.array([[3, 0], [1, 2]]), np.array([5, 20])
    >>> attention(query, *k, *v, block_tables, context_lens).shape
    (2, 4, 64)
    """

    def __init__(
        self,
        tq: TurboQuant,
        num_query_heads: int,
        *,
        value_quantizer: TurboQuant | None = None,
        compute: Literal["float32", "int8"] = "float32",
    ) -> None:
        for name, quantizer in (("tq", tq), ("value_quantizer", value_quantizer or tq)):
            if not isinstance(quantizer, TurboQuant):
                raise TypeError(f"{name} must be a TurboQuant, got {quantizer!r}")
        if isinstance(num_query_heads, bool) or not isinstance(num_query_heads, (int, np.integer)):
            raise TypeError(f"num_query_heads must be a positive integer, got {num_query_heads!r}")
        if num_query_heads < 1:
            raise ValueError(f"num_query_heads must be a positive integer, got {num_query_heads}")
        check_compute(compute)
        self.key_quantizer = tq
        self.value_quantizer = value_quantizer or tq
        self.num_query_heads = int(num_query_heads)
        self.compute = compute
        if self.value_quantizer.head_dim != tq.head_dim:
            raise ValueError(
                f"keys have head_dim {tq.head_dim}, values {self.value_quantizer.head_dim}; "
                "they must agree"
            )

    def __repr__(self) -> str:
        return (
            f"TQPagedAttention(head_dim={self.key_quantizer.head_dim}, "
            f"num_query_heads={self.num_query_heads}, key_bits={self.key_quantizer.bits}, "
            f"value_bits={self.value_quantizer.bits}, compute={self.compute!r})"
        )

    def forward(
        self,
        query: Any,
        k_packed: Any,
        k_norms: Any,
        v_packed: Any,
        v_norms: Any,
        block_tables: Any,
        context_lens: Any,
        block_size: int | None = None,
        num_kv_heads: int | None = None,
        *,
        query_start_loc: Any = None,
        query_positions: Any = None,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        sliding_window: int | None = None,
        sinks: Any = None,
        key_offset: Any = None,
        return_lse: bool = False,
        out: Any = None,
        check: bool | None = None,
    ) -> Any:
        """Attend from each query token to the cached tokens it may see.

        Parameters
        ----------
        query : array, float
            [num_seqs, num_query_heads, head_dim], one token for each sequence;
            [num_seqs, query_len, num_query_heads, head_dim], several;
            or [num_tokens, num_query_heads, head_dim] with `query_start_loc`, a ragged batch.
            The tokens are the last ones of their sequence: with L of them and a context of n tokens
            (these included), token i sees the first n - L + i + 1 (causal).
        k_packed, v_packed : array, uint8, shape [num_blocks, block_size, num_kv_heads, packed_dim]
            Any strides; each packed vector contiguous.
        k_norms, v_norms : array, float32, shape [num_blocks, block_size, num_kv_heads]
        block_tables : array, int32 or int64, shape [num_seqs, max_blocks]
            Block numbers of each sequence in order.  Entries beyond the context are not read.
        context_lens : array, int32 or int64, shape [num_seqs]
            Tokens of each sequence in the cache, the query tokens included.  0 gives zeros.
        block_size, num_kv_heads : int, optional
            Read from the shapes; given, they must agree with them.
        query_start_loc : array, int32 or int64, shape [num_seqs + 1], optional
            Where each sequence's query tokens begin in a ragged batch, from 0 to num_tokens.
        query_positions : array, int32 or int64, shape [num_seqs], optional
            Position of each sequence's first query token, counted from the first cached token, if
            the query tokens are not the last cached ones: a token at position p sees cached tokens
            0 to p.  For caches that keep their newest tokens elsewhere.
        scale : float, optional
            Factor of the scores, 1 / sqrt(head_dim) by default.
        logits_soft_cap : float, optional
            c > 0 turns each scaled score s into c * tanh(s / c).
        sliding_window : int, optional
            w >= 1: a token sees itself and the w - 1 positions before it.
        sinks : array, float32, shape [num_query_heads], optional
            One learnt logit for each head which takes part in the softmax but has no value.
        key_offset : array, float32, shape [num_seqs, num_kv_heads, head_dim], optional
            What was subtracted from the keys before they were encoded; its product with the query
            is added to the scores.
        return_lse : bool
            Also return the natural logarithm of each softmax denominator, for `merge_attention`.
        out : array like the result, optional
        check : bool, optional
            True checks every value that could give a wrong result (NaN in query or norms too).
            By default values that decide which memory is read are checked on a CPU, and on a GPU,
            where looking at them would wait for the device, shapes and dtypes only.

        Returns
        -------
        out : array, shape and dtype of `query`
        lse : array, float32, shape of `query` without its last axis
            Only with `return_lse`; -inf where a token sees nothing.

        Raises
        ------
        TypeError, ValueError
            If shapes, dtypes or devices do not fit, or a checked value is out of range.
        """
        batch, query_shape, give_back = check_attention(
            self.key_quantizer,
            self.value_quantizer,
            self.num_query_heads,
            query=query,
            k_packed=k_packed,
            k_norms=k_norms,
            v_packed=v_packed,
            v_norms=v_norms,
            block_tables=block_tables,
            context_lens=context_lens,
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            query_start_loc=query_start_loc,
            query_positions=query_positions,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            sliding_window=sliding_window,
            sinks=sinks,
            key_offset=key_offset,
            out=out,
            check=check,
        )
        backend = _backend.backend_for(batch.query, self.key_quantizer.config.backend)
        attention = attention_in(self.compute, backend)
        attention(self.key_quantizer._spec, self.value_quantizer._spec, batch)
        result = give_back(batch.out.reshape(query_shape)) if out is None else out
        if not return_lse:
            return result
        return result, give_back(batch.lse.reshape(query_shape[:-1]))

    __call__ = forward


def merge_attention(outputs: Any, lses: Any) -> tuple[Any, Any]:
    """Combine attention over disjoint parts of a context into attention over all of it.

    Parameters
    ----------
    outputs : sequence of arrays, shape [..., head_dim]
        One for each part, as `TQPagedAttention.forward` returns them.
    lses : sequence of arrays, float32, shape [...]
        The parts' log-sum-exps (natural logarithm).

    Returns
    -------
    out, lse
        Shapes and dtype of one part.  Where no part sees anything, zeros and -inf.

    Notes
    -----
    ``sum_p exp(lse_p - lse) out_p`` with ``lse = log sum_p exp(lse_p)``.  Give sinks to one
    part only.

    Examples
    --------
    >>> import numpy as np
    >>> from turboquant_np.fused_attention import merge_attention
    >>> parts = [np.full((1, 2), 1.0, np.float32), np.full((1, 2), 4.0, np.float32)]
    >>> merge_attention(parts, [np.log([1.0]), np.log([2.0])])[0]
    array([[3., 3.]], dtype=float32)
    """
    taken = [_arrays.take_in(o, "outputs") for o in outputs]
    if not taken:
        raise ValueError("merge_attention needs at least one part")
    give_back = taken[0][1]
    out = [o for o, _ in taken]
    lse = [_arrays.take_in(x, "lses")[0] for x in lses]
    if len(lse) != len(out):
        raise ValueError(f"got {len(out)} outputs and {len(lse)} lses")
    for o, x in zip(out, lse, strict=True):
        if o.shape != out[0].shape or x.shape != out[0].shape[:-1]:
            raise ValueError(
                f"each part needs out {out[0].shape} and lse {out[0].shape[:-1]}, "
                f"got {o.shape} and {x.shape}"
            )
    xp = _backend.array_module(out[0])
    weights = xp.stack(lse).astype(np.float32)
    top = weights.max(axis=0)
    top = xp.where(xp.isfinite(top), top, np.float32(0))
    weights = xp.exp(weights - top)
    total = weights.sum(axis=0)
    nothing = total == 0
    weights /= xp.where(nothing, np.float32(1), total)
    merged = sum(w[..., None] * o.astype(np.float32) for w, o in zip(weights, out, strict=True))
    merged_lse = xp.where(nothing, np.float32(-math.inf), top + xp.log(xp.where(nothing, 1, total)))
    return give_back(merged.astype(out[0].dtype)), give_back(merged_lse.astype(np.float32))
