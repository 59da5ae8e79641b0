"""What a quantiser is, without any array: settings, codebook, expected errors, sizes."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _arrays, memory
from .codebook import get_theory_bounds
from .config import TurboQuantConfig
from .theory import expected_mse

__all__ = ["QuantizerFacts"]


class QuantizerFacts:
    """What `TurboQuant` tells of itself; parameters and errors are described there."""

    def __init__(self, config: TurboQuantConfig | None = None, **settings: Any) -> None:
        if config is not None and not isinstance(config, TurboQuantConfig):
            raise TypeError(
                f"the first argument is a TurboQuantConfig, got {config!r}; "
                "name the settings, for example TurboQuant(head_dim=128, bits=4)"
            )
        if config is not None and settings:
            raise TypeError(
                f"give a config or keywords, not both (got {', '.join(settings)}); "
                "dataclasses.replace(config, ...) changes a config"
            )
        known = [field.name for field in fields(TurboQuantConfig)]
        if unknown := sorted(set(settings) - set(known)):
            raise TypeError(
                f"unknown settings: {', '.join(unknown)}; the known ones are {', '.join(known)}"
            )
        self.config = config if config is not None else TurboQuantConfig(**settings)
        self._spec = self.config.make_spec()

    @property
    def head_dim(self) -> int:
        """Length of the vectors."""
        return self._spec.head_dim

    @property
    def bits(self) -> int:
        """Bits per coordinate."""
        return self._spec.bits

    @property
    def num_levels(self) -> int:
        """Number of centroids, 2**bits."""
        return 1 << self.bits

    @property
    def packed_dim(self) -> int:
        """Bytes of packed codes for each vector: ceil(head_dim * bits / 8)."""
        return self._spec.packed_dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """Default output dtype of `decode`."""
        return _arrays.float_dtype(self.config.dtype)

    @property
    def device(self) -> str:
        """ "auto", "cpu" or "cuda"."""
        return self.config.device

    @property
    def rotation(self) -> npt.NDArray[np.float32]:
        """[head_dim, head_dim] with rotated = rotation @ x, for inspection."""
        return self._spec.rotation.matrix

    @cached_property
    def centroids(self) -> npt.NDArray[np.float32]:
        """[2**bits] reconstruction levels for a coordinate of a unit vector, ascending."""
        return (self._spec.centroids / math.sqrt(self.head_dim)).astype(np.float32)

    @cached_property
    def boundaries_inner(self) -> npt.NDArray[np.float32]:
        """[2**bits - 1] decision boundaries for a coordinate of a unit vector."""
        return (self._spec.thresholds / math.sqrt(self.head_dim)).astype(np.float32)

    @cached_property
    def mse_total(self) -> float:
        """Exact expected squared error of a unit vector under a Haar rotation, scale "norm"."""
        return expected_mse(self.head_dim, self.bits)

    @property
    def theory_lower(self) -> float:
        """Lower bound on the squared error of a unit vector for any quantiser: 4**-bits."""
        return get_theory_bounds(self.bits)[0]

    @property
    def theory_upper(self) -> float:
        """Upper bound of theorem 1 of arXiv:2504.19874: sqrt(3) pi / 2 * 4**-bits."""
        return get_theory_bounds(self.bits)[1]

    def __repr__(self) -> str:
        return (
            f"TurboQuant(d={self.head_dim}, bits={self.bits}, "
            f"compress={self.compression_ratio():.1f}x, mse={self.mse_total:.4f}, "
            f"rotation={self.config.rotation_kind}, scale={self.config.scale}, "
            f"engine={self.config.backend})"
        )

    def compression_ratio(self) -> float:
        """Bytes of float16 vectors over bytes of packed ones, scales included."""
        return 2 * self.head_dim / (self.packed_dim + 4)

    def compression_ratio_vs_fp8(self) -> float:
        """Bytes of 8-bit vectors over bytes of packed ones, scales included."""
        return self.head_dim / (self.packed_dim + 4)

    def memory_report(
        self, seq_len: int, num_layers: int = 32, num_kv_heads: int = 8
    ) -> dict[str, Any]:
        """Size of a KV cache, keys and values, scales included; see `turboquant_np.memory`.

        Parameters
        ----------
        seq_len : int
            Tokens.
        num_layers, num_kv_heads : int

        Returns
        -------
        dict
            ``config``, ``fp16_mb``, ``fp8_mb``, ``tq{bits}_mb`` (MiB), ``ratio_vs_fp16``,
            ``ratio_vs_fp8``.

        Examples
        --------
        >>> from turboquant_np import TurboQuant
        >>> TurboQuant(bits=4).memory_report(40_000)["tq4_mb"]
        1328.125
        """
        return memory.memory_report(self.head_dim, self.bits, seq_len, num_layers, num_kv_heads)
