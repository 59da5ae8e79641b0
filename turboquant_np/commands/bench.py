"""``turboquant-np bench``: speed beside the machine's limits and beside other libraries."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import CommandError

DEFAULT_MEGABYTES = {"cpu": 64.0, "cuda": 1024.0}  # beyond most caches, and long against a launch

EPILOG = """\
examples:
  turboquant-np bench                          under a minute
  turboquant-np bench --full --peers           every setting, and the other libraries installed
  turboquant-np bench --json cpu.json --plot cpu.svg

Each figure comes with its ratio to something measured in the same moments: memory bandwidth, a
float64 matrix product, or another library on the same vectors. Other libraries: faiss-cpu,
turbovec, turbo-quant-lite. Exit code 1 if an error is not what theory says.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="speed, beside the limits of the machine and other libraries",
        description="Measure speed and error; print each beside what bounds it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="every setting; takes minutes")
    parser.add_argument(
        "--peers", action="store_true", help="compare with other libraries installed"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto (default) is cuda if CuPy finds a GPU",
    )
    parser.add_argument("--backend", default="auto", help="auto (default), reference, cpu, ...")
    parser.add_argument(
        "--megabytes",
        type=float,
        metavar="MB",
        help="size of the vectors of a case, in units of 2**20 bytes; default: 64, on a GPU 1024",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured, for programs")
    parser.add_argument("--plot", metavar="FILE", help="draw it: .svg, .png or .pdf")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.megabytes is not None and not arguments.megabytes > 0:
        raise CommandError(f"--megabytes must be positive, got {arguments.megabytes}")
    if arguments.plot and find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'turboquant-np[plot]'")
    from ..bench.report import report
    from ..bench.run import default_device, run
    from ..bench.worker import Options

    device = default_device() if arguments.device == "auto" else arguments.device
    if arguments.peers and device != "cpu":
        raise CommandError("--peers compares on the CPU: add --device cpu")
    document = run(
        Options(
            full=arguments.full,
            peers=arguments.peers,
            device=device,
            backend=arguments.backend,
            megabytes=arguments.megabytes or DEFAULT_MEGABYTES[device],
        )
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")
    print(report(document))
    if arguments.plot:
        from ..bench.plot import draw

        print(f"\nPlot: {draw(document, arguments.plot)}")
    return 0 if all(row["passed"] for row in document["validation"]) else 1
