"""Which kernels an attention step launches, and with what grids; no GPU needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch

from .attention_constants import Constants
from .attention_plan import WINDOW_THREADS, window_rows
from .attention_shapes import MANY_DIMS, MERGE_WARPS, Layout, Plan, Shapes

QUERY_WARPS = 8  # rows of a block of attention_query
DENSE_ROWS, DENSE_THREADS = 8, 128
DTYPE_NUMBERS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}

Address = Callable[[Any], int]


@dataclass(frozen=True, eq=False)
class FullPages:
    """Tokens in full precision to which the S sequences of a batch attend as well.

    Attributes
    ----------
    keys, values : float, [pages, block_size, kv_heads, head_dim], C-contiguous
    pages : int32 [S, W], numbers of the sequences' pages
    positions : int32 [S, W], of the pages' first tokens in the sequence; -1 where there is no page
    query_positions : int32 [S], of the first query tokens in the sequence; the last query token of
        a sequence is the last one in its pages
    tiles : int32 [tiles, 2], see `window_tiles`
    rows : int, of a tile
    offset_slots : int32 [S], the row of batch.key_offset that belongs to each sequence
    """

    keys: Any
    values: Any
    pages: Any
    positions: Any
    query_positions: Any
    tiles: Any
    rows: int
    offset_slots: Any


def window_tiles(query_lens: Sequence[int], group: int) -> tuple[npt.NDArray[Any], int]:
    """(sequence, first query row) of each tile of attention_window, and the rows of a tile."""
    rows = window_rows(max(query_lens, default=0) * group)
    tiles = [(s, first) for s, n in enumerate(query_lens) for first in range(0, n * group, rows)]
    return np.array(tiles, np.int32).reshape(-1, 2), rows


class Launch(NamedTuple):
    """One kernel launch; `extra` are the arguments behind the common struct."""

    source: str
    macros: Mapping[str, int]
    kernel: str
    grid: tuple[int, ...]
    threads: int
    extra: tuple[Any, ...] = ()
    shared_bytes: int = 0
    cooperative: bool = False  # all blocks run at the same time


def launches(
    batch: AttentionBatch,
    plan: Plan,
    keys: Constants,
    values: Constants,
    full: FullPages | None = None,
) -> list[Launch]:
    """The launches of a step, in order."""
    rows = math.prod(batch.query.shape[:2])
    launch = partial(Launch, plan.source, plan.macros)
    steps = [launch(plan.kernel, plan.grid, plan.threads, (), plan.shared_bytes, plan.fused)]
    if not plan.fused:
        dense_grid = (-(-rows // DENSE_ROWS),)
        kind = "_many" if plan.many_rows else ""
        merge_rows, query_rows = MERGE_WARPS // plan.merge_warps, QUERY_WARPS
        if plan.many_rows:
            merge_rows = query_rows = 32 * QUERY_WARPS * MANY_DIMS // plan.macros["D"]
        merge_grid, query_grid = (-(-rows // merge_rows),), (-(-rows // query_rows) + 1,)
        steps.insert(0, launch(f"attention_query{kind}", query_grid, 32 * QUERY_WARPS))
        steps.append(launch(f"attention_merge{kind}", merge_grid, 32 * MERGE_WARPS))
        if "matrix" in keys:
            extra = (keys["transposed_matrix"], np.int32(0))
            steps.insert(0, launch("attention_dense", dense_grid, DENSE_THREADS, extra))
        if "matrix" in values:
            extra = (values["matrix"], np.int32(1))
            steps.append(launch("attention_dense", dense_grid, DENSE_THREADS, extra))
    if full is not None:
        macros = {
            "D": plan.macros["D"],
            "BLOCK_SIZE": plan.macros["BLOCK_SIZE"],
            "WINDOW_DTYPE": DTYPE_NUMBERS[full.keys.dtype.name],
            "ROWS": full.rows,
            "UNIT": plan.macros["UNIT"],
        }
        grid = (len(full.tiles), batch.num_kv_heads)
        steps.insert(
            0,
            Launch("attention_window.cu", macros, "attention_window", grid, WINDOW_THREADS),
        )
    return steps


def shapes_of(batch: AttentionBatch, address: Address, full: FullPages | None = None) -> Shapes:
    """What the plan needs to know of a batch."""

    def layout(array: Any) -> Layout:
        return Layout(address(array), *array.strides[:3])

    return Shapes(
        num_tokens=len(batch.query),
        num_seqs=batch.num_seqs,
        query_len=batch.query_len,
        num_kv_heads=batch.num_kv_heads,
        group=batch.group,
        max_blocks=int(batch.block_tables.shape[1]),
        block_size=batch.block_size,
        soft_cap=batch.logits_soft_cap != 0,
        full_pages=full is not None,
        wide_query=(
            batch.query.dtype.name != "float64"
            and batch.query.strides[2] == batch.query.itemsize
            and not any(n % 16 for n in (address(batch.query), *batch.query.strides[:2]))
        ),
        k_layout=layout(batch.k_packed),
        v_layout=layout(batch.v_packed),
        kn_layout=layout(batch.k_norms),
        vn_layout=layout(batch.v_norms),
    )
