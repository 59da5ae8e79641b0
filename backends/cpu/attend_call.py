"""What the kernels of attention are told: a call, its units of work, a thread's scratch memory."""

from __future__ import annotations

from functools import lru_cache

from .int8_layout import padded_dim
from .kernels import Plan
from .simd import I64, Simd, Value
from .tile import TILE, key_windows_bytes, registers_of

# What all tasks of a call share, as int64: numbers and addresses, then for each array its address
# and its strides in bytes.
NUMBERS = (
    *("claimed", "finished"),  # tasks that threads have begun, and done
    *("rotations", "units", "merges"),  # the number of tasks of each kind, done in this order
    *("whole_units", "parts"),  # units behind the whole ones are as many tasks each
    *("unit_list", "merge_list"),  # int64 [units, len(UNIT)], [merges / kv_heads, len(MERGE)]
    *("first", "last"),  # int32 [rows], the tokens each row sees
    *("block_size", "kv_heads", "group"),
    "rows",  # query rows of a key/value head: query tokens times heads of the group
    *("gain", "soft_cap"),  # bits of float32: factor of the query; 0 for no cap
    *("into_tiles", "out_of_tiles"),  # float32 [padded, padded] matrices that rotate
    "rotated",  # float32 [kv_heads, rows, padded]
    *("states", "outputs"),  # partial results: softmax.State, float32 [padded]
)
CALL = (
    *NUMBERS,
    *("key_codes", "key_block", "key_token", "key_head", "key_byte"),
    *("key_norms", "key_norm_block", "key_norm_token", "key_norm_head"),
    *("value_codes", "value_block", "value_token", "value_head", "value_byte"),
    *("value_norms", "value_norm_block", "value_norm_token", "value_norm_head"),
    *("blocks", "blocks_pitch", "blocks_item"),  # int64 block tables
    *("bias", "bias_head", "bias_row"),  # float32, added to scaled scores
    *("sinks", "sinks_head"),  # float32, -inf for none
    *("query", "query_token", "query_head", "query_item"),  # float32, the last axis contiguous
    *("out", "out_token", "out_head", "out_item"),  # float32, the last axis contiguous
    *("lse", "lse_token", "lse_head"),  # float32
)
# One unit: its sequence, first row and their number, its tokens, its place among partial results
# (counted in rows; head h and row r are at place + h * rows + r).
UNIT = ("seq", "row", "rows", "start", "stop", "place")
# Rows whose partial results lie in `chunks` units behind each other.
MERGE = ("place", "chunks", "rows", "row")

OFFSETS = ("key_codes", "key_norms", "value_codes", "value_norms")  # of each token of a tile
# Where fetching the next tile's packed vectors has come to, on each side: address of the first
# head's codes without a token's offset; bytes of all heads; addresses of the last offset of a
# quarter of the tile, and of the next one; which quarter, and bytes of heads, are next.
SIDES = ("key", "value")
CURSOR = ("base", "end", "last", "slot", "quarter", "skip")
CURSORS_BYTES = 128
ROTATED_ROWS = 16  # by one task
SCORE_BYTES = 6 * TILE  # at most, of a row and a tile: scores, and their weights if in 8 bits


class Fields:
    """int64 fields in memory, by name."""

    def __init__(self, s: Simd, address: Value, names: tuple[str, ...]) -> None:
        self.s, self.address, self.names = s, address, names

    def __getitem__(self, name: str) -> Value:
        return self.s.load(I64, self.place(name))

    def place(self, name: str) -> Value:
        """The address of a field."""
        return self.s.at(self.address, 8 * self.names.index(name))


def row_registers(plan: Plan, width: int) -> int:
    """Registers of a row of a query or an output."""
    if plan.kind == "attend_int8":
        return registers_of(padded_dim(plan.dim, plan.bits, plan.value_bits), width)
    return registers_of(plan.dim, width)


def row_bytes(s: Simd, plan: Plan) -> int:
    """Bytes of a row, padded to whole registers."""
    return 4 * s.width * row_registers(plan, s.width)


@lru_cache(maxsize=64)
def attend_scratch_bytes(plan: Plan, rows: int, width: int) -> int:
    """The offsets of two tiles, norms, cursors, a tile, windows, scores or rows on their way.

    rows : of any unit, at most
    """
    row = 4 * width * row_registers(plan, width)
    windows = key_windows_bytes(plan.bits, plan.dim, width)
    last = max(SCORE_BYTES * rows, row * max(rows, ROTATED_ROWS))
    return 2 * 8 * TILE * len(OFFSETS) + 2 * 4 * TILE + CURSORS_BYTES + row * TILE + windows + last


class Scratch:
    """Addresses within a thread's scratch memory."""

    def __init__(self, s: Simd, plan: Plan, base: Value) -> None:
        self.offsets = base  # int64 [2, len(OFFSETS), TILE]
        self.norms = s.at(base, 2 * 8 * TILE * len(OFFSETS))  # float32 [2, TILE]
        self.cursors = s.at(self.norms, 2 * 4 * TILE)  # int64 [len(SIDES), len(CURSOR)]
        self.tile = s.at(self.cursors, CURSORS_BYTES)
        self.windows = s.at(self.tile, row_bytes(s, plan) * TILE)
        self.scores = s.at(self.windows, key_windows_bytes(plan.bits, plan.dim, s.width))
        self.rows = self.scores  # before and after units: float32 [rows, padded]
