"""The two KV caches that the loop can run on: TurboQuant pages, and plain arrays.

Both have the same few methods, so the loop does not know which one it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from turboquant_np import PagedKVCache

from .loader import Config

__all__ = ["Cache", "FloatCache", "Step", "make_cache"]


class Step(Protocol):
    """New tokens of some sequences, one sequence after the other, layer by layer."""

    def append(self, layer: int, keys: Any, values: Any) -> None: ...

    def attend(self, layer: int, query: Any) -> Any: ...

    def cancel(self) -> None: ...


class Cache(Protocol):
    """Keys and values of running sequences; see `turboquant_np.PagedKVCache`."""

    def allocate(self) -> int: ...

    def fork(self, sequence: int) -> int: ...

    def free(self, sequence: int) -> None: ...

    def length(self, sequence: int) -> int: ...

    def begin_step(
        self, sequences: list[int], counts: list[int], *, pack_first: bool = False
    ) -> Step: ...

    def stats(self) -> dict[str, Any]: ...


def make_cache(
    config: Config,
    kind: str,
    *,
    max_sequences: int,
    max_tokens: int,
    step_tokens: int = 256,
    key_bits: int | Sequence[int] = 4,
    value_bits: int | Sequence[int] = 4,
    device: str = "cpu",
    compute: Literal["float32", "int8"] = "float32",
    dtype: Any = "float32",
) -> Cache:
    """A cache for `max_sequences` sequences of up to `max_tokens` tokens each.

    Parameters
    ----------
    config : Config
    kind : {"turboquant", "float"}
    step_tokens : int
        New tokens of a step at most: they are in full precision until it is over.
    key_bits, value_bits : int, or one for each layer
        Of "turboquant".
    device : {"cpu", "cuda"}
    compute : {"float32", "int8"}
        Of "turboquant".
    dtype : dtype-like
        Of "float".
    """
    sizes = (config.layers, config.kv_heads, config.head_dim)
    if kind == "float":
        return FloatCache(*sizes, max_sequences, max_tokens, dtype=dtype, device=device)
    if kind != "turboquant":
        raise ValueError(f"a cache is 'float' or 'turboquant', got {kind!r}")
    return PagedKVCache(
        *sizes,
        num_blocks=max_sequences * -(-max_tokens // 16),
        # Of each sequence the first page, the recent ones and two that a step may begin or copy.
        num_full_blocks=max_sequences * (1 + 5 + 2) + -(-step_tokens // 16),
        block_size=16,
        max_sequences=max_sequences,
        key_bits=key_bits,
        value_bits=value_bits,
        device=device,
        compute=compute,
    )


class FloatCache:
    """Keys and values as they are, a fixed room for each sequence; a fork is a copy.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int
    max_sequences, max_tokens : int
    dtype : dtype-like
    device : {"cpu", "cuda"}
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_sequences: int,
        max_tokens: int,
        *,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        self.xp = np
        if device == "cuda":
            import cupy

            self.xp = cupy
        shape = (num_layers, max_sequences, num_kv_heads, max_tokens, head_dim)
        self.keys, self.values = self.xp.zeros(shape, dtype), self.xp.zeros(shape, dtype)
        self.max_tokens = max_tokens
        self.lengths: dict[int, int] = {}

    def allocate(self) -> int:
        """Start an empty sequence."""
        for sequence in range(self.keys.shape[1]):
            if sequence not in self.lengths:
                self.lengths[sequence] = 0
                return sequence
        raise ValueError(f"all {len(self.lengths)} sequences are in use; free one")

    def fork(self, sequence: int) -> int:
        """Copy a sequence."""
        new, length = self.allocate(), self.lengths[sequence]
        for pool in (self.keys, self.values):
            pool[:, new, :, :length] = pool[:, sequence, :, :length]
        self.lengths[new] = length
        return new

    def free(self, sequence: int) -> None:
        """Forget a sequence."""
        del self.lengths[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self.lengths[sequence]

    def begin_step(
        self, sequences: list[int], counts: list[int], *, pack_first: bool = False
    ) -> FloatStep:
        """Make sure that there is room for new tokens."""
        lengths = [self.lengths[s] + count for s, count in zip(sequences, counts, strict=True)]
        if max(lengths, default=0) > self.max_tokens:
            raise ValueError(f"there is room for {self.max_tokens} tokens, not {max(lengths)}")
        return FloatStep(self, sequences, counts)

    def stats(self) -> dict[str, Any]:
        """Bytes of the tokens there are, and of the room for them."""
        tokens = sum(self.lengths.values())
        slots = self.keys.shape[1] * self.max_tokens
        allocated = self.keys.nbytes + self.values.nbytes
        return {
            "stored_tokens": tokens,
            "used_bytes": allocated // slots * tokens,
            "allocated_bytes": allocated,
        }


@dataclass(frozen=True, eq=False)
class Part:
    """S sequences with L new tokens each, up to n tokens long."""

    rows: Any  # [S * L] their tokens in the batch
    sequences: Any  # [S]
    longest: int  # n
    visible: Any  # [S, 1, L, 1, n] what each new token sees


class FloatStep:
    """Appends and attends; sequences that get one token are computed together, others singly."""

    def __init__(self, cache: FloatCache, sequences: list[int], counts: list[int]) -> None:
        self.cache, self.sequences, self.counts = cache, sequences, counts
        self._left = cache.keys.shape[0]
        before = np.array([cache.lengths[s] for s in sequences])
        starts = np.cumsum([0, *counts])
        self._sequence_of_token = cache.xp.asarray(np.repeat(np.array(sequences), counts))
        self._position_of_token = cache.xp.asarray(
            np.concatenate([b + np.arange(c) for b, c in zip(before, counts, strict=True)])
        )
        single = [i for i, count in enumerate(counts) if count == 1]
        several = [[i] for i, count in enumerate(counts) if count > 1]
        self._parts = [
            self._part(
                [sequences[i] for i in chosen],
                np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen]),
                before[chosen][:, None] + np.arange(counts[chosen[0]]),
            )
            for chosen in ([single] if single else []) + several
        ]

    def _part(self, sequences: list[int], rows: Any, positions: Any) -> Part:
        longest = int(positions.max()) + 1
        visible = np.arange(longest) <= positions[..., None]  # [S, L, n]
        return Part(
            rows=self._index(rows),
            sequences=self._index(np.array(sequences)),
            longest=longest,
            visible=self.cache.xp.asarray(visible[:, None, :, None]),
        )

    def _index(self, numbers: Any) -> Any:
        """A slice, which makes a view, where that does; an array of indices makes a copy."""
        if np.all(np.diff(numbers) == 1):
            return slice(int(numbers[0]), int(numbers[-1]) + 1)
        return self.cache.xp.asarray(numbers)

    def append(self, layer: int, keys: Any, values: Any) -> None:
        """[T, kv_heads, d] each: the new tokens of one layer."""
        at = (self._sequence_of_token, slice(None), self._position_of_token)
        self.cache.keys[layer][at], self.cache.values[layer][at] = keys, values
        self._left -= 1
        if not self._left:
            for sequence, count in zip(self.sequences, self.counts, strict=True):
                self.cache.lengths[sequence] += count

    def attend(self, layer: int, query: Any) -> Any:
        """[T, heads, d] -> the same: softmax(query @ keys / sqrt(d)) @ values."""
        xp, c = self.cache.xp, self.cache
        _, heads, d = query.shape
        kv_heads = c.keys.shape[2]
        scale = query.dtype.type(1 / math.sqrt(d))
        out = xp.empty(query.shape, query.dtype)
        for part in self._parts:
            keys = c.keys[layer][part.sequences, :, : part.longest]  # [S, kv_heads, n, d]
            values = c.values[layer][part.sequences, :, : part.longest]
            num_seqs, n = len(keys), part.longest
            split = (num_seqs, -1, kv_heads, heads // kv_heads, d)
            rows = (query[part.rows] * scale).reshape(split).transpose(0, 2, 1, 3, 4)
            rows = rows.reshape(num_seqs, kv_heads, -1, d)
            scores = (rows @ keys.swapaxes(2, 3)).astype(np.float32, copy=False)
            scores = scores.reshape(num_seqs, kv_heads, -1, heads // kv_heads, n)
            scores = xp.where(part.visible, scores, np.float32(-np.inf))
            scores -= scores.max(axis=-1, keepdims=True)
            weights = xp.exp(scores, out=scores)
            weights = weights.reshape(num_seqs, kv_heads, -1, n)
            total = weights.sum(axis=-1, keepdims=True)
            mixed = weights.astype(values.dtype, copy=False) @ values / total
            mixed = mixed.reshape(num_seqs, kv_heads, -1, heads // kv_heads, d)
            out[part.rows] = mixed.transpose(0, 2, 1, 3, 4).reshape(-1, heads, d)
        return out

    def cancel(self) -> None:
        """Lengths have not changed yet, so there is nothing to undo."""
