"""The tables of a quantiser on a device, copied there once."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import DenseRotation, HadamardRotation

from . import limbs

MAX_Z = 16.05  # kernels with bucket tables clamp z to +-16
TABLE_BYTES = 16384
CENTROID_FRACTION_BITS = 19


@dataclass(frozen=True)
class BucketTable:
    """A monotone map of z to buckets that hold one threshold at most (kernels/encode.cu).

    The bucket of z is in the low 14 bits of the float32 z * scale + (1 + 2**-10), rounded once.

    Attributes
    ----------
    entries : ndarray, uint32, shape [count, 2]
        The threshold in the bucket (bits of a float32; infinity if there is none) and the number of
        thresholds in lower buckets.
    scale : float
    """

    entries: npt.NDArray[np.uint32]
    scale: float


def bucket_table(thresholds: npt.NDArray[np.float32], head_dim: int) -> BucketTable:
    """The table for 2**bits - 1 ascending thresholds; |z| is at most sqrt(head_dim)."""
    count = max(128, 8 * (len(thresholds) + 1))
    scale = np.float32(2.0**-10 / min(MAX_Z, 1.003 * np.sqrt(head_dim)))
    bucket = np.array([_place(float(t), float(scale)) for t in thresholds])
    bucket //= TABLE_BYTES // count
    if not (np.diff(bucket) > 0).all():
        raise AssertionError(f"two of {len(thresholds)} thresholds share one of {count} buckets")
    entries = np.empty((count, 2), np.uint32)
    entries[:, 0] = np.float32(np.inf).view(np.uint32)
    entries[bucket, 0] = thresholds.view(np.uint32)
    entries[:, 1] = np.searchsorted(bucket, np.arange(count))
    return BucketTable(entries, float(scale))


def _place(z: float, scale: float) -> int:
    """The low 14 bits of the mantissa of z * scale + (1 + 2**-10), correctly rounded."""
    exact = Fraction(z) * Fraction(scale) + Fraction(1, 1024)
    return round(exact * 2**23)  # half to even, as the GPU rounds


_lock = threading.RLock()


class made_once(cached_property[Any]):
    """A `cached_property` that no two threads compute.

    Launches hold addresses, so arrays must stay where they are: of two that were made at the same
    time one would be dropped, and its memory used for something else.
    """

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        with _lock:
            return super().__get__(instance, owner)


class Constants:
    """Device copies of what a spec prescribes, each made when first asked for."""

    def __init__(self, spec: CodecSpec) -> None:
        self.bits, self.head_dim = spec.bits, spec.head_dim
        self._thresholds = spec.thresholds
        self._centroids = spec.centroids
        self._decode_table = spec.decode_table
        self._rotation = spec.rotation

    @made_once
    def signs(self) -> Any:
        assert isinstance(self._rotation, HadamardRotation)
        return _to_device(self._rotation.signs)

    @made_once
    def thresholds(self) -> Any:
        return _to_device(self._thresholds)

    @made_once
    def centroids(self) -> Any:
        return _to_device(self._centroids)

    @made_once
    def decode_table(self) -> Any:
        return _to_device(self._decode_table)

    @made_once
    def bucket_table(self) -> BucketTable:
        return bucket_table(self._thresholds, self.head_dim)

    @made_once
    def buckets(self) -> Any:
        return _to_device(self.bucket_table.entries)

    @made_once
    def matrix(self) -> Any:
        """[d, d] float64, the rotation in fixed point: rows @ matrix rotates back."""
        return _to_device(self._fixed)

    @made_once
    def matrix_transposed(self) -> Any:
        """rows @ matrix_transposed rotates."""
        return _to_device(np.ascontiguousarray(self._fixed.T))

    @made_once
    def limbs(self) -> int:
        """Bytes of an entry of `fragments`."""
        return limbs.limbs_needed(self._fixed)

    @made_once
    def fragments(self) -> Any:
        """The matrix as kernels/encode_dense.cu multiplies by it."""
        return _to_device(limbs.fragments(self._fixed))

    @made_once
    def fragments_back(self) -> Any:
        """As kernels/decode_dense.cu does."""
        return _to_device(limbs.fragments(self._fixed.T))

    @made_once
    def centroid_words(self) -> Any:
        """Limbs of the centroids as whole numbers."""
        exact = np.ldexp(self._centroids.astype(np.float64), CENTROID_FRACTION_BITS)
        return _to_device(limbs.words(np.rint(exact)))

    @property
    def _fixed(self) -> npt.NDArray[np.float64]:
        assert isinstance(self._rotation, DenseRotation)
        return self._rotation.fixed


_constants: WeakKeyDictionary[CodecSpec, dict[int, Constants]] = WeakKeyDictionary()


def constants(spec: CodecSpec) -> Constants:
    """Those of `spec` on the current device."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    with _lock:
        on_devices = _constants.setdefault(spec, {})
        if device not in on_devices:
            on_devices[device] = Constants(spec)
        return on_devices[device]


def _to_device(array: npt.NDArray[Any]) -> Any:
    """A copy that every stream may read."""
    import cupy

    copied = cupy.asarray(array)
    cupy.cuda.get_current_stream().synchronize()
    return copied
