"""Attention on the host side: what is cut into units, and what happens before and after them.

Queries are rotated, padded and put into the coordinate order of tiles by one matrix product; the
merged outputs come back by another.  How a batch is cut depends on each sequence alone,
never on the number of threads or on the rest of the batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec

from .attend import STATE_BYTES
from .attend_units import CALL, MERGE, UNIT, attend_scratch_bytes
from .codec import address, aligned_empty, check_status, constants_of
from .compile import compiled
from .kernels import Plan
from .simd import target
from .threads import for_rows
from .tile import coordinate_order

ROWS_PER_UNIT = 64  # at most, unless one query token has more heads than that
SHORT_CHUNK, LONG_CHUNK = 256, 1024  # tokens of a unit: if one unit holds all rows, and else
MOST_CHUNKS = 128

Ints = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]


class Cut(NamedTuple):
    """How a batch is divided.

    Attributes
    ----------
    units : int64 [units, len(UNIT)], with the sequence in the place of the block table's address
    merges : int64 [row tiles, len(MERGE)]
    first, last : int32 [rows], the tokens each query row sees: from `first` to before `last`
    places : int, rows of partial results
    """

    units: Ints
    merges: Ints
    first: npt.NDArray[np.int32]
    last: npt.NDArray[np.int32]
    places: int


def cut(
    starts: Ints, positions: Ints, context_lens: Ints, group: int, kv_heads: int, window: int
) -> Cut:
    """Divide query rows and contexts into units; a pure function of the batch's lengths.

    starts : [num_seqs + 1] first query token of each sequence
    positions : [num_seqs] position of that token
    window : sliding window, 0 if there is none
    """
    lengths = np.diff(starts)
    tokens_per_tile = max(1, ROWS_PER_UNIT // group)
    tiles_of = -(-lengths // tokens_per_tile)
    seq = np.repeat(np.arange(len(lengths)), tiles_of)
    number = np.arange(len(seq)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    begin = number * tokens_per_tile  # query tokens of the tile, within the sequence
    end = np.minimum(begin + tokens_per_tile, lengths[seq])

    tile_stop = np.clip(positions[seq] + end, 0, context_lens[seq])
    tile_start = np.zeros_like(tile_stop)
    if window:
        tile_start = np.clip(positions[seq] + begin + 1 - window, 0, tile_stop)
    visible = tile_stop - tile_start
    shortest = np.where(tiles_of[seq] == 1, SHORT_CHUNK, LONG_CHUNK)
    doublings = np.ceil(np.log2(np.maximum(visible / (shortest * MOST_CHUNKS), 1.0)))
    chunk = shortest << doublings.astype(np.int64)
    chunks = -(-visible // chunk)

    rows = (end - begin) * group
    row = (starts[seq] + begin) * group
    tile = np.repeat(np.arange(len(seq)), chunks)
    part = np.arange(len(tile)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    start = tile_start[tile] + part * chunk[tile]
    stop = np.minimum(start + chunk[tile], tile_stop[tile])
    sizes = rows[tile] * kv_heads
    place = np.cumsum(sizes) - sizes
    first_unit = np.cumsum(chunks) - chunks
    merge_place = np.append(place, 0)[np.minimum(first_unit, len(place))]

    position = np.repeat(positions, lengths) + np.arange(len(seq) and starts[-1])
    position -= np.repeat(starts[:-1], lengths)
    last = np.repeat(position + 1, group)
    first = np.maximum(last - window, 0) if window else np.zeros_like(last)
    return Cut(
        np.stack([seq[tile], row[tile], rows[tile], start, stop, place], axis=1),
        np.stack([merge_place, chunks, rows, row], axis=1),
        first.astype(np.int32),
        last.astype(np.int32),
        int(sizes.sum()),
    )


@lru_cache(maxsize=16)
def _cut_again(
    starts: bytes, positions: bytes, lens: bytes, group: int, kv_heads: int, window: int
) -> Cut:
    """`cut`, remembered: all layers of a step have the same lengths."""
    a, b, c = (np.frombuffer(data, np.int64) for data in (starts, positions, lens))
    return cut(a, b, c, group, kv_heads, window)


def attention(key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch) -> None:
    """Fill batch.out and batch.lse."""
    tokens, heads, dim = batch.query.shape
    kv_heads, group = batch.num_kv_heads, batch.group
    if batch.query_start_loc is None:
        starts = np.arange(batch.num_seqs + 1, dtype=np.int64) * batch.query_len
    else:
        starts = batch.query_start_loc.astype(np.int64)
    if tokens == 0:
        return
    lens = batch.context_lens.astype(np.int64)
    positions = lens - np.diff(starts)
    if batch.query_positions is not None:
        positions = batch.query_positions.astype(np.int64)
    lengths = (starts.tobytes(), positions.tobytes(), lens.tobytes())
    work = _cut_again(*lengths, group, kv_heads, batch.sliding_window)
    plain = batch.query.astype(np.float32)
    rotated = (plain.reshape(-1, dim) @ _into_tiles(key_spec)).reshape(tokens, kv_heads, group, -1)
    query = aligned_empty((kv_heads, tokens, group, rotated.shape[-1]), np.float32)
    query[...] = rotated.transpose(1, 0, 2, 3)
    bias = _offset_scores(batch, plain.reshape(tokens, kv_heads, group, dim), starts)
    results, states = _run(key_spec, value_spec, batch, work, query, bias)

    out = (results.reshape(-1, results.shape[-1]) @ _out_of_tiles(value_spec)).reshape(
        kv_heads, tokens, group, dim
    )
    top, total = (states[..., i].reshape(kv_heads, tokens, group) for i in (0, 1))
    with np.errstate(divide="ignore", over="ignore"):
        lse = np.where(total > 0, top + np.log(total), np.float32(-np.inf))
        if batch.sinks is not None:
            with_sink = np.logaddexp(lse, batch.sinks.reshape(kv_heads, 1, group))
            out *= np.exp(lse - with_sink)[..., None]
            lse = with_sink
        batch.out[...] = out.transpose(1, 0, 2, 3).reshape(tokens, heads, dim)
    batch.lse[...] = lse.transpose(1, 0, 2).reshape(tokens, heads)


def _offset_scores(batch: AttentionBatch, query: Float32s, starts: Ints) -> Float32s:
    """[kv_heads, tokens * group] what the key offset adds to the scaled scores."""
    tokens, kv_heads, group, _ = query.shape
    if batch.key_offset is None:
        return np.zeros((kv_heads, tokens * group), np.float32)
    offset = np.repeat(batch.key_offset, np.diff(starts), axis=0)
    scores = np.einsum("tkgd,tkd->ktg", query, offset) * np.float32(batch.scale)
    return np.ascontiguousarray(scores.reshape(kv_heads, tokens * group))


def _run(
    key_spec: CodecSpec,
    value_spec: CodecSpec,
    batch: AttentionBatch,
    work: Cut,
    query: Float32s,
    bias: Float32s,
) -> tuple[Float32s, Float32s]:
    """Launch the units and merge them: [kv_heads, rows, padded dim] results, [.., 3] states."""
    kv_heads, tokens, group, padded = query.shape
    dim, rows = key_spec.head_dim, tokens * group
    results = np.empty((kv_heads, rows, padded), np.float32)
    result_states = np.empty((kv_heads, rows, STATE_BYTES // 4), np.float32)
    states = np.empty((work.places, STATE_BYTES // 4), np.float32)
    outputs = aligned_empty((work.places, padded), np.float32)
    root = dim**-0.5
    gains = np.array([batch.scale * root, root, batch.logits_soft_cap], np.float32)
    tables = np.ascontiguousarray(batch.block_tables, np.int64)
    units = work.units.copy()
    units[:, 0] = address(tables) + units[:, 0] * tables.strides[0]
    fields: dict[str, int] = {
        "block_size": batch.block_size,
        "kv_heads": kv_heads,
        "gains": address(gains),
        "query": address(query),
        "query_head": query.strides[0],
        "bias": address(bias),
        "bias_head": bias.strides[0],
        "first": address(work.first),
        "last": address(work.last),
        "states": address(states),
        "outputs": address(outputs),
        "result_states": address(result_states),
        "results": address(results),
        "result_head": results.strides[0],
    }
    sides = (
        ("key", batch.k_packed, batch.k_norms),
        ("value", batch.v_packed, batch.v_norms),
    )
    for side, packed, norms in sides:
        fields[f"{side}_codes"], fields[f"{side}_norms"] = address(packed), address(norms)
        for i, axis in enumerate(("block", "token", "head")):
            fields[f"{side}_{axis}"] = packed.strides[i]
            fields[f"{side}_norm_{axis}"] = norms.strides[i]
    call = np.array([fields[name] for name in CALL], np.int64)
    plan = Plan("attend", dim, key_spec.bits, value_bits=value_spec.bits)
    most_rows = int(work.merges[:, MERGE.index("rows")].max())
    scratch_bytes = attend_scratch_bytes(dim, most_rows, target().width)
    key_tables = constants_of(key_spec).encode
    value_tables = constants_of(value_spec).encode

    def launch(plan: Plan, items: Ints, work_per_item: int) -> None:
        kernel = compiled(plan)

        def run(start: int, stop: int) -> None:
            scratch = aligned_empty((scratch_bytes,), np.uint8)
            status = kernel(
                address(call),
                0,
                address(items) + start * items.strides[0],
                0,
                stop - start,
                address(key_tables),
                address(value_tables),
                0,
                address(scratch),
                0,
            )
            check_status(status)

        for_rows(len(items), work_per_item, run)

    if len(units):
        tokens_per_unit = units[:, UNIT.index("stop")] - units[:, UNIT.index("start")]
        launch(plan, units, int(tokens_per_unit.mean()) * kv_heads * dim)
    launch(Plan("merge", dim), work.merges, kv_heads * most_rows * dim)
    return results, result_states


_into: WeakKeyDictionary[CodecSpec, Float32s] = WeakKeyDictionary()
_out: WeakKeyDictionary[CodecSpec, Float32s] = WeakKeyDictionary()


def _into_tiles(spec: CodecSpec) -> Float32s:
    """[head_dim, padded] rotate and reorder: a column for each place of a tile row."""
    if spec not in _into:
        _into[spec] = np.ascontiguousarray(_out_of_tiles(spec).T)
    return _into[spec]


def _out_of_tiles(spec: CodecSpec) -> Float32s:
    """[padded, head_dim] the inverse: row i of the rotation where its coordinate lies."""
    if spec not in _out:
        order = _order(spec.bits, spec.head_dim, target().width)
        matrix = np.zeros((len(order), spec.head_dim), np.float32)
        inside = order < spec.head_dim
        matrix[inside] = spec.rotation.matrix[order[inside]]
        _out[spec] = matrix
    return _out[spec]


@lru_cache(maxsize=64)
def _order(bits: int, dim: int, width: int) -> Ints:
    return coordinate_order(bits, dim, width)
