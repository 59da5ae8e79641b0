"""What a benchmark is asked to do, and which sections there are."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["GROWTH", "QUICK_SECTIONS", "SECTIONS", "Options", "usable_cores"]

SECTIONS = {
    "codec": "encode and decode beside the rooflines of the machine",
    "attention": "a decoding step on a packed, paged cache; prefill",
    "append": "new tokens into a paged cache",
    "validation": "errors of random vectors beside theory",
    "memory": "bytes of a KV cache, longest contexts",
    "startup": "import, and the first call of a process",
    "growth": "how time grows with context, batch, vectors, length, bits and threads",
}
GROWTH = "growth"
QUICK_SECTIONS = tuple(name for name in SECTIONS if name != GROWTH)


@dataclass(frozen=True)
class Options:
    """What to measure, and with how much data.

    Attributes
    ----------
    sections : tuple of str
        Keys of `SECTIONS`.
    full : bool
        Every setting.
    peers : bool
        Other libraries, too.
    device : {"cpu", "cuda"}
    backend : str
    megabytes : float
        Size of the vectors of a case, and of all pages a case rotates over.
    """

    sections: tuple[str, ...] = QUICK_SECTIONS
    full: bool = False
    peers: bool = False
    device: str = "cpu"
    backend: str = "auto"
    megabytes: float = 64.0


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
