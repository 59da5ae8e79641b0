"""``turboquant-np validate``: is the measured error what theory says?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from .table import format_table, significant

STANDARD_ERRORS = 6  # a deviation beyond this happens by chance once in 500 million runs
SLOPE_TOLERANCE = 1e-4  # <decoded, x> of the unbiased scale is 1 but for float32 rounding

EPILOG = """\
examples:
  turboquant-np validate
  turboquant-np validate --head-dim 96 --bits 3 4 --rotation haar
  turboquant-np validate --device cuda --json

Random unit vectors are encoded and decoded. A bit width passes if the mean squared error lies below
the bound of theorem 1 of arXiv:2504.19874 and,
  with --scale norm      within 6 standard errors of the exact expectation;
  with --scale mse       not above that expectation;
  with --scale unbiased  <decoded, x> is 1.
Exit code 1 if one fails.
"""


@dataclass(frozen=True)
class Verdict:
    """Measured and expected error of one bit width, and what is wrong with it."""

    bits: int
    passed: bool
    why: str
    mse: float
    mse_standard_error: float
    mse_expected: float
    mse_theory_lower: float
    mse_theory_upper: float
    deviation: float  # (mse - mse_expected) in standard errors
    ip_slope: float
    backend: str


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "validate",
        help="PASS or FAIL: the error of random vectors beside theory",
        description="Measure the squared error of random unit vectors and judge it by theory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--head-dim", type=int, default=128, metavar="D", help="default: 128")
    parser.add_argument(
        "--bits", type=int, nargs="+", default=range(1, 9), metavar="B", help="default: 1 to 8"
    )
    parser.add_argument(
        "--rotation", default="hadamard", choices=["hadamard", "haar"], help="default: hadamard"
    )
    parser.add_argument(
        "--scale", default="norm", choices=["norm", "mse", "unbiased"], help="default: norm"
    )
    parser.add_argument(
        "--num-vectors", type=int, default=20_000, metavar="N", help="default: 20000"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--backend", default="auto", help="auto (default), reference, cpu, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the vectors; default: 0")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def judge(measured: dict[str, Any], scale: str) -> Verdict:
    """A verdict on what `TurboQuant.validate` returns."""
    mse, expected = measured["mse"], measured["mse_expected"]
    deviation = (mse - expected) / measured["mse_standard_error"]
    if not mse < measured["mse_theory_upper"]:
        why = "above the bound of the theorem"
    elif scale == "norm" and not abs(deviation) <= STANDARD_ERRORS:
        why = f"{deviation:+.1f} standard errors off"
    elif scale == "mse" and not deviation <= STANDARD_ERRORS:
        why = f"{deviation:+.1f} standard errors above what the norm alone would give"
    elif scale == "unbiased" and not abs(measured["ip_slope"] - 1) <= SLOPE_TOLERANCE:
        why = f"inner products are biased, <decoded, x> is {measured['ip_slope']:.5f}"
    else:
        why = ""
    names = {field.name for field in fields(Verdict)} & measured.keys()
    return Verdict(
        passed=not why, why=why, deviation=deviation, **{name: measured[name] for name in names}
    )


def run(arguments: argparse.Namespace) -> int:
    from .. import TurboQuant

    verdicts = []
    for bits in sorted(set(arguments.bits)):
        tq = TurboQuant(
            head_dim=arguments.head_dim,
            bits=bits,
            rotation=arguments.rotation,
            scale=arguments.scale,
            backend=arguments.backend,
        )
        measured = tq.validate(arguments.num_vectors, arguments.device, seed=arguments.seed)
        verdicts.append(judge(measured, arguments.scale))
    if arguments.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        print(
            f"{arguments.num_vectors} random unit vectors, head_dim {arguments.head_dim}, rotation "
            f"{arguments.rotation}, scale {arguments.scale}, backend {verdicts[0].backend}\n"
        )
        print(report(verdicts))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def report(verdicts: list[Verdict]) -> str:
    """One line for each bit width."""
    return format_table(
        [
            "bits",
            "squared error\nmeasured",
            "standard\nerror",
            "exact\nexpectation",
            "deviation in\nstandard errors",
            "lower\nbound",
            "upper\nbound",
            "<decoded, x>",
            "verdict",
        ],
        [
            [
                f"{v.bits}",
                f"{v.mse:#.4g}",
                f"{v.mse_standard_error:.1e}",
                f"{v.mse_expected:#.4g}",
                f"{v.deviation:+.1f}",
                significant(v.mse_theory_lower),
                significant(v.mse_theory_upper),
                f"{v.ip_slope:.5f}",
                "PASS" if v.passed else f"FAIL: {v.why}",
            ]
            for v in verdicts
        ],
    )
