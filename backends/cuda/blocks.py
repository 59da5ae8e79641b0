"""Launching kernels/any.cu: one block of threads a vector, for any head_dim."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import Kernel, kernel, max_shared_bytes
from .layout import block_threads, block_workspace_bytes


def block_kernel(name: str, type_name: str, head_dim: int) -> tuple[Kernel, bool]:
    """A kernel of any.cu, and whether its rows need scratch memory instead of shared memory."""
    workspace = block_workspace_bytes(head_dim)
    fits = workspace <= max_shared_bytes()
    macros = {"TYPE": type_name}
    threads = block_threads(head_dim)
    return kernel("any.cu", name, macros, threads, workspace if fits else 0), not fits


def block_launch(name: str, type_name: str, head_dim: int, rows: int, *arguments: Any) -> None:
    """Launch a kernel of any.cu whose last two arguments are the scratch memory and its size."""
    import cupy

    compiled, needs_scratch = block_kernel(name, type_name, head_dim)
    blocks = min(rows, compiled.resident_blocks)
    size = block_workspace_bytes(head_dim)
    scratch = cupy.empty(blocks * size, np.uint8) if needs_scratch else None
    compiled((blocks,), (*arguments, scratch, np.int64(size)))
