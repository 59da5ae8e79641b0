"""Attention on CuPy arrays: the launches of one step."""

from __future__ import annotations

import math
import re
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import HadamardRotation

from .attention_plan import (
    ALIGNMENT,
    MERGE_WARPS,
    WINDOW_THREADS,
    Layout,
    Plan,
    Shapes,
    make_plan,
    window_rows,
)
from .source import variant_source

LOG2_E = 1.4426950408889634
QUERY_WARPS = 8  # rows of a block of attention_query
DENSE_ROWS, DENSE_THREADS = 8, 128
DTYPE_NUMBERS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}

Constants = Mapping[str, Any]
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


def attention(key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch) -> None:
    """Fill batch.out and batch.lse; see AttentionBatch for shapes, `attention_beside` for more."""
    attention_beside(key_spec, value_spec, batch, None)


def attention_beside(
    key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch, full: FullPages | None
) -> None:
    """Attention to packed tokens and, beside them, those of full-precision pages.

    With `full`, batch.query_start_loc must be given.

    Nothing waits for the device, and the launches depend on shapes only: a captured graph stays
    valid while context_lens, block_tables and the contents of the cache change.  Scratch memory
    belongs to the current stream; replays of graphs captured on one stream must not overlap (the
    blocks of one could wait for those of the other for ever).
    """
    import cupy

    if batch.query.size:
        with batch.query.device:
            if batch.key_offset is not None:
                batch = replace(batch, key_offset=cupy.ascontiguousarray(batch.key_offset))
            step = _compiled(key_spec, value_spec, batch, full)
            with _launching:  # nothing comes between the launches that share a stream's scratch
                for launch in _bind(step, batch, full):
                    launch()
            if cupy.cuda.get_current_stream().is_capturing():
                # The caller need not hold them: lse may be unasked for, the others copies.
                _captured.append((batch.query, batch.key_offset, batch.lse, full))


def prepare(
    key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch
) -> list[Callable[[], None]]:
    """The launches of a step on the current stream, with everything compiled and filled in."""
    return _bind(_compiled(key_spec, value_spec, batch, None), batch, None)


class CompiledStep(NamedTuple):
    """A step, but for its arrays."""

    plan: Plan
    keys: Constants
    values: Constants
    launches: list[tuple[Any, Launch]]  # function and shape of each


def _compiled(
    key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch, full: FullPages | None
) -> CompiledStep:
    device = int(batch.query.device.id)
    keys, values = _constants(key_spec, device), _constants(value_spec, device)
    num_sms, bulk_copies = _device_facts(device)
    dense = "matrix" in keys or "matrix" in values
    shapes = shapes_of(batch, _address, full)
    plan = make_plan(key_spec, value_spec, shapes, num_sms, bulk_copies, dense)
    compiled = []
    for step in launches(batch, plan, keys, values, full):
        module = _compile(device, step.source, tuple(step.macros.items()), plan.options)
        compiled.append((_function(module, step.kernel, step.shared_bytes), step))
    return CompiledStep(plan, keys, values, compiled)


def _bind(
    step: CompiledStep, batch: AttentionBatch, full: FullPages | None
) -> list[Callable[[], None]]:
    import cupy

    device, stream = int(batch.query.device.id), cupy.cuda.get_current_stream()
    scratch = _address(_scratch(device, stream, step.plan.scratch_bytes))
    barrier = _barrier(device, int(stream.ptr))
    arguments = fill_arguments(
        batch, step.plan, step.keys, step.values, _address, scratch, barrier, full
    )
    return [
        partial(
            function,
            launch.grid,
            (launch.threads,),
            (arguments, *launch.extra),
            shared_mem=launch.shared_bytes,
            enable_cooperative_groups=launch.cooperative,
        )
        for function, launch in step.launches
    ]


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
        each = plan.rows_per_warp
        kind = "_fours" if each == 4 else ""
        merge_grid = (-(-rows * plan.merge_warps // (each * MERGE_WARPS)),)
        query_grid = (-(-rows // (each * QUERY_WARPS)) + 1,)
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


def fill_arguments(
    batch: AttentionBatch,
    plan: Plan,
    keys: Constants,
    values: Constants,
    address: Address,
    scratch: int,
    barrier: int,
    full: FullPages | None = None,
) -> npt.NDArray[Any]:
    """The struct that every kernel gets, as an array of one element."""
    fields = argument_dtype().fields
    assert fields is not None
    a: dict[str, float] = dict.fromkeys(fields, 0)
    for name in ("query", "k_packed", "k_norms", "v_packed", "v_norms", "out", "lse"):
        a[name] = address(getattr(batch, name))
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
    a["block_tables"], a["context_lens"] = (
        address(batch.block_tables),
        address(batch.context_lens),
    )
    # Integers are read as 32 bits; of 64 these are the low ones.
    a["table_row_stride"], a["table_step"] = (s // 4 for s in batch.block_tables.strides)
    a["lens_step"] = batch.context_lens.strides[0] // 4
    if batch.query_start_loc is not None:
        a["query_start_loc"] = address(batch.query_start_loc)
        a["starts_step"] = batch.query_start_loc.strides[0] // 4
    if batch.query_positions is not None:
        a["query_positions"] = address(batch.query_positions)
        a["positions_step"] = batch.query_positions.strides[0] // 4
    if batch.sinks is not None:
        a["sinks"], a["sinks_step"] = address(batch.sinks), batch.sinks.strides[0] // 4
    if batch.key_offset is not None:
        a["key_offset"] = address(batch.key_offset)
    for prefix, constants in (("k", keys), ("v", values)):
        a[f"{prefix}_centroids"] = address(constants["centroids"])
        if "signs" in constants:
            a[f"{prefix}_signs"] = address(constants["signs"])
            a[f"{prefix}_steps"] = len(constants["signs"])
    a["barrier"] = barrier
    for name in ("q_rows", "q_factors", "plan", "parts", "part_scales"):
        a[name] = scratch + plan.scratch[name][0]
    if full is not None:
        for name in (
            "keys",
            "values",
            "pages",
            "positions",
            "query_positions",
            "tiles",
        ):
            a[f"full_{name}"] = address(getattr(full, name))
        a["full_pages_each"] = full.pages.shape[1]
        a["offset_slots"] = address(full.offset_slots)
        for name in ("other_out", "other_lse"):
            a[name] = scratch + plan.scratch[name][0]
    if "matrix" in keys:
        a["rotated_query"] = scratch + plan.scratch["rows"][0]
    if "matrix" in values:
        a["merged"] = scratch + plan.scratch["rows"][0]

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
    packer, words = _packing()
    return np.frombuffer(packer.pack(*a.values()), words)


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
def _packing() -> tuple[struct.Struct, np.dtype[Any]]:
    """What packs the fields of `struct Args`, and a dtype that CuPy passes on without a look."""
    dtype = argument_dtype()
    assert dtype.fields is not None
    packer = struct.Struct("".join(field[0].char for field in dtype.fields.values()) + "0P")
    assert packer.size == dtype.itemsize
    return packer, np.dtype([("words", np.int64, (packer.size // 8,))])


def make_constants(spec: CodecSpec) -> dict[str, npt.NDArray[Any]]:
    """What the kernels need to know of a quantiser, in host memory."""
    gain = table_gain(spec.centroids)
    table = (spec.centroids * gain).astype(np.float16).astype(np.float32)
    constants: dict[str, npt.NDArray[Any]] = {
        "centroids": table,
        "gain": np.array(gain),
    }
    rotation = spec.rotation
    if isinstance(rotation, HadamardRotation):
        words = -(-spec.head_dim // 32)
        bits = np.zeros((len(rotation.signs), 32 * words), np.uint8)
        bits[:, : spec.head_dim] = rotation.signs < 0
        constants["signs"] = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    else:
        constants["matrix"] = np.ascontiguousarray(rotation.matrix)
        constants["transposed_matrix"] = np.ascontiguousarray(rotation.matrix.T)
    return constants


def table_gain(centroids: npt.NDArray[np.float32]) -> float:
    """The factor in [1, 2) with which centroids lose least when rounded to float16.

    Few magnitudes have to fit at low bits: the error falls 120 to 3 times at 1 to 5 bits.
    """
    gains = 2.0 ** (np.arange(2048) / 2048)
    scaled = centroids.astype(np.float64) * gains[:, None]
    loss = ((scaled.astype(np.float16) - scaled) / gains[:, None]) ** 2
    return float(gains[loss.sum(axis=1).argmin()])


def _element_strides(array: Any) -> tuple[int, ...]:
    return tuple(s // array.itemsize for s in array.strides)


def _address(array: Any) -> int:
    return int(array.data.ptr)


_making = threading.Lock()
_on_device: WeakKeyDictionary[CodecSpec, dict[int, Constants]] = WeakKeyDictionary()


def _constants(spec: CodecSpec, device: int) -> Constants:
    import cupy

    with _making:  # launches hold addresses: of two copies one would be dropped
        cached = _on_device.setdefault(spec, {})
        if device not in cached:
            made = make_constants(spec).items()
            cached[device] = {k: cupy.asarray(v) if v.ndim else v for k, v in made}
            cupy.cuda.get_current_stream().synchronize()  # every stream may read them
        return cached[device]


@cache
def _device_facts(device: int) -> tuple[int, bool]:
    """Multiprocessors; whether the device is of compute capability 9 (Hopper)."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device)
    return int(properties["multiProcessorCount"]), int(properties["major"]) == 9


@cache
def _compile(
    device: int,
    source: str,
    macros: tuple[tuple[str, int], ...],
    options: tuple[str, ...],
) -> Any:
    import cupy

    return cupy.RawModule(code=step_source(source, dict(macros)), options=options)


@cache
def _function(module: Any, name: str, shared_bytes: int) -> Any:
    function = module.get_function(name)
    if shared_bytes:
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function.kernel  # which can be launched cooperatively


_launching = threading.Lock()
_buffers: dict[tuple[int, int], Any] = {}
_captured: list[Any] = []  # what a graph may still read or write


def _scratch(device: int, stream: Any, size: int) -> Any:
    """Scratch memory of a stream, kept between calls; it grows and never shrinks."""
    import cupy

    key = (device, int(stream.ptr))
    buffer = _buffers.get(key)
    if buffer is None or buffer.nbytes < size:
        buffer = _buffers[key] = cupy.empty(size, np.uint8)
    if stream.is_capturing() and not any(buffer is b for b in _captured):
        _captured.append(buffer)
    return buffer


_barriers: dict[tuple[int, int], Any] = {}


def _barrier(device: int, stream: int) -> int:
    """Address of the counter of a stream's launches whose blocks wait for each other; zero.

    Fresh memory, not from the pool, and set on a stream of its own: `stream` may be recording.
    """
    import cupy

    memory = _barriers.get((device, stream))
    if memory is None:
        memory = _barriers[device, stream] = cupy.cuda.Memory(ALIGNMENT)
        other = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.runtime.memsetAsync(memory.ptr, 0, ALIGNMENT, other.ptr)
        other.synchronize()
    return int(memory.ptr)
