"""What a backend needs to know of a quantiser: everything that decides bits, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from .codebook import unit_variance_centroids
from .packing import packed_size
from .rotation import Rotation

FORMAT_VERSION = 1

ScaleKind = Literal["norm", "mse", "unbiased"]
SCALE_KINDS: tuple[ScaleKind, ...] = ("norm", "mse", "unbiased")

# A row is used as it is while its sum of squares lies in this range; otherwise it is first
# multiplied by the power of two that brings its largest magnitude into [1, 2).
SAFE_SUM_OF_SQUARES = (2.0**-60, 2.0**60)


@dataclass(frozen=True, eq=False)
class CodecSpec:
    """The constants of docs/format.md for one quantiser.

    Attributes
    ----------
    bits : int
        1 to 8.
    rotation : Rotation
    scale : {"norm", "mse", "unbiased"}
        What the float32 beside the codes of a vector holds.
    """

    bits: int
    rotation: Rotation
    scale: ScaleKind = "norm"

    @property
    def head_dim(self) -> int:
        return self.rotation.head_dim

    @property
    def packed_dim(self) -> int:
        """Bytes of packed codes for each vector."""
        return packed_size(self.head_dim, self.bits)

    @cached_property
    def centroids(self) -> npt.NDArray[np.float32]:
        """[2**bits] centroids of z = sqrt(head_dim) * y, ascending."""
        return unit_variance_centroids(self.head_dim, self.bits).astype(np.float32)

    @cached_property
    def thresholds(self) -> npt.NDArray[np.float32]:
        """[2**bits - 1] decision boundaries of z; a code counts those strictly below z."""
        z = unit_variance_centroids(self.head_dim, self.bits)
        return ((z[1:] + z[:-1]) / 2).astype(np.float32)

    @cached_property
    def encode_gain(self) -> np.float32:
        """z = rotated * (encode_gain / norm): sqrt(head_dim) over the growth of the rotation."""
        return np.float32(math.sqrt(self.head_dim) / self.rotation.growth)

    @cached_property
    def decode_gain(self) -> np.float64:
        """1 / (sqrt(head_dim) * growth), float64; rounded to float32 for Hadamard rotations."""
        return np.float64(1.0 / (math.sqrt(self.head_dim) * self.rotation.growth))

    @cached_property
    def decode_table(self) -> npt.NDArray[np.float32]:
        """[2**bits] centroids times the decode gain, both float32, rounded once."""
        return self.centroids * np.float32(self.decode_gain)
