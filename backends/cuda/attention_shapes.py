"""Shapes of an attention step, the plan made of them, and what plans of all kernels need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from turboquant_np._spec import CodecSpec

MERGE_WARPS = 8  # of a block of attention_merge
MANY_DIMS = 32  # of a lane of attention_query_many and attention_merge_many
LEAST_PARTS = 4  # of an output row that a warp of attention_merge takes
ALIGNMENT = 256  # of each part of the scratch memory


class Layout(NamedTuple):
    """Where a paged array lies: address and strides in bytes."""

    address: int
    block: int
    token: int
    head: int


@dataclass(frozen=True)
class Shapes:
    """The numbers of an AttentionBatch that decide the plan.

    Attributes
    ----------
    num_tokens, num_seqs, num_kv_heads, group, max_blocks, block_size : int
    query_len : int, query tokens of each sequence; 0 if ragged
    soft_cap : bool
    full_pages : bool, whether there are tokens in full precision, too
    wide_query : bool, whether rows of the query can be read 16 bytes at a time
    k_layout, v_layout, kn_layout, vn_layout : Layout
        Of the packed codes and of the norms.
    """

    num_tokens: int
    num_seqs: int
    query_len: int
    num_kv_heads: int
    group: int
    max_blocks: int
    block_size: int
    soft_cap: bool
    full_pages: bool
    wide_query: bool
    k_layout: Layout
    v_layout: Layout
    kn_layout: Layout
    vn_layout: Layout

    @property
    def num_query_rows(self) -> int:
        return self.num_tokens * self.num_kv_heads * self.group

    @property
    def rows_per_seq(self) -> float:
        """Query rows of a kv head; of a ragged batch the mean."""
        return (self.query_len or self.num_tokens / max(1, self.num_seqs)) * self.group


@dataclass(frozen=True)
class Plan:
    """Launch of one attention step.

    Attributes
    ----------
    source, kernel : str, what computes the parts
    macros : the variant of the source
    options : for the compiler
    grid : (ranges, groups of kv heads); a block writes parts of the items in its range.  Of
        attention_prefill (items times kv heads, splits)
    threads, shared_bytes : int, of a block
    tile_rows : int, query rows of an item
    fused : bool, whether attention_pages is the only launch
    merge_warps : int, warps of a merge that share an output row
    slots : int, upper bound of the parts of one kv head
    scratch : {name: (offset, bytes)}, parts of the scratch memory
    scratch_bytes : int
    """

    source: str
    kernel: str
    macros: Mapping[str, int]
    options: tuple[str, ...]
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    tile_rows: int
    fused: bool
    merge_warps: int
    slots: int
    scratch: Mapping[str, tuple[int, int]]
    scratch_bytes: int

    @property
    def num_ranges(self) -> int:
        """Ranges of attention_split and its like, parts of an output row of attention_prefill."""
        return self.grid[self.kernel == "attention_prefill"]

    @property
    def many_rows(self) -> bool:
        """Whether the launches before and behind the parts take MANY_ROWS at once."""
        return bool(self.macros.get("MANY_ROWS"))


def scratch_layout(
    head_dim: int, shapes: Shapes, part_rows: int, dense: bool
) -> tuple[dict[str, tuple[int, int]], int]:
    """Offset and size of each part of the scratch memory, and the size of all."""
    q_rows = shapes.num_query_rows
    sizes = {
        "q_rows": q_rows * _round_up(head_dim, 32) * 2,
        "q_factors": q_rows * 8,
        "plan": 16 * (shapes.num_seqs + 1),
        "parts": part_rows * _round_up(head_dim, 8) * 2,
        "part_scales": part_rows * 8,
        "rows": q_rows * head_dim * 4 if dense else 0,
        "other_out": q_rows * head_dim * 4 if shapes.full_pages else 0,
        "other_lse": q_rows * 4 if shapes.full_pages else 0,
    }
    scratch, offset = {}, 0
    for name, size in sizes.items():
        scratch[name] = (offset, size)
        offset += _round_up(size, ALIGNMENT)
    return scratch, offset


def max_items(shapes: Shapes, tile_rows: int) -> int:
    """Most (sequence, tile of rows) pairs that a batch of these shapes can have."""
    if shapes.query_len:
        return shapes.num_seqs * -(-shapes.query_len * shapes.group // tile_rows)
    return shapes.num_tokens * shapes.group // tile_rows + shapes.num_seqs


def run_bytes(spec: CodecSpec, lanes: int) -> int:
    """Bytes of the codes that one of `lanes` lanes reads of a vector: whole groups of 8 codes."""
    octets = -(-spec.head_dim // 8)
    return -(-octets // lanes) * spec.bits


def load_width(run: int, packed_dim: int, *addresses: int) -> int:
    """Bytes that one load of codes may take: a power of two that divides every address."""
    width = math.gcd(16, run, packed_dim, *addresses)
    return width & -width


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
