"""Where everything is measured: device, clock and rooflines; and one measured line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .options import Options
from .rooflines import CudaRooflines, HostRooflines, Roofline, Rooflines
from .timing import Call, Clock, CudaClock, HostClock, alternate

__all__ = ["Line", "Task", "Work", "Workbench"]

Row = dict[str, Any]
Task = Callable[[], list[Row]]
ARITHMETIC = {"multiply-add": "multiply_add", "tensor cores": "tensor_cores"}


@dataclass(frozen=True)
class Work:
    """What a call has to do at least.

    Attributes
    ----------
    moved_bytes : int
        Bytes it must read and write.
    memory : {"read", "copy"}
        The roofline they are compared with.
    operations : int
        Multiply-adds; a lone addition or multiplication takes the place of one.
    arithmetic : {"multiply-add", "tensor cores", "float64 product"}
        The roofline they are compared with.
    """

    moved_bytes: int
    memory: str = "copy"
    operations: int = 0
    arithmetic: str = "multiply-add"


@dataclass(frozen=True)
class Line:
    """One measurement beside the rooflines that were measured in turns with it.

    Attributes
    ----------
    section, operation : str
    settings : dict
        What was measured: bits, context and so on.
    threads : int
        0 on a GPU.
    items : int
        Vectors or tokens of a call.
    seconds : float
        Median time of a call.
    timed : str
        As `Runner.timed`.
    work : Work
    rooflines : dict of str to float
        Bytes or operations a second.  On a GPU a copy is always among them, since speeds there are
        usually given as a share of it.
    """

    section: str
    operation: str
    settings: dict[str, Any]
    threads: int
    items: int
    seconds: float
    timed: str
    work: Work
    rooflines: dict[str, float]

    @property
    def limit(self) -> str:
        """The roofline that allows least."""
        return max(self._least_seconds(), key=self._least_seconds().__getitem__)

    @property
    def share(self) -> float:
        """Of what that roofline allows, 1 being all of it."""
        return max(self._least_seconds().values()) / self.seconds

    def _least_seconds(self) -> dict[str, float]:
        """What each roofline asks for."""
        amounts = {
            self.work.memory: self.work.moved_bytes,
            self.work.arithmetic: self.work.operations,
        }
        return {
            name: amounts[name] / rate for name, rate in self.rooflines.items() if name in amounts
        }

    def row(self) -> Row:
        """For JSON: settings beside figures."""
        return {
            "section": self.section,
            "operation": self.operation,
            **self.settings,
            "threads": self.threads,
            "items": self.items,
            "seconds": self.seconds,
            "items_per_second": self.items / self.seconds,
            "timed": self.timed,
            "moved_bytes": self.work.moved_bytes,
            "operations": self.work.operations,
            "bytes_per_second": self.work.moved_bytes / self.seconds,
            "operations_per_second": self.work.operations / self.seconds,
            "rooflines": self.rooflines,
            "limit": self.limit,
            "share": self.share,
        }


class Workbench:
    """Measures on one device with one number of threads.

    Parameters
    ----------
    options : Options
    threads : int
        How many the process may use; for the rooflines and the record.  0 on a GPU.
    """

    def __init__(self, options: Options, threads: int) -> None:
        self.options, self.threads = options, threads
        self.device = options.device
        self.num_bytes = int(options.megabytes * 2**20)
        self.rooflines: Rooflines
        self.clock: Clock
        if self.device == "cuda":
            self.rooflines, self.clock = CudaRooflines(self.num_bytes), CudaClock()
        else:
            self.rooflines, self.clock = HostRooflines(self.num_bytes, threads), HostClock()

    @property
    def xp(self) -> Any:
        """numpy or cupy."""
        if self.device == "cpu":
            return np
        import cupy

        return cupy

    def free(self) -> None:
        """Give device memory of the last case back."""
        if self.device == "cuda":
            self.xp.get_default_memory_pool().free_all_blocks()

    def measure(
        self,
        section: str,
        operation: str,
        settings: dict[str, Any],
        items: int,
        work: Work,
        steps: Sequence[Call],
        *,
        product: tuple[int, int] | None = None,
        clock: Clock | None = None,
    ) -> Row:
        """Time `steps` in turns with the rooflines of their work.

        Parameters
        ----------
        section, operation, settings, items, work
            As in `Line`.
        steps : sequence of callable
            The same work on different inputs.
        product : (rows, d), optional
            Shape of the matrix product that `work` is compared with.
        clock : Clock, optional
            For the steps; rooflines are always timed by that of the device.

        Returns
        -------
        dict
            `Line.row`.
        """
        memories = {work.memory, "copy"} if self.device == "cuda" else {work.memory}
        best: dict[str, Roofline | None] = {
            name: getattr(self.rooflines, name)() for name in sorted(memories)
        }
        if product:
            best[work.arithmetic] = self.rooflines.float64_product(*product)
        elif work.operations:
            best[work.arithmetic] = getattr(self.rooflines, ARITHMETIC[work.arithmetic])()
        measured = {name: roofline for name, roofline in best.items() if roofline is not None}
        runners = {"ours": (clock or self.clock).prepare(steps)}
        runners |= {
            name: self.clock.prepare([roofline.call], graph=False)
            for name, roofline in measured.items()
        }
        seconds = alternate(runners)
        line = Line(
            section=section,
            operation=operation,
            settings=settings,
            threads=self.threads,
            items=items,
            seconds=seconds["ours"],
            timed=runners["ours"].timed,
            work=work,
            rooflines={name: line.amount / seconds[name] for name, line in measured.items()},
        )
        return line.row()
