"""A Hypothesis state machine that drives `PagedKVCache` against a model of plain arrays.

Run it on your own set-up, for example with pages on a GPU::

    from turboquant_np.testing.stateful import PagedCacheMachine

    class OnGpu(PagedCacheMachine):
        device = "cuda"

    TestOnGpu = OnGpu.TestCase
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_np.kv_cache import OutOfPagesError, PagedKVCache

from ._bits import assert_bits_equal

try:
    from hypothesis import event
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
except ImportError as error:
    raise ImportError(
        f"{__name__} needs Hypothesis: pip install 'turboquant-np[testing]'"
    ) from error

__all__ = ["ModelSequence", "PagedCacheMachine"]

Float32s = npt.NDArray[np.float32]
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 32
# Of keys and of values, for all layers or for each; few pairs, as each is a kernel to compile.
BITS: list[tuple[Any, Any]] = [
    (4, 4),
    (3, 2),
    (8, 5),
    ([4, 8, 4], [4, 5, 4]),
    ([3, 3, 8], [2, 2, 5]),
]


@dataclass
class ModelSequence:
    """What the cache should hold: [2 (keys, values), LAYERS, tokens, KV_HEADS, HEAD_DIM]."""

    tokens: Float32s = field(
        default_factory=lambda: np.zeros((2, LAYERS, 0, KV_HEADS, HEAD_DIM), np.float32)
    )
    packed: frozenset[int] = frozenset()  # numbers of packed pages
    offset: Float32s | None = None  # [LAYERS, KV_HEADS, HEAD_DIM]

    @property
    def length(self) -> int:
        return int(self.tokens.shape[2])


class PagedCacheMachine(RuleBasedStateMachine):
    """Appends, forks, truncates, frees, swaps and saves, and compares every token after each step.

    Inputs are small multiples of 1/16, so that float16 pages and means are exact and the comparison
    is bit for bit.

    Attributes
    ----------
    device : str
        "cpu" or "cuda".
    attention_error : float
        How far attention may be from a softmax in float64, over the norm of the longest value.
        CUDA takes centroids and probabilities in float16, which changes scores as well: 4e-3 there.
    """

    device = "cpu"
    attention_error = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, ModelSequence] = {}
        self.swapped: set[int] = set()
        self.appended = 0

    @initialize(
        block_size=st.sampled_from([1, 3, 4, 16]),
        num_blocks=st.integers(0, 30),
        num_full_blocks=st.integers(1, 20),
        sink_tokens=st.sampled_from([0, 1, 4, 6]),
        recent_tokens=st.sampled_from([0, 1, 5, 8]),
        key_offset_tokens=st.sampled_from([0, 1, 8]),
        bits=st.sampled_from(BITS),
    )
    def start(self, bits: tuple[Any, Any], **sizes: Any) -> None:
        self.cache = PagedKVCache(
            LAYERS,
            KV_HEADS,
            HEAD_DIM,
            key_bits=bits[0],
            value_bits=bits[1],
            max_sequences=4,
            device=self.device,
            **sizes,
        )
        self.sizes = sizes

    # -- rules -------------------------------------------------------------------------------------

    @rule()
    def allocate(self) -> None:
        self.model[self.cache.allocate()] = ModelSequence()

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        """Several sequences at once, their tokens interleaved."""
        of_token = data.draw(st.lists(st.sampled_from(self._resident()), max_size=40))
        of_token.sort(key=lambda s: hash((s, len(of_token))) % 3)
        new = self._new_tokens(len(of_token))
        try:
            self.cache.append(of_token, *map(self._to_device, new))
        except OutOfPagesError:
            event("out of pages")
            return
        rows = np.array(of_token)
        for sequence in dict.fromkeys(of_token):
            self._add(sequence, new[:, :, rows == sequence])
            self._pack(sequence, self.model[sequence].length)

    @precondition(lambda self: self._resident())
    @rule(data=st.data(), pack_first=st.booleans())
    def step(self, data: st.DataObject, pack_first: bool) -> None:
        """Tokens appended and attended to, layer by layer; or a step that is given up."""
        sequences = data.draw(st.lists(st.sampled_from(self._resident()), min_size=1, unique=True))
        counts = [data.draw(st.integers(0, 20)) for _ in sequences]
        new = self._new_tokens(sum(counts))
        parts = np.split(new, np.cumsum(counts)[:-1], axis=2)
        try:
            step = self.cache.begin_step(sequences, counts, pack_first=pack_first)
        except OutOfPagesError:
            event("out of pages")
            return
        if sum(counts) and data.draw(st.integers(0, 9)) == 0:
            step.append(0, *map(self._to_device, new[:, 0]))
            step.cancel()
            return
        if sum(counts):
            for layer in range(LAYERS):
                step.append(layer, *map(self._to_device, new[:, layer]))
        befores = [self.model[s].length for s in sequences]
        for sequence, part, before in zip(sequences, parts, befores, strict=True):
            self._add(sequence, part)
            if part.shape[2]:
                self._pack(sequence, before + (part.shape[2] if pack_first else 1))
        self._compare_attention(step, {s: self.model[s].tokens for s in sequences}, counts)
        for sequence, part in zip(sequences, parts, strict=True):
            if part.shape[2]:
                self._pack(sequence, self.model[sequence].length)

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self._resident()))
        self.model[self.cache.fork(source)] = replace(self.model[source])

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._resident()))
        model = self.model[sequence]
        length = data.draw(st.integers(max(0, model.length - 20), model.length))
        self.cache.truncate(sequence, length)
        pages = -(-length // self.sizes["block_size"])
        model.tokens = model.tokens[:, :, :length]
        model.packed = frozenset(page for page in model.packed if page < pages)
        if length == 0:
            model.offset = None

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        self.cache.free(sequence)
        del self.model[sequence]
        self.swapped.discard(sequence)

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._resident()))
        self.cache.swap_out(sequence)
        self.swapped.add(sequence)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.swapped)))
        try:
            self.cache.swap_in(sequence)
        except OutOfPagesError:
            event("out of pages on the way back")
            return
        self.swapped.discard(sequence)

    @precondition(lambda self: self.model and not self.swapped)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.npz"
            self.cache.save(path)
            self.cache = PagedKVCache.load(path, device=self.device)

    @precondition(lambda self: self._resident())
    @rule(data=st.data())
    def attend(self, data: st.DataObject) -> None:
        """The last tokens of every sequence in the pages, against a plain softmax."""
        sequences = [s for s in self._resident() if self.model[s].length]
        lens = [data.draw(st.integers(1, min(3, self.model[s].length))) for s in sequences]
        step = self.cache.begin_step(sequences, [0] * len(sequences))
        self._compare_attention(step, {s: self.model[s].tokens for s in sequences}, lens)

    def _compare_attention(self, step: Any, tokens: dict[int, Float32s], lens: list[int]) -> None:
        """The last `lens` tokens of every sequence attend as a plain softmax over `tokens` does."""
        rng = np.random.Generator(np.random.PCG64([5, self.appended]))
        query = rng.standard_normal((sum(lens), 2 * KV_HEADS, HEAD_DIM), np.float32) / 4
        for layer in range(LAYERS):
            out = self._to_host(step.attend(layer, self._to_device(query), query_lens=lens))
            row = 0
            for held, length in zip(tokens.values(), lens, strict=True):
                for i in range(length):
                    seen = held.shape[2] - length + i + 1
                    keys, values = held[:, layer, :seen].astype(np.float64)
                    want = _softmax_attention(query[row], keys, values)
                    longest = np.linalg.norm(values, axis=-1).max(initial=0.0)
                    error = np.linalg.norm(out[row] - want, axis=-1).max()
                    assert error <= self.attention_error * longest
                    row += 1

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def tokens_are_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.sequences == sorted(self.model)
        for sequence, model in self.model.items():
            assert self.cache.length(sequence) == model.length
            if sequence in self.swapped:
                continue
            for layer in range(LAYERS):
                for got, want in zip(
                    self.cache.read(sequence, layer), model.tokens[:, layer], strict=True
                ):
                    assert_bits_equal(self._to_host(got), np.ascontiguousarray(want))

    @invariant()
    def pages_are_conserved(self) -> None:
        """Every page is free, or has one reference for each sequence that holds it."""
        if not hasattr(self, "cache"):
            return
        self.cache.stats()  # packs what the last step left to be packed
        held = [page for state in self.cache._sequences.values() for page in state.pages]
        for full, pool in ((True, self.cache._full), (False, self.cache._packed)):
            numbers = [page.number for page in held if page.full == full]
            counts = np.bincount(numbers, minlength=len(pool.references))
            assert pool.references == counts.tolist()
            assert pool.free == pool.references.count(0)
        for state in self.cache._sequences.values():
            assert len(state.pages) == -(-state.length // self.sizes["block_size"])

    # -- the model ---------------------------------------------------------------------------------

    def _add(self, sequence: int, new: Float32s) -> None:
        """New tokens; a packed page that gets some goes on as float16, from its decoded tokens."""
        model, size = self.model[sequence], self.sizes["block_size"]
        if not new.shape[2]:
            return
        tokens, page = model.tokens.copy(), model.length // size
        if page in model.packed:
            tokens[:, :, page * size :] = tokens[:, :, page * size :].astype(np.float16)
        model.tokens = np.concatenate([tokens, new], axis=2)
        model.packed -= {page}

    def _pack(self, sequence: int, length: int) -> None:
        """Pack the pages that lie outside of both windows when there are `length` tokens."""
        model, size = self.model[sequence], self.sizes["block_size"]
        first = -(-self.sizes["sink_tokens"] // size)
        last = max(0, length - self.sizes["recent_tokens"]) // size
        leaving = [page for page in range(first, last) if page not in model.packed]
        count = self.sizes["key_offset_tokens"]
        if leaving and model.offset is None and count:
            model.offset = model.tokens[0, :, :count].mean(axis=1)
        model.tokens = model.tokens.copy()  # a fork's model may share it
        for page in leaving:
            part = slice(page * size, (page + 1) * size)
            model.tokens[:, :, part] = self._coded(model.tokens[:, :, part], model.offset)
        model.packed |= set(leaving)

    def _new_tokens(self, count: int) -> Float32s:
        """[2, LAYERS, count, KV_HEADS, HEAD_DIM] numbers that float16 holds."""
        self.appended += 1
        rng = np.random.Generator(np.random.PCG64(self.appended))
        shape = (2, LAYERS, count, KV_HEADS, HEAD_DIM)
        return rng.integers(-64, 65, shape).astype(np.float32) / np.float32(16)

    def _coded(self, tokens: Float32s, offset: Float32s | None) -> Float32s:
        """Keys and values after encoding and decoding."""
        shift = np.float32(0) if offset is None else offset[:, None]
        coded = [
            [
                quantizer.decode(*quantizer.encode(layer), dtype=np.float32)
                for quantizer, layer in zip(quantizers, side, strict=True)
            ]
            for quantizers, side in (
                (self.cache.key_quantizers, tokens[0] - shift),
                (self.cache.value_quantizers, tokens[1]),
            )
        ]
        return np.stack([np.stack(coded[0]) + shift, np.stack(coded[1])])

    def _resident(self) -> list[int]:
        return sorted(set(self.model) - self.swapped)

    def _to_device(self, array: Any) -> Any:
        return self.cache._xp.asarray(array)

    @staticmethod
    def _to_host(array: Any) -> Any:
        return array.get() if hasattr(array, "get") else array


def _softmax_attention(query: Any, keys: Any, values: Any) -> Any:
    """[heads, d] one token's attention, one head at a time."""
    group = len(query) // keys.shape[1]
    out = np.empty(query.shape)
    for head, q in enumerate(query.astype(np.float64)):
        scores = keys[:, head // group] @ q / np.sqrt(len(q))
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group] / weights.sum()
    return out
