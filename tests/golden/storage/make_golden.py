"""Write the golden files of the current format version; run once for each version.

Files of older versions are never written again: they prove that old files still decode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from turboquant_np import FORMAT_VERSION, QuantizedArray, TurboQuant, save

HERE = Path(__file__).parent

# name -> settings, shape and dtype of the original
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "hadamard.npz": (dict(head_dim=16, bits=4), (3, 2, 16), "float16"),
    "hadamard.safetensors": (dict(head_dim=12, bits=3, seed=-1, scale="mse"), (5, 12), "float32"),
    "haar.npz": (dict(head_dim=5, bits=8, rotation="haar", seed=7), (5,), "float64"),
    "matrix.npz": (dict(head_dim=4, bits=2, scale="unbiased"), (3, 4), "bfloat16"),
    "matrix.safetensors": (dict(head_dim=4, bits=1), (2, 4), "float32"),
    "empty.npz": (dict(head_dim=64, bits=5, hadamard_rounds=1), (0, 64), "float16"),
}
MATRIX = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [3, 1, -3, -1], [1, -3, -1, 3]])


def original(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Numbers that are exact in every dtype: multiples of 1/8 from -7 to 7."""
    n = int(np.prod(shape))
    return ((np.arange(n) * 37 % 113 - 56) / 8).astype(np.float32).reshape(shape)


def quantize(name: str) -> QuantizedArray:
    """The quantised array of a golden file."""
    settings, shape, dtype = CASES[name]
    if name.startswith("matrix"):
        rotation = MATRIX / np.linalg.norm(MATRIX, axis=1, keepdims=True)
        settings = settings | dict(rotation=rotation)
    quantizer = TurboQuant(**settings, backend="reference")
    packed, norms = quantizer.encode(original(shape))
    return QuantizedArray(packed, norms, quantizer, dtype)


def main() -> None:
    """Write the files and, as hexadecimal float32, what they decode to."""
    decoded = {}
    for name in CASES:
        quantized = quantize(name)
        save(HERE / f"v{FORMAT_VERSION}_{name}", quantized)
        decoded[name] = quantized.decode(dtype=np.float32).astype("<f4").tobytes().hex()
    text = json.dumps(decoded, indent=2) + "\n"
    (HERE / f"v{FORMAT_VERSION}_decoded.json").write_text(text)


if __name__ == "__main__":
    main()
