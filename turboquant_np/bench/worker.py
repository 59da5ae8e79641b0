"""One process of the benchmark.  It may use the cores that its parent left it, and no others.

Thread pools (OpenMP, BLAS, rayon, Numba) take their size from the cores a process may run on when
it starts; so every number of threads gets a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from .options import GROWTH, Options
from .workbench import Row, Task, Workbench

__all__ = ["collect_tasks", "measure", "measure_in_process"]

THREAD_VARIABLES = (
    "TURBOQUANT_NP_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
)

# Threads of OpenMP and OpenBLAS wait busily for some time after a call, and so would take a core
# from the call that is next in turn.
NO_BUSY_WAITING = {
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
    "OPENBLAS_THREAD_TIMEOUT": "4",
}


def collect_tasks(bench: Workbench, sweeps: bool) -> Iterable[Task]:
    """What the options ask for; growth but for the number of threads in one process only."""
    from . import append, attention, attention_peers, codec, codec_peers, growth, launches

    sections = bench.options.sections
    for name, modules in (
        ("codec", (codec,)),
        ("attention", (attention, launches)),
        ("append", (append,)),
    ):
        if name in sections:
            for module in modules:
                yield from module.tasks(bench)
    if bench.options.peers:
        for name, peers in (("codec", codec_peers), ("attention", attention_peers)):
            if name in sections:
                yield from peers.tasks(bench)
    if GROWTH in sections:
        yield from growth.tasks(bench, threads_only=not sweeps)


def measure(options: Options, threads: int, sweeps: bool = True) -> list[Row]:
    """All rows that are measured in a process with so many threads."""
    from ..commands.progress import ProgressBar

    bench = Workbench(options, threads)
    if options.device == "cuda":
        from .compile_first import compile_first

        compile_first(bench)
    tasks = list(collect_tasks(bench, sweeps))
    where = options.device if options.device != "cpu" else f"{threads} threads"
    rows: list[Row] = []
    with ProgressBar(f"bench, {where}", "cases") as progress:
        for done, task in enumerate(tasks):
            progress(done, len(tasks))
            rows += task()
        progress(len(tasks), len(tasks))
    return rows


def measure_in_process(options: Options, threads: int, sweeps: bool = True) -> list[Row]:
    """`measure` in a new process that may use `threads` cores.

    Raises
    ------
    RuntimeError
        If the process fails; its error stands on stderr.
    """
    environment = os.environ | {name: str(threads) for name in THREAD_VARIABLES} | NO_BUSY_WAITING
    settings = json.dumps([asdict(options), threads, sweeps])
    with _confined_to(threads):
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, settings],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
    with process:
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a process of the benchmark ended with code {process.returncode}")
    results: list[Row] = json.loads(output)
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


def _main(arguments: list[Any]) -> None:
    settings, threads, sweeps = arguments
    options = Options(**settings | {"sections": tuple(settings["sections"])})
    results = sys.stdout
    sys.stdout = sys.stderr  # what other libraries print must not get between the results
    json.dump(measure(options, threads, sweeps), results)


if __name__ == "__main__":
    try:
        _main(json.loads(sys.argv[1]))
    except KeyboardInterrupt:  # the parent was interrupted too, and says what there is to say
        sys.exit(130)
