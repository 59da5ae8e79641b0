"""What `TQPagedAttention` refuses, and the one form in which backends get their arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays, _backend
from ._checks import check_same_place, take_in_out

if TYPE_CHECKING:
    from .quantizer import TurboQuant


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Checked arguments of one attention call; T tokens of S sequences in all.

    Attributes
    ----------
    query : [T, num_query_heads, head_dim], native float dtype, any strides
    query_start_loc : [S + 1], int, on the device of the query; None if every sequence has query_len
    query_len : int, query tokens of each sequence; 0 if ragged
    query_positions : [S], int, position of each sequence's first query token; None if the query
        tokens are the last ones of the context
    k_packed, v_packed : uint8, [num_blocks, block_size, num_kv_heads, packed_dim], the last axis
        contiguous, other strides free
    k_norms, v_norms : float32, [num_blocks, block_size, num_kv_heads]
    block_tables : [S, max_blocks], int
    context_lens : [S], int
    scale : float
    logits_soft_cap, sliding_window : 0 if absent
    sinks : float32 [num_query_heads] or None
    key_offset : float32 [S, num_kv_heads, head_dim] or None
    out : [T, num_query_heads, head_dim], dtype of the query, C-contiguous; to be filled
    lse : float32 [T, num_query_heads]; to be filled
    """

    query: Any
    query_start_loc: Any
    query_len: int
    query_positions: Any
    k_packed: Any
    k_norms: Any
    v_packed: Any
    v_norms: Any
    block_tables: Any
    context_lens: Any
    scale: float
    logits_soft_cap: float
    sliding_window: int
    sinks: Any
    key_offset: Any
    out: Any
    lse: Any

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def block_size(self) -> int:
        return int(self.k_packed.shape[1])

    @property
    def num_kv_heads(self) -> int:
        return int(self.k_packed.shape[2])

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return int(self.query.shape[1]) // self.num_kv_heads


def check_attention(
    key_quantizer: TurboQuant,
    value_quantizer: TurboQuant,
    num_query_heads: int,
    *,
    query: Any,
    k_packed: Any,
    k_norms: Any,
    v_packed: Any,
    v_norms: Any,
    block_tables: Any,
    context_lens: Any,
    block_size: int | None,
    num_kv_heads: int | None,
    query_start_loc: Any,
    query_positions: Any,
    scale: float | None,
    logits_soft_cap: float | None,
    sliding_window: int | None,
    sinks: Any,
    key_offset: Any,
    out: Any,
    check: bool | None,
) -> tuple[AttentionBatch, _arrays.GiveBack]:
    """Check everything `TQPagedAttention.forward` gets; see there for shapes."""
    q, give_back = _arrays.take_in(query, "query")
    head_dim = key_quantizer.head_dim

    def take(x: Any, name: str, dtypes: tuple[str, ...], shape: tuple[int | str, ...]) -> Any:
        array, _ = _arrays.take_in(x, name)
        if type(array) is not np.ndarray or type(q) is not np.ndarray:
            check_same_place(array, name, q, "query")
        if _name(array.dtype) not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")
        _check_shape(array, name, shape)
        return _arrays.native(array)

    ints = ("int32", "int64")
    packed_names = ("num_blocks", "block_size", "num_kv_heads", "packed_dim")
    cache = {"k_packed": take(k_packed, "k_packed", ("uint8",), packed_names)}
    num_blocks, page, kv_heads = cache["k_packed"].shape[:3]
    if page < 1 or kv_heads < 1:
        raise ValueError(
            f"block_size and num_kv_heads must be positive, k_packed is {cache['k_packed'].shape}"
        )
    same = (num_blocks, page, kv_heads)
    cache["v_packed"] = take(v_packed, "v_packed", ("uint8",), (*same, "packed_dim"))
    cache["k_norms"] = take(k_norms, "k_norms", ("float32",), same)
    cache["v_norms"] = take(v_norms, "v_norms", ("float32",), same)
    for name, quantizer in (("k_packed", key_quantizer), ("v_packed", value_quantizer)):
        packed = cache[name]
        if packed.shape[-1] != quantizer.packed_dim:
            raise ValueError(
                f"{name} must end in an axis of {quantizer.packed_dim} bytes ({head_dim} codes of "
                f"{quantizer.bits} bits), got shape {packed.shape}"
            )
        if quantizer.packed_dim > 1 and packed.size and packed.strides[-1] != 1:
            raise ValueError(f"the last axis of {name} must be contiguous")
    if block_size is not None and block_size != page:
        raise ValueError(f"block_size is {block_size}, but k_packed has blocks of {page} tokens")
    if num_kv_heads is not None and num_kv_heads != kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}, but k_packed has {kv_heads}")
    if num_query_heads % kv_heads:
        raise ValueError(
            f"num_query_heads ({num_query_heads}) must be a multiple of num_kv_heads ({kv_heads})"
        )

    if _name(q.dtype) not in _arrays.FLOAT_NAMES:
        raise TypeError(f"query must be {', '.join(_arrays.FLOAT_NAMES)}, got {q.dtype}")
    lens = take(context_lens, "context_lens", ints, ("num_seqs",))
    num_seqs = len(lens)
    tables = take(block_tables, "block_tables", ints, (num_seqs, "max_blocks"))
    starts, query_len = None, 0
    if query_start_loc is not None:
        _check_shape(q, "query", ("num_tokens", num_query_heads, head_dim))
        starts = take(query_start_loc, "query_start_loc", ints, (num_seqs + 1,))
        tokens = q
    elif q.ndim == 4:
        _check_shape(q, "query", (num_seqs, "query_len", num_query_heads, head_dim))
        query_len = int(q.shape[1])
        tokens = q.reshape(-1, num_query_heads, head_dim)
    else:
        _check_shape(q, "query", (num_seqs, num_query_heads, head_dim))
        tokens, query_len = q, 1

    backend = _backend.backend_for(q, key_quantizer.config.backend)
    if out is None:
        result = backend.empty(tokens.shape, tokens.dtype.newbyteorder("="), q)
    else:
        result = take_in_out(out, q.shape, (q.dtype.name,), "out", q).reshape(tokens.shape)
    batch = AttentionBatch(
        query=_arrays.native(tokens),
        query_start_loc=starts,
        query_len=query_len,
        query_positions=None
        if query_positions is None
        else take(query_positions, "query_positions", ints, (num_seqs,)),
        **cache,
        block_tables=tables,
        context_lens=lens,
        scale=_positive(scale, "scale", 1.0 / math.sqrt(head_dim)),
        logits_soft_cap=_positive(logits_soft_cap, "logits_soft_cap", 0.0),
        sliding_window=_window(sliding_window),
        sinks=None if sinks is None else take(sinks, "sinks", ("float32",), (num_query_heads,)),
        key_offset=None
        if key_offset is None
        else take(key_offset, "key_offset", ("float32",), (num_seqs, kv_heads, head_dim)),
        out=result,
        lse=backend.empty(tokens.shape[:-1], np.dtype(np.float32), q),
    )
    if check or (check is None and backend.device == "cpu"):
        _check_values(batch, everything=bool(check))
    return batch, give_back


_name = cache(lambda dtype: dtype.name)  # which NumPy puts together anew each time


def _check_shape(array: Any, name: str, shape: tuple[int | str, ...]) -> None:
    """Each axis has the given length; a string names an axis of any length."""
    fits = array.ndim == len(shape)
    for want, have in zip(shape, array.shape, strict=False):
        fits = fits and (want == have or isinstance(want, str))
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {tuple(array.shape)}")


def _positive(value: float | None, name: str, default: float) -> float:
    if value is None:
        return default
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def _window(value: int | None) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"sliding_window must be a positive integer, got {value!r}")
    if value < 1:
        raise ValueError(f"sliding_window must be a positive integer, got {value}")
    return int(value)


def _check_values(batch: AttentionBatch, everything: bool) -> None:
    """Look at the integers (and, with `everything`, at the floats) on the host."""
    lens, tables = _to_host(batch.context_lens), _to_host(batch.block_tables)
    num_blocks, page = batch.k_packed.shape[:2]
    if batch.query_start_loc is not None:
        starts = _to_host(batch.query_start_loc)
        if starts[0] != 0 or starts[-1] != len(batch.query) or (np.diff(starts) < 0).any():
            raise ValueError(
                f"query_start_loc must rise from 0 to the number of query tokens "
                f"({len(batch.query)}), got {starts.tolist()}"
            )
    capacity = tables.shape[1] * page
    if len(lens) and not (lens.min() >= 0 and lens.max() <= capacity):
        wrong = (lens < 0) | (lens > capacity)
        s = int(wrong.argmax())
        raise ValueError(
            f"context_lens[{s}] is {lens[s]}, allowed are 0 to {capacity} "
            f"({tables.shape[1]} blocks of {page} tokens in block_tables)"
        )
    if tables.size and not (tables.min() >= 0 and tables.max() < num_blocks):
        _check_blocks(lens, tables, num_blocks, page)
    if everything:
        _check_floats(batch, lens, tables)


def _check_blocks(lens: Any, tables: Any, num_blocks: int, page: int) -> None:
    """Entries of block tables are in range; those behind the context may be anything."""
    blocks_used = -(-lens // page)
    inside = np.arange(tables.shape[1]) < blocks_used[:, None]
    if (wrong := inside & ((tables < 0) | (tables >= num_blocks))).any():
        s, j = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"block_tables[{s}, {j}] is {tables[s, j]}, inside the context of sequence {s}; "
            f"the cache has blocks 0 to {num_blocks - 1}"
        )


def _check_floats(batch: AttentionBatch, lens: Any, tables: Any) -> None:
    for name in ("query", "sinks", "key_offset"):
        array = getattr(batch, name)
        if array is not None and not np.isfinite(_to_host(array).astype(np.float32)).all():
            raise ValueError(f"{name} contains NaN or infinity")
    page = batch.block_size
    for name in ("k_norms", "v_norms"):
        norms = _to_host(getattr(batch, name))
        for s, n in enumerate(lens):
            for j in range(-(-int(n) // page)):
                used = norms[tables[s, j], : min(page, int(n) - j * page)]
                if not np.isfinite(used).all():
                    raise ValueError(
                        f"{name} of block {tables[s, j]} (sequence {s}) contains NaN or infinity"
                    )


def _to_host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else np.asarray(array)
