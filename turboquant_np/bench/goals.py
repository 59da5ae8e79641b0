"""The speeds this library sets out to reach, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Goal", "goals"]

Document = dict[str, Any]


class Goal(NamedTuple):
    """`measured` is None where the run did not measure it."""

    what: str
    needed: float
    unit: str
    measured: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.needed if self.at_most else self.measured >= self.needed


def _find(rows: list[dict[str, Any]], key: str, **settings: Any) -> float | None:
    """`key` of the row that has these settings."""
    for row in rows:
        if settings.items() <= row.items():
            return float(row[key])
    return None


def goals(document: Document) -> Iterator[Goal]:
    """The goals for the CPU: d = 128, float32, 4 bits, one core where nothing else is said."""
    codec, peers, startup = document["codec"], document["peers"], document["startup"]
    base = {"head_dim": 128, "bits": 4, "dtype": "float32"}

    def speed(operation: str, threads: int) -> float | None:
        return _find(codec, "mvec_s", operation=operation, rounds=3, threads=threads, **base)

    one, two = speed("encode", 1), speed("encode", 2)
    yield Goal("encode, 3 Hadamard rounds", 12, "Mvec/s", one)
    yield Goal("decode", 15, "Mvec/s", speed("decode", 1))
    yield Goal("encode, 2 cores over 1", 1.8, "x", two / one if one and two else None)
    haar = [
        _find(codec, "share", operation=operation, rounds=0, threads=1, **base)
        for operation in ("encode", "decode")
    ]
    shares = [share for share in haar if share is not None]
    yield Goal("Haar, of the float64 matrix product", 0.6, "", min(shares, default=None))
    for peer, head_dim, three_rounds, one_round in (
        ("faiss tqmse + rotation", 128, 30, 60),
        ("turbovec add", 128, 10, 20),
        ("turbovec add", 768, 4, None),
        ("turbovec add", 1536, 4, None),
    ):
        settings = {"peer": peer, "head_dim": head_dim, "bits": 4, "threads": 1}
        what = f"encode over {peer}, d = {head_dim}"
        ratio = _find(peers, "ratio_3_rounds", **settings)
        yield Goal(f"{what}, 3 rounds", three_rounds, "x", ratio)
        if one_round:
            ratio = _find(peers, "ratio_1_round", **settings)
            yield Goal(f"{what}, 1 round", one_round, "x", ratio)
    yield Goal("import", 0.3, "s", startup["import_seconds"], at_most=True)
    yield Goal(
        "first encode, kernels cached", 2, "s", startup["first_encode_seconds"], at_most=True
    )
