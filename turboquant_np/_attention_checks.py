"""What `TQPagedAttention` refuses, and the one form in which backends get their arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays, _backend
from ._attention_shapes import check_forms
from ._checks import check_same_place, take_in_out

if TYPE_CHECKING:
    from .quantizer import TurboQuant

_OPTIONAL = frozenset(("query_start_loc", "query_positions", "sinks", "key_offset"))
_FLOAT32 = np.dtype(np.float32)
MOST_REMEMBERED = 1 << 16  # bytes
_fitting: tuple[bytes, bytes, Any] | None = None  # lengths and tables that were found right last
_UNSIGNED = {4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


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
) -> tuple[AttentionBatch, tuple[int, ...], _arrays.GiveBack]:
    """Check everything `TQPagedAttention.forward` gets; see there for shapes.

    Returns
    -------
    batch, shape of the query, what gives results the query's kind
    """
    q, give_back = _arrays.take_in(query, "query")
    arrays: dict[str, Any] = {}
    for name, x in (
        ("k_packed", k_packed),
        ("k_norms", k_norms),
        ("v_packed", v_packed),
        ("v_norms", v_norms),
        ("block_tables", block_tables),
        ("context_lens", context_lens),
        ("query_start_loc", query_start_loc),
        ("query_positions", query_positions),
        ("sinks", sinks),
        ("key_offset", key_offset),
    ):
        arrays[name] = None if x is None and name in _OPTIONAL else _take(x, name, q)
    query_len = check_forms(
        (num_query_heads, key_quantizer.head_dim, key_quantizer.bits, value_quantizer.bits),
        tuple([_form(x) for x in (q, *arrays.values())]),
        block_size,
        num_kv_heads,
    )
    tokens = q if q.ndim == 3 else q.reshape(-1, *q.shape[2:])
    backend = _backend.backend_for(q, key_quantizer.config.backend)
    if out is None:
        result = backend.empty(tokens.shape, tokens.dtype.newbyteorder("="), q)
    else:
        result = take_in_out(out, q.shape, (_arrays.dtype_name(q.dtype),), "out", q).reshape(
            tokens.shape
        )
    native: dict[str, Any] = {
        name: x if x is None else _arrays.native(x) for name, x in arrays.items()
    }
    batch = AttentionBatch(
        query=_arrays.native(tokens),
        query_len=query_len,
        **native,
        **check_options(q.shape[-1], scale, logits_soft_cap, sliding_window),
        out=result,
        lse=backend.empty(tokens.shape[:-1], _FLOAT32, q),
    )
    if check or (check is None and backend.device == "cpu"):
        _check_values(batch, everything=bool(check))
    return batch, q.shape, give_back


def _take(x: Any, name: str, query: Any) -> Any:
    # In most calls all arrays are of one kind, in one memory.
    if type(x) is type(query) and (
        type(x) is np.ndarray or x.data.device_id == query.data.device_id
    ):
        return x
    array, _ = _arrays.take_in(x, name)
    check_same_place(array, name, query, "query")
    return array


def _form(array: Any) -> Any:
    return None if array is None else (array.shape, array.dtype, array.strides)


def check_options(
    head_dim: int, scale: float | None, logits_soft_cap: float | None, sliding_window: int | None
) -> dict[str, Any]:
    """These fields of an AttentionBatch."""
    return {
        "scale": _positive(scale, "scale", 1.0 / math.sqrt(head_dim)),
        "logits_soft_cap": _positive(logits_soft_cap, "logits_soft_cap", 0.0),
        "sliding_window": _window(sliding_window),
    }


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
    _check_pages(lens, tables, num_blocks, page)
    if everything:
        _check_floats(batch, lens, tables)


def _check_pages(lens: Any, tables: Any, num_blocks: int, page: int) -> None:
    """Contexts and blocks are in range; what all layers of a step share is looked at once."""
    global _fitting
    capacity = tables.shape[1] * page
    known = None
    if tables.nbytes <= MOST_REMEMBERED:
        kinds = lens.itemsize, tables.itemsize, tables.shape, num_blocks, page
        known = lens.tobytes(), tables.tobytes(), kinds
        if known == _fitting:
            return
    if _largest(lens) > capacity:
        wrong = (lens < 0) | (lens > capacity)
        s = int(wrong.argmax())
        raise ValueError(
            f"context_lens[{s}] is {lens[s]}, allowed are 0 to {capacity} "
            f"({tables.shape[1]} blocks of {page} tokens in block_tables)"
        )
    if _largest(tables) >= num_blocks:
        _check_blocks(lens, tables, num_blocks, page)
    _fitting = known


def _largest(ints: Any) -> int:
    """The largest number, or a larger one if some are negative; -1 if there are none.

    As unsigned numbers negative ones are large: one look instead of two.
    """
    if not ints.size:
        return -1
    unsigned = ints.view(_UNSIGNED[ints.itemsize])
    return int(np.maximum.reduce(unsigned, axis=None))


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
