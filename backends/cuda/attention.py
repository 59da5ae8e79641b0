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
from weakref import WeakKeyDictionary, ref

import numpy as np
import numpy.typing as npt

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import HadamardRotation

from .attention_plan import (
    ALIGNMENT,
    MANY_DIMS,
    MERGE_WARPS,
    WINDOW_THREADS,
    Layout,
    Plan,
    Shapes,
    make_plan,
    window_rows,
)
from .device import on_device
from .source import variant_source

LOG2_E = 1.4426950408889634
QUERY_WARPS = 8  # rows of a block of attention_query
DENSE_ROWS, DENSE_THREADS = 8, 128
DTYPE_NUMBERS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}

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
PLAN_ALIGNMENT = 16  # no plan asks for more

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
        with on_device(batch.query.data.device_id):
            offset = batch.key_offset
            if offset is not None and not offset.flags.c_contiguous:
                batch = replace(batch, key_offset=cupy.ascontiguousarray(offset))
            step = _step(key_spec, value_spec, batch, full)
            stream = cupy.cuda.get_current_stream()
            with _launching:  # nothing comes between the launches that share a stream's scratch
                for launch in _bind(step, batch, full, stream):
                    launch()
            if stream.is_capturing():
                # The caller need not hold them: lse may be unasked for, the others copies.
                _captured.append((batch.query, batch.key_offset, batch.lse, full))


def prepare(
    key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch
) -> list[Callable[[], None]]:
    """The launches of a step on the current stream, with everything compiled and filled in."""
    import cupy

    step = _step(key_spec, value_spec, batch, None)
    return _bind(step, batch, None, cupy.cuda.get_current_stream())


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


MOST_STEPS = 256  # remembered for a quantiser of keys
_steps: WeakKeyDictionary[CodecSpec, dict[Any, CompiledStep]] = WeakKeyDictionary()


def _step(
    key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch, full: FullPages | None
) -> CompiledStep:
    """The compiled step of a batch, from memory if one of the same form came before."""
    steps = _steps.setdefault(key_spec, {})
    form = (ref(value_spec), *_form(batch, full))
    step = steps.get(form)
    if step is None:
        if len(steps) >= MOST_STEPS:
            steps.clear()
        step = steps[form] = _compiled(key_spec, value_spec, batch, full)
    return step


def _form(batch: AttentionBatch, full: FullPages | None) -> tuple[Any, ...]:
    """All that launches and numbers depend on, addresses as far as they are aligned."""
    query, k, v, kn, vn = batch.query, batch.k_packed, batch.v_packed, batch.k_norms, batch.v_norms
    tables, lens = batch.block_tables, batch.context_lens
    starts, positions, sinks = batch.query_start_loc, batch.query_positions, batch.sinks
    form: tuple[Any, ...] = (
        query.data.device_id,
        query.dtype.char,  # bfloat16 has one of its own
        query.shape,
        query.strides,
        batch.query_len,
        k.shape,
        tables.shape,
        *(a.strides for a in (k, v, kn, vn, tables, lens)),
        *(a.data.ptr % PLAN_ALIGNMENT for a in (query, k, v, kn, vn)),
        *(None if a is None else a.strides for a in (starts, positions, sinks)),
        batch.scale,
        batch.logits_soft_cap,
        batch.sliding_window,
    )
    if full is not None:
        form += (full.keys.dtype.char, full.pages.shape, full.tiles.shape, full.rows)
    return form


def _compiled(
    key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch, full: FullPages | None
) -> CompiledStep:
    device = int(batch.query.data.device_id)
    keys, values = _constants(key_spec, device), _constants(value_spec, device)
    num_sms, bulk_copies = _device_facts(device)
    dense = "matrix" in keys or "matrix" in values
    shapes = shapes_of(batch, _address, full)
    plan = make_plan(key_spec, value_spec, shapes, num_sms, bulk_copies, dense)
    compiled = []
    for step in launches(batch, plan, keys, values, full):
        module = _compile(device, step.source, tuple(step.macros.items()), plan.options)
        compiled.append((_function(module, step.kernel, step.shared_bytes), step))
    numbers = number_fields(batch, plan, keys, values, full)
    return CompiledStep(
        plan, compiled, constant_addresses(keys, values, _address), numbers, (keys, values)
    )


def _bind(
    step: CompiledStep, batch: AttentionBatch, full: FullPages | None, stream: Any
) -> list[Callable[[], None]]:
    device = batch.query.data.device_id
    scratch = _address(_scratch(device, stream, step.plan.scratch_bytes))
    barrier = _barrier(device, int(stream.ptr))
    arguments = fill_arguments(batch, step, _address, scratch, barrier, full)
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
