"""Memory that the launches of an attention step share, kept for each stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from .attention_shapes import ALIGNMENT

buffers: dict[tuple[int, int], Any] = {}
captured: list[Any] = []  # what a graph may still read or write


def scratch_of(device: int, stream: Any, size: int, capturing: bool) -> Any:
    """Scratch memory of a stream, kept between calls; it grows and never shrinks."""
    import cupy

    key = (device, int(stream.ptr))
    buffer = buffers.get(key)
    if buffer is None or buffer.nbytes < size:
        buffer = buffers[key] = cupy.empty(size, np.uint8)
    if capturing and not any(buffer is b for b in captured):
        captured.append(buffer)
    return buffer


_barriers: dict[tuple[int, int], Any] = {}


def barrier_of(device: int, stream: int) -> int:
    """Address of the counter of a stream's launches whose blocks wait for each other; zero.

    Fresh memory, not from the pool, and set on a stream of its own: `stream` may be recording.
    """
    import cupy

    memory = _barriers.get((device, stream))
    if memory is None:
        memory = _barriers[device, stream] = cupy.cuda.Memory(ALIGNMENT)
        other = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.runtime.memsetAsync(memory.ptr, 0, ALIGNMENT, other.ptr)
        other.synchronize()
    return int(memory.ptr)
