"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_table", "significant"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, the first one to the left.

    A newline in a header cell stacks it; stacked headers are aligned at the bottom.

    Examples
    --------
    >>> from turboquant_np.commands.table import format_table
    >>> print(format_table(["bits", "squared\\nerror"], [["1", "0.3609"], ["2", "0.1160"]]))
          squared
    bits    error
    1      0.3609
    2      0.1160
    """
    height = max(cell.count("\n") + 1 for cell in header)
    stacked = [cell.split("\n") for cell in header]
    columns = [[""] * (height - len(lines)) + lines for lines in stacked]
    lines = [*map(list, zip(*columns, strict=True)), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def significant(x: float) -> str:
    """Three significant digits, without an exponent down to 0.001.

    Examples
    --------
    >>> from turboquant_np.commands.table import significant
    >>> significant(0.36089), significant(0.00932), significant(4.021e-05)
    ('0.361', '0.00932', '4.02e-05')
    """
    return f"{x:#.3g}"
