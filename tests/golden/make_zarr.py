"""Write tests/golden/zarr: stores that guard the format.

Run once for a format version; a later release must read these files, not replace them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import turboquant_np.numcodecs
import turboquant_np.zarr

FOLDER = Path(__file__).parent / "zarr"


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    x = np.random.default_rng(1).standard_normal((10, 3, 24)).astype(np.float32)
    np.save(FOLDER / "vectors.npy", x)
    stores: dict[str, dict[str, Any]] = {
        "plain": {
            "dtype": "float32",
            "chunks": (6, 2, 24),
            "serializer": turboquant_np.zarr.TurboQuantCodec(bits=3, seed=11),
            "compressors": None,
        },
        "sharded": {
            "dtype": "float16",
            "chunks": (2, 3, 24),
            "shards": (6, 3, 24),
            "serializer": turboquant_np.zarr.TurboQuantCodec(
                bits=4, seed=11, rotation="haar", scale="unbiased"
            ),
            "compressors": None,
        },
        "format_2": {
            "dtype": "float32",
            "chunks": (6, 3, 24),
            "zarr_format": 2,
            "compressors": turboquant_np.numcodecs.TurboQuantCodec(
                head_dim=24, bits=5, seed=11, scale="mse"
            ),
        },
    }
    for name, settings in stores.items():
        array = zarr.create_array(FOLDER / f"{name}.zarr", shape=x.shape, **settings)
        array[:] = x
        np.save(FOLDER / f"{name}.npy", array[:])


if __name__ == "__main__":
    main()
