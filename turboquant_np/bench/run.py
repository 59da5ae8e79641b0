"""The whole benchmark: everything it finds, as one document that JSON can hold."""

from __future__ import annotations

import datetime
import platform
import sys
from dataclasses import asdict
from typing import Any

from .. import TurboQuant, __version__
from .._backend import load
from ..commands.doctor import PACKAGES, installed_version
from ..commands.validate import judge
from ..memory import MODELS, kv_bytes_per_token
from .goals import goals
from .startup import first_encode_seconds, import_seconds
from .worker import Options, measure, measure_in_process, usable_cores

__all__ = ["default_device", "run"]


def default_device() -> str:
    """ "cuda" if CuPy finds a GPU, else "cpu"."""
    return "cpu" if load("cuda").why_unavailable() else "cuda"


def run(options: Options) -> dict[str, Any]:
    """Measure everything the options ask for.

    Returns
    -------
    dict
        ``about``, ``codec``, ``peers``, ``startup``, ``validation``, ``memory``, ``goals``.
    """
    document: dict[str, Any] = {"about": about(options), "codec": [], "peers": []}
    if options.device == "cuda":
        parts = [measure(options, threads=0)]
    else:
        cores = usable_cores()
        counts = sorted({1, min(2, cores), cores})
        parts = [measure_in_process(options, threads) for threads in counts]
    for part in parts:
        document["codec"] += part["codec"]
        document["peers"] += part["peers"]
    document["startup"] = {
        "import_seconds": import_seconds(),
        "first_encode_seconds": first_encode_seconds(options.backend),
    }
    document["validation"] = list(validation(options))
    document["memory"] = memory()
    document["goals"] = []
    if options.device == "cpu":
        document["goals"] = [goal._asdict() | {"met": goal.met} for goal in goals(document)]
    return document


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


def validation(options: Options) -> list[dict[str, Any]]:
    """Error of random vectors beside theory: the same judgement as ``turboquant-np validate``."""
    head_dims = (64, 80, 128, 256) if options.full else (128,)
    return [
        {"head_dim": head_dim} | asdict(judge(_validate(options, head_dim, bits), "norm"))
        for head_dim in head_dims
        for bits in range(1, 9)
    ]


def _validate(options: Options, head_dim: int, bits: int) -> dict[str, Any]:
    tq = TurboQuant(head_dim=head_dim, bits=bits, backend=options.backend)
    return tq.validate(num_vectors=10_000, device=options.device)


def memory() -> list[dict[str, Any]]:
    """Bytes of keys and values per token, float16 beside 4, 3 and 2 bits."""
    return [
        {"model": model.name}
        | {
            "float16" if bits is None else f"{bits} bits": kv_bytes_per_token(model, bits)
            for bits in (None, 4, 3, 2)
        }
        for model in MODELS
    ]
