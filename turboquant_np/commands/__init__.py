"""The commands of ``turboquant-np``, one module each."""

from __future__ import annotations

__all__ = ["CommandError"]


class CommandError(Exception):
    """A mistake in the call: printed as one line on stderr, exit code 2."""
