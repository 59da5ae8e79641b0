"""The struct that every kernel of an attention step gets."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch

from .attention_constants import Constants
from .attention_launches import DTYPE_NUMBERS, Address, FullPages, Launch
from .attention_shapes import Plan
from .source import variant_source

LOG2_E = 1.4426950408889634

BATCH_ADDRESSES = (
    "query",
    "k_packed",
    "k_norms",
    "v_packed",
    "v_norms",
    "out",
    "lse",
    "block_tables",
    "context_lens",
)
OPTIONAL_ADDRESSES = ("query_start_loc", "query_positions", "sinks", "key_offset")
SCRATCH_ADDRESSES = ("q_rows", "q_factors", "plan", "parts", "part_scales")
FULL_ADDRESSES = ("keys", "values", "pages", "positions", "query_positions", "tiles")
ADDRESS_CODE = np.dtype("u8").char


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """A step, but for the addresses of its arrays.

    Attributes
    ----------
    plan : Plan
    launches : (function, Launch), ...
    constants : addresses in device memory that stay, by field of `struct Args`
    numbers : bytes, the fields of `struct Args` that are no addresses, which come first
    owners : what lies at those addresses
    """

    plan: Plan
    launches: list[tuple[Any, Launch]]
    constants: dict[str, int]
    numbers: bytes
    owners: tuple[Constants, Constants]


def constant_addresses(keys: Constants, values: Constants, address: Address) -> dict[str, int]:
    """Where the tables of two quantisers are, by field of `struct Args`."""
    found = {}
    for prefix, constants in (("k", keys), ("v", values)):
        found[f"{prefix}_centroids"] = address(constants["centroids"])
        if "signs" in constants:
            found[f"{prefix}_signs"] = address(constants["signs"])
    return found


def number_fields(
    batch: AttentionBatch,
    plan: Plan,
    keys: Constants,
    values: Constants,
    full: FullPages | None,
) -> bytes:
    """The fields of `struct Args` that are no addresses."""
    _, fields, packer, _ = _layout()
    a: dict[str, float] = dict.fromkeys(fields, 0)
    q_strides = _element_strides(batch.query)
    for axis, stride in zip(("token", "head", "dim"), q_strides, strict=True):
        a[f"q_{axis}_stride"] = stride
    for prefix, strides in (
        ("k", batch.k_packed.strides),
        ("v", batch.v_packed.strides),
        ("kn", _element_strides(batch.k_norms)),
        ("vn", _element_strides(batch.v_norms)),
    ):
        for axis, stride in zip(("block", "token", "head"), strides[:3], strict=True):
            a[f"{prefix}_{axis}_stride"] = stride
    # Integers are read as 32 bits; of 64 these are the low ones.
    a["table_row_stride"], a["table_step"] = (s // 4 for s in batch.block_tables.strides)
    for name, array in (
        ("lens_step", batch.context_lens),
        ("starts_step", batch.query_start_loc),
        ("positions_step", batch.query_positions),
        ("sinks_step", batch.sinks),
    ):
        if array is not None:
            a[name] = array.strides[0] // 4
    for prefix, constants in (("k", keys), ("v", values)):
        if "signs" in constants:
            a[f"{prefix}_steps"] = len(constants["signs"])
    if full is not None:
        a["full_pages_each"] = full.pages.shape[1]

    head_dim = batch.query.shape[2]
    cap = batch.logits_soft_cap
    a["num_seqs"], a["num_tokens"] = batch.num_seqs, len(batch.query)
    a["query_len"] = batch.query_len
    a["num_kv_heads"], a["group"] = batch.num_kv_heads, batch.group
    a["max_blocks"], a["window"] = batch.block_tables.shape[1], batch.sliding_window
    a["tile_rows"], a["num_ranges"] = plan.tile_rows, plan.num_ranges
    a["merge_warps"] = plan.merge_warps
    a["query_dtype"] = DTYPE_NUMBERS[batch.query.dtype.name]
    a["offset_factor"] = batch.scale * (1 / cap if cap else LOG2_E)
    a["score_factor"] = a["offset_factor"] / (math.sqrt(head_dim) * float(keys["gain"]))
    a["soft_cap_log2"] = cap * LOG2_E
    a["value_factor"] = 1 / (math.sqrt(head_dim) * float(values["gain"]))
    assert len(a) == len(fields)
    return packer.pack(*a.values())


def fill_arguments(
    batch: AttentionBatch,
    step: CompiledStep,
    address: Address,
    scratch: int,
    barrier: int,
    full: FullPages | None = None,
) -> npt.NDArray[Any]:
    """The struct that every kernel gets, as an array of one element."""
    addresses, _, _, words = _layout()
    a = addresses | step.constants
    for name in BATCH_ADDRESSES:
        a[name] = address(getattr(batch, name))
    for name in OPTIONAL_ADDRESSES:
        array = getattr(batch, name)
        if array is not None:
            a[name] = address(array)
    a["barrier"] = barrier
    parts = step.plan.scratch
    for name in SCRATCH_ADDRESSES:
        a[name] = scratch + parts[name][0]
    if full is not None:
        for name in FULL_ADDRESSES:
            a[f"full_{name}"] = address(getattr(full, name))
        a["offset_slots"] = address(full.offset_slots)
        for name in ("other_out", "other_lse"):
            a[name] = scratch + parts[name][0]
    for constants, name in zip(step.owners, ("rotated_query", "merged"), strict=True):
        if "matrix" in constants:
            a[name] = scratch + parts["rows"][0]
    assert len(a) == len(addresses)
    return np.frombuffer(_packer(len(a)).pack(*a.values()) + step.numbers, words)


def step_source(name: str, macros: Mapping[str, int]) -> str:
    """The kernels of one step for one variant, whose macros the headers see too."""
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return defines + variant_source(name, {})


@cache
def argument_dtype() -> np.dtype[Any]:
    """The layout of `struct Args`, read from the kernels' source, where it is written."""
    body = re.search(r"struct Args \{\n(.*?)\n\};", step_source("attention.cu", {}), re.DOTALL)
    assert body is not None
    fields = []
    for line in body[1].splitlines():
        declaration = line.partition("//")[0].strip().rstrip(";")
        if declaration:
            kind, _, names = declaration.removeprefix("const ").partition(" ")
            code = "u8" if "*" in declaration else {"i64": "i8", "int": "i4", "float": "f4"}[kind]
            fields += [(name.strip(), code) for name in names.split(",")]
    return np.dtype(fields, align=True)


@cache
def _layout() -> tuple[dict[str, int], tuple[str, ...], struct.Struct, np.dtype[Any]]:
    """The addresses of `struct Args`, all zero; its other fields, behind them; what packs these.

    And a dtype of the size of the struct that CuPy passes on without a look.
    """
    dtype = argument_dtype()
    assert dtype.fields is not None
    codes = {name: field[0].char for name, field in dtype.fields.items()}
    addresses = [name for name, code in codes.items() if code == ADDRESS_CODE]
    numbers = list(codes)[len(addresses) :]
    assert addresses == list(codes)[: len(addresses)]
    packer = struct.Struct("".join(codes[name] for name in numbers) + "0P")
    size = 8 * len(addresses) + packer.size
    assert size == dtype.itemsize
    words = np.dtype([("words", np.int64, (size // 8,))])
    return dict.fromkeys(addresses, 0), tuple(numbers), packer, words


@cache
def _packer(count: int) -> struct.Struct:
    return struct.Struct(f"{count}Q")


def _element_strides(array: Any) -> tuple[int, ...]:
    return tuple(s // array.itemsize for s in array.strides)
