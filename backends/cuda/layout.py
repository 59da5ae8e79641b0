"""How kernels are shaped and where rows lie: pure functions, tested without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import HadamardRotation

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)  # those whose vectors kernels hold in registers
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
    return isinstance(spec.rotation, HadamardRotation) and spec.head_dim in HEAD_DIMS


def encode_macros(spec: CodecSpec, side: int, store: int) -> dict[str, str | int]:
    """Macros of kernels/encode.cu for one side of a launch."""
    scale = SCALE_KINDS.index(spec.scale)
    return {f"BITS_{side}": spec.bits, f"SCALE_{side}": scale, f"STORE_{side}": store}


@dataclass(frozen=True)
class Shape:
    """How the kernels that hold vectors in registers are cut.

    Attributes
    ----------
    lanes : int
        Lanes that hold one vector.
    warps : int
        Warps a block has.
    blocks : int
        Blocks a multiprocessor should hold; with `warps` it limits the registers of a thread.
    """

    lanes: int
    warps: int
    blocks: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def rows(self) -> int:
        """Vectors that the warps of a block hold."""
        return 32 // self.lanes * self.warps

    @property
    def macros(self) -> dict[str, str | int]:
        return {"LANES": self.lanes, "WARPS": self.warps, "BLOCKS": self.blocks}


def encode_shape(head_dim: int, itemsize: int, corrected: bool) -> Shape:
    """As measured on an H100 (docs/benchmarks/cuda_codec.md), without spilled registers.

    `corrected` says that a scale other than the norm is stored.
    """
    lanes = 1 if head_dim < 128 else 2
    registers = head_dim // lanes
    if corrected:
        return Shape(lanes, warps=4, blocks=3 if registers <= 64 else 2)
    if registers <= 64:
        return Shape(lanes, warps=8, blocks=2) if itemsize == 2 else Shape(lanes, 4, 4)
    return Shape(lanes, warps=4, blocks=3)


def decode_shape(head_dim: int, itemsize: int) -> Shape:
    """As `encode_shape`, for the dtype of the output."""
    lanes = 1 if head_dim < 128 else 2
    return Shape(lanes, warps=4, blocks=4 if head_dim == 64 else 3)


def encode_shared_bytes(spec: CodecSpec, itemsize: int, shape: Shape) -> int:
    """Dynamic shared memory of a block of kernels/encode.cu."""
    assert isinstance(spec.rotation, HadamardRotation)
    tables = (16384 if spec.bits > 1 else 0) + (0 if spec.scale == "norm" else 1024)
    row = padded_row(spec.head_dim * itemsize) + padded_row(spec.packed_dim)
    signs = 4 * spec.head_dim * steps(spec.rotation)
    return tables + shape.rows * row + signs


def decode_shared_bytes(spec: CodecSpec, itemsize: int, shape: Shape) -> int:
    """Dynamic shared memory of a block of kernels/decode.cu."""
    assert isinstance(spec.rotation, HadamardRotation)
    row = padded_row(spec.packed_dim) + padded_row(spec.head_dim * itemsize)
    signs = 4 * spec.head_dim * steps(spec.rotation)
    return lookup_bytes(spec.bits) + shape.rows * row + signs


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

    Two do after merging neighbouring axes, if the last axis is contiguous and every vector starts
    at a multiple of `alignment` bytes.  Without `merge`, the axes of [n, m, d] stay apart.
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
