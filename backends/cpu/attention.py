"""Attention on the host side: what the kernel is told, and how many threads run it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec

from .array_fields import DESCRIBE, describe
from .attend_call import CALL, NUMBERS, ROTATED_ROWS, attend_scratch_bytes
from .attention_cut import Cut, cut
from .byte_planes import in_planes, planes_order
from .codec import address, check_status, constants_of
from .compile import Kernel, compile_function, compiled
from .kernels import Plan
from .memory import Memory
from .simd import target
from .softmax import state_floats
from .threads import NO_LOAN, Loan, helpers_worth, lend, own_box, take_back
from .tile import registers_of, value_order

MOST_PARTS = 4  # of a unit's key/value heads

Float32s = npt.NDArray[np.float32]

_results, _scratch = Memory(), Memory()  # partial results of a call; what each thread works with


class Prepared(NamedTuple):
    """What all calls with the same quantisers share."""

    plan: Plan
    attend: Kernel
    padded: int
    matrices: tuple[Float32s, Float32s]  # [padded, padded]
    into_tiles: int  # address of the first one, which rotates queries
    out_of_tiles: int  # of the second one, which rotates outputs back
    key_tables: int
    value_tables: int
    describe: Kernel
    nothing: Float32s  # the bias of every head and row
    no_sink: Float32s  # of every query head


def attention(key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch) -> None:
    """Fill batch.out and batch.lse."""
    attend(_prepare(key_spec, value_spec), batch)


def attend(prepared: Prepared, batch: AttentionBatch) -> None:
    """Fill batch.out and batch.lse by the kernel of `prepared`."""
    tokens, _, dim = batch.query.shape
    if tokens == 0:
        return
    work = _cut_of(batch)
    query, out = batch.query, batch.out
    if query.dtype != np.float32 or query.strides[2] != query.itemsize:
        query = np.ascontiguousarray(query, np.float32)
    if out.dtype != np.float32:
        out = np.empty(out.shape, np.float32)
    helpers = helpers_worth(work.cut.tokens * batch.num_kv_heads * dim)
    call, in_use = _call(batch, prepared, work, query, out, helpers)
    size = attend_scratch_bytes(prepared.plan, work.cut.most_rows, target().width)

    def take_part(loan: Loan, stay: int, box: int) -> int:
        _, (scratch,) = _scratch.take(size)
        tables = prepared.key_tables, prepared.value_tables
        first, count, wanted = loan
        return prepared.attend(call, 0, first, wanted, count, *tables, stay, scratch, box)

    def help_out(in_use: Any = in_use) -> None:
        """In another thread, which keeps all memory that the call needs."""
        take_part(NO_LOAN, 0, own_box())

    loan = lend(help_out, helpers)
    try:
        check_status(take_part(loan, 1, 0))
    except RuntimeError:
        _results.forget()  # helpers may still write there
        raise
    finally:
        take_back()
    if out is not batch.out:
        batch.out[...] = out


def _call(
    batch: AttentionBatch,
    prepared: Prepared,
    work: Work,
    query: Float32s,
    out: Float32s,
    helpers: int,
) -> tuple[int, Any]:
    """Address of the fields that the kernel reads, and what must live while they are in use."""
    tokens, heads, dim = query.shape
    page, kv_heads = batch.k_packed.shape[1:3]
    group, row_bytes, places = heads // kv_heads, 4 * prepared.padded, work.cut.places
    rows = tokens * group
    rotations = -(-kv_heads * rows // ROTATED_ROWS)
    bias, sinks = prepared.nothing, batch.sinks
    if batch.key_offset is not None:
        bias = _offset_scores(batch, query.reshape(tokens, kv_heads, group, dim))
    if sinks is None:
        sinks = prepared.no_sink
    arrays = (
        *(batch.k_packed, batch.k_norms, batch.v_packed, batch.v_norms),
        np.ascontiguousarray(batch.block_tables, np.int64),
        *(bias, sinks, query, out, batch.lse),
    )
    state_bytes = 4 * state_floats(target().width)
    room, of_results = _results.take(
        kv_heads * rows * row_bytes, places * state_bytes, places * row_bytes
    )
    fields = np.empty(len(CALL), np.int64)
    units = len(work.cut.units)
    divided = min(units, 2 * (1 + helpers)) if helpers else 0  # so that all threads end together
    whole, parts = units - divided, min(kv_heads, MOST_PARTS)
    fields[: len(NUMBERS)] = (
        *(0, 0, rotations, whole + divided * parts, len(work.cut.merges) * kv_heads),
        *(whole, parts),
        *work.addresses,
        *(page, kv_heads, group, rows),
        # scores are sums over z = sqrt(dim) * coordinates
        *_bits_of(batch.scale * dim**-0.5, batch.logits_soft_cap),
        *(prepared.into_tiles, prepared.out_of_tiles),
        *of_results,
    )
    at: int = prepared.describe(fields, len(NUMBERS), *arrays)
    return at, (fields, arrays, room, work, prepared)


def _bits_of(*numbers: float) -> tuple[int, ...]:
    """float32 numbers as the integers that have the same bits."""
    return struct.unpack(f"{len(numbers)}i", struct.pack(f"{len(numbers)}f", *numbers))


def _offset_scores(batch: AttentionBatch, query: Float32s) -> Float32s:
    """[kv_heads, rows] what the key offset adds to the scaled scores.

    query : [tokens, kv_heads, group, head_dim]
    """
    counts: Any = batch.query_len
    if batch.query_start_loc is not None:
        counts = np.diff(batch.query_start_loc)
    offset = np.repeat(batch.key_offset, counts, axis=0)
    scores: Float32s = np.einsum("tkgd,tkd->ktg", query, offset)
    return scores.reshape(len(scores[:, 0]), -1) * np.float32(batch.scale)


class Work(NamedTuple):
    """How a batch is divided, and the addresses of the arrays that say so."""

    cut: Cut
    addresses: tuple[int, ...]


def _cut_of(batch: AttentionBatch) -> Work:
    """`cut`, remembered: all layers of a step have the same lengths."""
    starts, positions = batch.query_start_loc, batch.query_positions
    return _cut_again(
        batch.query_len if starts is None else starts.astype(np.int64).tobytes(),
        None if positions is None else positions.astype(np.int64).tobytes(),
        batch.context_lens.astype(np.int64).tobytes(),
        batch.group,
        batch.num_kv_heads,
        batch.sliding_window,
    )


@lru_cache(maxsize=16)
def _cut_again(
    starts: int | bytes,
    positions: bytes | None,
    lens: bytes,
    group: int,
    kv_heads: int,
    window: int,
) -> Work:
    """starts : query tokens of each sequence, or first query tokens"""
    contexts = np.frombuffer(lens, np.int64)
    if isinstance(starts, int):
        first = np.arange(len(contexts) + 1, dtype=np.int64) * starts
    else:
        first = np.frombuffer(starts, np.int64)
    at = contexts - np.diff(first)
    if positions is not None:
        at = np.frombuffer(positions, np.int64)
    work = cut(first, at, contexts, group, kv_heads, window)
    lists: tuple[npt.NDArray[Any], ...] = work.units, work.merges, work.first, work.last
    return Work(work, tuple(address(x) for x in lists))


class PerPair:
    """What `make` returns for quantisers of keys and values, kept as long as these live."""

    def __init__(self, make: Callable[[CodecSpec, CodecSpec], Prepared]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[CodecSpec, WeakKeyDictionary[CodecSpec, Prepared]]
        self._made = WeakKeyDictionary()

    def __call__(self, key_spec: CodecSpec, value_spec: CodecSpec) -> Prepared:
        of_key = self._made.setdefault(key_spec, WeakKeyDictionary())
        known = of_key.get(value_spec)
        if known is None:
            known = of_key[value_spec] = self._make(key_spec, value_spec)
        return known


def prepare(
    key_spec: CodecSpec, value_spec: CodecSpec, plan: Plan, matrices: tuple[Float32s, Float32s]
) -> Prepared:
    """What calls of one kernel share; `matrices` rotate queries, and outputs back."""
    return Prepared(
        plan,
        compiled(plan),
        len(matrices[0]),
        matrices,
        address(matrices[0]),
        address(matrices[1]),
        constants_of(key_spec).addresses["encode"],
        constants_of(value_spec).addresses["encode"],
        compile_function(describe, DESCRIBE),
        np.broadcast_to(np.zeros(1, np.float32), (2, 2)),
        np.broadcast_to(np.full(1, -np.inf, np.float32), 2),
    )


def rotating_into(spec: CodecSpec, order: Sequence[int]) -> Float32s:
    """[n, n] matrix that rotates a row and puts coordinate order[i] at place i.

    Places whose number is no coordinate, and the places of a row behind its coordinates, are 0.
    """
    matrix, places = np.zeros((len(order), len(order)), np.float32), np.array(order)
    (inside,) = np.nonzero(places < spec.head_dim)
    matrix[: spec.head_dim, inside] = spec.rotation.matrix[places[inside]].T
    return matrix


def rotating_out_of(spec: CodecSpec, order: Sequence[int]) -> Float32s:
    """[n, n] matrix that rotates a row of centroids of z back, coordinate order[i] at place i."""
    matrix, places = np.zeros((len(order), len(order)), np.float32), np.array(order)
    (inside,) = np.nonzero(places < spec.head_dim)
    matrix[inside, : spec.head_dim] = spec.rotation.matrix[places[inside]]
    return matrix * np.float32(spec.head_dim**-0.5)


def _make(key_spec: CodecSpec, value_spec: CodecSpec) -> Prepared:
    plan = Plan("attend", key_spec.head_dim, key_spec.bits, value_bits=value_spec.bits)
    width = target().width
    into = rotating_into(key_spec, range(registers_of(plan.dim, width) * width))
    order = value_order(plan.value_bits, plan.dim, width)
    if in_planes(target(), plan.dim, plan.value_bits):
        order = planes_order(plan.dim)
    out_of = rotating_out_of(value_spec, order)
    return prepare(key_spec, value_spec, plan, (into, out_of))


_prepare = PerPair(_make)
