"""How one attention step is cut into blocks: pure functions of shapes, no GPU needed.

The lengths of the contexts are not known here (looking at them would wait for the device, and a
captured graph must stay valid when they change), so the number of blocks follows from the most that
the shapes allow, and the kernels share the tokens that there are among these blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from turboquant_np._spec import CodecSpec

from .attention_prefill_plan import PREFILL_DIMS, prefill_plan
from .attention_shapes import (
    LEAST_PARTS,
    MERGE_WARPS,
    Plan,
    Shapes,
    load_width,
    max_items,
    run_bytes,
    scratch_layout,
)

SPLIT_TILE_ROWS = 16  # query rows of one matrix product
SPLIT_UNIT = 64  # tokens that a block of attention_split handles at once
SPLIT_THREADS = 128

PAGE = 16  # tokens of one copy of attention_pages
FUSED_DIMS = (64, 96, 128)  # of which it rotates and merges rows itself
PAGES_DIMS = (64, 96, 128, 256)  # head_dim of attention_pages
PAGES_LEAST_BITS = 2
HEAD_MAJOR_BLOCKS = (16, 32, 64)  # tokens
PAGES_HEADS = 8  # kv heads of a block
PAGES_ROW_TILES = (1, 2, 4)  # of 8 query rows each, that read a page together
PAGES_MOST_ROWS = 64  # query rows of a sequence; each tile reads the pages again
PAGES_THREADS, PAGES_MOST_THREADS = 288, 384
PAIRED_BITS = 5  # at which a table of pairs of codes is worth its memory
PAIRS_BYTES = 131072
PAIRED_STAGES = 3  # of pages that must fit beside it
MOST_SUMS = 512  # row tiles times head_dim, whose sums fit the registers of a warp
WIDE_HEADS, WIDE_PAGES = 4, 4  # kv heads of a block of attention_wide, pages that it takes at once
WIDE_THREADS = 640
WIDE_MERGED_ROWS = 64  # output rows that its warps merge at a time
FEW_SEQUENCES = 128  # that attention_pages can plan by itself
PAGES_SHARED_BYTES = 231424  # the most a block may have, less 1 KB

MERGED_ROWS = 32  # that a block of attention_pages merges at a time; more get a launch of their own
UNEVEN_MERGED_ROWS = 16  # at head_dim 96, where a warp has one row at a time
SCRATCH_SHARE = 0.018  # of a long packed cache; with more, there are half as many parts
MANY_TOKENS = 65536
WINDOW_THREADS = 128


def make_plan(
    key: CodecSpec,
    value: CodecSpec,
    shapes: Shapes,
    num_sms: int,
    bulk_copies: bool,
    dense: bool,
) -> Plan:
    """Plan a step.

    Parameters
    ----------
    key, value : CodecSpec
    shapes : Shapes
    num_sms : int, multiprocessors of the device
    bulk_copies : bool, whether the device is one that kernels/attention_pages is written for
    dense : bool, whether a rotation needs a row of floats for each query row
    """
    macros = {
        "D": key.head_dim,
        "KEY_BITS": key.bits,
        "VALUE_BITS": value.bits,
        "BLOCK_SIZE": shapes.block_size,
    }
    if bulk_copies and key.head_dim in PREFILL_DIMS and shapes.rows_per_seq > PAGES_MOST_ROWS:
        return prefill_plan(key, value, shapes, num_sms, macros, dense)
    order = page_order(key, value, shapes) if bulk_copies else None
    if order is None:
        macros |= {
            "K_ALIGN": load_width(run_bytes(key, 4), key.packed_dim, *shapes.k_layout),
            "V_ALIGN": load_width(run_bytes(value, 8), value.packed_dim, *shapes.v_layout),
            "UNIT": SPLIT_UNIT,
            "MIN_BLOCKS": blocks_per_sm(key.head_dim),
        }
        blocks = num_sms * blocks_per_sm(key.head_dim)
        return _plan(
            "attention_split",
            macros,
            shapes,
            shapes.num_kv_heads,
            blocks,
            SPLIT_TILE_ROWS,
            dense,
        )
    may_fuse = (
        not dense
        and shapes.wide_query
        and key.head_dim in FUSED_DIMS
        and shapes.num_seqs <= FEW_SEQUENCES
    )
    macros |= {"HEAD_MAJOR": int(order == "head"), "NUM_SMEM": PAGES_SHARED_BYTES}
    tiles = wide_tiles(key, value, shapes) if order == "head" else 0
    if tiles:
        groups = shapes.num_kv_heads // WIDE_HEADS
        items = max_items(shapes, 8 * tiles)
        fused = (
            may_fuse
            and num_sms // groups < 2 * LEAST_PARTS * items  # few parts of an output row
            and shapes.num_query_rows <= 2 * WIDE_MERGED_ROWS * num_sms
        )
        macros |= {"WIDE": 1, "ROW_TILES": tiles, "FUSED": int(fused)}
        macros |= {"HEADS": WIDE_HEADS, "SHARES": WIDE_PAGES, "SUB": 1, "UNIT": PAGE * WIDE_PAGES}
        return _plan("attention_wide", macros, shapes, groups, num_sms, 8 * tiles, dense)
    tiles = row_tiles(key, value, shapes)
    merged = UNEVEN_MERGED_ROWS if key.head_dim == 96 else MERGED_ROWS
    fused = may_fuse and tiles == 1 and shapes.num_query_rows <= merged * num_sms
    macros |= {"ROW_TILES": tiles, "FUSED": int(fused)}

    pages = pages_per_warp(key, value, tiles)
    if has_pairs(key, value, tiles):
        macros["PAIRS"] = 1

    def plan(heads: int) -> Plan:
        shares = PAGES_HEADS // heads
        variant = macros | {"HEADS": heads, "SHARES": shares, "SUB": pages}
        variant["UNIT"] = PAGE * pages * shares
        groups = shapes.num_kv_heads // heads
        return _plan("attention_pages", variant, shapes, groups, num_sms, 8 * tiles, dense)

    heads = min(shapes.num_kv_heads, PAGES_HEADS)
    if order == "head":  # a stage is whole blocks
        of_block = shapes.block_size // PAGE
        while pages * (PAGES_HEADS // heads) % of_block:
            heads //= 2
    whole = plan(heads)
    tokens = shapes.num_seqs * shapes.max_blocks * shapes.block_size
    cache_bytes = tokens * shapes.num_kv_heads * (key.packed_dim + value.packed_dim + 8)
    if (
        order == "head"
        and heads == PAGES_HEADS
        and tokens >= MANY_TOKENS
        and whole.scratch_bytes > SCRATCH_SHARE * cache_bytes
    ):
        return plan(PAGES_HEADS // 2)
    return whole


def _plan(
    kernel: str,
    macros: Mapping[str, int],
    shapes: Shapes,
    head_groups: int,
    blocks: int,
    most_rows: int,
    dense: bool,
) -> Plan:
    """Cut the tokens into ranges for `blocks` blocks."""
    wide, fused = kernel == "attention_wide", bool(macros.get("FUSED"))
    pages = wide or kernel == "attention_pages"
    threads = PAGES_THREADS if pages else SPLIT_THREADS
    options: tuple[str, ...] = ("-std=c++17",)
    if wide or (pages and (macros["ROW_TILES"] > 2 or macros["D"] > 128)):
        # Warps hand registers to each other.
        threads = WIDE_THREADS if wide else PAGES_MOST_THREADS
        options = ("-arch=sm_90a", *options)
    rows = (shapes.query_len or shapes.num_tokens) * shapes.group
    tile_rows = max(1, min(most_rows, rows))
    items = max_items(shapes, tile_rows)
    units = -(-shapes.max_blocks * shapes.block_size // macros["UNIT"])
    ranges = max(1, min(blocks // head_groups, items * units))
    slots = ranges + items
    scratch, scratch_bytes = scratch_layout(
        macros["D"], shapes, slots * shapes.num_kv_heads * tile_rows, dense
    )
    parts = ranges / max(1, items)  # of an output row, about
    at_once = MERGE_WARPS * ranges * head_groups if fused else math.inf
    warps = MERGE_WARPS
    while warps > 1 and (parts < LEAST_PARTS * warps or shapes.num_query_rows * warps > at_once):
        warps //= 2
    return Plan(
        f"{kernel}.cu" if pages else "attention.cu",
        kernel,
        macros,
        options,
        (ranges, head_groups),
        threads,
        PAGES_SHARED_BYTES if pages else 0,
        tile_rows,
        fused,
        warps,
        slots,
        scratch,
        scratch_bytes,
    )


def page_order(key: CodecSpec, value: CodecSpec, shapes: Shapes) -> str | None:
    """Memory order "head" or "token" of pages that kernels/attention_pages can read, else None.

    It wants one of a few head_dims, 2 bits or more, no soft cap, few query rows, and 16 tokens of
    all heads of a block of threads in one piece: [head][token] in blocks of 16, 32 or 64, or
    [token][head].
    """
    heads = shapes.num_kv_heads
    if (
        key.head_dim not in PAGES_DIMS
        or min(key.bits, value.bits) < PAGES_LEAST_BITS
        or shapes.soft_cap
        or shapes.rows_per_seq > PAGES_MOST_ROWS
        or shapes.block_size % PAGE
        or (PAGES_HEADS % heads and heads % PAGES_HEADS)
        or stages(key, value, 1, 1) < 2
    ):
        return None
    arrays = (
        (shapes.k_layout, key.packed_dim),
        (shapes.v_layout, value.packed_dim),
        (shapes.kn_layout, 4),
        (shapes.vn_layout, 4),
    )
    if any(a.address % 16 or a.block % 16 for a, _ in arrays):
        return None
    if heads <= PAGES_HEADS and all(
        a.token == heads * size and (heads == 1 or a.head == size) for a, size in arrays
    ):
        return "token"
    if shapes.block_size in HEAD_MAJOR_BLOCKS and all(
        a.token == size and a.head == shapes.block_size * size for a, size in arrays
    ):
        return "head"
    return None


def row_tiles(key: CodecSpec, value: CodecSpec, shapes: Shapes) -> int:
    """Tiles of 8 query rows that read a page together: as many as needed, if memory is left."""
    most = MOST_SUMS // key.head_dim
    fitting = [
        n
        for n in PAGES_ROW_TILES
        if n <= most and stages(key, value, n, pages_per_warp(key, value, n)) > 1
    ]
    return next((n for n in fitting if 8 * n >= shapes.rows_per_seq), fitting[-1])


def has_pairs(key: CodecSpec, value: CodecSpec, tiles: int) -> bool:
    """Whether keys and values of 5 bits share a table of pairs, which takes half of the memory.

    Beside a table of pairs of one side alone and that of the other no memory is left for pages.
    """
    if key.bits != PAIRED_BITS or value.bits != PAIRED_BITS:
        return False
    return _stages(key, value, tiles, 1, PAIRS_BYTES) >= PAIRED_STAGES


def stages(key: CodecSpec, value: CodecSpec, tiles: int, pages: int) -> int:
    """Stages of `pages` pages of 8 heads that fit the ring of attention_pages."""
    if has_pairs(key, value, tiles):
        return _stages(key, value, tiles, pages, PAIRS_BYTES)
    return _stages(key, value, tiles, pages, _table_bytes(key, value))


def _stages(key: CodecSpec, value: CodecSpec, tiles: int, pages: int, tables: int) -> int:
    rows = PAGES_HEADS * tiles * (16 * key.head_dim + 128)  # TileRows of each warp
    return (_ring_bytes(tables) - rows) // (pages * _page_bytes(key, value, PAGES_HEADS))


def wide_tiles(key: CodecSpec, value: CodecSpec, shapes: Shapes) -> int:
    """Tiles of 8 query rows of attention_wide, or 0 if it is not for these shapes."""
    rows, heads = shapes.rows_per_seq, shapes.num_kv_heads
    if rows <= 8 or key.head_dim != 128 or value.bits != 4 or heads % WIDE_HEADS:
        return 0
    tiles = 2 if rows <= 16 else 4
    of_head = tiles * (16 * key.head_dim + 1312) + 64  # WideRows
    ring = _ring_bytes(_table_bytes(key, value)) - WIDE_HEADS * of_head
    return tiles if ring >= 2 * WIDE_PAGES * _page_bytes(key, value, WIDE_HEADS) else 0


def _table_bytes(key: CodecSpec, value: CodecSpec) -> int:
    """TABLE_BYTES of attention_fragments.cuh without pairs; 3 bits take two tables."""
    return 131072 if 3 in (key.bits, value.bits) and key.bits != value.bits else 65536


def _ring_bytes(tables: int) -> int:
    """Shared memory for the ring of pages and for the query rows."""
    return PAGES_SHARED_BYTES - tables - 512 - (16 * FEW_SEQUENCES + 128)  # barriers, work list


def _page_bytes(key: CodecSpec, value: CodecSpec, heads: int) -> int:
    return PAGE * heads * (key.packed_dim + value.packed_dim + 8)


def pages_per_warp(key: CodecSpec, value: CodecSpec, tiles: int) -> int:
    """Pages that a warp of attention_pages takes at once: as many as its registers hold."""
    widest = max(key.bits, value.bits)
    one = tiles > 1 or widest > 6 or has_pairs(key, value, tiles)
    pages = 1 if one else 4 if widest == 2 else 2
    pages = max(1, min(4, pages * 128 // key.head_dim))
    while pages > 1 and stages(key, value, tiles, pages) < 2:
        pages //= 2
    return pages


def window_rows(rows_of_a_sequence: int) -> int:
    """Query rows of a block of attention_window."""
    return 4 if rows_of_a_sequence <= 4 else 8


def blocks_per_sm(head_dim: int) -> int:
    """Blocks of attention_split that fit one multiprocessor by their registers."""
    return 3 if head_dim <= 128 else 2
