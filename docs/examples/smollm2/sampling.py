"""Choose the next tokens of a batch, where the scores are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Sampling", "choose"]


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes
    ----------
    temperature : float
        0 takes the most likely token.
    top_p : float
        Leaves out the unlikely tokens whose probabilities sum to less than 1 - top_p.
    seed : int
        A request's tokens depend on its seed and not on what else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def choose(xp: Any, logits: Any, samplings: list[Sampling], uniforms: list[float]) -> Any:
    """One token for each row.

    Parameters
    ----------
    xp : module
    logits : float32 [n, vocabulary]
    samplings : list of Sampling, length n
    uniforms : list of float, length n
        Random numbers in [0, 1).

    Returns
    -------
    int array [n]
    """
    likeliest = logits.argmax(axis=-1)
    if not any(s.temperature for s in samplings):
        return likeliest
    temperature, top_p, uniform = xp.asarray(
        np.array([[s.temperature for s in samplings], [s.top_p for s in samplings], uniforms])
    )[:, :, None]
    order = xp.argsort(-logits, axis=-1)
    ranked = xp.take_along_axis(logits, order, axis=-1).astype(np.float64)
    ranked /= xp.where(temperature > 0, temperature, 1)
    weights = xp.exp(ranked - ranked[:, :1])
    weights /= weights.sum(axis=-1, keepdims=True)
    before = weights.cumsum(axis=-1) - weights
    weights = xp.where(before < top_p, weights, 0)  # always keeps the likeliest
    below = weights.cumsum(axis=-1)
    rank = (below <= uniform * below[:, -1:]).sum(axis=-1, keepdims=True)
    drawn = xp.take_along_axis(order, rank, axis=-1)
    return xp.where(temperature > 0, drawn, likeliest[:, None])[:, 0]
