"""Attention on the host side: what happens before and after the kernels.

Queries are rotated by one matrix product; the merged outputs, whose coordinates lie in the order of
their registers, come back by another.  All rows are padded to whole registers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec

from .attend_units import CALL, attend_scratch_bytes
from .attention_cut import Cut, cut
from .codec import address, check_status, constants_of
from .compile import Kernel, compiled
from .kernels import Plan
from .simd import CACHE_LINE, target
from .softmax import STATE_BYTES
from .threads import for_rows, num_threads
from .tile import registers_of, value_order

Ints = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]


class Prepared(NamedTuple):
    """What all calls with the same quantisers share."""

    plan: Plan
    attend: Kernel
    merge: Kernel
    project: Kernel
    padded: int
    matrices: tuple[Float32s, Float32s]  # [padded, padded]
    into_tiles: int  # address of the first one, which rotates queries
    out_of_tiles: int  # of the second one, which rotates outputs back
    key_tables: int
    value_tables: int


class Workspace:
    """Named float32 arrays in one piece of memory, each on cache lines of its own.

    NumPy takes a microsecond to tell an address; here it tells one for all of them.
    """

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.shapes, self.starts, size = shapes, dict[str, int](), 0
        for name, shape in shapes.items():
            self.starts[name] = size
            size += -(-4 * math.prod(shape) // CACHE_LINE) * CACHE_LINE
        self.memory = np.empty(size + CACHE_LINE, np.uint8)
        at = address(self.memory)
        self.first = -at % CACHE_LINE
        self.base = at + self.first

    def address(self, name: str) -> int:
        return self.base + self.starts[name]

    def array(self, name: str) -> Float32s:
        start, shape = self.first + self.starts[name], self.shapes[name]
        part = self.memory[start : start + 4 * math.prod(shape)]
        return part.view(np.float32).reshape(shape)


def attention(key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch) -> None:
    """Fill batch.out and batch.lse."""
    tokens, heads, dim = batch.query.shape
    kv_heads, group = batch.num_kv_heads, batch.group
    if tokens == 0:
        return
    work = _cut_of(batch)
    prepared = _prepare(key_spec, value_spec)
    rows, padded = tokens * group, prepared.padded
    space = Workspace(
        plain=(kv_heads, tokens, group, padded),
        query=(kv_heads * rows, padded),
        bias=(kv_heads, tokens, group),
        soft_cap=(1,),
        states=(work.places, STATE_BYTES // 4),
        outputs=(work.places, padded),
        result_states=(kv_heads, tokens, group, STATE_BYTES // 4),
        results=(kv_heads * rows, padded),
        final=(kv_heads, tokens, group, padded),
    )
    query = batch.query.astype(np.float32, copy=False).reshape(tokens, kv_heads, group, dim)
    gain = np.float32(batch.scale * dim**-0.5)  # scores are sums over z = sqrt(dim) * coordinates
    plain = space.array("plain")
    np.multiply(query.transpose(1, 0, 2, 3), gain, out=plain[..., :dim])
    if padded > dim:
        plain[..., dim:] = 0
    space.array("bias")[...] = _offset_scores(batch, query)
    _project(prepared, space, "plain", prepared.into_tiles, "query")
    _run(prepared, batch, work, space)
    _project(prepared, space, "results", prepared.out_of_tiles, "final")

    out = space.array("final")[..., :dim]
    states = space.array("result_states")
    top, total = states[..., 0], states[..., 1]
    with np.errstate(divide="ignore", over="ignore"):
        lse = np.where(total > 0, top + np.log(total), np.float32(-np.inf))
        if batch.sinks is not None:
            with_sink = np.logaddexp(lse, batch.sinks.reshape(kv_heads, 1, group))
            out *= np.exp(lse - with_sink)[..., None]
            lse = with_sink
        batch.out[...] = out.transpose(1, 0, 2, 3).reshape(tokens, heads, dim)
    batch.lse[...] = lse.transpose(1, 0, 2).reshape(tokens, heads)


def _offset_scores(batch: AttentionBatch, query: Float32s) -> Float32s | float:
    """[kv_heads, tokens, group] what the key offset adds to the scaled scores.

    query : [tokens, kv_heads, group, head_dim]
    """
    if batch.key_offset is None:
        return 0.0
    counts: Any = batch.query_len
    if batch.query_start_loc is not None:
        counts = np.diff(batch.query_start_loc)
    offset = np.repeat(batch.key_offset, counts, axis=0)
    scores: Float32s = np.einsum("tkgd,tkd->ktg", query, offset)
    return scores * np.float32(batch.scale)


def _project(prepared: Prepared, space: Workspace, source: str, matrix: int, target: str) -> None:
    """Rows of one array times the matrix at an address become rows of another."""
    from_, to, padded = space.address(source), space.address(target), prepared.padded

    def run(start: int, stop: int) -> None:
        skip, rows = 4 * padded * start, stop - start
        tables = prepared.key_tables
        status = prepared.project(from_ + skip, 0, to + skip, 0, rows, tables, matrix, 0, 0, 0)
        check_status(status)

    for_rows(math.prod(space.shapes[source]) // padded, padded, run)


def _run(prepared: Prepared, batch: AttentionBatch, work: Cut, space: Workspace) -> None:
    """Launch the units, which the threads claim one by one, and merge their results."""
    kv_heads, tokens, group, padded = space.shapes["plain"]
    dim, rows = prepared.plan.dim, tokens * group
    space.array("soft_cap")[...] = batch.logits_soft_cap
    tables = np.ascontiguousarray(batch.block_tables, np.int64)
    fields = {
        "blocks": address(tables),
        "blocks_pitch": tables.strides[0],
        "block_size": batch.block_size,
        "kv_heads": kv_heads,
        "query_head": 4 * rows * padded,
        "bias_head": 4 * rows,
        "first": address(work.first),
        "last": address(work.last),
        "result_head": 4 * rows * padded,
    }
    for name in space.shapes:
        fields[name] = space.address(name)
    sides = (
        ("key", batch.k_packed, batch.k_norms),
        ("value", batch.v_packed, batch.v_norms),
    )
    for side, packed, norms in sides:
        for name, array in ((side, packed), (f"{side}_norm", norms)):
            fields[f"{name}_block"], fields[f"{name}_token"], fields[f"{name}_head"] = (
                array.strides[:3]
            )
        fields[f"{side}_codes"], fields[f"{side}_norms"] = address(packed), address(norms)
    call = np.array([0, *(fields[name] for name in CALL[1:])], np.int64)
    at_call, at_units, at_merges = address(call), address(work.units), address(work.merges)
    scratch_bytes = attend_scratch_bytes(prepared.plan, work.most_rows, target().width)
    tables_at = prepared.key_tables, prepared.value_tables

    def attend(_start: int, _stop: int) -> None:
        scratch, units = Workspace(scratch=(scratch_bytes // 4,)), len(work.units)
        status = prepared.attend(at_call, 0, at_units, 0, units, *tables_at, 0, scratch.base, 0)
        check_status(status)

    def merge(start: int, stop: int) -> None:
        at = at_merges + start * work.merges.strides[0]
        check_status(prepared.merge(at_call, 0, at, 0, stop - start, *tables_at, 0, 0, 0))

    threads = num_threads()
    for_rows(threads, work.tokens * kv_heads * dim // threads, attend)
    for_rows(len(work.merges), kv_heads * work.most_rows * dim, merge)


def _cut_of(batch: AttentionBatch) -> Cut:
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
) -> Cut:
    """starts : query tokens of each sequence, or first query tokens"""
    contexts = np.frombuffer(lens, np.int64)
    if isinstance(starts, int):
        first = np.arange(len(contexts) + 1, dtype=np.int64) * starts
    else:
        first = np.frombuffer(starts, np.int64)
    at = contexts - np.diff(first)
    if positions is not None:
        at = np.frombuffer(positions, np.int64)
    return cut(first, at, contexts, group, kv_heads, window)


_prepared: WeakKeyDictionary[CodecSpec, WeakKeyDictionary[CodecSpec, Prepared]]
_prepared = WeakKeyDictionary()


def _prepare(key_spec: CodecSpec, value_spec: CodecSpec) -> Prepared:
    of_key = _prepared.setdefault(key_spec, WeakKeyDictionary())
    known = of_key.get(value_spec)
    if known is None:
        plan = Plan("attend", key_spec.head_dim, key_spec.bits, value_bits=value_spec.bits)
        matrices = _into_tiles(key_spec), _out_of_tiles(value_spec)
        known = of_key[value_spec] = Prepared(
            plan,
            compiled(plan),
            compiled(Plan("merge", key_spec.head_dim)),
            compiled(Plan("project", key_spec.head_dim)),
            len(matrices[0]),
            matrices,
            address(matrices[0]),
            address(matrices[1]),
            constants_of(key_spec).addresses["encode"],
            constants_of(value_spec).addresses["encode"],
        )
    return known


def _into_tiles(spec: CodecSpec) -> Float32s:
    """A column of the rotation for each coordinate of a key, zeros behind."""
    matrix, dim = _square(spec), spec.head_dim
    matrix[:dim, :dim] = spec.rotation.matrix.T
    return matrix


def _out_of_tiles(spec: CodecSpec) -> Float32s:
    """Row i of the rotation in the place of coordinate i of a value, for centroids of z."""
    matrix, dim = _square(spec), spec.head_dim
    order = np.array(value_order(spec.bits, dim, target().width))
    inside = order < dim
    matrix[inside, :dim] = spec.rotation.matrix[order[inside]] * np.float32(dim**-0.5)
    return matrix


def _square(spec: CodecSpec) -> Float32s:
    size = registers_of(spec.head_dim, target().width) * target().width
    return np.zeros((size, size), np.float32)
