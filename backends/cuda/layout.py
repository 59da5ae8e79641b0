"""How kernels are shaped and where rows lie: pure functions, tested without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import HadamardRotation

WARPS = 4
THREADS = 32 * WARPS
# head_dim -> lanes that hold one vector in registers
LANES = {64: 1, 80: 1, 96: 1, 112: 1, 128: 1, 192: 2, 256: 2}
TYPE_NAMES = {
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float32": "Float",
    "float64": "Double",
}


def padded_row(size: int) -> int:
    """As `padded_row` of kernels/rows.cuh: bytes of a row in shared memory."""
    return (-(-size // 16) | 1) * 16


def steps(rotation: HadamardRotation) -> int:
    """Rows of signs: one a round, two where head_dim is no power of two."""
    return rotation.rounds * (1 if rotation.is_power_of_two else 2)


def block_factor(rotation: HadamardRotation) -> float:
    """What a transform of one block is multiplied by."""
    return 1 / math.sqrt(rotation.block)


def in_registers(spec: CodecSpec) -> bool:
    """Whether the kernels that hold vectors in registers take `spec`."""
    return isinstance(spec.rotation, HadamardRotation) and spec.head_dim in LANES


def encode_macros(spec: CodecSpec, side: int, store: int) -> dict[str, str | int]:
    """Macros of kernels/encode.cu for one side of a launch."""
    scale = SCALE_KINDS.index(spec.scale)
    return {f"BITS_{side}": spec.bits, f"SCALE_{side}": scale, f"STORE_{side}": store}


def encode_blocks(head_dim: int, corrected: bool) -> int:
    """Blocks of `encode` that a multiprocessor should hold: as many as need no spilled registers."""
    registers = head_dim // LANES[head_dim]
    if registers <= 64:
        return 4
    return 2 if corrected else 3


def decode_blocks(head_dim: int) -> int:
    """As `encode_blocks`, for `decode`."""
    return 4 if head_dim // LANES[head_dim] <= 64 else 3


def encode_shared_bytes(spec: CodecSpec, itemsize: int) -> int:
    """Dynamic shared memory of a block of kernels/encode.cu."""
    assert isinstance(spec.rotation, HadamardRotation)
    tables = (16384 if spec.bits > 1 else 0) + (0 if spec.scale == "norm" else 1024)
    rows = 32 // LANES[spec.head_dim]
    tile = rows * (padded_row(spec.head_dim * itemsize) + padded_row(spec.packed_dim))
    return tables + WARPS * tile + 4 * spec.head_dim * steps(spec.rotation)


def decode_shared_bytes(spec: CodecSpec, itemsize: int) -> int:
    """Dynamic shared memory of a block of kernels/decode.cu."""
    assert isinstance(spec.rotation, HadamardRotation)
    rows = 32 // LANES[spec.head_dim]
    tile = rows * (padded_row(spec.packed_dim) + padded_row(spec.head_dim * itemsize))
    signs = 4 * spec.head_dim * steps(spec.rotation)
    return lookup_bytes(spec.bits) + WARPS * tile + signs


def lookup_bytes(bits: int) -> int:
    """As `Lookup::BYTES` of kernels/lookup.cuh."""
    group = 4 if bits <= 2 else 2 if bits <= 4 else 1
    return 4 * group << (bits * group)


def block_workspace_bytes(head_dim: int) -> int:
    """As `Workspace` of kernels/block.cuh: a row, half of the padded row, codes."""
    padded = 1 << (head_dim - 1).bit_length()
    return -(-(4 * head_dim + 2 * max(padded, 2) + head_dim) // 16) * 16


def block_threads(head_dim: int) -> int:
    """Threads that share one vector in kernels/any.cu."""
    return min(max(1 << (head_dim - 1).bit_length() >> 1, 32), 512)


def width_of(*sizes: int) -> int:
    """The widest word, up to 16 bytes, that divides all addresses, strides and row lengths."""
    return math.gcd(16, *sizes)


@dataclass(frozen=True)
class Rows:
    """Vector v of an array lies at v // inner * outer_stride + v % inner * inner_stride bytes."""

    array: Any
    count: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(array: Any, alignment: int, *, merge: bool = True) -> Rows:
    """The vectors of the last axis by two strides; a copy where two do not do.

    Two do after merging neighbouring axes, if the last axis is contiguous and every vector starts at
    a multiple of `alignment` bytes.  Without `merge` the two axes of a [n, m, d] array stay apart.
    """
    found = _two_strides(array, alignment, merge)
    if found is None:
        found = _two_strides(array.copy(order="C"), alignment, merge)
        assert found is not None
    return found


def _two_strides(array: Any, alignment: int, merge: bool) -> Rows | None:
    *shape, d = array.shape
    *strides, last = array.strides
    axes: list[tuple[int, int]] = []  # (length, stride), outermost first
    for length, stride in zip(shape, strides, strict=True):
        if merge and length == 1:
            continue
        if merge and axes and axes[-1][1] == length * stride:
            axes[-1] = (axes[-1][0] * length, stride)
        else:
            axes.append((length, stride))
    address = array.data.ptr
    if (
        len(axes) > 2
        or (d > 1 and last != array.itemsize)
        or any(n % alignment for n in (address, *(stride for _, stride in axes)))
    ):
        return None
    while len(axes) < 2:
        axes.insert(0, (1, 0))
    (outer, outer_stride), (inner, inner_stride) = axes
    return Rows(array, outer * inner, inner, outer_stride, inner_stride)
