"""Launch every kernel of the codec once or twice on a few vectors, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/cuda/every_kernel.py

Nothing is compared here.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from turboquant_np import TurboQuant
from turboquant_np.cuda import compiled_kernels
from turboquant_np.paged import encode_paged

ROWS = 45  # no multiple of a tile

KINDS: list[dict[str, Any]] = [
    {"head_dim": 128, "bits": 4},
    {"head_dim": 128, "bits": 3, "scale": "mse"},
    {"head_dim": 64, "bits": 1, "hadamard_rounds": 1},
    {"head_dim": 96, "bits": 8, "scale": "unbiased"},
    {"head_dim": 50, "bits": 5},
    {"head_dim": 192, "bits": 2},
    {"head_dim": 768, "bits": 4},
    {"head_dim": 1536, "bits": 3, "scale": "mse"},
    {"head_dim": 127, "bits": 3, "scale": "mse"},
    {"head_dim": 7, "bits": 2},
    {"head_dim": 3000, "bits": 4},
    {"head_dim": 128, "bits": 4, "rotation": "haar"},
    {"head_dim": 128, "bits": 3, "rotation": "haar", "scale": "mse"},
    {"head_dim": 64, "bits": 8, "rotation": "haar"},
    {"head_dim": 96, "bits": 2, "rotation": "haar", "scale": "unbiased"},
    {"head_dim": 40, "bits": 4, "rotation": "haar"},
]


def vectors(shape: tuple[int, ...], dtype: Any) -> Any:
    return cupy.asarray(np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype))


def main() -> None:
    for i, settings in enumerate(KINDS):
        tq = TurboQuant(**settings)
        dtype = np.float16 if i % 2 == 0 else np.float32
        x = vectors((ROWS, tq.head_dim), dtype)
        packed, norms = tq.encode(x)
        strided = vectors((3, 2 * tq.head_dim + 8), dtype)[:, : tq.head_dim]
        tq.encode(strided)
        tq.decode(packed, norms, dtype=dtype)
        if tq.head_dim <= 192:
            tq.inner_products(x[:3], packed, norms)
            tokens = x.reshape(9, 5, -1)
            cache = [cupy.zeros((4, 4, 5, tq.packed_dim), np.uint8) for _ in range(2)]
            scales = [cupy.zeros((4, 4, 5), np.float32) for _ in range(2)]
            encode_paged(
                tokens,
                tokens,
                k_packed=cache[0],
                k_norms=scales[0],
                v_packed=cache[1],
                v_norms=scales[1],
                slot_mapping=cupy.asarray([3, -1, 15, 0, 1, 2, 9, 8, 7]),
                key_quantizer=tq,
            )
    cupy.cuda.Device().synchronize()
    print(len(compiled_kernels()), "kernels")


if __name__ == "__main__":
    main()
