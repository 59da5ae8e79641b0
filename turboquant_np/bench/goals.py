"""The speeds this library sets out to reach, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Goal", "goals"]

Document = dict[str, Any]
Rows = list[dict[str, Any]]


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


def goals(document: Document) -> Iterator[Goal]:
    """The goals for the device of the document, of the sections that were run."""
    options = document["about"]["options"]
    asked = options["sections"]
    if options["device"] == "cuda":
        if "codec" in asked:
            yield from _cuda_codec(document["lines"])
        if "attention" in asked:
            yield from _cuda_steps(document["lines"], document["peers"])
            yield from _cuda_other_steps(document["lines"])
            yield from _cuda_launches(document["launches"])
            yield from _cuda_prefill(document["peers"])
        if "append" in asked:
            yield from _cuda_append(document["lines"])
        return
    if "codec" in asked:
        yield from _codec(document["lines"], document["peers"])
    if "attention" in asked:
        yield from _attention(document["lines"], document["peers"])
    if "startup" in asked:
        startup = document["startup"]
        yield Goal("import", 0.3, "s", startup["import_seconds"], at_most=True)
        first = startup["first_encode_seconds"]
        yield Goal("first encode, kernels cached", 2, "s", first, at_most=True)


def _row(rows: Rows, **settings: Any) -> dict[str, Any] | None:
    """The first row that has these settings."""
    return next((row for row in rows if settings.items() <= row.items()), None)


def _find(rows: Rows, key: str, **settings: Any) -> float | None:
    """`key` of the row that has these settings."""
    row = _row(rows, **settings)
    return None if row is None else float(row[key])


def _share(rows: Rows, rate: str, limit: str, **settings: Any) -> float | None:
    """`rate` of the row that has these settings, over one of its rooflines."""
    row = _row(rows, **settings)
    return None if row is None else float(row[rate] / row["rooflines"][limit])


def _share_of_copy(rows: Rows, **settings: Any) -> float | None:
    """Bytes a second over those of a device-to-device copy."""
    return _share(rows, "bytes_per_second", "copy", **settings)


def _codec(lines: Rows, peers: Rows) -> Iterator[Goal]:
    """d = 128, float32, 4 bits, one core where nothing else is said."""
    base = {"section": "codec", "head_dim": 128, "bits": 4, "dtype": "float32"}

    def speed(operation: str, threads: int) -> float | None:
        key = {"operation": operation, "rounds": 3, "threads": threads}
        found = _find(lines, "items_per_second", **base, **key)
        return None if found is None else found / 1e6

    one, two = speed("encode", 1), speed("encode", 2)
    yield Goal("encode, 3 Hadamard rounds, one core", 14, "Mvec/s", one)
    yield Goal("decode, 3 Hadamard rounds, one core", 15, "Mvec/s", speed("decode", 1))
    yield Goal("encode, 2 cores over 1", 1.8, "x", two / one if one and two else None)
    haar = [
        _find(lines, "share", operation=operation, rounds=0, threads=1, **base)
        for operation in ("encode", "decode")
    ]
    shares = [share for share in haar if share is not None]
    yield Goal("Haar, of the float64 matrix product", 0.6, "", min(shares, default=None))
    for operation, peer, head_dim, variant, needed in (
        ("encode", "faiss tqmse + rotation", 128, "3 rounds", 30),
        ("encode", "faiss tqmse + rotation", 128, "1 round", 60),
        ("encode", "turbovec add", 128, "3 rounds", 10),
        ("encode", "turbovec add", 128, "1 round", 20),
        ("encode", "turbovec add", 768, "3 rounds", 4),
        ("encode", "turbovec add", 1536, "3 rounds", 4),
        ("decode", "faiss tqmse, no rotation", 128, "1 round", 2),
        ("decode", "faiss tqmse + rotation", 128, "3 rounds", 7),
    ):
        settings = {"operation": operation, "peer": peer, "head_dim": head_dim, "bits": 4}
        ratio = _find(peers, "ratio", threads=1, ours=variant, **settings)
        yield Goal(f"{operation} over {peer}, d = {head_dim}, {variant}", needed, "x", ratio)


def _attention(lines: Rows, peers: Rows) -> Iterator[Goal]:
    """One sequence, 32 query and 8 kv heads of 128, 4 bits, two cores."""
    base = {"section": "attention", "batch": 1, "threads": 2, "head_dim": 128}
    step = {**base, "operation": "step", "context": 8192}
    bits = {"key_bits": 4, "value_bits": 4}
    share = _share(lines, "operations_per_second", "multiply-add", group=4, **bits, **step)
    yield Goal("attention step, 2 cores, of the multiply-add peak", 0.75, "", share)
    for peer, operation, context, needed in (
        ("torch SDPA bfloat16", "step", 8192, 3.5),
        ("torch SDPA float32", "prefill", 1024, 1.0),
    ):
        settings = {**base, "operation": operation, "context": context, "peer": peer}
        ratio = _find(peers, "ratio", ours="4 bits", **settings)
        yield Goal(f"attention, {operation} of {context}, over {peer}", needed, "x", ratio)


def _cuda_codec(lines: Rows) -> Iterator[Goal]:
    """d = 128, float16, 4 bits; of a device copy."""
    base = {"section": "codec", "head_dim": 128, "bits": 4, "dtype": "float16"}
    for operation, rounds, needed in (
        ("encode", 1, 0.85),
        ("encode", 3, 0.60),
        ("decode", 1, 0.85),
        ("decode", 3, 0.65),
    ):
        share = _share_of_copy(lines, operation=operation, rounds=rounds, **base)
        yield Goal(f"{operation}, rounds: {rounds}, of a device copy", needed, "", share)


CUDA_STEPS = {  # (batch, context): share of a device copy by bits
    (32, 8192): {4: 0.91, 3: 0.87, 2: 0.82},
    (64, 2048): {4: 0.82, 3: 0.78, 2: 0.70},
    (1, 131072): {4: 0.86, 3: 0.80, 2: 0.74},
}
CUDA_MICROSECONDS = {4: 11, 3: 11, 2: 10}  # batch 1, context 8192
CUDA_OVER_FLASHINFER = {4: 4.0, 3: 5.0, 2: 6.5}  # batch 32, context 8192


CUDA_OTHER_STEPS: dict[str, dict[str, int]] = {  # batch 32, context 8192: what is not as above
    "group 8": {"group": 8},
    "head_dim 64": {"head_dim": 64},
    "head_dim 96": {"head_dim": 96},
    "head_dim 256": {"head_dim": 256},
    "blocks of 32 tokens": {"block_size": 32},
    "5 bits": {"key_bits": 5, "value_bits": 5},
    "6 bits": {"key_bits": 6, "value_bits": 6},
    "8 bits": {"key_bits": 8, "value_bits": 8},
    "keys of 4, values of 2 bits": {"key_bits": 4, "value_bits": 2},
    "keys of 5, values of 4 bits": {"key_bits": 5, "value_bits": 4},
}
CUDA_OTHER_SHARE = 0.80
CUDA_BASE = {"group": 4, "head_dim": 128, "block_size": 16, "dtype": "float16"}


def _cuda_steps(lines: Rows, peers: Rows) -> Iterator[Goal]:
    """32 query and 8 kv heads of 128, 16-token pages in random order, in a CUDA graph."""
    base = {"section": "attention", "operation": "step", **CUDA_BASE}
    for (batch, context), needed in CUDA_STEPS.items():
        for bits, share in needed.items():
            settings = {"batch": batch, "context": context, "key_bits": bits, "value_bits": bits}
            measured = _share_of_copy(lines, **base, **settings)
            yield Goal(f"batch {batch} x {context}, {bits} bits, of a copy", share, "", measured)
    for bits, microseconds in CUDA_MICROSECONDS.items():
        settings = {"batch": 1, "context": 8192, "key_bits": bits, "value_bits": bits}
        seconds = _find(lines, "seconds", **base, **settings)
        time = None if seconds is None else seconds * 1e6
        yield Goal(f"batch 1 x 8192, {bits} bits", microseconds, "us", time, at_most=True)
    for bits, ratio in CUDA_OVER_FLASHINFER.items():
        shape = {"batch": 32, "context": 8192, "query_heads": 32}
        measured = _find(peers, "ratio", peer="FlashInfer float16", ours=f"{bits} bits", **shape)
        yield Goal(f"batch 32 x 8192, {bits} bits, over FlashInfer float16", ratio, "x", measured)


def _cuda_other_steps(lines: Rows) -> Iterator[Goal]:
    """Other shapes and bits, of a copy; eight query tokens, over one."""
    base = {"section": "attention", "batch": 32, "context": 8192, "key_bits": 4, "value_bits": 4}
    base |= CUDA_BASE
    for what, changes in CUDA_OTHER_STEPS.items():
        share = _share_of_copy(lines, **base | {"operation": "step"} | changes)
        yield Goal(f"batch 32 x 8192, {what}, of a copy", CUDA_OTHER_SHARE, "", share)
    one = _find(lines, "seconds", query_len=1, **base)
    eight = _find(lines, "seconds", query_len=8, **base)
    times = eight / one if one and eight else None
    yield Goal("batch 32 x 8192, 8 query tokens over 1", 1.25, "x", times, at_most=True)


def _cuda_launches(launches: Rows) -> Iterator[Goal]:
    """What a call from Python adds to a step in a graph."""
    row = _row(launches, operation="step", batch=32, context=8192, key_bits=4, value_bits=4)
    more = None if row is None else (row["loop_seconds"] - row["graph_seconds"]) * 1e6
    yield Goal("batch 32 x 8192, added by a call without a graph", 8, "us", more, at_most=True)


def _cuda_prefill(peers: Rows) -> Iterator[Goal]:
    """Of the fastest kernel that FlashInfer has for an unpacked prompt."""
    ratios = [
        row["ratio"]
        for row in peers
        if row["peer"].startswith("FlashInfer")
        and (row["operation"], row["context"]) == ("prefill", 8192)
    ]
    fastest = min(ratios, default=None)
    yield Goal("prefill of 8192 over FlashInfer float16", 0.5, "x", fastest)


def _cuda_append(lines: Rows) -> Iterator[Goal]:
    """A new token of each sequence, keys and values of 8 heads."""
    settings = {"operation": "encode_paged", "sequences": 256, "bits": 4, "dtype": "float16"}
    seconds = _find(lines, "seconds", section="append", **settings)
    time = None if seconds is None else seconds * 1e6
    yield Goal("encode_paged of 256 tokens", 6, "us", time, at_most=True)
