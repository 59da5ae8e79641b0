"""The attention kernels compile without a GPU, and those that decide the speed do not spill."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from typing import Any

import pytest

from turboquant_np import TurboQuant
from turboquant_np.backends.cuda.attention_plan import make_plan
from turboquant_np.backends.cuda.attention_shapes import Layout, Plan, Shapes

nvrtc: Any = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
arguments: Any = importlib.import_module("turboquant_np.backends.cuda.attention_arguments")

KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL
)
WALK_BYTES = 192  # what a kernel may keep in memory between token ranges
SIGNS_BYTES = 8  # of these what a rotation of attention_pages loads early


def plan_of(
    bits: tuple[int, int],
    head_dim: int,
    block_size: int,
    *,
    bulk_copies: bool,
    query_len: int = 1,
    num_seqs: int = 4,
    dense: bool = False,
    head_major: bool = False,
) -> Plan:
    """The plan of a decoding step over pages stored [token][head] or [head][token]."""
    k, v = (TurboQuant(head_dim=head_dim, bits=b)._spec for b in bits)
    heads = 8

    def layout(size: int) -> Layout:
        token, head = (size, block_size * size) if head_major else (heads * size, size)
        return Layout(0, block_size * heads * size, token, head)

    shapes = Shapes(
        num_tokens=num_seqs * query_len,
        num_seqs=num_seqs,
        query_len=query_len,
        num_kv_heads=heads,
        group=4,
        max_blocks=64,
        block_size=block_size,
        soft_cap=False,
        full_pages=False,
        wide_query=True,
        k_layout=layout(k.packed_dim),
        v_layout=layout(v.packed_dim),
        kn_layout=layout(4),
        vn_layout=layout(4),
    )
    return make_plan(k, v, shapes, num_sms=132, bulk_copies=bulk_copies, dense=dense)


def spills_and_registers(plan: Plan, arch: int, more: str = "") -> dict[str, tuple[int, int]]:
    """Compile a plan's kernels and `more`; {kernel: (bytes spilled, registers)}."""
    source = arguments.step_source(plan.source, plan.macros) + (
        f"static_assert(sizeof(Args) == {arguments.argument_dtype().itemsize});{more}"
    )
    try:
        program = nvrtc.createProgram(source, plan.source, [], [])
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"no NVRTC: {error}")
    options = [*plan.options, f"-arch=sm_{arch}", "-ftz=true", "--ptxas-options=-v"]
    if nvrtc.getVersion() >= (12, 9):
        options.append("--no-cache")  # what NVRTC finds in a cache of its own comes without a log
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    log = nvrtc.getProgramLog(program)
    return {name: (int(spill), int(used)) for name, spill, used in KERNEL.findall(log)}


@pytest.mark.parametrize(
    ("bits", "head_dim", "query_len", "dense", "head_major", "most"),
    [
        ((2, 2), 128, 1, False, True, 0),
        ((2, 2), 128, 1, False, False, SIGNS_BYTES),
        ((3, 3), 128, 1, False, False, 0),
        ((4, 4), 128, 1, False, False, 0),
        ((8, 8), 128, 1, True, False, 0),
        ((4, 2), 128, 4, False, False, 0),
        ((3, 3), 128, 8, False, False, 0),
        ((3, 3), 64, 1, False, False, 0),
        ((5, 5), 128, 1, False, True, 0),
        ((5, 4), 128, 1, False, False, 0),
        ((6, 6), 128, 1, False, False, 0),
        ((7, 5), 128, 1, True, False, 0),
        ((5, 6), 64, 1, False, False, 0),
        ((4, 4), 64, 8, False, False, 0),
        ((2, 2), 96, 1, False, True, 0),
        ((3, 3), 96, 1, False, False, 0),
        ((4, 4), 96, 1, False, True, 0),
        ((4, 4), 96, 8, False, False, 0),
        ((5, 5), 96, 1, False, False, 0),
        ((6, 8), 96, 2, True, True, 0),
        ((2, 2), 256, 1, False, False, 0),
        ((4, 4), 256, 1, False, False, 0),
        ((6, 4), 256, 4, False, False, 0),
    ],
)
def test_pages_kernel_does_not_spill(
    bits: tuple[int, int], head_dim: int, query_len: int, dense: bool, head_major: bool, most: int
) -> None:
    plan = plan_of(
        bits,
        head_dim,
        16,
        bulk_copies=True,
        query_len=query_len,
        dense=dense,
        head_major=head_major,
    )
    assert plan.kernel == "attention_pages"
    spill, registers = spills_and_registers(plan, 90)["attention_pages"]
    assert spill <= most
    assert registers * plan.threads <= 65536


@pytest.mark.parametrize(
    ("key_bits", "query_len", "dense", "most"),
    [(4, 8, False, WALK_BYTES), (6, 8, True, WALK_BYTES), (4, 4, False, 0), (3, 3, True, 0)],
)
def test_wide_kernel_spills_little(key_bits: int, query_len: int, dense: bool, most: int) -> None:
    plan = plan_of(
        (key_bits, 4),
        128,
        16,
        bulk_copies=True,
        query_len=query_len,
        num_seqs=16,
        dense=dense,
        head_major=True,
    )
    assert plan.kernel == "attention_wide"
    assert plan.fused == (not dense)
    spill, registers = spills_and_registers(plan, 90)["attention_wide"]
    assert spill <= most
    assert registers * plan.threads <= 65536


@pytest.mark.parametrize(
    ("bits", "head_dim", "dense"),
    [((4, 4), 128, False), ((8, 3), 128, False), ((1, 6), 96, False), ((2, 5), 64, True)],
)
def test_prefill_kernel_spills_little(bits: tuple[int, int], head_dim: int, dense: bool) -> None:
    plan = plan_of(bits, head_dim, 16, bulk_copies=True, query_len=99, dense=dense)
    assert plan.kernel == "attention_prefill"
    size = f"static_assert(PREFILL_BYTES == {plan.shared_bytes});"
    used = spills_and_registers(plan, 90, size)
    spill, registers = used["attention_prefill"]
    assert spill <= WALK_BYTES
    assert registers * plan.threads <= 65536
    assert used["attention_query"][0] == used["attention_merge"][0] == 0
    many = {name for name in used if name.endswith("many")}
    assert len(many) == (2 if head_dim != 96 and not dense else 0)
    assert all(used[name][0] == 0 for name in many)


@pytest.mark.parametrize(
    ("bits", "head_dim", "block_size", "arch"),
    [((4, 4), 128, 16, 90), ((1, 7), 80, 1, 80), ((5, 6), 33, 100, 100)],
)
def test_split_kernel_compiles(
    bits: tuple[int, int], head_dim: int, block_size: int, arch: int
) -> None:
    plan = plan_of(bits, head_dim, block_size, bulk_copies=False)
    used = spills_and_registers(plan, arch)
    assert used.keys() == {f"attention_{name}" for name in ("query", "dense", "split", "merge")}
    assert used["attention_split"][0] <= WALK_BYTES


def test_window_kernel_does_not_spill() -> None:
    plan = plan_of((4, 4), 128, 16, bulk_copies=True)
    window = replace(
        plan,
        source="attention_window.cu",
        macros={"D": 128, "BLOCK_SIZE": 16, "UNIT": 32, "WINDOW_DTYPE": 0, "ROWS": 8},
    )
    assert spills_and_registers(window, 80)["attention_window"][0] == 0
