"""Speed of `encode` and `decode`, beside the roofline that bounds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from .. import TurboQuant
from .._arrays import float_dtype
from .rooflines import CudaRooflines, HostRooflines, Rooflines, matrix_product
from .timing import Call, Timer, alternate, cuda_seconds, host_seconds

__all__ = ["Case", "CodecBench", "CodecResult", "codec_cases"]


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


@dataclass(frozen=True)
class CodecResult:
    """One line: how fast, and how near to the roofline.

    `rate` and `roofline_rate` are in GB/s of bytes read and written, or in GFLOP/s if `roofline` is
    "dgemm"; both were measured in turns.
    """

    operation: str
    head_dim: int
    bits: int
    rounds: int
    dtype: str
    threads: int
    vectors: int
    seconds: float
    mvec_s: float
    roofline: str
    rate: float
    roofline_rate: float

    @property
    def share(self) -> float:
        """Of the roofline, 1 being all of it."""
        return self.rate / self.roofline_rate


def codec_cases(full: bool) -> list[Case]:
    """What is measured: seconds of it by default, minutes with `full`."""
    if not full:
        return [
            *(Case(128, bits, 3) for bits in (1, 2, 3, 4, 8)),
            Case(128, 4, 1),
            Case(128, 4, 3, "float16"),
            Case(1536, 4, 3),
            Case(128, 4, 0),
        ]
    grid = product((64, 128, 256, 768, 1536), (1, 2, 3, 4, 6, 8), (3, 1), ("float32", "float16"))
    haar = [Case(d, bits, 0) for d, bits in product((64, 128, 256, 768), (2, 4))]
    return [*(Case(*settings) for settings in grid), *haar]


class CodecBench:
    """Measures cases on one device with one number of threads.

    Parameters
    ----------
    device : {"cpu", "cuda"}
    threads : int
        How many the process may use; for the rooflines and the record.
    megabytes : float
        Size of the vectors, in units of 2**20 bytes.
    backend : str
    """

    def __init__(
        self, device: str, threads: int, megabytes: float = 64.0, backend: str = "auto"
    ) -> None:
        self.device, self.threads, self.backend = device, threads, backend
        self.num_bytes = int(megabytes * 2**20)
        self.rooflines: Rooflines
        self.timer: Timer
        if device == "cuda":
            self.rooflines, self.timer = CudaRooflines(self.num_bytes), cuda_seconds
        else:
            self.rooflines, self.timer = HostRooflines(self.num_bytes, threads), host_seconds

    def vectors(self, head_dim: int, dtype: str, rows: int) -> Any:
        """[rows, head_dim] Gaussian vectors on the device."""
        rng = np.random.Generator(np.random.PCG64([head_dim, 7]))
        # A block of them again and again: making millions of Gaussians takes longer than encoding.
        block = rng.standard_normal((min(rows, 4096), head_dim), dtype=np.float32)
        block = block.astype(float_dtype(dtype))
        xp: Any = np
        if self.device == "cuda":
            import cupy

            xp = cupy
        return xp.tile(xp.asarray(block), (-(-rows // len(block)), 1))[:rows]

    def measure(self, case: Case) -> Iterator[CodecResult]:
        """A result for `encode` and one for `decode`."""
        tq = case.quantizer(self.backend)
        itemsize = float_dtype(case.dtype).itemsize
        rows = max(1, self.num_bytes // (case.head_dim * itemsize))
        if case.rounds == 0:
            rows = max(1, rows // 8)  # a dense product is slow
        x = self.vectors(case.head_dim, case.dtype, rows)
        packed, norms = tq.encode(x)
        decoded = tq.decode(packed, norms, dtype=case.dtype)
        moved = x.nbytes + packed.nbytes + norms.nbytes
        # check_finite would make every call on a GPU wait for the result
        check = self.device == "cpu"
        operations: dict[str, Call] = {
            "encode": lambda: tq.encode(x, out=(packed, norms), check_finite=check),
            "decode": lambda: tq.decode(packed, norms, out=decoded),
        }
        for operation, call in operations.items():
            if case.rounds == 0:
                roofline, work, work_at_best = "dgemm", 2 * rows * case.head_dim**2, 0
                best = matrix_product(rows, case.head_dim, x)
                work_at_best = work
            elif operation == "encode":
                roofline, work, work_at_best = "read", moved, self.rooflines.read_bytes
                best = self.rooflines.read
            else:
                roofline, work, work_at_best = "copy", moved, self.rooflines.copy_bytes
                best = self.rooflines.copy
            seconds = alternate({"ours": call, "best": best}, self.timer)
            yield CodecResult(
                operation=operation,
                head_dim=case.head_dim,
                bits=case.bits,
                rounds=case.rounds,
                dtype=case.dtype,
                threads=self.threads,
                vectors=rows,
                seconds=seconds["ours"],
                mvec_s=rows / seconds["ours"] / 1e6,
                roofline=roofline,
                rate=work / seconds["ours"] / 1e9,
                roofline_rate=work_at_best / seconds["best"] / 1e9,
            )
