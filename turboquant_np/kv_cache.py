"""`PagedKVCache`: keys and values of running sequences, packed page by page.

The first tokens and the most recent ones of each sequence stay in full precision, in whole pages; a
page is packed when it leaves the window.  The mean of a sequence's first keys is removed before
packing and its product with the query added to the scores, which is exact.  Both matter more to a
model's output than any choice of code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Sized
from typing import Any, Literal

from . import _arrays
from ._attention_compute import check_host_compute
from ._kv_bulk import append_tokens, read_tokens
from ._kv_files import fill_cache, read_cache, write_cache
from ._kv_memory import allocate_groups
from ._kv_plan import Windows
from ._kv_sequences import SequenceStore
from ._kv_settings import array_library, check_sizes, describe_bits, layer_quantizers
from ._kv_stats import cache_stats
from ._kv_step import Step
from ._pages import OutOfPagesError
from .quantizer import TurboQuant

__all__ = ["OutOfPagesError", "PagedKVCache", "Step"]


STEP_TOKENS = 256  # new tokens of a step that there are full-precision pages for by default


class PagedKVCache(SequenceStore):
    """A paged cache of attention keys and values for a number of layers.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int
    num_blocks : int
        Packed pages, shared by all sequences; each holds `block_size` tokens of every layer.
    num_full_blocks : int, optional
        Full-precision pages.  By default what the windows of `max_sequences` sequences need, and
        256 tokens beside them that may come in one step.
    block_size : int
        Tokens of a page.
    max_sequences : int
        Key offsets that can be kept, one for each sequence that is not a fork.
    key_bits, value_bits : int or sequence of num_layers ints
        Bits of the default quantisers, of all layers or of each.
    key_quantizer, value_quantizer : TurboQuant or sequence of num_layers TurboQuants, optional
        Instead of the default ones, whose scale is "unbiased" for keys of 3 bits and more and
        values of 1 and 2 bits, else "mse".  Layers with the same two are packed together.
    sink_tokens, recent_tokens : int
        First and most recent tokens kept in full precision, rounded up to whole pages.
    key_offset_tokens : int
        Keys whose mean is the key offset; 0 for no offset.
    dtype : dtype-like
        Of full-precision pages: float16, bfloat16 or float32.
    device : {"cpu", "cuda"}
    compute : {"float32", "int8"}
        Arithmetic of attention to packed pages, as in `TQPagedAttention`.  "int8" is for
        device="cpu" and 1 to 4 bits; where it cannot be had, this constructor raises.

    Attributes
    ----------
    key_quantizers, value_quantizers : tuple of TurboQuant
        Of each layer.

    Raises
    ------
    ValueError, TypeError
        If a size is out of range, bits or quantisers do not fit the layers, or `compute` cannot be
        had.

    Examples
    --------
    >>> import numpy as np
    >>> from turboquant_np.kv_cache import PagedKVCache
    >>> cache = PagedKVCache(num_layers=1, num_kv_heads=2, head_dim=64, num_blocks=32)
    >>> sequence = cache.allocate()
    >>> rng = np.random.default_rng(0)
    >>> keys, values = rng.standard_normal((2, 200, 2, 64), np.float32)
    >>> step = cache.begin_step([sequence], [200])
    >>> step.append(0, keys, values)
    >>> query = rng.standard_normal((200, 4, 64), np.float32)
    >>> step.attend(0, query).shape
    (200, 4, 64)
    >>> cache.length(sequence)
    200
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_blocks: int,
        num_full_blocks: int | None = None,
        block_size: int = 16,
        max_sequences: int = 32,
        key_bits: int | Sized[int] = 4,
        value_bits: int | Sized[int] = 4,
        key_quantizer: TurboQuant | Sized[TurboQuant] | None = None,
        value_quantizer: TurboQuant | Sized[TurboQuant] | None = None,
        sink_tokens: int = 4,
        recent_tokens: int = 64,
        key_offset_tokens: int = 64,
        dtype: Any = "float16",
        device: str = "cpu",
        compute: Literal["float32", "int8"] = "float32",
    ) -> None:
        check_sizes(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            num_blocks=num_blocks,
            num_full_blocks=0 if num_full_blocks is None else num_full_blocks,
            block_size=block_size,
            max_sequences=max_sequences,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            key_offset_tokens=key_offset_tokens,
        )
        self.key_quantizers = layer_quantizers("key", key_quantizer, key_bits, num_layers, head_dim)
        self.value_quantizers = layer_quantizers(
            "value", value_quantizer, value_bits, num_layers, head_dim
        )
        pairs = zip(self.key_quantizers, self.value_quantizers, strict=True)
        check_host_compute(compute, device, pairs)
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.device, self.compute = device, compute
        self.dtype = _arrays.float_dtype(dtype)
        windows = Windows(block_size, sink_tokens, recent_tokens, key_offset_tokens)
        if num_full_blocks is None:
            of_one = windows.sink_pages + -(-recent_tokens // block_size) + 2
            num_full_blocks = max_sequences * of_one + -(-STEP_TOKENS // block_size)
        self._xp = array_library(device)
        groups = allocate_groups(
            self._xp,
            self.key_quantizers,
            self.value_quantizers,
            packed_pages=num_blocks,
            full_pages=num_full_blocks,
            offset_slots=max_sequences,
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            dtype=self.dtype,
        )
        super().__init__(windows, num_full_blocks, num_blocks, max_sequences, groups)
        views = {
            layer: group.single(row) for group in groups for row, layer in enumerate(group.layers)
        }
        self._layers = [views[layer] for layer in range(num_layers)]

    @property
    def key_quantizer(self) -> TurboQuant:
        """The quantiser of the keys of all layers.

        Raises
        ------
        ValueError
            If the layers have different ones; see `key_quantizers`.
        """
        return self._only("key")

    @property
    def value_quantizer(self) -> TurboQuant:
        """The quantiser of the values of all layers; see `key_quantizer`."""
        return self._only("value")

    def _only(self, side: str) -> TurboQuant:
        quantizers: tuple[TurboQuant, ...] = getattr(self, f"{side}_quantizers")
        if len(set(quantizers)) > 1:
            raise ValueError(
                f"the layers' {side}s have different quantisers: {side}_quantizers[layer]"
            )
        return quantizers[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, without the quantisers and what the machine decides."""
        windows = self._windows
        return {
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_blocks": len(self._packed.references),
            "num_full_blocks": len(self._full.references),
            "block_size": windows.block_size,
            "max_sequences": len(self._offsets.references),
            "sink_tokens": windows.sink_tokens,
            "recent_tokens": windows.recent_tokens,
            "key_offset_tokens": windows.key_offset_tokens,
            "dtype": self.dtype.name,
        }

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(layers={self.num_layers}, kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, key_bits={describe_bits(self.key_quantizers)}, "
            f"value_bits={describe_bits(self.value_quantizers)}, "
            f"sequences={len(self._sequences)}, "
            f"free pages={self._packed.free} packed + {self._full.free} full, "
            f"device={self.device}, compute={self.compute})"
        )

    # -- tokens ------------------------------------------------------------------------------------

    def begin_step(
        self, sequences: Sized[int], counts: Sized[int], *, pack_first: bool = False
    ) -> Step:
        """Make room for new tokens in all layers.

        Parameters
        ----------
        sequences : sequence of int
            Each at most once.
        counts : sequence of int
            New tokens of each; 0 for a sequence that is only attended to.
        pack_first : bool
            Pack what leaves the window of recent tokens before attention and not behind it.  A long
            prompt then needs few full-precision pages, but its tokens see neighbours packed that
            lie within their window, which costs quality (docs: benchmarks, quality).

        Returns
        -------
        Step
            Append every layer's keys and values to it; then the next step may begin.

        Raises
        ------
        OutOfPagesError
            If there are not enough pages; nothing is changed.  All new tokens take full-precision
            pages until the step is over: read a long prompt in several steps, or give the cache
            more of them (`num_full_blocks`).
        ValueError
            If a sequence is unknown or named twice, or a count is negative.
        RuntimeError
            If the step before is not finished.
        """
        self._no_open_step("begin a step")
        if len(sequences) != len(counts):
            raise ValueError(f"got {len(sequences)} sequences and {len(counts)} counts")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"a sequence is named twice in {list(sequences)}")
        if any(count < 0 for count in counts):
            raise ValueError(f"counts must not be negative, got {list(counts)}")
        states = [self._get(sequence) for sequence in sequences]
        plan = self._planner.plan(states, [int(count) for count in counts], pack_first=pack_first)
        self._version += 1
        step = Step(self, list(sequences), plan)
        try:
            step.prepare()
        except BaseException:
            self._planner.cancel(plan)
            raise
        self._open_step = step
        if not any(plan.counts):
            step.missing.clear()
            step.finish()
        return step

    def append(self, sequences: int | Sized[int], keys: Any, values: Any) -> None:
        """Append tokens of all layers at once, however many.

        Parameters
        ----------
        sequences : int or sequence of int, length tokens
            One sequence for all tokens, or the sequence of each token, in any order.
        keys, values : array, float, shape [num_layers, tokens, num_kv_heads, head_dim]
            The first axis may be left out if there is a single layer.

        Raises
        ------
        OutOfPagesError
            If there are not enough pages; nothing is changed.
        TypeError, ValueError
            If shapes or dtypes do not fit; nothing is changed.
        """
        append_tokens(self, sequences, keys, values)

    def read(self, sequence: int, layer: int) -> tuple[Any, Any]:
        """All keys and values of a sequence as attention sees them, decoded; for inspection.

        Returns
        -------
        keys, values : array, float32, shape [length, num_kv_heads, head_dim]
        """
        self._settle()
        return read_tokens(self, sequence, layer)

    # -- the whole cache ---------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all sequences to an .npz file, packed as they are, shared pages once.

        Raises
        ------
        RuntimeError
            If a step is open or a sequence is swapped out.
        """
        self._no_open_step("save")
        if self._swapped:
            raise RuntimeError(f"swap in the sequences {sorted(self._swapped)} before saving")
        write_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        num_blocks: int | None = None,
        num_full_blocks: int | None = None,
        device: str = "cpu",
        compute: Literal["float32", "int8"] = "float32",
    ) -> PagedKVCache:
        """Read a cache written by `save`; sequences keep their identifiers.

        Parameters
        ----------
        path : path-like
        num_blocks, num_full_blocks : int, optional
            Sizes of the new cache, by default those of the saved one.
        device : {"cpu", "cuda"}
        compute : {"float32", "int8"}
            Like the device no part of the file: it depends on the machine.

        Raises
        ------
        StorageError
            If the file is damaged, of another kind or of a newer version.
        OutOfPagesError
            If the new cache is too small.
        ValueError
            If `compute` cannot be had.
        """
        saved = read_cache(path)
        settings = saved.settings
        if num_blocks is not None:
            settings["num_blocks"] = num_blocks
        if num_full_blocks is not None:
            settings["num_full_blocks"] = num_full_blocks
        cache = cls(**settings, device=device, compute=compute)
        fill_cache(cache, saved)
        return cache

    def stats(self) -> dict[str, Any]:
        """Sizes in bytes, and how well they are used.

        Returns
        -------
        dict
            ``tokens`` (of all sequences, shared ones counted for each), ``stored_tokens`` (shared
            ones once); ``packed_pages`` and ``full_pages`` (used, total); ``allocated_bytes`` (all
            pools, norms and key offsets included), ``used_bytes`` (of pages in use),
            ``layer_bytes`` (of pages in use, a list by layer), ``swapped_bytes``; ``fp16_bytes``
            (of the stored tokens in float16), ``ratio_vs_fp16`` (fp16_bytes / used_bytes);
            ``fragmentation`` (share of the token slots in used pages that hold no token).
        """
        self._settle()
        return cache_stats(self)
