"""`PagedKVCache`: keys and values of running sequences, packed page by page.

The first tokens and the most recent ones of each sequence stay in full precision, in whole pages; a
page is packed when it leaves the window.  The mean of a sequence's first keys is removed before
packing and its product with the query added to the scores, which is exact.  Both matter more to a
model's output than any choice of code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Sized
from typing import Any

import numpy as np

from . import _arrays
from ._kv_plan import Planner, Windows
from ._kv_step import Step
from ._kv_transfer import SwappedSequence, fill_cache, read_cache, swap_in, swap_out, write_cache
from ._pages import OutOfPagesError, Page, PagePool, Sequence
from .quantizer import TurboQuant

__all__ = ["OutOfPagesError", "PagedKVCache", "Step"]


STEP_TOKENS = 256  # new tokens of a step that there are full-precision pages for by default


class PagedKVCache:
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
    key_bits, value_bits : int
        Bits of the default quantisers.
    key_quantizer, value_quantizer : TurboQuant, optional
        Instead of the default ones, whose scale is "unbiased" for keys at 3 bits and more, else
        "mse".
    sink_tokens, recent_tokens : int
        First and most recent tokens kept in full precision, rounded up to whole pages.
    key_offset_tokens : int
        Keys whose mean is the key offset; 0 for no offset.
    dtype : dtype-like
        Of full-precision pages: float16, bfloat16 or float32.
    device : {"cpu", "cuda"}

    Raises
    ------
    ValueError, TypeError
        If a size is out of range or a quantiser does not fit.

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
        key_bits: int = 4,
        value_bits: int = 4,
        key_quantizer: TurboQuant | None = None,
        value_quantizer: TurboQuant | None = None,
        sink_tokens: int = 4,
        recent_tokens: int = 64,
        key_offset_tokens: int = 64,
        dtype: Any = "float16",
        device: str = "cpu",
    ) -> None:
        sizes = dict(
            num_layers=(num_layers, 1),
            num_kv_heads=(num_kv_heads, 1),
            num_blocks=(num_blocks, 0),
            block_size=(block_size, 1),
            max_sequences=(max_sequences, 1),
            sink_tokens=(sink_tokens, 0),
            recent_tokens=(recent_tokens, 0),
            key_offset_tokens=(key_offset_tokens, 0),
        )
        if num_full_blocks is not None:
            sizes["num_full_blocks"] = (num_full_blocks, 0)
        for name, (size, least) in sizes.items():
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        key_scale = "unbiased" if key_bits >= 3 else "mse"
        self.key_quantizer = key_quantizer or TurboQuant(
            head_dim=head_dim, bits=key_bits, scale=key_scale
        )
        self.value_quantizer = value_quantizer or TurboQuant(
            head_dim=head_dim, bits=value_bits, scale="mse"
        )
        for name, quantizer in (("key", self.key_quantizer), ("value", self.value_quantizer)):
            if quantizer.head_dim != head_dim:
                raise ValueError(
                    f"{name}_quantizer has head_dim {quantizer.head_dim}, the cache {head_dim}"
                )
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.device = device
        self.dtype = _arrays.float_dtype(dtype)
        self._windows = Windows(block_size, sink_tokens, recent_tokens, key_offset_tokens)
        if num_full_blocks is None:
            of_one = self._windows.sink_pages + -(-recent_tokens // block_size) + 2
            num_full_blocks = max_sequences * of_one + -(-STEP_TOKENS // block_size)
        self._full = PagePool(num_full_blocks, "full-precision pages")
        self._packed = PagePool(num_blocks, "packed pages")
        self._offsets = PagePool(max_sequences, "key offsets (max_sequences)")
        self._planner = Planner(self._windows, self._full, self._packed, self._offsets)
        self._xp = _array_library(device)
        self._allocate_memory()
        self._sequences: dict[int, Sequence] = {}
        self._swapped: dict[int, SwappedSequence] = {}
        self._next_sequence = 0
        self._open_step: Step | None = None
        self._attended_step: Step | None = None  # finished, its pages not packed yet
        self._version = 0  # counts what makes page tables of earlier steps invalid

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, without the quantisers and the device."""
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

    def _allocate_memory(self) -> None:
        """Pages, zeroed: [num_layers, pages, block_size, num_kv_heads, ...]."""
        xp, size = self._xp, self._windows.block_size
        packed = (self.num_layers, len(self._packed.references), size, self.num_kv_heads)
        full = (self.num_layers, len(self._full.references), size, self.num_kv_heads)
        self._k_packed = xp.zeros((*packed, self.key_quantizer.packed_dim), np.uint8)
        self._v_packed = xp.zeros((*packed, self.value_quantizer.packed_dim), np.uint8)
        self._k_norms, self._v_norms = xp.zeros(packed, np.float32), xp.zeros(packed, np.float32)
        self._k_full = xp.zeros((*full, self.head_dim), self.dtype)
        self._v_full = xp.zeros((*full, self.head_dim), self.dtype)
        slots = len(self._offsets.references) + 1  # the last one stays zero: "no offset"
        offsets = (self.num_layers, slots, self.num_kv_heads, self.head_dim)
        self._key_offsets = xp.zeros(offsets, np.float32)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(layers={self.num_layers}, kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, key_bits={self.key_quantizer.bits}, "
            f"value_bits={self.value_quantizer.bits}, sequences={len(self._sequences)}, "
            f"free pages={self._packed.free} packed + {self._full.free} full, "
            f"device={self.device})"
        )

    # -- sequences ---------------------------------------------------------------------------------

    @property
    def sequences(self) -> list[int]:
        """Identifiers of all sequences, swapped-out ones included."""
        return sorted([*self._sequences, *self._swapped])

    def allocate(self) -> int:
        """Start an empty sequence; returns its identifier.  Takes no memory yet."""
        return self._register(Sequence())

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        swapped = self._swapped.get(sequence)
        return swapped.length if swapped else self._get(sequence).length

    def fork(self, sequence: int) -> int:
        """A second sequence with the same tokens, which shares their pages until one is written.

        Returns
        -------
        int
            Identifier of the new sequence.
        """
        self._no_open_step("fork")
        source = self._get(sequence)
        for page in source.pages:
            self._planner.pool(page).share(page.number)
        if source.offset is not None:
            self._offsets.share(source.offset)
        return self._register(source.copy())

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from `length` on, for example rejected speculative ones.

        A page that was packed stays packed; if tokens are appended to a partly filled one, it goes
        on in full precision from its decoded tokens.
        """
        self._no_open_step("truncate")
        state = self._get(sequence)
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
            raise TypeError(f"length must be an integer, got {length!r}")
        if not 0 <= length <= state.length:
            raise ValueError(
                f"sequence {sequence} has {state.length} tokens, cannot truncate it to {length}"
            )
        keep = -(-int(length) // self._windows.block_size)
        self._release(state.pages[keep:])
        del state.pages[keep:]
        state.length = int(length)
        if length == 0 and state.offset is not None:
            self._offsets.release(state.offset)
            state.offset = None

    def free(self, sequence: int) -> None:
        """Forget a sequence; its pages are free unless a fork shares them."""
        self._no_open_step("free")
        if self._swapped.pop(sequence, None):
            return
        state = self._get(sequence)
        self._release(state.pages)
        if state.offset is not None:
            self._offsets.release(state.offset)
        del self._sequences[sequence]

    def swap_out(self, sequence: int) -> None:
        """Move a sequence to host memory, out of the pages; `swap_in` brings it back.

        Pages that a fork shares are copied.
        """
        self._no_open_step("swap out")
        swapped = swap_out(self, self._get(sequence))
        self.free(sequence)
        self._swapped[sequence] = swapped

    def swap_in(self, sequence: int) -> None:
        """Bring a sequence back from host memory.

        Raises
        ------
        OutOfPagesError
            If there are not enough pages; it stays in host memory.
        """
        self._no_open_step("swap in")
        if sequence not in self._swapped:
            raise ValueError(f"sequence {sequence!r} is not swapped out")
        self._version += 1  # it may take pages that the last step still attends to
        self._sequences[sequence] = swap_in(self, self._swapped[sequence])
        del self._swapped[sequence]

    def _release(self, pages: list[Page]) -> None:
        self._version += 1
        for page in pages:
            self._planner.pool(page).release(page.number)

    def _register(self, state: Sequence) -> int:
        identifier = self._next_sequence
        self._next_sequence += 1
        self._sequences[identifier] = state
        return identifier

    def _get(self, sequence: int) -> Sequence:
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):
            if sequence in self._swapped:
                raise ValueError(
                    f"sequence {sequence} is swapped out; swap_in({sequence})"
                ) from None
            known = ", ".join(map(str, self._sequences)) or "none"
            raise ValueError(f"no sequence {sequence!r} in the cache; there are {known}") from None

    def _settle(self) -> None:
        """Pack what the last step left to be packed until its attention was over."""
        if self._attended_step is not None:
            self._attended_step.pack()  # if it fails, for want of memory, it can be tried again
            self._attended_step = None

    def _no_open_step(self, what: str) -> None:
        self._settle()
        if self._open_step is not None:
            raise RuntimeError(
                f"cannot {what} while a step is open: append to layers "
                f"{sorted(self._open_step.missing)} first, or call its cancel()"
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
        step = self._open_step = Step(self, list(sequences), plan)
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
        k, v = _arrays.take_in(keys, "keys")[0], _arrays.take_in(values, "values")[0]
        if self.num_layers == 1 and k.ndim == 3 and v.ndim == 3:
            k, v = k[None], v[None]
        for name, x in (("keys", k), ("values", v)):
            if x.ndim != 4 or len(x) != self.num_layers:
                raise ValueError(
                    f"{name} must have shape [{self.num_layers} layers, tokens, "
                    f"{self.num_kv_heads}, {self.head_dim}], got {tuple(x.shape)}"
                )
        tokens = int(k.shape[1])
        of_token = [sequences] * tokens if isinstance(sequences, (int, np.integer)) else sequences
        if len(of_token) != tokens:
            raise ValueError(f"got {len(of_token)} sequences for {tokens} tokens")
        rows: dict[int, list[int]] = {}
        for row, sequence in enumerate(of_token):
            rows.setdefault(int(sequence), []).append(row)
        order = self._xp.asarray(np.array([r for part in rows.values() for r in part], np.int64))
        counts = [len(part) for part in rows.values()]
        step = self.begin_step(list(rows), counts, pack_first=True)  # nothing attends to it
        try:
            for layer in range(self.num_layers) if tokens else ():
                step.append(layer, k[layer][order], v[layer][order])
        except BaseException:
            step.cancel()
            raise

    def read(self, sequence: int, layer: int) -> tuple[Any, Any]:
        """All keys and values of a sequence as attention sees them, decoded; for inspection.

        Returns
        -------
        keys, values : array, float32, shape [length, num_kv_heads, head_dim]
        """
        self._settle()
        state = self._get(sequence)
        shape = (len(state.pages) * self._windows.block_size, self.num_kv_heads, self.head_dim)
        keys, values = self._xp.empty((2, *shape), np.float32)
        for i, page in enumerate(state.pages):
            part = slice(i * self._windows.block_size, (i + 1) * self._windows.block_size)
            if page.full:
                keys[part] = self._k_full[layer, page.number]
                values[part] = self._v_full[layer, page.number]
            else:
                offset = -1 if state.offset is None else state.offset
                keys[part] = self._unpack_keys(layer, page.number, offset)
                values[part] = self._unpack_values(layer, page.number)
        return keys[: state.length], values[: state.length]

    def _unpack_keys(self, layer: int, page: int, offset: int) -> Any:
        """[block_size, num_kv_heads, head_dim] decoded keys of a packed page, offset added."""
        packed, norms = self._k_packed[layer, page], self._k_norms[layer, page]
        keys = self.key_quantizer.decode(packed, norms, dtype=np.float32)
        return keys + self._key_offsets[layer, offset]

    def _unpack_values(self, layer: int, page: int) -> Any:
        packed, norms = self._v_packed[layer, page], self._v_norms[layer, page]
        return self.value_quantizer.decode(packed, norms, dtype=np.float32)

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
    ) -> PagedKVCache:
        """Read a cache written by `save`; sequences keep their identifiers.

        Parameters
        ----------
        path : path-like
        num_blocks, num_full_blocks : int, optional
            Sizes of the new cache, by default those of the saved one.
        device : {"cpu", "cuda"}

        Raises
        ------
        StorageError
            If the file is damaged, of another kind or of a newer version.
        OutOfPagesError
            If the new cache is too small.
        """
        settings, arrays = read_cache(path)
        if num_blocks is not None:
            settings["num_blocks"] = num_blocks
        if num_full_blocks is not None:
            settings["num_full_blocks"] = num_full_blocks
        cache = cls(**settings, device=device)
        fill_cache(cache, arrays)
        return cache

    def stats(self) -> dict[str, Any]:
        """Sizes in bytes, and how well they are used.

        Returns
        -------
        dict
            ``tokens`` (of all sequences, shared ones counted for each), ``stored_tokens`` (shared
            ones once); ``packed_pages`` and ``full_pages`` (used, total); ``allocated_bytes`` (all
            pools, norms and key offsets included), ``used_bytes`` (of pages in use),
            ``swapped_bytes``; ``fp16_bytes`` (of the stored tokens in float16),
            ``ratio_vs_fp16`` (fp16_bytes / used_bytes); ``fragmentation`` (share of the token slots
            in used pages that hold no token).
        """
        self._settle()
        size = self._windows.block_size
        held: dict[Page, int] = {}
        for state in self._sequences.values():
            for i, page in enumerate(state.pages):
                held[page] = max(held.get(page, 0), min(size, state.length - i * size))
        stored, slots = sum(held.values()), len(held) * size
        packed_pool = (self._k_packed, self._v_packed, self._k_norms, self._v_norms)
        pools = ((self._packed, packed_pool), (self._full, (self._k_full, self._v_full)))
        used = sum(
            sum(a.nbytes for a in arrays) * len(pool.used) // max(1, len(pool.references))
            for pool, arrays in pools
        )
        used += self._key_offsets[:, :1].nbytes * len(self._offsets.used)
        fp16 = 4 * stored * self.num_layers * self.num_kv_heads * self.head_dim
        return {
            "tokens": sum(state.length for state in self._sequences.values()),
            "stored_tokens": stored,
            "packed_pages": (len(self._packed.used), len(self._packed.references)),
            "full_pages": (len(self._full.used), len(self._full.references)),
            "allocated_bytes": sum(a.nbytes for _, arrays in pools for a in arrays)
            + self._key_offsets.nbytes,
            "used_bytes": used,
            "swapped_bytes": sum(s.nbytes for s in self._swapped.values()),
            "fp16_bytes": fp16,
            "ratio_vs_fp16": fp16 / used if used else 1.0,
            "fragmentation": 1 - stored / slots if slots else 0.0,
        }


def _array_library(device: str) -> Any:
    """numpy or cupy."""
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "device='cuda' needs CuPy: pip install 'turboquant-np[cuda12]' (or cuda13)"
        ) from error
    return cupy
