"""The loop: prompts join and leave a running batch, long ones are read in chunks.

In each step every running sequence gives some tokens to the model, one that it has just chosen or
a chunk of a prompt.  Their keys and values go to the cache, and a sequence with no more tokens to
give chooses its next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .caches import Cache
from .model import Model
from .sampling import Sampling, choose

__all__ = ["Batch", "Request"]


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it.

    Attributes
    ----------
    sequence : int
        In the cache, until the request is finished.
    pending : list of int
        Tokens that the model has not seen yet.
    max_new_tokens : int
    sampling : Sampling
    generated : list of int
        The token that ends the answer is not among them.
    finished : bool
    """

    sequence: int
    pending: list[int]
    max_new_tokens: int
    sampling: Sampling
    generated: list[int] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.sampling.seed)


class Batch:
    """Runs requests together; they may be submitted, and taken away, between any two steps.

    Parameters
    ----------
    model : Model
    cache : Cache
    stop : int, optional
        Token that ends an answer.
    prefill_chunk : int
        Prompt tokens that a step takes at most, so that long prompts do not hold up the others.
        A `PagedKVCache` needs full-precision pages for them.

    Examples
    --------
    >>> batch = Batch(model, cache, stop=tokenizer.end)  # doctest: +SKIP
    >>> one = batch.submit(tokenizer.chat("Why is the sky blue?"))  # doctest: +SKIP
    >>> for request, token in batch.run():  # doctest: +SKIP
    ...     print(tokenizer.decode([token]), end="")
    """

    def __init__(
        self, model: Model, cache: Cache, *, stop: int | None = None, prefill_chunk: int = 256
    ) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be positive, got {prefill_chunk}")
        self.model, self.cache, self.stop = model, cache, stop
        self.prefill_chunk = prefill_chunk
        self.running: list[Request] = []

    def submit(
        self,
        tokens: list[int],
        *,
        sequence: int | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Request:
        """Let a prompt join.

        Parameters
        ----------
        tokens : list of int
            At least one.
        sequence : int, optional
            Of the cache, whose tokens come before; the request owns it from now on.  To share a
            prefix, give a fork of it.
        max_new_tokens : int
        sampling : Sampling, optional
            The most likely tokens by default.

        Raises
        ------
        ValueError
            If there is no token, or prompt and answer may be longer than the model's context.
        """
        before = 0 if sequence is None else self.cache.length(sequence)
        total, context = before + len(tokens) + max_new_tokens, self.model.config.context
        if not tokens or total > context:
            raise ValueError(f"1 to {context} tokens, answer included, are possible, got {total}")
        if sequence is None:
            sequence = self.cache.allocate()
        request = Request(sequence, list(tokens), max_new_tokens, sampling or Sampling())
        self.running.append(request)
        return request

    def leave(self, request: Request) -> None:
        """Take a request away, finished or not."""
        self.running.remove(request)
        self.cache.free(request.sequence)
        request.finished = True

    def prefill(self, tokens: list[int]) -> int:
        """Read a prefix; returns its sequence, to be forked by those that begin with it."""
        sequence = self.cache.allocate()
        for start in range(0, len(tokens), self.prefill_chunk):
            self._forward([sequence], [tokens[start : start + self.prefill_chunk]])
        return sequence

    def step(self) -> list[tuple[Request, int]]:
        """Run the model once.

        Returns
        -------
        list of (Request, int)
            The new tokens.  Requests that have just finished may have none.
        """
        room = self.prefill_chunk
        chosen, given = [], []
        for request in self.running:
            tokens = request.pending[: 1 if len(request.pending) == 1 else room]
            room -= len(tokens) if len(request.pending) > 1 else 0
            if tokens:
                chosen.append(request)
                given.append(tokens)
        if not chosen:
            return []
        hidden = self._forward([request.sequence for request in chosen], given)
        last = np.cumsum([len(tokens) for tokens in given]) - 1
        rows = []
        for row, request, tokens in zip(last, chosen, given, strict=True):
            del request.pending[: len(tokens)]
            if not request.pending:
                rows.append((int(row), request))
        return self._choose(hidden, rows) if rows else []

    def run(self) -> Iterator[tuple[Request, int]]:
        """Steps until all requests are finished; yields each token as it is chosen."""
        while self.running:
            yield from self.step()

    def _forward(self, sequences: list[int], tokens: list[list[int]]) -> Any:
        """Hidden states [T, width] of new tokens of some sequences."""
        counts = [len(part) for part in tokens]
        positions = np.concatenate(
            [
                self.cache.length(sequence) + np.arange(count)
                for sequence, count in zip(sequences, counts, strict=True)
            ]
        )
        step = self.cache.begin_step(sequences, counts)

        def attend(layer: int, q: Any, k: Any, v: Any) -> Any:
            step.append(layer, k, v)
            return step.attend(layer, q)

        try:
            return self.model.forward(np.concatenate(tokens), positions, attend)
        except BaseException:
            step.cancel()
            raise

    def _choose(self, hidden: Any, rows: list[tuple[int, Request]]) -> list[tuple[Request, int]]:
        xp = self.model.xp
        logits = self.model.logits(hidden[xp.asarray([row for row, _ in rows])])
        requests = [request for _, request in rows]
        uniforms = [request.random.random() for request in requests]
        tokens = choose(xp, logits, [request.sampling for request in requests], uniforms).tolist()
        new = []
        for request, token in zip(requests, tokens, strict=True):
            if token != self.stop:
                request.generated.append(token)
                request.pending.append(token)
                new.append((request, token))
            if token == self.stop or len(request.generated) >= request.max_new_tokens:
                self.leave(request)
        return new
