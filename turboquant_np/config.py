"""`TurboQuantConfig`: the settings of a quantiser, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _arrays
from ._spec import SCALE_KINDS, CodecSpec, ScaleKind
from .codebook import check_bits, check_dim
from .rotation import HadamardRotation, Rotation, haar_rotation, rotation_from_matrix

__all__ = ["TurboQuantConfig"]

ROTATION_KINDS = ("hadamard", "haar")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, eq=False)
class TurboQuantConfig:
    """The settings of a `TurboQuant`.

    Parameters
    ----------
    head_dim : int
        Length of the vectors, at least 2; powers of two are fastest.
    bits : int
        Bits per coordinate, 1 to 8.
    seed : int
        Seed of the rotation, taken modulo 2**32.  The same seed gives the same rotation everywhere.
    use_hadamard : bool, optional
        The older spelling of `rotation`: True is "hadamard", False is "haar".
    hadamard_rounds : int
        Rounds of signs and transform, at least 1.  Three are needed for near-Haar errors on sparse
        vectors; one is fastest.
    device : {"auto", "cpu", "cuda"}
        Where arrays must live.  "auto" accepts both and works where each array is.
    dtype : dtype-like
        Output dtype of `decode`: float16, bfloat16, float32 or float64.
    use_triton : bool, optional
        Accepted so that code written for aither-kvcache runs; there is no Triton here.
    rotation : {"hadamard", "haar"} or array, shape [head_dim, head_dim]
        The random rotation, or an orthogonal matrix of your own.
    scale : {"norm", "mse", "unbiased"}
        What is stored beside the codes: the norm (as in the paper), the scale of least squared
        error, or the one that makes inner products with other vectors unbiased.  All decode alike.
    backend : str
        "auto", "reference", "cpu", "cuda", or the name of a registered backend.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of range, with the allowed ones.

    Examples
    --------
    >>> from turboquant_np import TurboQuantConfig
    >>> TurboQuantConfig(head_dim=64, bits=3).scale
    'norm'
    """

    head_dim: int = 128
    bits: int = 4
    seed: int = 42
    use_hadamard: bool | None = None
    hadamard_rounds: int = 3
    device: str = "auto"
    dtype: Any = "float16"
    use_triton: bool | None = None
    rotation: Any = "hadamard"
    scale: ScaleKind = "norm"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_dim(self.head_dim)
        check_bits(self.bits)
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        rounds = self.hadamard_rounds
        if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)):
            raise TypeError(f"hadamard_rounds must be an integer >= 1, got {rounds!r}")
        if not 1 <= rounds <= 16:
            raise ValueError(f"hadamard_rounds must be from 1 to 16, got {rounds}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.scale not in SCALE_KINDS:
            raise ValueError(f"scale must be one of {', '.join(SCALE_KINDS)}, got {self.scale!r}")
        if isinstance(self.rotation, str) and self.rotation not in ROTATION_KINDS:
            raise ValueError(
                f"rotation must be one of {', '.join(ROTATION_KINDS)} or an orthogonal matrix, "
                f"got {self.rotation!r}"
            )
        if self.use_hadamard is not None and not isinstance(self.rotation, str):
            raise ValueError("give use_hadamard or a rotation matrix, not both")
        if self.use_hadamard and self.rotation == "haar":
            raise ValueError("use_hadamard=True contradicts rotation='haar'; give one of them")
        _arrays.float_dtype(self.dtype)

    @property
    def rotation_kind(self) -> str:
        """ "hadamard", "haar" or "matrix"."""
        if not isinstance(self.rotation, str):
            return "matrix"
        if self.use_hadamard is None:
            return self.rotation
        return "hadamard" if self.use_hadamard else "haar"

    def make_spec(self) -> CodecSpec:
        """The constants that decide bits; builds the rotation."""
        return CodecSpec(int(self.bits), _make_rotation(self), self.scale)


def _make_rotation(config: TurboQuantConfig) -> Rotation:
    d, seed = int(config.head_dim), int(config.seed)
    kind = config.rotation_kind
    if kind == "hadamard":
        return HadamardRotation(d, seed, int(config.hadamard_rounds))
    if kind == "haar":
        return haar_rotation(d, seed % 2**32)
    rotation = rotation_from_matrix(config.rotation)
    if rotation.head_dim != d:
        raise ValueError(
            f"the rotation matrix is {rotation.head_dim} x {rotation.head_dim}, head_dim is {d}"
        )
    return rotation
