"""Make format_1.npz: encoded and decoded vectors that no version may ever change.

Run it once for each FORMAT_VERSION; a test compares the stored bits with every backend.  Inputs
come from whole numbers and powers of two, so that no random generator has to stay the same either.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_np import FORMAT_VERSION, TurboQuant
from turboquant_np.testing.conformance import varied_configs


def vectors(head_dim: int) -> npt.NDArray[np.float32]:
    """[8, head_dim]: dense ones at several magnitudes, sparse, constant, zero."""
    i, j = np.arange(8)[:, None], np.arange(head_dim)
    x = ((7919 * i + 104_729 * j + 31 * i * j * j) % 2003 - 1001) / 1024
    x[2] = j == 1
    x[3] = 1.0
    x[4] = 0.0
    x *= 2.0 ** np.array([0, 3, -2, 0, 0, 100, -120, -140])[:, None]
    return x.astype(np.float32)


def main() -> None:
    arrays: dict[str, Any] = {}
    for config in varied_configs():
        x = vectors(config.head_dim)
        tq = TurboQuant(replace(config, backend="reference"))
        packed, norms = tq.encode(x)
        case = f"{config.head_dim}/{config.bits}/{config.rotation}/{config.scale}/{config.seed}"
        arrays[f"{config.head_dim}/x"] = x
        arrays[f"{case}/packed"] = packed
        arrays[f"{case}/norms"] = norms
        arrays[f"{case}/decoded"] = tq.decode(packed, norms, dtype=np.float32)
    path = Path(__file__).with_name(f"format_{FORMAT_VERSION}.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
