"""How a time grows: the slope of a straight line through logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Growth", "fit"]


class Growth(NamedTuple):
    """Exponents p of ``time = c * x**p``.

    Attributes
    ----------
    slope : float
        Of the straight line of least squares through all points.
    steepest : float
        The largest between neighbours: where a path is superlinear, however short, this shows.
    between : (float, float)
        Where that is.
    """

    slope: float
    steepest: float
    between: tuple[float, float]


def fit(x: Sequence[float], seconds: Sequence[float]) -> Growth:
    """Fit a power law.

    Parameters
    ----------
    x, seconds : sequences of positive numbers, the same length, at least 2
        In any order; no two x alike.

    Raises
    ------
    ValueError
        If there are too few points.

    Examples
    --------
    >>> from turboquant_np.bench.fits import fit
    >>> growth = fit([1, 10, 100], [2, 20, 2000])
    >>> round(growth.slope, 3), round(growth.steepest, 3), growth.between
    (1.5, 2.0, (10, 100))
    """
    if len(x) < 2 or len(x) != len(seconds):
        raise ValueError(f"a slope needs two points or more, got {len(x)} and {len(seconds)}")
    order = np.argsort(x)
    log_x, log_y = (np.log(np.asarray(values, np.float64))[order] for values in (x, seconds))
    slope = np.polyfit(log_x, log_y, 1)[0]
    parts = np.diff(log_y) / np.diff(log_x)
    at = int(parts.argmax())
    return Growth(float(slope), float(parts[at]), (x[order[at]], x[order[at + 1]]))
