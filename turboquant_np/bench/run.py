"""The whole benchmark: everything it finds, as one document that JSON can hold."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from .. import __version__
from .._backend import load
from ..commands.doctor import PACKAGES, installed_version
from ..commands.progress import ProgressBar
from .checks import contexts, memory, validation
from .goals import goals
from .growth import slopes
from .options import GROWTH, Options, usable_cores
from .startup import first_encode_seconds, import_seconds
from .workbench import Row
from .worker import measure, measure_in_process

__all__ = ["SCHEMA", "default_device", "run", "sort_rows"]

SCHEMA = 2  # of the document; a change that breaks readers raises it
TIMED = ("codec", "attention", "append", GROWTH)


def default_device() -> str:
    """ "cuda" if CuPy finds a GPU, else "cpu"."""
    return "cpu" if load("cuda").why_unavailable() else "cuda"


def run(options: Options) -> dict[str, Any]:
    """Measure everything the options ask for.

    Returns
    -------
    dict
        ``schema``, ``about``; ``lines`` (see `Line`), ``launches`` (see `launches.measure`),
        ``peers`` and ``missing`` (see `compare`);
        ``growth`` (see `slopes`), ``startup``, ``validation``, ``memory``, ``contexts``, ``goals``.
        What was not asked for is empty.
    """
    document: dict[str, Any] = {"schema": SCHEMA, "about": about(options)}
    document |= sort_rows(_timed_rows(options))
    document["growth"] = list(slopes(document["lines"]))
    document |= {"startup": {}, "validation": [], "memory": [], "contexts": []}
    asked = options.sections
    with ProgressBar("bench, one process", "sections") as progress:
        if "startup" in asked:
            progress(0, 2)
            document["startup"] = {
                "import_seconds": import_seconds(),
                "first_encode_seconds": first_encode_seconds(options.backend),
            }
        progress(1, 2)
        if "validation" in asked:
            document["validation"] = validation(options)
        progress(2, 2)
    if "memory" in asked:
        document |= {"memory": memory(), "contexts": contexts()}
    document["goals"] = [goal._asdict() | {"met": goal.met} for goal in goals(document)]
    return document


def _timed_rows(options: Options) -> list[Row]:
    """From one process for a GPU, or one for each number of threads."""
    if not set(TIMED) & set(options.sections):
        return []
    if options.device == "cuda":
        return measure(options, threads=0)
    cores = usable_cores()
    counts = sorted({1, min(2, cores), cores})
    if options.sections == (GROWTH,):
        counts = sorted({1, *(2**k for k in range(1, cores.bit_length()) if 2**k <= cores), cores})
    rows = []
    for threads in counts:
        # on one core, which other programs disturb least, the way a time grows shows best
        rows += measure_in_process(options, threads, sweeps=threads == 1)
    return rows


def sort_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """``lines``, ``launches``, ``peers`` and ``missing``, what is missing once."""
    kinds: dict[str, list[Row]] = {"lines": [], "launches": [], "peers": [], "missing": []}
    keys = {"missing": "missing", "peer": "peers", "loop_seconds": "launches"}
    for row in rows:
        kind = next((kind for key, kind in keys.items() if key in row), "lines")
        if kind != "missing" or row not in kinds[kind]:
            kinds[kind].append(row)
    return kinds


def about(options: Options) -> dict[str, Any]:
    """Machine, versions and settings."""
    versions = {package: installed_version(package) for package in PACKAGES}
    known = {package: number for package, number in versions.items() if number}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _device_name() if options.device == "cuda" else _processor_name(),
        "cores": usable_cores(),
        "options": asdict(options),
        "versions": {
            "turboquant_np": __version__,
            "python": platform.python_version(),
            **known,
        },
        "backend": load(_backend_name(options)).describe(),
    }


def _backend_name(options: Options) -> str:
    return options.device if options.backend == "auto" else options.backend


def _processor_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_name() -> str:
    import cupy

    name: bytes = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return name.decode()
