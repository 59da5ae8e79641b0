"""Compiling what the cases of a GPU need, with all cores, before anything is timed.

One after the other, as cases first use them, kernels take longer to compile than all the timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from itertools import product

from ..commands.progress import ProgressBar
from . import attention, checks, codec, growth
from .options import GROWTH, usable_cores
from .workbench import Workbench

__all__ = ["cases", "compile_first"]

LARGEST = 2**30  # bytes of a case's cache, about


def cases(bench: Workbench) -> Iterator[attention.AttentionCase | codec.Case]:
    """One of each kind that the sections asked for will measure, and some twice."""
    options, found = bench.options, bench.options.sections
    if "attention" in found:
        yield from attention.attention_cases(options.full, bench.device)
    if "codec" in found:
        yield from codec.codec_cases(options.full, bench.device)
    if GROWTH in found:
        yield from (case for _, case, _ in growth.points(bench, threads_only=False))
    if "validation" in found:
        yield from (
            codec.Case(d, bits, 3) for d, bits in product(checks.head_dims(options), range(1, 9))
        )


def compile_first(bench: Workbench) -> None:
    """Call each case once, on as little data as has the same kernels."""
    wanted = list(dict.fromkeys(cases(bench)))
    small = Workbench(replace(bench.options, megabytes=2**-10), bench.threads)
    # what a case holds while it is compiled, its threads hold at the same time
    threads = max(1, min(usable_cores(), growth.memory_to_use(bench.device) // LARGEST))
    with (
        ProgressBar("bench, compiling", "cases") as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        calls = [pool.submit(_call, small, case) for case in wanted]
        for done, _ in enumerate(as_completed(calls), 1):
            progress(done, len(wanted))
    bench.free()


def _call(bench: Workbench, case: attention.AttentionCase | codec.Case) -> None:
    """Whatever goes wrong here does so again where the case is measured, and is an error there."""
    with suppress(Exception):
        if isinstance(case, attention.AttentionCase):
            attention.Problem(bench, case).steps()[0]()
            return
        tq = case.quantizer(bench.options.backend)
        x = codec.vectors(bench, case.head_dim, case.dtype, 2)
        packed, norms = tq.encode(x, check_finite=False)
        tq.decode(packed, norms, dtype=case.dtype)
