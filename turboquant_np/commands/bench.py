"""``turboquant-np bench``: speed beside the machine's limits and beside other libraries."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import CommandError

DEFAULT_MEGABYTES = {"cpu": 64.0, "cuda": 1024.0}  # beyond most caches, and long against a launch
TO_STDOUT = "-"

EPILOG = """\
examples:
  turboquant-np bench                                about a minute
  turboquant-np bench --section codec attention      only these
  turboquant-np bench --peers                        other libraries on the same data
  turboquant-np bench --section growth               context, batch, length, bits, threads
  turboquant-np bench --full --peers --json all.json --plot all.svg

Each time is the median of calls that take turns with what bounds them: reading and copying memory,
fused multiply-adds, a float64 matrix product, or another library. So a share or a ratio holds even
where the machine's speed varies. On a GPU, steps over rotating inputs are timed in CUDA graphs.

Other libraries, if installed: faiss-cpu, turbovec, turbo-quant-lite, rabitqlib, aither-kvcache,
torch, and on a GPU flashinfer-python. Those that are not are listed with the reason.

Exit code 1 if an error is not what theory says.
"""


def add_parser(subparsers: Any) -> None:
    from ..bench.options import QUICK_SECTIONS, SECTIONS

    parser = subparsers.add_parser(
        "bench",
        help="speed, beside the limits of the machine and other libraries",
        description="Measure speed and error; print each beside what bounds it.",
        epilog="sections:\n"
        + "".join(f"  {name:12}{what}\n" for name, what in SECTIONS.items())
        + f"\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--section",
        nargs="+",
        choices=SECTIONS,
        metavar="NAME",
        help=f"what to measure (below); default: {', '.join(QUICK_SECTIONS)}",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every setting and section; takes many minutes, on a GPU about four",
    )
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
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=TO_STDOUT,
        help="write everything measured, for programs; without FILE, to standard output in place "
        "of the report",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw it: FILE.svg, .png or .pdf; one file for each plot, named after FILE "
        "(needs matplotlib)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.megabytes is not None and not arguments.megabytes > 0:
        raise CommandError(f"--megabytes must be positive, got {arguments.megabytes}")
    if arguments.plot and find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'turboquant-np[plot]'")
    from ..bench.options import QUICK_SECTIONS, SECTIONS, Options
    from ..bench.report import report
    from ..bench.run import default_device, run

    device = default_device() if arguments.device == "auto" else arguments.device
    default = tuple(SECTIONS) if arguments.full else QUICK_SECTIONS
    document = run(
        Options(
            sections=tuple(dict.fromkeys(arguments.section or default)),
            full=arguments.full,
            peers=arguments.peers,
            device=device,
            backend=arguments.backend,
            megabytes=arguments.megabytes or DEFAULT_MEGABYTES[device],
        )
    )
    text = json.dumps(document, indent=1)
    if arguments.json == TO_STDOUT:
        print(text)
    else:
        if arguments.json:
            Path(arguments.json).write_text(text + "\n")
        print(report(document))
    if arguments.plot:
        from ..bench.plot import draw

        written = draw(document, arguments.plot)
        if arguments.json != TO_STDOUT:
            print("\n" + "\n".join(f"Plot: {path}" for path in written))
    return 0 if all(row["passed"] for row in document["validation"]) else 1
