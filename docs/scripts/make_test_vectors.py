"""Write docs/test_vectors.json with the reference backend; see docs/format.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from turboquant_np import FORMAT_VERSION, TurboQuant
from turboquant_np.rotation import haar_rotation, random_signs

Settings = dict[str, Any]

RAMP8 = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
WAVE = [((37 * i) % 101 - 50) / 16 for i in range(128)]
CASES: list[tuple[str, Settings, list[float]]] = [
    ("power of two", {"bits": 3, "seed": 42}, RAMP8),
    ("scale mse", {"bits": 3, "seed": 42, "scale": "mse"}, RAMP8),
    ("scale unbiased", {"bits": 3, "seed": 42, "scale": "unbiased"}, RAMP8),
    ("one round, 1 bit", {"bits": 1, "seed": 7, "hadamard_rounds": 1}, RAMP8),
    ("other length, even", {"bits": 2, "seed": 42}, [1, -2, 3, -4, 5, -6]),
    ("other length, odd", {"bits": 5, "seed": 42}, [1, -2, 3, -4, 5, -6, 7]),
    ("seed wraps", {"bits": 4, "seed": 2**32 - 1}, [0.5, -0.25, 0.125, 3.0]),
    ("haar", {"bits": 4, "seed": 42, "rotation": "haar"}, [1, 2, 3, 4]),
    ("haar, other length", {"bits": 8, "seed": 1, "rotation": "haar"}, [1, 0, -1, 0.5, 2]),
    ("normal codebook", {"bits": 4, "seed": 42}, WAVE),
    ("zero row", {"bits": 4, "seed": 42}, [0.0] * 8),
    ("subnormal row", {"bits": 4, "seed": 42}, [2.0**-149, -(2.0**-140), 0, 0, 2.0**-141, 0, 0, 0]),
    ("large row", {"bits": 4, "seed": 42}, [2.0**126, -(2.0**125), 1, 0, 2.0**100, 0, 0, 0]),
    ("coordinates on a threshold", {"bits": 2, "seed": 42}, [1, 1, 0, 0, 0, 0, 0, 0]),
    ("not finite", {"bits": 4, "seed": 42}, [float("inf"), 1, 2, 3]),
]


def bits_of(values: Any) -> list[str]:
    """float32 numbers as eight hexadecimal digits; every NaN as "nan"."""
    floats = np.asarray(values, np.float32).reshape(-1)
    return [
        "nan" if np.isnan(f) else f"{int(bits):08x}"
        for f, bits in zip(floats, floats.view(np.uint32), strict=True)
    ]


def encode_case(settings: Settings, x: Any) -> dict[str, Any]:
    tq = TurboQuant(head_dim=len(x), backend="reference", **settings)
    packed, stored = tq.encode(np.array(x, np.float32), check_finite=False)
    return {
        "packed": packed.tobytes().hex(),
        "stored": bits_of(stored)[0],
        "decoded": bits_of(tq.decode(packed, stored, dtype=np.float32)),
    }


def make() -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "signs": [
            {"seed": seed, "signs": random_signs(8, seed).astype(int).tolist()}
            for seed in (0, 42, 43, 44)
        ],
        "haar": [
            {"d": d, "seed": seed, "matrix": haar_rotation(d, seed).fixed.astype(int).tolist()}
            for d, seed in ((4, 42), (5, 1))
        ],
        "vectors": [
            {"name": name, **settings, "x": bits_of(x), **encode_case(settings, x)}
            for name, settings, x in CASES
        ],
    }


def write(path: Path) -> None:
    """One line for each entry, so that the file reads well and differs well."""
    lines = [
        f'"{part}": [\n' + ",\n".join("  " + json.dumps(entry) for entry in entries) + "\n]"
        if isinstance(entries, list)
        else f'"{part}": {entries}'
        for part, entries in make().items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "ascii")


if __name__ == "__main__":
    write(Path(__file__).parent.parent / "test_vectors.json")
