"""Launching kernels/any.cu: one team of threads a vector, for any head_dim."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import Kernel, kernel, max_shared_bytes
from .layout import block_threads, workspace_bytes

WARPS = 4  # a block has where a team is a warp
MAX_WARP_WORKSPACE = 8192  # bytes; longer rows get a block, so that enough warps are resident


def team_kernel(name: str, type_name: str, head_dim: int) -> tuple[Kernel, int, bool]:
    """A kernel of any.cu, teams a block has, and whether rows need scratch memory."""
    workspace = workspace_bytes(head_dim)
    fits = workspace <= max_shared_bytes()
    if workspace <= MAX_WARP_WORKSPACE:
        team, teams, threads = "Warp", WARPS, 32 * WARPS
    else:
        team, teams, threads = "Block" if fits else "ScratchBlock", 1, block_threads(head_dim)
    macros = {"TYPE": type_name, "TEAM": team}
    shared = teams * workspace if fits else 0
    return kernel("any.cu", name, macros, threads, shared), teams, not fits


def team_launch(name: str, type_name: str, head_dim: int, rows: int, *arguments: Any) -> None:
    """Launch a kernel of any.cu whose last two arguments are the scratch memory and its size."""
    import cupy

    compiled, teams, needs_scratch = team_kernel(name, type_name, head_dim)
    blocks = min(-(-rows // teams), compiled.resident_blocks)
    size = workspace_bytes(head_dim)
    scratch = cupy.empty(blocks * teams * size, np.uint8) if needs_scratch else None
    compiled((blocks,), (*arguments, scratch, np.int64(size)))
