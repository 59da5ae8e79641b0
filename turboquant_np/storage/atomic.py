"""Files that appear complete or not at all."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[io.BufferedRandom]:
    """Open a file for writing which takes its name when the block ends without an error.

    Until then it lies beside its destination under a hidden name.  A file that already has the name
    is replaced in one step; whoever reads or maps it keeps the old one.
    """
    final = Path(os.path.realpath(path))  # replaces what a symbolic link points to, not the link
    partial = final.with_name(f".{final.name[:64]}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
