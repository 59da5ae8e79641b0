"""Other libraries on the same data, in turns with ours; and which of them are missing, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .timing import Call, Runner, alternate
from .workbench import Row, Task, Workbench

__all__ = ["Peer", "compare", "missing_row", "peer_tasks", "why_missing"]


@dataclass(frozen=True)
class Peer:
    """A library, and how it is called.

    Attributes
    ----------
    name : str
    distribution, module : str
        What pip installs, and what is imported.
    devices : tuple of str
    calls : callable
        Makes what is timed from a problem; what exactly, the sections say.  Raises ValueError if
        the library cannot do that.
    """

    name: str
    distribution: str
    module: str
    devices: tuple[str, ...]
    calls: Callable[..., Any]

    @property
    def version(self) -> str:
        return version(self.distribution)


def why_missing(peer: Peer, device: str) -> str | None:
    """None if the peer can run on this device, else the reason."""
    if device not in peer.devices:
        where = {"cpu": "CPUs", "cuda": "GPUs"}
        return f"works on {' and '.join(where[d] for d in peer.devices)} only"
    try:
        version(peer.distribution)
    except PackageNotFoundError:
        return f"not installed: pip install {peer.distribution}"
    try:
        module = import_module(peer.module)
    except Exception as error:  # a library that is broken here must not end the benchmark
        return f"import {peer.module} fails: {_first_line(error)}"
    if device == "cuda" and peer.module == "torch" and not module.cuda.is_available():
        return f"torch {peer.version} finds no GPU"
    return None


def missing_row(peer: Peer, section: str, reason: str) -> Row:
    """What the document says of a peer that is not compared."""
    return {"section": section, "peer": peer.name, "missing": reason}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def compare(
    bench: Workbench,
    peer: Peer,
    section: str,
    operation: str,
    settings: dict[str, Any],
    items: int,
    ours: Mapping[str, Sequence[Call]],
    theirs: Sequence[Call],
    *,
    difference: float | None = None,
) -> list[Row]:
    """One row for each of ours: seconds of both, and how many times faster ours is.

    Parameters
    ----------
    ours : mapping
        Steps by the name of our variant.
    theirs : sequence of callable
    difference : float, optional
        Of the results, relative; recorded.
    """
    runners: dict[str, Runner] = {
        name: bench.clock.prepare(steps) for name, steps in {**ours, peer.name: theirs}.items()
    }
    seconds = alternate(runners)
    return [
        {
            "section": section,
            "operation": operation,
            "peer": peer.name,
            "version": peer.version,
            **settings,
            "threads": bench.threads,
            "items": items,
            "ours": name,
            "peer_seconds": seconds[peer.name],
            "our_seconds": seconds[name],
            "ratio": seconds[peer.name] / seconds[name],
            "peer_timed": runners[peer.name].timed,
            "our_timed": runners[name].timed,
            "difference": difference,
        }
        for name in ours
    ]


def guarded(peer: Peer, section: str, task: Task) -> Task:
    """`task`, but a peer that fails becomes a row that says so."""

    def run() -> list[Row]:
        try:
            return task()
        except Exception as error:
            return [missing_row(peer, section, f"failed: {_first_line(error)}")]

    return run


def peer_tasks(
    bench: Workbench,
    section: str,
    peers: Iterable[Peer],
    comparisons: Callable[[Workbench, Peer], Iterable[Task]],
) -> Iterable[Task]:
    """Comparisons with the peers that are there; one row for each that is not."""
    for peer in peers:
        if reason := why_missing(peer, bench.device):
            row = missing_row(peer, section, reason)
            yield lambda row=row: [row]  # type: ignore[misc]
        else:
            for task in comparisons(bench, peer):
                yield guarded(peer, section, task)
