"""How kernels are shaped and where rows lie: pure functions, tested without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from turboquant_np._spec import SCALE_KINDS, CodecSpec
from turboquant_np.rotation import DenseRotation, HadamardRotation

DENSE_HEAD_DIMS = (64, 96, 128, 192)  # those whose dense rotation fits the memory of a block
MIN_HEAD_DIM = 32  # of the kernels that hold vectors in registers
MAX_REGISTERS = 144  # that hold coordinates, of the 255 a thread can have
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


def lanes_of(head_dim: int) -> int | None:
    """How many lanes hold a vector in registers; None if no number does (kernels/lanes.cuh).

    Lanes take turns at chunks of coordinates.  Halves of a vector must be whole turns, unless its
    length is a power of two.
    """
    if head_dim < 128:
        return 1 if head_dim >= MIN_HEAD_DIM and head_dim % 2 == 0 else None
    power_of_two = head_dim & (head_dim - 1) == 0
    fitting = []
    for lanes in (2, 4, 8, 16, 32):
        turn = lanes * chunk(head_dim, lanes)
        if head_dim % (turn if power_of_two else 2 * turn) == 0:
            fitting.append(lanes)
    for limit, most in ((64, 4), (MAX_REGISTERS, 32)):  # as measured on an H100
        for lanes in fitting:
            if head_dim // lanes <= limit and lanes <= most:
                return lanes
    return None


def chunk(head_dim: int, lanes: int) -> int:
    """As `Layout::CHUNK` of kernels/lanes.cuh, for several lanes."""
    return 16 if lanes == 2 and head_dim % 64 == 0 else 8


def in_registers(spec: CodecSpec) -> bool:
    """Whether the kernels that hold vectors in registers take `spec`."""
    hadamard = isinstance(spec.rotation, HadamardRotation)
    return hadamard and lanes_of(spec.head_dim) is not None


def on_tensor_cores(spec: CodecSpec) -> bool:
    """Whether the kernels that multiply by a dense rotation themselves take `spec`."""
    return isinstance(spec.rotation, DenseRotation) and spec.head_dim in DENSE_HEAD_DIMS


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
    lanes = lanes_of(head_dim)
    assert lanes is not None
    registers = head_dim // lanes
    if lanes > 2:
        return _wide_shape(lanes, 16 if registers <= 64 else 8)
    if corrected:
        return Shape(lanes, warps=4, blocks=3 if registers <= 64 else 2)
    if registers <= 64:
        return Shape(lanes, warps=8, blocks=2) if itemsize == 2 else Shape(lanes, 4, 4)
    return Shape(lanes, warps=4, blocks=3 if registers <= 112 else 2)


def decode_shape(head_dim: int, itemsize: int) -> Shape:
    """As `encode_shape`, for the dtype of the output."""
    lanes = lanes_of(head_dim)
    assert lanes is not None
    registers = head_dim // lanes
    if lanes > 2:
        return _wide_shape(lanes, 8 if registers > 64 else 16 if itemsize == 2 else 12)
    if head_dim <= 64:
        return Shape(lanes, warps=4, blocks=4)
    return Shape(lanes, warps=4, blocks=3 if registers <= (112 if itemsize == 2 else 96) else 2)


def _wide_shape(lanes: int, warps: int) -> Shape:
    """One block, since the signs of long vectors take much of a multiprocessor's memory."""
    return Shape(lanes, warps, blocks=1)


def encode_shared_bytes(spec: CodecSpec, itemsize: int, shape: Shape) -> int:
    """Dynamic shared memory of a block of kernels/encode.cu."""
    return _quantizer_bytes(spec) + shape.rows * _row_bytes(spec, itemsize) + _signs_bytes(spec)


def decode_shared_bytes(spec: CodecSpec, itemsize: int, shape: Shape) -> int:
    """Dynamic shared memory of a block of kernels/decode.cu."""
    row = _row_bytes(spec, itemsize)
    return lookup_bytes(spec.bits) + shape.rows * row + _signs_bytes(spec)


def _quantizer_bytes(spec: CodecSpec) -> int:
    return (16384 if spec.bits > 1 else 0) + (0 if spec.scale == "norm" else 1024)


def _row_bytes(spec: CodecSpec, itemsize: int) -> int:
    return padded_row(spec.head_dim * itemsize) + padded_row(spec.packed_dim)


def _signs_bytes(spec: CodecSpec) -> int:
    """As `fill_signs` of kernels/lanes.cuh."""
    assert isinstance(spec.rotation, HadamardRotation)
    return 4 * (-(-spec.head_dim // 4) * 4) * steps(spec.rotation)


@dataclass(frozen=True)
class DenseShape:
    """How the kernels for dense rotations are cut: one block a multiprocessor."""

    warps: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def rows(self) -> int:
        """Vectors that the warps of a block hold."""
        return 16 * self.warps

    @property
    def macros(self) -> dict[str, str | int]:
        return {"WARPS": self.warps, "BLOCKS": 1}


def dense_encode_shape(
    spec: CodecSpec, itemsize: int, limbs: int, max_shared_bytes: int
) -> DenseShape | None:
    """Of kernels/encode_dense.cu; None if its memory does not do."""
    fixed = limbs * spec.head_dim**2 + _quantizer_bytes(spec)
    warps = 12 if spec.scale == "norm" and spec.head_dim <= 128 and limbs == 3 else 8
    return _dense_shape(warps, fixed, _row_bytes(spec, itemsize), max_shared_bytes)


def dense_decode_shape(spec: CodecSpec, limbs: int, max_shared_bytes: int) -> DenseShape | None:
    """As `dense_encode_shape`, of kernels/decode_dense.cu."""
    fixed = limbs * spec.head_dim**2 + 1024
    warps = 12 if spec.head_dim <= 128 else 8
    return _dense_shape(warps, fixed, padded_row(spec.packed_dim), max_shared_bytes)


def _dense_shape(warps: int, fixed: int, row: int, max_shared_bytes: int) -> DenseShape | None:
    """With up to `warps` warps of 16 rows each."""
    warps = min(warps, (max_shared_bytes - fixed) // (16 * row))
    return DenseShape(warps, fixed + warps * 16 * row) if warps >= 4 else None


def lookup_bytes(bits: int) -> int:
    """As `Lookup::BYTES` of kernels/lookup.cuh."""
    group = 4 if bits <= 2 else 2 if bits <= 4 else 1
    return 4 * group << (bits * group)


def workspace_bytes(head_dim: int) -> int:
    """As `Workspace` of kernels/team.cuh: a row, half of the padded row, codes."""
    padded = 1 << (head_dim - 1).bit_length()
    return -(-(4 * head_dim + 2 * max(padded, 2) + head_dim) // 16) * 16


def block_threads(head_dim: int) -> int:
    """Threads of a block that shares one vector in kernels/any.cu."""
    return min(max(1 << (head_dim - 1).bit_length() >> 1, 32), 512)


def row_width(head_dim: int, itemsize: int) -> int:
    """Bytes moved at once from or to rows of vectors, which must start at a multiple of them."""
    return math.gcd(16, head_dim * itemsize)


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
