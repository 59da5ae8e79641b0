"""Importing the package is quick and pulls in nothing that is not needed yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["numba", "llvmlite", "cupy", "torch", "jax", "scipy", "ml_dtypes", "hypothesis", "pytest"]


def run(code: str, cwd: Path) -> str:
    """Output of a fresh interpreter, in a folder where nothing shadows the installed package."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True).stdout


@pytest.mark.parametrize("module", ["turboquant_np", "turboquant_np.testing"])
def test_import_loads_no_heavy_module(module: str, tmp_path: Path) -> None:
    loaded = run(f"import sys, {module}; print(*sys.modules)", tmp_path).split()
    assert module in loaded
    assert not set(HEAVY) & set(loaded)


def test_import_takes_little_time(tmp_path: Path) -> None:
    # Processor time, as a busy machine is no fault of ours, beyond what NumPy itself takes.
    code = (
        "import time, numpy; t = time.process_time(); import turboquant_np; "
        "print(time.process_time() - t)"
    )
    assert min(float(run(code, tmp_path)) for _ in range(5)) < 0.2


def test_the_folder_of_backends_is_no_package_of_its_own(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, turboquant_np as t; "
        "t.TurboQuant(head_dim=8, backend='reference').encode(np.ones(8)); "
        "print(*sys.modules)"
    )
    loaded = run(code, tmp_path).split()
    assert "turboquant_np.backends.reference" in loaded
    assert "backends" not in loaded
    assert not set(HEAVY) & set(loaded)


def test_the_reference_backend_needs_no_compiler(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['numba'] = sys.modules['cupy'] = sys.modules['scipy'] = None\n"
        "import numpy as np, turboquant_np as t\n"
        "tq = t.TurboQuant(head_dim=64, backend='reference')\n"
        "print(tq.decode(*tq.encode(np.ones((2, 64)))).shape)"
    )
    assert run(code, tmp_path).strip() == "(2, 64)"
