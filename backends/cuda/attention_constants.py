"""What attention kernels know of a quantiser: tables and rotations, once a device."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from turboquant_np._spec import CodecSpec
from turboquant_np.rotation import HadamardRotation

Constants = Mapping[str, Any]


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


_making = threading.Lock()
_on_device: WeakKeyDictionary[CodecSpec, dict[int, Constants]] = WeakKeyDictionary()


def constants_of(spec: CodecSpec, device: int) -> Constants:
    """The same, in the memory of a device."""
    import cupy

    with _making:  # launches hold addresses: of two copies one would be dropped
        cached = _on_device.setdefault(spec, {})
        if device not in cached:
            made = make_constants(spec).items()
            cached[device] = {k: cupy.asarray(v) if v.ndim else v for k, v in made}
            cupy.cuda.get_current_stream().synchronize()  # every stream may read them
        return cached[device]
