"""Encode and decode on the host side: which rows go to which kernel, and in what pieces."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import MATRIX_FRACTION_BITS, DenseRotation

from .compile import Kernel, compiled
from .kernels import FLUSHES_SUBNORMALS, Plan, can_batch, can_stream, scratch_floats, signs_pitch
from .quantize import cells_for, host_tables
from .rotate import HALF_SQRT
from .simd import CACHE_LINE, PAGE, target
from .threads import for_rows

CENTROID_FRACTION_BITS = 19  # as the format prescribes for dense rotations
CONVERTED_ELEMENTS = 1 << 20  # of an array with awkward strides, copied at a time
PRODUCT_ELEMENTS = 1 << 18  # of a float64 matrix product at a time: it stays in the cache

_thread = threading.local()


@dataclass(frozen=True)
class Constants:
    """Host memory that kernels of one quantiser read."""

    encode: npt.NDArray[np.float32]  # tables with the centroids of z
    decode: npt.NDArray[np.float32]  # tables with what codes decode to
    forward: npt.NDArray[np.float32]  # [steps + 1, signs_pitch / 4] signs, see rotate.RowRotation
    back: npt.NDArray[np.float32]
    rounds: int
    cells: int

    @cached_property
    def addresses(self) -> dict[str, int]:
        """Of the arrays, by name; asking NumPy takes a microsecond for each."""
        names = ("encode", "decode", "forward", "back")
        return {name: address(getattr(self, name)) for name in names}


_constants: WeakKeyDictionary[CodecSpec, Constants] = WeakKeyDictionary()


def constants_of(spec: CodecSpec) -> Constants:
    known = _constants.get(spec)
    if known is None:
        known = _constants[spec] = _make_constants(spec)
    return known


def _make_constants(spec: CodecSpec) -> Constants:
    cpu, rotation = target(), spec.rotation
    if isinstance(rotation, DenseRotation):
        values = np.rint(np.ldexp(spec.centroids, CENTROID_FRACTION_BITS))
        forward = back = np.ones((1, 1), np.float32)
        rounds = 0
    else:
        values, rounds = spec.decode_table, rotation.rounds
        floats = signs_pitch(spec.head_dim, cpu.width) // 4
        back = aligned_empty((len(rotation.signs) + 1, floats), np.float32, PAGE)
        back[:] = 1
        back[:-1, : spec.head_dim] = rotation.signs
        forward = mixing_signs(back, spec.head_dim)
    return Constants(
        aligned(host_tables(cpu, spec, spec.centroids)),
        aligned(host_tables(cpu, spec, values)),
        forward,
        back,
        rounds,
        cells_for(cpu, spec),
    )


def address(array: npt.NDArray[Any]) -> int:
    return cast(int, array.__array_interface__["data"][0])


def aligned_empty(shape: tuple[int, ...], dtype: Any, unit: int = CACHE_LINE) -> npt.NDArray[Any]:
    """Memory at a multiple of `unit`: NumPy's own 16 bytes make registers straddle cache lines."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + unit, np.uint8)
    start = -address(memory) % unit
    aligned: npt.NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return aligned


def aligned(array: npt.NDArray[Any], unit: int = CACHE_LINE) -> npt.NDArray[Any]:
    """A copy at a multiple of `unit`."""
    copy = aligned_empty(array.shape, array.dtype, unit)
    copy[:] = array
    return copy


def mixing_signs(signs: npt.NDArray[np.float32], dim: int) -> npt.NDArray[np.float32]:
    """Signs of the forward rotation: where a step mixes halves, times what mixing multiplies with.

    Exact, as only the sign changes; one multiplication then does for both.
    """
    if dim & (dim - 1) == 0:
        return signs
    result = aligned(signs, PAGE)
    result[1:, : dim // 2] *= np.float32(HALF_SQRT)
    result[1:, dim - dim // 2 : dim] *= np.float32(HALF_SQRT)
    return result


def scratch(dim: int) -> int:
    """Address of this thread's scratch rows for vectors of one length, zero behind the row."""
    known: dict[int, tuple[int, Any]] = _thread.__dict__.setdefault("scratch", {})
    if dim not in known:
        rows = aligned_empty((scratch_floats(dim, target().width),), np.float32, PAGE)
        rows[:] = 0
        known[dim] = (address(rows), rows)
    return known[dim][0]


def launch(
    kernel: Kernel,
    spec: CodecSpec,
    tables: Literal["encode", "decode"],
    source: npt.NDArray[Any],
    result: npt.NDArray[Any],
    scales: npt.NDArray[np.float32] | None,
    *,
    signs: int | None = None,
    parameter: int | None = None,
    exponents: npt.NDArray[np.int32] | None = None,
) -> None:
    """Run a kernel over the rows of `source` (any pitch) and `result` (C-contiguous).

    Raises
    ------
    RuntimeError
        If this thread's CPU state flushes subnormal numbers to zero.
    """
    constants = constants_of(spec)
    from_, to = address(source), address(result)
    pitch, result_pitch = source.strides[0], result.strides[0]
    at_scales = 0 if scales is None else address(scales)
    at_exponents = 0 if exponents is None else address(exponents)
    at_tables = constants.addresses[tables]
    rotation = {"encode": "forward", "decode": "back"}[tables]
    at_signs = constants.addresses[rotation] if signs is None else signs
    number = constants.rounds if parameter is None else parameter

    def run(start: int, stop: int) -> None:
        status = kernel(
            from_ + start * pitch,
            pitch,
            to + start * result_pitch,
            at_scales + 4 * start,
            stop - start,
            at_tables,
            at_signs,
            number,
            scratch(spec.head_dim),
            at_exponents + 8 * start,
        )
        check_status(status)

    for_rows(len(source), spec.head_dim, run)


def check_status(status: int) -> None:
    """Raise what a kernel reports."""
    if status == FLUSHES_SUBNORMALS:
        raise RuntimeError(
            "this thread's CPU flushes subnormal numbers to zero (a library has set flush-to-zero "
            "or denormals-are-zero), so codes could differ from the format; switch it off, for "
            "example with torch.set_flush_denormal(False), or work in a thread started before it "
            "was set"
        )


@cache
def hadamard_kernel(kind: str, dtype: Any, rounds: int, **settings: Any) -> Kernel:
    """Kernel to encode or decode with a Hadamard rotation, by batches or by rows.

    Remembered by NumPy's dtype, whose name takes longer to find than small calls should.
    """
    plan = Plan(kind, dtype=dtype.name, **settings)
    if rounds > 1 and can_batch(target().width, plan):
        plan = replace(plan, kind=f"{kind}_batch")
    return compiled(plan)


def row_blocks(vectors: Any, dim: int) -> Iterator[tuple[int, Any]]:
    """(first row, [rows, dim] array with a contiguous last axis), over all of `vectors`.

    The whole array is one block, without a copy, if its leading axes collapse into one; else blocks
    of bounded size are copied.
    """
    vectors = np.atleast_2d(vectors)
    batch = vectors.shape[:-1]
    rows = math.prod(batch)
    if rows == 0:
        return
    if vectors.strides[-1] == vectors.itemsize:
        try:
            yield 0, np.reshape(vectors, (rows, dim), copy=False)
            return
        except ValueError:
            pass
    step = max(1, CONVERTED_ELEMENTS // dim)
    for start in range(0, rows, step):
        index = np.unravel_index(np.arange(start, min(rows, start + step)), batch)
        yield start, np.ascontiguousarray(vectors[index])


def encode(spec: CodecSpec, vectors: Any, packed: Any, scales: Any) -> None:
    """Fill `packed` and `scales`."""
    packed_rows, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    for start, rows in row_blocks(vectors, spec.head_dim):
        part = slice(start, start + len(rows))
        encode_rows(spec, rows, packed_rows[part], flat_scales[part], spec.scale, "codes")


def encode_rows(
    spec: CodecSpec, rows: Any, result: Any, scales: Any, scale: str, output: str
) -> None:
    """Encode [n, d] rows to packed codes, or to z (float32 [n, d])."""
    constants = constants_of(spec)
    settings: dict[str, Any] = dict(
        dim=spec.head_dim, bits=spec.bits, scale=scale, cells=constants.cells, output=output
    )
    if output == "z":
        settings.update(bits=8, cells=0)
    if not isinstance(spec.rotation, DenseRotation):
        kernel = hadamard_kernel("encode", rows.dtype, constants.rounds, **settings)
        launch(kernel, spec, "encode", rows, result, scales)
        return
    fix = compiled(Plan("fix", spec.head_dim, dtype=rows.dtype.name))
    finish = compiled(Plan("encode_product", **settings))
    for part, fixed, product in _product_blocks(spec, len(rows)):
        exponents = np.empty((len(fixed), 2), np.int32)
        launch(fix, spec, "encode", rows[part], fixed, scales[part], exponents=exponents)
        np.matmul(fixed, spec.rotation.fixed.T, out=product)
        launch(
            finish,
            spec,
            "encode",
            product,
            result[part],
            scales[part],
            exponents=exponents,
        )


def decode(spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
    """Fill `out`."""
    codes, flat_scales = packed.reshape(-1, spec.packed_dim), scales.reshape(-1)
    rows = out.reshape(-1, spec.head_dim)
    if not len(rows):
        return
    if not isinstance(spec.rotation, DenseRotation):
        rounds = constants_of(spec).rounds
        streams = can_stream(spec.head_dim, rows.nbytes, address(rows), rows.strides[0])
        settings = dict(dim=spec.head_dim, bits=spec.bits, streams=streams)
        kernel = hadamard_kernel("decode", out.dtype, rounds, **settings)
        launch(kernel, spec, "decode", codes, rows, flat_scales)
        return
    look_up = compiled(Plan("look_up", spec.head_dim, spec.bits, "float64"))
    finish = compiled(Plan("decode_product", spec.head_dim, dtype=out.dtype.name))
    factor = np.ldexp(spec.decode_gain, -CENTROID_FRACTION_BITS - MATRIX_FRACTION_BITS)
    for part, fixed, product in _product_blocks(spec, len(rows)):
        launch(look_up, spec, "decode", codes[part], fixed, None)
        np.matmul(fixed, spec.rotation.fixed, out=product)
        launch(
            finish,
            spec,
            "decode",
            product,
            rows[part],
            flat_scales[part],
            parameter=int(np.float64(factor).view(np.int64)),
        )


def _product_blocks(
    spec: CodecSpec, rows: int
) -> Iterator[tuple[slice, npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """(rows, factor, product) for blocks of bounded size; the buffers are used again."""
    step = min(rows, max(64, PRODUCT_ELEMENTS // spec.head_dim))
    fixed, product = np.empty((2, step, spec.head_dim))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield slice(start, start + count), fixed[:count], product[:count]
