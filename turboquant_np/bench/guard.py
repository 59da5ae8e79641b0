"""A guard against losing speed: ``python -m turboquant_np.bench.guard``.

Nothing here is compared with seconds.  Speeds are shares of rooflines that are measured in turns
with them, growth is a ratio of two times measured in turns, and each floor is half of what was
measured or less, so that another machine, or a busy one, passes; what misses its floor is measured
again, twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from . import append, attention, codec
from .options import Options
from .timing import alternate
from .workbench import Row, Workbench

__all__ = ["CHECKS", "Check", "guard", "main"]

ATTEMPTS = 3


@dataclass(frozen=True)
class Check:
    """Something measured that must not fall below its floor.

    Attributes
    ----------
    what : str
    floor : float
    measure : callable
        Of a `Workbench`.
    """

    what: str
    floor: float
    measure: Callable[[Workbench], float]


def _share(row: Row) -> float:
    return float(row["share"])


def _codec(case: codec.Case, operation: str) -> Callable[[Workbench], float]:
    def share(bench: Workbench) -> float:
        rows = {row["operation"]: row for row in codec.measure(bench, case)}
        return _share(rows[operation])

    return share


def _attention(case: attention.AttentionCase) -> Callable[[Workbench], float]:
    return lambda bench: _share(attention.measure(bench, case))


def _slots(tokens: int) -> Callable[[Workbench], float]:
    return lambda bench: _share(append.measure_slots(bench, tokens, 4, "float32"))


def linearity(case: attention.AttentionCase, times: int) -> Callable[[Workbench], float]:
    """How near to linear: `times` times the time of a context over that of one so much longer."""

    def ratio(bench: Workbench) -> float:
        cases = {"short": case, "long": replace(case, context=case.context * times)}
        problems = {name: attention.Problem(bench, c) for name, c in cases.items()}
        runners = {name: bench.clock.prepare(p.steps()) for name, p in problems.items()}
        seconds = alternate(runners)
        return times * seconds["short"] / seconds["long"]

    return ratio


STEP = attention.AttentionCase(context=4096)
CHECKS = (
    Check("encode, 3 rounds", 0.15, _codec(codec.Case(128, 4, 3), "encode")),
    Check("encode, 1 round", 0.15, _codec(codec.Case(128, 4, 1), "encode")),
    Check("encode, float16", 0.10, _codec(codec.Case(128, 4, 3, "float16"), "encode")),
    Check("encode, d = 1536", 0.10, _codec(codec.Case(1536, 4, 3), "encode")),
    Check("decode, 3 rounds", 0.15, _codec(codec.Case(128, 4, 3), "decode")),
    Check("decode, 1 round", 0.15, _codec(codec.Case(128, 4, 1), "decode")),
    Check("encode, Haar", 0.35, _codec(codec.Case(128, 4, 0), "encode")),
    Check("attention, 4 bits", 0.08, _attention(STEP)),
    Check("attention, 2 bits", 0.08, _attention(attention.with_bits(STEP, 2))),
    Check("prefill", 0.12, _attention(replace(STEP, context=512, query_len=512))),
    Check("encode_paged, 256 tokens", 0.05, _slots(256)),
    Check("attention is linear in the context", 0.5, linearity(STEP, 8)),
)


def guard(
    bench: Workbench,
    checks: Sequence[Check] = CHECKS,
    *,
    attempts: int = ATTEMPTS,
    report: Callable[[str], None] = print,
) -> bool:
    """Run all checks.

    Parameters
    ----------
    bench : Workbench
    checks : sequence of Check
    attempts : int
        How often one that misses its floor is measured before it fails.
    report : callable
        Gets a line of text for each check.

    Returns
    -------
    bool
        Whether all of them reached their floors.
    """
    passed = True
    for check in checks:
        found: list[float] = []
        while len(found) < attempts and not (found and found[-1] >= check.floor):
            found.append(check.measure(bench))
        good = found[-1] >= check.floor
        passed &= good
        figures = ", then ".join(f"{value:.2f}" for value in found)
        verdict = "ok" if good else "TOO SLOW"
        report(f"{verdict:9}{check.what:36}{figures} (at least {check.floor:.2f})")
    return passed


def main() -> int:
    """Exit code 0 if everything is fast enough, on one core, else 1."""
    os.environ["TURBOQUANT_NP_NUM_THREADS"] = "1"
    options = Options(megabytes=16)
    return 0 if guard(Workbench(options, threads=1)) else 1


if __name__ == "__main__":
    sys.exit(main())
