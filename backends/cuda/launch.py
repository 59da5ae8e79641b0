"""What encode kernels are told: `Side` of kernels/side.cuh, packed field for field."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import HadamardRotation

from .constants import constants
from .layout import Rows, block_factor, in_registers, on_tensor_cores, width_of

_OF_LAUNCH = struct.Struct("<14q2I2i")
_OF_QUANTIZER = struct.Struct("<4q3fi")
# CuPy passes arrays of one element by value.
SIDE = np.dtype([("words", np.int64, (_OF_LAUNCH.size + _OF_QUANTIZER.size) // 8)])
SIDES = np.dtype([("words", np.int64, (_OF_LAUNCH.size + _OF_QUANTIZER.size) // 4)])


@dataclass(frozen=True)
class Target:
    """Where codes and scales go: addresses and strides in bytes, and slots if there are any."""

    packed: int
    packed_strides: tuple[int, int, int]  # block, slot, member of a group
    scales: int
    scale_strides: tuple[int, int, int]
    slots: Any = None
    num_slots: int = 0
    block_size: int = 1

    def contiguous(self, rows: Rows) -> bool:
        """Whether vectors follow each other, and codes and scales do."""
        row = rows.array.shape[-1] * rows.array.itemsize
        inner = rows.inner_stride == row or rows.inner == 1
        outer = rows.outer_stride == rows.inner * row or rows.count == rows.inner
        return inner and outer and self.slots is None

    def store_width(self, row_bytes: int) -> int:
        """Bytes that one store of codes may write."""
        return width_of(self.packed, row_bytes, *self.packed_strides)


def dense_target(spec: CodecSpec, rows: Rows, packed: Any, scales: Any) -> Target:
    """Row v goes to row v of C-contiguous arrays."""
    row = spec.packed_dim
    return Target(
        packed.data.ptr, (0, rows.inner * row, row), scales.data.ptr, (0, rows.inner * 4, 4)
    )


def of_quantizer(spec: CodecSpec) -> bytes:
    """The fields of `Side` that hold for every launch with `spec` on the current device."""
    c = constants(spec)
    hadamard = spec.rotation if isinstance(spec.rotation, HadamardRotation) else None
    bucketed = spec.bits > 1 and (in_registers(spec) or on_tensor_cores(spec))
    return _OF_QUANTIZER.pack(
        c.signs.data.ptr if hadamard else 0,
        c.buckets.data.ptr if bucketed else 0,
        c.thresholds.data.ptr,
        c.centroids.data.ptr,
        c.bucket_table.scale if bucketed else 0.0,
        spec.encode_gain,
        block_factor(hadamard) if hadamard else 1.0,
        hadamard.rounds if hadamard else 0,
    )


def of_launch(rows: Rows, target: Target) -> bytes:
    """The other fields of `Side`."""
    if rows.count >= 2**32 or target.num_slots >= 2**32:
        raise ValueError(
            f"one call takes fewer than 2**32 vectors and slots, got {rows.count} and "
            f"{target.num_slots}; split the array"
        )
    slots = target.slots
    return _OF_LAUNCH.pack(
        rows.array.data.ptr,
        rows.outer_stride,
        rows.inner_stride,
        target.packed,
        *target.packed_strides,
        target.scales,
        *target.scale_strides,
        0 if slots is None else slots.data.ptr,
        target.num_slots,
        rows.count,
        max(rows.inner, 1),
        target.block_size,
        slots is not None and slots.dtype.itemsize == 8,
        0,
    )


def side(spec: CodecSpec, rows: Rows, target: Target) -> Any:
    """The `Side` of kernels/any.cu."""
    return np.frombuffer(of_launch(rows, target) + of_quantizer(spec), SIDE)
