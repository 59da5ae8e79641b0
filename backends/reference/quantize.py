"""From rotated coordinates to codes and the stored scale (docs/format.md, steps 5 and 7)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from turboquant_np._spec import CodecSpec

from .normalize import fold_sum

Float32s = npt.NDArray[np.float32]


def quantize(spec: CodecSpec, z: Float32s) -> npt.NDArray[np.uint8]:
    """[n, d] coordinates of unit variance -> [n, d] codes: the number of thresholds below each.

    A coordinate on a threshold takes the lower code.
    """
    return np.searchsorted(spec.thresholds, z, side="left").astype(np.uint8)


def stored_scale(
    spec: CodecSpec, z: Float32s, codes: npt.NDArray[np.uint8], norms: Float32s
) -> Float32s:
    """[n] what the float32 slot holds, before the power of two of the range step."""
    if spec.scale == "norm":
        return norms
    centroids = spec.centroids[codes]
    with np.errstate(divide="ignore", invalid="ignore"):
        along = fold_sum(z * centroids)
        if spec.scale == "mse":
            ratio = along / fold_sum(centroids * centroids)
        else:
            ratio = np.float32(spec.head_dim) / along
        scale = norms * ratio
    return np.where(norms == 0, np.float32(0), scale)
