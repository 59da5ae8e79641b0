"""A progress bar for long commands: how much is done, how fast, how long it still takes."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

SECONDS_BETWEEN_DRAWINGS = 0.1
BAR_WIDTH = 24


class ProgressBar:
    """Draws ``label [####----] 42 %`` with elapsed time, rate and remaining time on one line.

    Draws nothing unless `stream` is a terminal, so output in files and pipes stays clean.  It is
    called as the library calls a `progress` callback: with what is done so far, and the total.

    Parameters
    ----------
    label : str
    unit : str
        What is counted, in the plural.
    stream : text file, optional
        By default standard error.
    clock : callable
        Seconds, from any origin.

    Examples
    --------
    >>> import io
    >>> with ProgressBar("encode", "vectors", stream=io.StringIO()) as progress:
    ...     progress(1, 2)
    ...     progress(2, 2)
    """

    def __init__(
        self,
        label: str,
        unit: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.unit = label, unit
        self._stream = sys.stderr if stream is None else stream
        self._visible = self._stream.isatty()
        self._clock = clock
        self._start = clock()
        self._last_drawn = -float("inf")
        self._drawn_width = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._drawn_width:
            self._stream.write("\n")  # the last state stays readable, above a result or an error
            self._stream.flush()

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if not self._visible:
            return
        if done < total and now - self._last_drawn < SECONDS_BETWEEN_DRAWINGS:
            return
        self._last_drawn = now
        line = self.line(done, total, now - self._start)
        line = line[: shutil.get_terminal_size().columns - 1]
        self._stream.write("\r" + line.ljust(self._drawn_width))
        self._stream.flush()
        self._drawn_width = len(line)

    def line(self, done: int, total: int, elapsed: float) -> str:
        """The text of the bar after `elapsed` seconds."""
        fraction = done / total if total else 1.0
        filled = int(fraction * BAR_WIDTH)
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        text = f"{self.label} [{bar}] {int(100 * fraction):3d} %  {format_seconds(elapsed)}"
        if done and elapsed > 0:
            rate = done / elapsed
            text += f"  {format_count(rate)} {self.unit}/s"
            if done < total:
                text += f"  {format_seconds((total - done) / rate)} left"
        return text


def format_seconds(seconds: float) -> str:
    """ "0:07", "12:34" or "1:02:03".

    Examples
    --------
    >>> format_seconds(7), format_seconds(754), format_seconds(3723)
    ('0:07', '12:34', '1:02:03')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_count(count: float) -> str:
    """Three digits and a decimal prefix: "999", "12.3 k", "4.56 M".

    Examples
    --------
    >>> format_count(999), format_count(12_345), format_count(4_560_000)
    ('999', '12.3 k', '4.56 M')
    """
    prefixes = ["", " k", " M", " G", " T", " P"]
    while count >= 999.5 and len(prefixes) > 1:
        count /= 1000
        prefixes.pop(0)
    return f"{count:.3g}{prefixes[0]}"
