"""How a step of many query rows is cut into blocks of attention_prefill."""

from __future__ import annotations

from collections.abc import Mapping

from turboquant_np._spec import CodecSpec

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

PREFILL_DIMS = (64, 96, 128)  # head_dim of attention_prefill
PREFILL_ROWS, PREFILL_TILE = 192, 64  # query rows of a block, tokens of a tile
PREFILL_STAGES, PREFILL_THREADS = 3, 512


def prefill_plan(
    key: CodecSpec,
    value: CodecSpec,
    shapes: Shapes,
    num_sms: int,
    macros: Mapping[str, int],
    dense: bool,
) -> Plan:
    """A block for each tile of query rows and kv head, or several, which split its tokens."""
    macros = {
        **macros,
        "PREFILL": 1,
        "FUSED": 0,
        "UNIT": PREFILL_TILE,
        "K_ALIGN": load_width(run_bytes(key, 4), key.packed_dim, *shapes.k_layout),
        "V_ALIGN": load_width(run_bytes(value, 4), value.packed_dim, *shapes.v_layout),
    }
    items = max_items(shapes, PREFILL_ROWS)
    tiles = -(-shapes.max_blocks * shapes.block_size // PREFILL_TILE)
    blocks = items * shapes.num_kv_heads
    splits = max(1, min(num_sms // max(1, blocks), tiles))
    scratch, scratch_bytes = scratch_layout(
        key.head_dim, shapes, items * splits * shapes.num_kv_heads * PREFILL_ROWS, dense
    )
    warps = MERGE_WARPS
    while warps > 1 and splits < LEAST_PARTS * warps:
        warps //= 2
    many = shapes.wide_query and not dense and key.head_dim != 96 and warps == 1
    macros["MANY_ROWS"] = int(many)
    return Plan(
        "attention_prefill.cu",
        "attention_prefill",
        macros,
        ("-arch=sm_90a", "-std=c++17"),
        (blocks, splits),
        PREFILL_THREADS,
        prefill_shared_bytes(key, value),
        PREFILL_ROWS,
        False,
        warps,
        items * splits,
        scratch,
        scratch_bytes,
    )


def prefill_shared_bytes(key: CodecSpec, value: CodecSpec) -> int:
    """PREFILL_BYTES of attention_prefill: tables, stages of tiles, query rows, the rest."""
    tables = sum(128 << (2 * q.bits if q.bits <= 4 else q.bits) for q in (key, value))
    rows = 2 * PREFILL_STAGES * PREFILL_TILE + PREFILL_ROWS
    norms = PREFILL_STAGES * 2 * PREFILL_TILE * 4
    return tables + rows * key.head_dim * 2 + norms + 32 * PREFILL_STAGES + PREFILL_ROWS // 8
