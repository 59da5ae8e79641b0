"""How long a new process waits: for the import, and for its first encoded vector."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

__all__ = ["first_encode_seconds", "import_seconds"]

IMPORT = """
import time
start = time.perf_counter()
import turboquant_np
print(time.perf_counter() - start)
"""

FIRST_ENCODE = """
import time
import numpy as np
from turboquant_np import TurboQuant
x = np.ones((1, 128), np.float32)
start = time.perf_counter()
TurboQuant(head_dim=128, bits=4, backend={backend!r}).encode(x)
print(time.perf_counter() - start)
"""


def _seconds(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def import_seconds(times: int = 5) -> float:
    """Median time of ``import turboquant_np`` in a new process, NumPy's own import included."""
    return median(_seconds(IMPORT) for _ in range(times))


def first_encode_seconds(backend: str = "auto", times: int = 3) -> float:
    """Median time of the first `encode` of a new process when the compiled kernels are cached."""
    code = FIRST_ENCODE.format(backend=backend)
    _seconds(code)  # fills the cache
    return median(_seconds(code) for _ in range(times))
