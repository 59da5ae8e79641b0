"""``turboquant-np doctor``: what works on this machine, what does not, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

EPILOG = """\
Each backend that works encodes and decodes a small input; codes, scales and decoded values must
equal those of the reference backend bit for bit. Exit code 1 if the default backend fails.
"""

# What is looked up, and what it is for.
PACKAGES = {
    "numpy": "required",
    "numba": "required; the cpu backend",
    "scipy": "required",
    "cupy": "the cuda backend: pip install 'turboquant-np[cuda12]' or [cuda13]",
    "ml_dtypes": "bfloat16 arrays: pip install 'turboquant-np[bfloat16]'",
    "safetensors": "safetensors files: pip install 'turboquant-np[io]'",
    "matplotlib": "plots: pip install 'turboquant-np[plot]'",
}
DISTRIBUTIONS = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}

# Settings of the self-check: every rotation and every scale.
CHECKS: tuple[dict[str, Any], ...] = (
    {"head_dim": 128, "bits": 4},
    {"head_dim": 96, "bits": 3, "scale": "unbiased"},
    {"head_dim": 64, "bits": 2, "scale": "mse", "rotation": "haar"},
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what works on this machine, and what is missing",
        description="Report versions, backends and a self-check of each backend.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def installed_version(package: str) -> str | None:
    """The version of an installed package, whatever its distribution is called."""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def machine() -> dict[str, str]:
    """Facts about the interpreter and the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": f"{usable} usable of {os.cpu_count()}",
    }


def examine(name: str) -> dict[str, Any]:
    """State of one backend; never raises, since finding out what is broken is the point."""
    from .._backend import load

    state: dict[str, Any] = {"name": name, "default": name == "cpu", "works": False, "facts": {}}
    try:
        backend = load(name)
        state["device"] = backend.device
        if reason := backend.why_unavailable():
            state["problem"] = reason
            return state
        state["facts"] = backend.describe()
        problem = differs_from_reference(name, backend.device)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        state["problem"] = problem
    else:
        state["works"] = True
    return state


def differs_from_reference(name: str, device: str) -> str | None:
    """None if the backend gives the reference's bits for the self-check, else where it does not."""
    import numpy as np

    from .. import TurboQuant

    def to_host(array: Any) -> Any:
        return array.get() if hasattr(array, "get") else array

    rng = np.random.Generator(np.random.PCG64(20250428))
    for settings in CHECKS:
        x = rng.standard_normal((256, settings["head_dim"])).astype(np.float32)
        x[0] = 0.0
        x[1] *= np.float32(1e-30)
        here = x
        if device == "cuda":
            import cupy

            here = cupy.asarray(x)
        mine = TurboQuant(**settings, backend=name)
        reference = TurboQuant(**settings, backend="reference")
        encoded, expected = mine.encode(here), reference.encode(x)
        pairs = {
            "codes": (encoded[0], expected[0]),
            "scales": (encoded[1], expected[1]),
            "decoded values": (
                mine.decode(*encoded, dtype=np.float32),
                reference.decode(*expected, dtype=np.float32),
            ),
        }
        for what, (got, wanted) in pairs.items():
            if not np.array_equal(to_host(got).view(np.uint8), wanted.view(np.uint8)):
                shown = ", ".join(f"{key}={value}" for key, value in settings.items())
                return f"{what} differ from the reference backend's with {shown}"
    return None


def run(arguments: argparse.Namespace) -> int:
    from .. import FORMAT_VERSION, __version__
    from .._backend import BUILT_IN, ENTRY_POINT_GROUP

    others = sorted(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
    backends = [examine(name) for name in (*BUILT_IN, *others)]
    ok = all(backend["works"] for backend in backends if backend["default"])
    found = {
        "turboquant_np": __version__,
        "format_version": FORMAT_VERSION,
        "machine": machine(),
        "packages": {package: installed_version(package) for package in PACKAGES},
        "backends": backends,
        "ok": ok,
    }
    print(json.dumps(found, indent=2) if arguments.json else report(found))
    return 0 if ok else 1


def report(found: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = [f"turboquant_np  {found['turboquant_np']} (format {found['format_version']})"]
    lines += [f"{name:<13}  {fact}" for name, fact in found["machine"].items()]
    lines += ["", "Packages"]
    lines += [
        f"  {package:<11}  {number or 'not installed; for ' + PACKAGES[package]}"
        for package, number in found["packages"].items()
    ]
    lines += ["", "Backends"]
    for backend in found["backends"]:
        default = ", the default for NumPy arrays" if backend["default"] else ""
        verdict = (
            f"works{default}; equals the reference bit for bit"
            if backend["works"]
            else f"does not work{default}: {backend['problem']}"
        )
        lines.append(f"  {backend['name']:<11}  {verdict}")
        lines += [f"  {'':<11}    {name}: {fact}" for name, fact in backend["facts"].items()]
    lines += [
        "",
        "All is well." if found["ok"] else "The default backend does not work: see above.",
    ]
    return "\n".join(lines)
