"""Which shapes and dtypes fit each other in a call of attention; looked at once for each set."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from . import _arrays
from .packing import packed_size

INTS = ("int32", "int64")


class Form(NamedTuple):
    """What an array looks like without its contents."""

    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...]


class Forms(NamedTuple):
    """Of all arrays of a call; None where there is none."""

    query: Form
    k_packed: Form
    k_norms: Form
    v_packed: Form
    v_norms: Form
    block_tables: Form
    context_lens: Form
    query_start_loc: Form | None
    query_positions: Form | None
    sinks: Form | None
    key_offset: Form | None


class Heads(NamedTuple):
    """What the quantisers and the model's heads demand."""

    num_query_heads: int
    head_dim: int
    key_bits: int
    value_bits: int


@lru_cache(maxsize=128)
def check_forms(
    of_heads: tuple[int, int, int, int],
    of_arrays: tuple[tuple[Any, Any, Any] | None, ...],
    block_size: int | None,
    num_kv_heads: int | None,
) -> int:
    """Number of query tokens of each sequence, 0 if they differ.

    Parameters
    ----------
    of_heads, of_arrays
        The contents of `Heads`, and of `Forms` with a `Form` in each place: plain tuples, which are
        made in less time, as every call needs them to find what was checked before.

    Raises
    ------
    TypeError, ValueError
        If an array's dtype or shape does not fit.
    """
    heads = Heads(*of_heads)
    forms = Forms(*[Form(*f) if f else None for f in of_arrays])  # type: ignore[arg-type]
    names = ("num_blocks", "block_size", "num_kv_heads", "packed_dim")
    _check(forms.k_packed, "k_packed", ("uint8",), names)
    num_blocks, page, kv_heads = forms.k_packed.shape[:3]
    if page < 1 or kv_heads < 1:
        raise ValueError(
            f"block_size and num_kv_heads must be positive, k_packed is {forms.k_packed.shape}"
        )
    same = (num_blocks, page, kv_heads)
    _check(forms.v_packed, "v_packed", ("uint8",), (*same, "packed_dim"))
    _check(forms.k_norms, "k_norms", ("float32",), same)
    _check(forms.v_norms, "v_norms", ("float32",), same)
    _check_packed(forms.k_packed, "k_packed", heads.head_dim, heads.key_bits)
    _check_packed(forms.v_packed, "v_packed", heads.head_dim, heads.value_bits)
    if block_size is not None and block_size != page:
        raise ValueError(f"block_size is {block_size}, but k_packed has blocks of {page} tokens")
    if num_kv_heads is not None and num_kv_heads != kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}, but k_packed has {kv_heads}")
    if heads.num_query_heads % kv_heads:
        raise ValueError(
            f"num_query_heads ({heads.num_query_heads}) must be a multiple of num_kv_heads "
            f"({kv_heads})"
        )
    return _check_batch(heads, forms, kv_heads)


def _check_packed(form: Form, name: str, head_dim: int, bits: int) -> None:
    packed_dim = packed_size(head_dim, bits)
    if form.shape[-1] != packed_dim:
        raise ValueError(
            f"{name} must end in an axis of {packed_dim} bytes ({head_dim} codes of "
            f"{bits} bits), got shape {form.shape}"
        )
    if packed_dim > 1 and 0 not in form.shape and form.strides[-1] != 1:
        raise ValueError(f"the last axis of {name} must be contiguous")


def _check_batch(heads: Heads, forms: Forms, kv_heads: int) -> int:
    """Everything that grows with the number of sequences or of query tokens."""
    query, starts = forms.query, forms.query_start_loc
    _check_dtype(query, "query", _arrays.FLOAT_NAMES)
    _check(forms.context_lens, "context_lens", INTS, ("num_seqs",))
    num_seqs = forms.context_lens.shape[0]
    _check(forms.block_tables, "block_tables", INTS, (num_seqs, "max_blocks"))
    token = (heads.num_query_heads, heads.head_dim)
    query_len = 0
    if starts is not None:
        _check_shape(query, "query", ("num_tokens", *token))
        _check(starts, "query_start_loc", INTS, (num_seqs + 1,))
    elif len(query.shape) == 4:
        _check_shape(query, "query", (num_seqs, "query_len", *token))
        query_len = query.shape[1]
    else:
        _check_shape(query, "query", (num_seqs, *token))
        query_len = 1
    if forms.query_positions is not None:
        _check(forms.query_positions, "query_positions", INTS, (num_seqs,))
    if forms.sinks is not None:
        _check(forms.sinks, "sinks", ("float32",), (heads.num_query_heads,))
    if forms.key_offset is not None:
        shape = (num_seqs, kv_heads, heads.head_dim)
        _check(forms.key_offset, "key_offset", ("float32",), shape)
    return query_len


def _check(form: Form, name: str, dtypes: tuple[str, ...], shape: tuple[int | str, ...]) -> None:
    _check_dtype(form, name, dtypes)
    _check_shape(form, name, shape)


def _check_dtype(form: Form, name: str, dtypes: tuple[str, ...]) -> None:
    if form.dtype.name not in dtypes:
        *others, last = dtypes
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name} must be {allowed}, got {form.dtype}")


def _check_shape(form: Form, name: str, shape: tuple[int | str, ...]) -> None:
    """Each axis has the given length; a string names an axis of any length."""
    fits = len(form.shape) == len(shape)
    for want, have in zip(shape, form.shape, strict=False):
        fits = fits and (want == have or isinstance(want, str))
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {form.shape}")
