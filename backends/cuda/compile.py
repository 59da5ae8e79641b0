"""Kernels compiled when they are first needed, once a process, variant and device.

CuPy compiles with NVRTC and keeps the result on disk ($CUPY_CACHE_DIR) for later processes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .source import variant_source

Macros = Mapping[str, str | int]

_kernels: dict[tuple[Any, ...], Kernel] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel with its launch shape.

    Attributes
    ----------
    function : cupy.RawKernel
    threads : int
        Threads a block.
    shared_bytes : int
        Dynamic shared memory a block.
    resident_blocks : int
        Blocks that run at the same time on the whole device.
    """

    function: Any
    threads: int
    shared_bytes: int
    resident_blocks: int

    def __call__(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch on the current stream of the current device."""
        self.function(grid, (self.threads,), arguments, shared_mem=self.shared_bytes)


def blocks_per_multiprocessor(
    attributes: Mapping[str, int], registers: int, threads: int, shared_bytes: int
) -> int:
    """How many blocks of a kernel a multiprocessor holds, by its registers, memory and threads."""
    by_registers = attributes["MaxRegistersPerMultiprocessor"] // (-(-registers // 8) * 8 * threads)
    by_memory = attributes["MaxSharedMemoryPerMultiprocessor"] // (shared_bytes + 1024)
    by_threads = attributes["MaxThreadsPerMultiProcessor"] // threads
    return max(1, min(by_registers, by_memory, by_threads))


@cache
def attributes_of(device: int) -> dict[str, int]:
    """Limits of a device, as CUDA calls them."""
    import cupy

    return dict(cupy.cuda.Device(device).attributes)


def max_shared_bytes() -> int:
    """Shared memory that a block may ask for on the current device."""
    import cupy

    return attributes_of(cupy.cuda.runtime.getDevice())["MaxSharedMemoryPerBlockOptin"]


def kernel(file: str, name: str, macros: Macros, threads: int, shared_bytes: int) -> Kernel:
    """Kernel `name` of kernels/`file` for the current device."""
    import cupy

    key = (cupy.cuda.runtime.getDevice(), file, name, tuple(macros.items()), threads, shared_bytes)
    found = _kernels.get(key)
    if found is None:
        function = _compile(file, name, macros)  # threads compile at the same time
        with _lock:
            found = _kernels.get(key) or _launchable(function, threads, shared_bytes)
            _kernels[key] = found
    return found


def compiled_kernels() -> list[str]:
    """What this process has compiled or loaded so far, one line a kernel."""
    return [
        f"device {device}: {name} ({' '.join(f'{k}={v}' for k, v in macros)})"
        for device, _, name, macros, _, _ in _kernels
    ]


def _compile(file: str, name: str, macros: Macros) -> Any:
    import cupy

    module = cupy.RawModule(code=variant_source(file, macros), options=("-std=c++17",))
    function = module.get_function(name)
    function.kernel  # noqa: B018 (compiles, which get_function need not do)
    return function


def _launchable(function: Any, threads: int, shared_bytes: int) -> Kernel:
    import cupy

    # CuPy gives the same function for the same source: another launch may have asked for more.
    if shared_bytes > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = shared_bytes
    attributes = attributes_of(cupy.cuda.runtime.getDevice())
    resident = attributes["MultiProcessorCount"] * blocks_per_multiprocessor(
        attributes, function.num_regs, threads, shared_bytes
    )
    return Kernel(function, threads, shared_bytes, resident)
