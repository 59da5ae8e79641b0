"""How an attention step on a GPU is cut up; nothing here needs a GPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from turboquant_np import TurboQuant
from turboquant_np.backends.cuda import attention_plan, attention_shapes
from turboquant_np.backends.cuda.attention_constants import make_constants, table_gain
from turboquant_np.backends.cuda.attention_plan import make_plan
from turboquant_np.backends.cuda.attention_shapes import Layout, Plan, Shapes

SMS = 132


def layout(order: str, block_size: int, heads: int, size: int, address: int = 4096) -> Layout:
    if order == "token":
        return Layout(address, block_size * heads * size, heads * size, size)
    return Layout(address, block_size * heads * size, size, block_size * size)


def shapes(k: Any, v: Any, *, order: str = "head", address: int = 4096, **changes: Any) -> Shapes:
    """A decoding step of 4 sequences unless changed."""
    numbers: dict[str, Any] = {
        "num_tokens": 4,
        "num_seqs": 4,
        "query_len": 1,
        "num_kv_heads": 8,
        "group": 4,
        "max_blocks": 64,
        "block_size": 16,
        "soft_cap": False,
        "full_pages": False,
        "wide_query": True,
        **changes,
    }
    block, heads = numbers["block_size"], numbers["num_kv_heads"]
    sizes = {"k": k.packed_dim, "v": v.packed_dim, "kn": 4, "vn": 4}
    layouts = {
        f"{name}_layout": layout(order, block, heads, size, address) for name, size in sizes.items()
    }
    return Shapes(**numbers, **layouts)


def specs(bits: tuple[int, int] = (4, 4), head_dim: int = 128) -> tuple[Any, Any]:
    k, v = (TurboQuant(head_dim=head_dim, bits=b)._spec for b in bits)
    return k, v


def plan(k: Any, v: Any, s: Shapes, *, bulk_copies: bool = True) -> Plan:
    return make_plan(k, v, s, SMS, bulk_copies, dense=False)


@pytest.mark.parametrize(
    ("kernel", "bits", "head_dim", "changes"),
    [
        ("pages", (4, 4), 128, {}),
        ("pages", (8, 2), 128, {}),
        ("pages", (3, 3), 128, {"order": "token"}),
        ("pages", (3, 3), 128, {"order": "token", "block_size": 64}),
        ("pages", (4, 4), 128, {"num_kv_heads": 16, "group": 1}),
        ("pages", (4, 4), 128, {"num_kv_heads": 1, "group": 8}),
        ("pages", (4, 4), 128, {"block_size": 32}),
        ("pages", (8, 8), 128, {"block_size": 64, "query_len": 4, "num_tokens": 16}),
        ("split", (4, 4), 128, {"block_size": 128}),  # heads of a page are 1 KB apart
        ("split", (4, 4), 128, {"num_kv_heads": 16, "order": "token"}),
        ("split", (4, 4), 128, {"num_kv_heads": 3}),
        ("split", (4, 4), 128, {"block_size": 8, "order": "token"}),
        ("pages", (5, 4), 128, {}),
        ("pages", (7, 6), 128, {}),
        ("split", (1, 4), 128, {}),
        ("pages", (3, 2), 64, {}),
        ("pages", (7, 4), 64, {}),
        ("pages", (6, 6), 256, {}),
        ("split", (8, 8), 256, {}),  # two stages of pages do not fit
        ("pages", (4, 4), 96, {}),
        ("pages", (8, 8), 96, {"order": "token"}),
        ("pages", (5, 2), 96, {"query_len": 16, "num_tokens": 64}),
        ("split", (4, 4), 80, {}),
        ("split", (4, 4), 128, {"soft_cap": True}),
        ("split", (4, 4), 128, {"address": 4097}),
        ("wide", (4, 4), 128, {"query_len": 3, "num_tokens": 12}),
        ("wide", (4, 4), 128, {"query_len": 16, "num_tokens": 64}),
        ("wide", (3, 4), 128, {"query_len": 4, "num_tokens": 16}),
        ("pages", (3, 4), 128, {"query_len": 8, "num_tokens": 32}),  # tables leave no memory
        ("pages", (4, 2), 128, {"query_len": 8, "num_tokens": 32}),
        ("pages", (4, 4), 128, {"query_len": 8, "num_tokens": 32, "order": "token"}),
        ("pages", (4, 4), 128, {"query_len": 8, "num_tokens": 32, "num_kv_heads": 2}),
        ("prefill", (4, 4), 128, {"query_len": 17, "num_tokens": 68}),
        ("prefill", (4, 4), 128, {"query_len": 0, "num_tokens": 80}),
        ("prefill", (1, 7), 96, {"query_len": 100, "num_tokens": 400, "soft_cap": True}),
        ("prefill", (8, 8), 64, {"query_len": 99, "num_tokens": 396, "block_size": 7}),
        ("split", (4, 4), 80, {"query_len": 99, "num_tokens": 396}),
        ("split", (4, 4), 256, {"query_len": 99, "num_tokens": 396}),
    ],
)
def test_which_kernel_runs(
    kernel: str, bits: tuple[int, int], head_dim: int, changes: dict[str, Any]
) -> None:
    k, v = specs(bits, head_dim)
    assert plan(k, v, shapes(k, v, **changes)).kernel == f"attention_{kernel}"


@pytest.mark.parametrize(
    ("bits", "head_dim", "rows", "pairs"),
    [
        ((5, 5), 64, 8, True),
        ((5, 5), 96, 8, True),
        ((5, 5), 128, 8, True),
        ((5, 5), 128, 16, False),  # the rows take the memory
        ((5, 5), 256, 8, False),  # two stages of pages do not fit
        ((5, 4), 128, 8, False),
    ],
)
def test_where_pairs_of_codes_have_a_table(
    bits: tuple[int, int], head_dim: int, rows: int, pairs: bool
) -> None:
    k, v = specs(bits, head_dim)
    macros = plan(k, v, shapes(k, v, group=rows)).macros
    assert macros["ROW_TILES"] == rows // 8
    assert ("PAIRS" in macros) == pairs


@pytest.mark.parametrize(
    ("head_dim", "num_seqs", "fused"),
    [(128, 128, True), (128, 129, False), (96, 64, True), (96, 67, False), (256, 4, False)],
)
def test_where_one_launch_does_it_all(head_dim: int, num_seqs: int, fused: bool) -> None:
    k, v = specs(head_dim=head_dim)
    s = shapes(k, v, num_seqs=num_seqs, num_tokens=num_seqs)
    assert plan(k, v, s).fused == fused


def test_the_pages_kernel_only_on_devices_it_is_written_for() -> None:
    k, v = specs()
    assert plan(k, v, shapes(k, v), bulk_copies=False).kernel == "attention_split"


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from([1, 3, 8, 20]),
    st.booleans(),
)
def test_parts_have_slots_of_their_own(
    lens: list[int], query_len: int, group: int, bulk_copies: bool
) -> None:
    """Cut the list of units as the kernels do, and look at the slots that are written."""
    assume(query_len * group <= attention_plan.PAGES_MOST_ROWS)  # else tokens are cut otherwise
    k, v = specs()
    s = shapes(
        k,
        v,
        num_seqs=len(lens),
        num_tokens=len(lens) * query_len,
        query_len=query_len,
        group=group,
        max_blocks=188,
    )
    p = plan(k, v, s, bulk_copies=bulk_copies)
    tiles = math.ceil(query_len * group / p.tile_rows)
    items = [math.ceil(n / p.macros["UNIT"]) for n in lens for _ in range(tiles)]
    owner = np.repeat(np.arange(len(items)), items)  # item of each unit
    ranges = min(p.grid[0], len(owner))
    edges = [len(owner) * r // ranges for r in range(ranges + 1)] if ranges else [0]
    slots = [
        r + int(item) for r in range(ranges) for item in np.unique(owner[edges[r] : edges[r + 1]])
    ]
    assert len(set(slots)) == len(slots)
    assert max(slots, default=0) < p.slots


@given(
    st.integers(1, 40), st.integers(0, 600), st.sampled_from([1, 4, 71]), st.sampled_from([1, 3, 8])
)
def test_blocks_of_a_prefill(num_seqs: int, query_len: int, group: int, kv_heads: int) -> None:
    """Each tile of rows of a kv head has a block, or several that do not overfill the device."""
    k, v = specs()
    num_tokens = num_seqs * (query_len or 300)
    s = shapes(
        k,
        v,
        num_seqs=num_seqs,
        num_tokens=num_tokens,
        query_len=query_len,
        group=group,
        num_kv_heads=kv_heads,
    )
    assume(s.rows_per_seq > attention_plan.PAGES_MOST_ROWS)
    p = plan(k, v, s)
    blocks, splits = p.grid
    most = num_seqs + num_tokens * group // 192  # each sequence may have a tile that is not full
    tiles = num_seqs * math.ceil(query_len * group / 192) if query_len else most
    assert blocks == tiles * kv_heads
    assert splits == 1 or blocks * splits <= SMS
    assert 1 <= splits <= math.ceil(64 * 16 / 64)  # of the longest context
    assert splits == p.num_ranges
    offset, size = p.scratch["parts"]
    assert size >= blocks * splits * 192 * 128 * 2
    assert offset + size <= p.scratch_bytes


@pytest.mark.parametrize(("bits", "head_dim"), [((4, 4), 128), ((8, 8), 128), ((5, 4), 96)])
def test_tiles_of_a_prefill_fit_a_block(bits: tuple[int, int], head_dim: int) -> None:
    k, v = specs(bits, head_dim)
    p = plan(k, v, shapes(k, v, query_len=64, num_tokens=256))
    assert p.kernel == "attention_prefill"
    assert p.shared_bytes <= 232448  # the most a block may have on a device of capability 9.0


@given(st.integers(1, 8), st.integers(1, 8), st.integers(32, 256), st.integers(0, 64))
def test_loads_are_aligned_and_cover_the_vector(
    k_bits: int, v_bits: int, head_dim: int, address: int
) -> None:
    for spec, lanes in zip(specs((k_bits, v_bits), head_dim), (4, 8), strict=True):
        run = attention_shapes.run_bytes(spec, lanes)
        assert run * lanes >= spec.packed_dim
        width = attention_shapes.load_width(run, spec.packed_dim, address, 3 * spec.packed_dim)
        assert width in (1, 2, 4, 8, 16)
        for number in (run, spec.packed_dim, address):
            assert number % width == 0


@pytest.mark.parametrize(("bits", "group"), [(2, 4), (2, 8), (3, 8), (4, 4), (4, 8), (8, 8)])
def test_scratch_is_small_at_long_context(bits: int, group: int) -> None:
    k, v = specs((bits, bits))
    blocks = 131072 // 16
    s = shapes(k, v, num_seqs=1, num_tokens=1, group=group, max_blocks=blocks)
    cache = blocks * 16 * 8 * 2 * (k.packed_dim + 4)
    for bulk_copies in (False, True):
        assert plan(k, v, s, bulk_copies=bulk_copies).scratch_bytes < 0.02 * cache


def test_scratch_parts_do_not_overlap() -> None:
    k, v = specs((3, 5), 80)
    p = make_plan(k, v, shapes(k, v), SMS, False, dense=True)
    parts = sorted(p.scratch.values())
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(parts))
    assert all(offset % 16 == 0 for offset, _ in parts)
    assert sum(parts[-1]) <= p.scratch_bytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_table_gain_helps_float16(bits: int) -> None:
    centroids = TurboQuant(head_dim=128, bits=bits)._spec.centroids.astype(np.float64)

    def loss(gain: float) -> float:
        rounded = (centroids * gain).astype(np.float16).astype(np.float64) / gain
        return float(np.sqrt(((rounded - centroids) ** 2).mean()))

    gain = table_gain(centroids.astype(np.float32))
    assert 1 <= gain < 2
    assert loss(gain) < loss(1.0) * (0.35 if bits <= 5 else 1)


@pytest.mark.parametrize("head_dim", [33, 128])
def test_signs_are_the_rotations(head_dim: int) -> None:
    spec = TurboQuant(head_dim=head_dim, bits=4, seed=5)._spec
    words = make_constants(spec)["signs"]
    negative = [[int(row[i // 32]) >> i % 32 & 1 for i in range(head_dim)] for row in words]
    signs: Any = spec.rotation
    np.testing.assert_array_equal(np.array(negative) == 1, signs.signs < 0)
