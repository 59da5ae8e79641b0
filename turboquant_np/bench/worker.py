"""One process of the benchmark.  It may use the cores that its parent left it, and no others.

Thread pools (OpenMP, BLAS, rayon, Numba) take their size from the cores a process may run on when
it starts; so every number of threads gets a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

__all__ = ["Options", "measure", "measure_in_process", "usable_cores"]

THREAD_VARIABLES = (
    "TURBOQUANT_NP_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


@dataclass(frozen=True)
class Options:
    """What to measure, and with how much data."""

    full: bool = False
    peers: bool = False
    device: str = "cpu"
    backend: str = "auto"
    megabytes: float = 64.0


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(options: Options, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Results of the codec and, if asked for, of its peers, from this process."""
    from ..commands.progress import ProgressBar
    from .codec import CodecBench, codec_cases
    from .peers import compare, installed_peers

    bench = CodecBench(options.device, threads, options.megabytes, options.backend)
    cases = codec_cases(options.full)
    head_dims = (64, 128, 256, 768, 1536) if options.full else (128, 768, 1536)
    settings = [*product(head_dims, (4,)), *([(128, 2)] if options.full else [])]
    compared = installed_peers() if options.peers else []
    pairs = [(peer, *setting) for peer, setting in product(compared, settings)]
    where = options.device if options.device != "cpu" else f"{threads} threads"
    codec, peers = [], []
    with ProgressBar(f"bench, {where}", "cases") as progress:
        total = len(cases) + len(pairs)
        for done, case in enumerate(cases):
            progress(done, total)
            codec += [asdict(result) | {"share": result.share} for result in bench.measure(case)]
        for done, (peer, head_dim, bits) in enumerate(pairs, len(cases)):
            progress(done, total)
            if result := compare(peer, head_dim, bits, bench):
                ratios = {
                    name: getattr(result, name) for name in ("ratio_3_rounds", "ratio_1_round")
                }
                peers.append(asdict(result) | ratios)
        progress(total, total)
    return {"codec": codec, "peers": peers}


def measure_in_process(options: Options, threads: int) -> dict[str, list[dict[str, Any]]]:
    """`measure` in a new process that may use `threads` cores.

    Raises
    ------
    RuntimeError
        If the process fails; its error stands on stderr.
    """
    environment = os.environ | {name: str(threads) for name in THREAD_VARIABLES}
    with _confined_to(threads):
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps([asdict(options), threads])],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
    with process:
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a process of the benchmark ended with code {process.returncode}")
    results: dict[str, list[dict[str, Any]]] = json.loads(output)
    return results


@contextmanager
def _confined_to(cores: int) -> Iterator[None]:
    """Let processes started meanwhile run on so many of the usable cores, where that is known."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    settings, threads = json.loads(sys.argv[1])
    try:
        json.dump(measure(Options(**settings), threads), sys.stdout)
    except KeyboardInterrupt:  # the parent was interrupted too, and says what there is to say
        sys.exit(130)
