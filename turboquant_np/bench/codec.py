"""Speed of `encode` and `decode`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from math import log2
from typing import Any

import numpy as np

from .. import TurboQuant
from .._arrays import float_dtype
from ..rotation import HadamardRotation
from .timing import Call
from .workbench import Row, Task, Work, Workbench

__all__ = ["Case", "codec_cases", "measure", "tasks", "transform_operations", "vectors"]


@dataclass(frozen=True)
class Case:
    """One setting of the codec; `rounds` is 0 for a Haar rotation."""

    head_dim: int
    bits: int
    rounds: int
    dtype: str = "float32"

    def quantizer(self, backend: str) -> TurboQuant:
        if self.rounds == 0:
            return TurboQuant(
                head_dim=self.head_dim, bits=self.bits, rotation="haar", backend=backend
            )
        return TurboQuant(
            head_dim=self.head_dim, bits=self.bits, hadamard_rounds=self.rounds, backend=backend
        )


def codec_cases(full: bool, device: str = "cpu") -> list[Case]:
    """What is measured: seconds of it by default, minutes with `full`."""
    if not full and device == "cuda":
        halves = [Case(128, b, rounds, "float16") for rounds, b in product((1, 3), (2, 3, 4, 8))]
        return [*halves, Case(128, 4, 3), Case(64, 4, 3, "float16"), Case(128, 4, 0, "float16")]
    if not full:
        return [
            *(Case(128, bits, 3) for bits in (1, 2, 3, 4, 8)),
            Case(128, 4, 1),
            Case(128, 4, 3, "float16"),
            Case(1536, 4, 3),
            Case(128, 4, 0),
        ]
    head_dims = (64, 80, 96, 112, 128, 192, 256, 768, 1536)
    if device == "cuda":  # where caches hold float16
        half = product(head_dims, (2, 3, 4, 8), (3, 1), ("float16",))
        more = product((128,), (1, 5, 6, 7), (3, 1), ("float16",))
        floats = product((128,), (2, 3, 4, 8), (3, 1), ("float32",))
        dense = product((64, 96, 128), (2, 4), (0,), ("float16",))
        return [Case(*settings) for settings in (*half, *more, *floats, *dense)]
    grid = product(head_dims, (1, 2, 3, 4, 6, 8), (3, 1), ("float32", "float16"))
    haar = [Case(d, bits, 0) for d, bits in product((64, 96, 128, 256, 768), (2, 4))]
    return [*(Case(*settings) for settings in grid), *haar, Case(128, 4, 0, "float16")]


def transform_operations(head_dim: int, rounds: int) -> int:
    """Additions of one vector's fast rotation."""
    rotation = HadamardRotation(head_dim, 0, rounds)
    transform = rotation.block * round(log2(rotation.block))
    if rotation.is_power_of_two:
        return rounds * transform
    return 2 * rounds * (transform + 2 * (head_dim - rotation.block))


def vectors(bench: Workbench, head_dim: int, dtype: str, rows: int) -> Any:
    """[rows, head_dim] Gaussian vectors on the device."""
    rng = np.random.Generator(np.random.PCG64([head_dim, 7]))
    # A block of them again and again: making millions of Gaussians takes longer than encoding.
    block = rng.standard_normal((min(rows, 4096), head_dim), dtype=np.float32)
    block = block.astype(float_dtype(dtype))
    xp = bench.xp
    return xp.tile(xp.asarray(block), (-(-rows // len(block)), 1))[:rows]


def measure(
    bench: Workbench, case: Case, rows: int | None = None, section: str = "codec"
) -> Iterator[Row]:
    """A line for `encode` and one for `decode`."""
    tq = case.quantizer(bench.options.backend)
    d = case.head_dim
    if rows is None:
        rows = max(1, bench.num_bytes // (d * float_dtype(case.dtype).itemsize))
        if case.rounds == 0:
            rows = max(1, rows // 8)  # a dense product is slow
    x = vectors(bench, d, case.dtype, rows)
    packed, norms = tq.encode(x)
    decoded = tq.decode(packed, norms, dtype=case.dtype)
    moved = x.nbytes + packed.nbytes + norms.nbytes
    # check_finite would make every call on a GPU wait for the result
    check = bench.device == "cpu"
    calls: dict[str, tuple[str, int, Call]] = {
        # norm, gain and a search among 2**bits intervals; a look-up and the scale
        "encode": (
            "read",
            d * (2 + case.bits),
            partial(tq.encode, x, out=(packed, norms), check_finite=check),
        ),
        "decode": ("copy", 2 * d, partial(tq.decode, packed, norms, out=decoded)),
    }
    for operation, (memory, others, call) in calls.items():
        if case.rounds == 0:
            work = Work(moved, memory, rows * d * d, "float64 product")
        else:
            work = Work(moved, memory, rows * (others + transform_operations(d, case.rounds)))
        yield bench.measure(
            section,
            operation,
            asdict(case),
            rows,
            work,
            [call] * (4 if bench.device == "cuda" else 1),
            product=(rows, d) if case.rounds == 0 else None,
        )


def tasks(bench: Workbench) -> Iterable[Task]:
    """All cases of this section."""
    for case in codec_cases(bench.options.full, bench.device):
        yield lambda case=case: list(measure(bench, case))  # type: ignore[misc]
