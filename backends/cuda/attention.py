"""Attention on CuPy arrays: compile the launches of a step once, then fill in addresses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec

from .attention_arguments import (
    CompiledStep,
    constant_addresses,
    fill_arguments,
    number_fields,
    step_source,
)
from .attention_constants import constants_of
from .attention_launches import FullPages, launches, shapes_of
from .attention_plan import make_plan
from .attention_scratch import barrier_of, buffers, captured, scratch_of
from .device import on_device

PLAN_ALIGNMENT = 16  # no plan asks for more
_launching = threading.Lock()


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
            capturing = stream.is_capturing()
            with _launching:  # nothing comes between the launches that share a stream's scratch
                for launch in _bind(step, batch, full, stream, capturing):
                    launch()
            if capturing:
                # The caller need not hold them: lse may be unasked for, the others copies.
                captured.append((batch.query, batch.key_offset, batch.lse, full))


def prepare(
    key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch
) -> list[Callable[[], None]]:
    """The launches of a step on the current stream, with everything compiled and filled in."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    step = _step(key_spec, value_spec, batch, None)
    return _bind(step, batch, None, stream, stream.is_capturing())


def release_captured() -> None:
    """Let go of what captured steps may read or write, when their launches have ended."""
    import cupy

    with _launching:
        for device in {device for device, _ in buffers}:
            with on_device(device):
                cupy.cuda.runtime.deviceSynchronize()
        captured.clear()


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
    keys, values = constants_of(key_spec, device), constants_of(value_spec, device)
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
    step: CompiledStep,
    batch: AttentionBatch,
    full: FullPages | None,
    stream: Any,
    capturing: bool,
) -> list[Callable[[], None]]:
    device = batch.query.data.device_id
    scratch = _address(scratch_of(device, stream, step.plan.scratch_bytes, capturing))
    barrier = barrier_of(device, int(stream.ptr))
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


def _address(array: Any) -> int:
    return int(array.data.ptr)


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
    if shared_bytes > function.max_dynamic_shared_size_bytes:  # another launch may need more
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function.kernel  # which can be launched cooperatively
