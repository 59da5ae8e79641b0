"""What encode kernels are told: `Side` of kernels/side.cuh, field for field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import HadamardRotation

from .constants import constants
from .layout import Rows, block_factor, width_of

SIDE = np.dtype(
    [
        *[(field, np.int64) for field in ("vectors", "vector_outer", "vector_inner")],
        *[(f"packed{part}", np.int64) for part in ("", "_block", "_slot", "_inner")],
        *[(f"scales{part}", np.int64) for part in ("", "_block", "_slot", "_inner")],
        *[(field, np.int64) for field in ("slots", "num_slots", "rows")],
        *[(field, np.int64) for field in ("signs", "buckets", "thresholds", "centroids")],
        ("bucket_scale", np.float32),
        ("gain", np.float32),
        ("block_factor", np.float32),
        ("inner", np.uint32),
        ("block_size", np.uint32),
        ("slots_are_64_bit", np.int32),
        ("rounds", np.int32),
    ],
    align=True,
)
SIDES = np.dtype([("side", SIDE, (2,))])  # `Sides`


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


def side(spec: CodecSpec, rows: Rows, target: Target, lanes: int = 0) -> Any:
    """A `Side` as a 0-d structured array, which CuPy passes by value.

    `lanes` is that of kernels/encode.cu, 0 for other kernels.
    """
    if rows.count >= 2**32 or target.num_slots >= 2**32:
        raise ValueError(
            f"one call takes fewer than 2**32 vectors and slots, got {rows.count} and "
            f"{target.num_slots}; split the array"
        )
    c = constants(spec)
    hadamard = spec.rotation if isinstance(spec.rotation, HadamardRotation) else None
    signs = None
    if hadamard is not None:
        pending = lanes and hadamard.is_power_of_two
        signs = c.multipliers(lanes) if pending else c.signs
    bucketed = lanes and spec.bits > 1
    values = (
        rows.array.data.ptr,
        rows.outer_stride,
        rows.inner_stride,
        target.packed,
        *target.packed_strides,
        target.scales,
        *target.scale_strides,
        target.slots.data.ptr if target.slots is not None else 0,
        target.num_slots,
        rows.count,
        signs.data.ptr if signs is not None else 0,
        c.buckets.data.ptr if bucketed else 0,
        c.thresholds.data.ptr,
        c.centroids.data.ptr,
        c.bucket_table.scale if bucketed else 0.0,
        spec.encode_gain,
        block_factor(hadamard) if hadamard else 1.0,
        max(rows.inner, 1),
        target.block_size,
        target.slots is not None and target.slots.dtype.itemsize == 8,
        hadamard.rounds if hadamard else 0,
    )
    return np.array(values, SIDE)


def pair(first: Any, second: Any) -> Any:
    """A `Sides` of two results of `side`."""
    both = np.empty((), SIDES)
    both["side"][0], both["side"][1] = first, second
    return both
