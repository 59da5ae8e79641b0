"""The cpu backend equals the reference bit for bit, on every SIMD level, in threads and forks.

Run as a script it checks a share of the cases, for the SIMD level that Numba's variables ask for.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
import threading
import tracemalloc
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import TurboQuant, _backend
from turboquant_np.testing import assert_bits_equal

DTYPES = [np.dtype(name) for name in ("float32", "float16", "float64")]
DTYPES.append(np.dtype(ml_dtypes.bfloat16))
SCALES = ("norm", "mse", "unbiased")
# in registers, in memory, powers of two or not, with and without a remainder of every width
HADAMARD_DIMS = [128, 2, 64, 768, 3, 256, 80, 16, 1536, 5, 100, 512, 7, 96, 32, 127, 8, 192]
HADAMARD_DIMS += [1024, 112, 4096, 31, 576, 4, 257, 33, 300, 6]
DENSE_DIMS = (128, 2, 80, 16, 33)
ROWS = 37  # no multiple of the rows that kernels do at once


class Case(NamedTuple):
    """One quantiser and the dtypes on both of its sides."""

    rotation: str
    dim: int
    bits: int
    rounds: int
    scale: str
    dtype: np.dtype[Any]
    out: np.dtype[Any]

    def quantizer(self, **settings: Any) -> TurboQuant:
        return TurboQuant(
            head_dim=self.dim,
            bits=self.bits,
            rotation=self.rotation,
            hadamard_rounds=self.rounds,
            scale=self.scale,
            seed=self.dim,
            **settings,
        )

    def __str__(self) -> str:
        names = (self.rotation, self.dim, f"{self.bits}bit", self.rounds, self.scale)
        return "-".join(map(str, (*names, self.dtype.name, self.out.name)))


def make_cases() -> list[Case]:
    """Every dim once; the other choices in turn, with periods that have no common divisor."""
    dims = [("hadamard", d) for d in HADAMARD_DIMS] + [("haar", d) for d in DENSE_DIMS]
    return [
        Case(
            rotation,
            dim,
            (5 * i + 3) % 8 + 1,
            (3, 1, 2, 4, 3)[i % 5],
            SCALES[i % 3],
            DTYPES[i % 4],
            DTYPES[(i // 2 + 1) % 4],
        )
        for i, (rotation, dim) in enumerate(dims)
    ]


CASES = make_cases()
# encoded in batches by some CPUs or all
BATCH_CASES = [
    Case("hadamard", dim, bits, rounds, "norm", dtype, dtype)
    for dim, bits, rounds, dtype in zip(
        (128, 64, 128, 16, 32, 8, 4, 128),
        (4, 3, 2, 1, 5, 3, 1, 1),
        (3, 2, 2, 3, 5, 2, 3, 2),
        2 * DTYPES,
        strict=True,
    )
]


def vectors(case: Case) -> npt.NDArray[Any]:
    """Rows with all that floats can hold."""
    rng = np.random.default_rng(1000 + case.dim)
    x = rng.standard_normal((ROWS, case.dim))
    x[1] = 0
    x[2], x[3] = -0.0, 1
    x[4, -1], x[5, 0], x[6, case.dim // 2] = np.nan, np.inf, -np.inf
    for row, factor in enumerate((1e-30, 1e25, 1e-38, 1e-42, 3e37, 6e-8, 1e300), start=7):
        x[row] *= factor
    x[14] = 0
    x[14, -1] = 1e-45  # the smallest number
    x[15] *= 10.0 ** rng.uniform(-45, 38, case.dim)
    x[16, 1:] = 0
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(case.dtype)


def scales_to_decode(stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    scales = stored.copy()
    scales[20:27] = [np.inf, -3, 1e-44, 3e38, 1e-6, -0.0, 7e4]
    return scales


class Guarded:
    """Arrays that end where the address space does: one byte further is a segmentation fault."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def array(self, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        pages = -(-like.nbytes // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self._maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        guard = ctypes.c_void_p(start + pages * mmap.PAGESIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        offset = pages * mmap.PAGESIZE - like.nbytes
        raw = np.frombuffer(memory, np.uint8, like.nbytes, offset)
        result = raw.view(like.dtype).reshape(like.shape)
        result[...] = like
        return result


def check_case(case: Case) -> None:
    cpu, reference = _backend.load("cpu"), _backend.load("reference")
    spec = case.quantizer()._spec
    x = vectors(case)
    packed = np.full((ROWS, spec.packed_dim), 0xA5, np.uint8)
    scales, out = np.zeros(ROWS, np.float32), np.zeros((ROWS, case.dim), case.out)
    reference.encode(spec, x, packed, scales)
    guarded = Guarded()
    packed_here = guarded.array(np.full_like(packed, 0x5A))
    scales_here = guarded.array(np.full_like(scales, -1))
    cpu.encode(spec, guarded.array(x), packed_here, scales_here)
    assert_bits_equal(packed_here, packed)
    assert_bits_equal(scales_here, scales)

    scales = scales_to_decode(scales)
    reference.decode(spec, packed, scales, out)
    out_here = guarded.array(np.zeros_like(out))
    cpu.decode(spec, guarded.array(packed), guarded.array(scales), out_here)
    equal = out_here.view(f"u{out.itemsize}") == out.view(f"u{out.itemsize}")
    both_nan = np.isnan(out_here) & np.isnan(out)
    assert (equal | both_nan).all(), np.argwhere(~(equal | both_nan))[:5]


def run_python(*arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter in which every warning is an error."""
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize("case", CASES + BATCH_CASES, ids=str)
def test_bits_equal_the_reference(case: Case) -> None:
    check_case(case)


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86 names")
@pytest.mark.parametrize(("name", "level"), [("haswell", "avx2"), ("nehalem", "generic")])
def test_other_simd_levels_give_the_same_bits(name: str, level: str) -> None:
    out = run_python(__file__, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="")
    assert out.split() == [level, str(len(CASES[::4] + BATCH_CASES))]


def test_a_matrix_of_ones_own() -> None:
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    x = np.random.default_rng(1).standard_normal((50, 24))
    results = [
        TurboQuant(head_dim=24, bits=3, rotation=q, backend=name).encode(x)
        for name in ("cpu", "reference")
    ]
    for ours, expected in zip(*results, strict=True):
        assert_bits_equal(ours, expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_many_rows_of_every_bit_width(bits: int) -> None:
    """Enough coordinates that every cell of the quantiser's tables is used."""
    x = np.random.default_rng(bits).standard_normal((3000, 16)).astype(np.float32)
    results = [
        TurboQuant(head_dim=16, bits=bits, backend=name).encode(x) for name in ("cpu", "reference")
    ]
    for ours, expected in zip(*results, strict=True):
        assert_bits_equal(ours, expected)


@pytest.mark.parametrize("dim", [2, 3, 17, 63, 64])
@pytest.mark.parametrize("bits", range(3, 9))
def test_grid_counts_thresholds(dim: int, bits: int) -> None:
    find_grid = import_module("turboquant_np.backends.cpu.quantize").find_grid
    thresholds = TurboQuant(head_dim=dim, bits=bits)._spec.thresholds
    grid = find_grid(thresholds)
    half = len(grid.below) // 2
    z = np.concatenate([np.nextafter(thresholds, np.float32(side)) for side in (-99, 99)])
    z = np.concatenate([z, thresholds, np.linspace(-8, 8, 5001, dtype=np.float32)])
    low, high = (0.25 - half) / grid.scale, (half - 0.75) / grid.scale
    clamped = np.clip(z, np.float32(low), np.float32(high))
    magic = np.float32(12582912 + half)
    rounded_twice = clamped * grid.scale + magic
    rounded_once = (clamped.astype(np.float64) * grid.scale + np.float64(magic)).astype(np.float32)
    for cell_number in (rounded_twice, rounded_once):
        cell = cell_number.view(np.int32) & (2 * half - 1)
        codes = grid.below[cell] + (z > grid.thresholds[cell])
        np.testing.assert_array_equal(codes, np.searchsorted(thresholds, z, side="left"))


def awkward_views(x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Views of a float32 array [6, 10, 48] in which rows are laid out in various ways."""
    return {
        "rows backwards": x[::-1],
        "both axes backwards": x[::-1, ::-1],
        "heads first": x.transpose(1, 0, 2),
        "every other": x[::2, ::3],
        "columns backwards": x[..., ::-1],
        "columns first": np.asfortranarray(x),
        "slice": x[:, 2:9, 5:43],
        "repeated": np.broadcast_to(x[:1, :1], x.shape),
        "one": x[3, 4],
        "unaligned": np.frombuffer(b"?" + x.tobytes(), np.uint8)[1:].view(np.float32),
    }


@pytest.mark.parametrize("name", list(awkward_views(np.zeros((6, 10, 48), np.float32))))
def test_strides_do_not_matter(name: str) -> None:
    x = np.random.default_rng(4).standard_normal((6, 10, 48)).astype(np.float32)
    view = awkward_views(x)[name]
    if view.ndim == 1 and view.size > 48:
        view = view.reshape(60, 48)
    tq = TurboQuant(head_dim=view.shape[-1], bits=4, backend="cpu")
    expected = tq.encode(np.ascontiguousarray(view))
    before = view.copy()
    for ours, wanted in zip(tq.encode(view), expected, strict=True):
        assert_bits_equal(ours, wanted)
    assert_bits_equal(view, before)


def test_awkward_strides_are_copied_in_pieces() -> None:
    x = np.zeros((64, 1 << 17), np.float32).T  # 32 MiB, columns contiguous
    tq = TurboQuant(head_dim=64, bits=1, backend="cpu")
    out = (np.empty((len(x), 8), np.uint8), np.empty(len(x), np.float32))
    tq.encode(x[:10])
    tracemalloc.start()
    try:
        tq.encode(x, out=out, check_finite=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5])
def test_few_rows(rows: int, rotation: str) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 32)).astype(np.float32)
    ours, expected = (
        TurboQuant(head_dim=32, bits=5, rotation=rotation, backend=name)
        for name in ("cpu", "reference")
    )
    packed, norms = ours.encode(x)
    assert_bits_equal(packed, expected.encode(x)[0])
    assert_bits_equal(ours.decode(packed, norms), expected.decode(packed, norms))
    assert ours.inner_products(x, packed, norms).shape == (rows, rows)


# -- inner products --------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [2, 9], ids=["row by row", "tile by tile"])
@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_inner_products_to_float32_accuracy(case: Case, queries: int) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 150, case.dim)) * np.exp(rng.standard_normal((2, 150, 1)))
    query = rng.standard_normal((queries, 1, case.dim)).astype(case.dtype)
    query[1] *= np.zeros((), case.dtype)
    ours, expected = (case.quantizer(backend=name) for name in ("cpu", "reference"))
    packed, norms = ours.encode(x)
    scores = ours.inner_products(query, packed, norms)
    exact = expected.inner_products(query, packed, norms)
    length = np.linalg.norm(query.astype(np.float64), axis=-1)[:, :, None, None] * norms
    assert scores.shape == (queries, 1, 2, 150)
    assert (np.abs(scores - exact) <= 2e-6 * math.sqrt(1.5) * length).all()


def test_inner_products_of_huge_and_tiny_vectors() -> None:
    tq = TurboQuant(head_dim=64, bits=8, backend="cpu")
    x = np.random.default_rng(3).standard_normal((1, 64)).astype(np.float32)
    for a, b in ((1e30, 1e-30), (1e-35, 1e30), (1e36, 1.0), (1e-30, 1e37), (1e37, 1e-30)):
        for queries in (1, 9):
            query = np.repeat(x * np.float32(a), queries, axis=0)
            scores = tq.inner_products(query, *tq.encode(x * np.float32(b)))
            np.testing.assert_allclose(scores, (x.astype(np.float64) ** 2).sum() * a * b, 1e-2)


@pytest.mark.parametrize("queries", [8, 9, 40])
def test_inner_products_are_the_same_bits_every_time(queries: int) -> None:
    rng = np.random.default_rng(4)
    tq = TurboQuant(head_dim=96, bits=4, backend="cpu")
    packed, norms = tq.encode(rng.standard_normal((20_000, 96), dtype=np.float32))
    query = rng.standard_normal((queries, 96))
    first = tq.inner_products(query, packed, norms)
    for _ in range(3):
        assert_bits_equal(tq.inner_products(query, packed, norms), first)


def test_inner_products_decode_no_more_than_tiles() -> None:
    tq = TurboQuant(head_dim=128, bits=4, backend="cpu")
    packed, norms = np.zeros((60_000, 64), np.uint8), np.ones(60_000, np.float32)
    query, scores = np.ones((9, 128), np.float32), np.empty((9, 60_000), np.float32)
    tq.inner_products(query, packed, norms, out=scores)
    tracemalloc.start()
    try:
        tq.inner_products(query, packed, norms, out=scores)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # decoded they would take 30 MiB


# -- threads, forks, the state of the CPU ----------------------------------------------------------


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
def test_number_of_threads_changes_nothing(rotation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(5).standard_normal((9001, 96)).astype(np.float32)
    tq = TurboQuant(head_dim=96, bits=3, scale="mse", rotation=rotation, backend="cpu")
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", threads)
        packed, norms = tq.encode(x)
        results.append((packed, norms, tq.decode(packed, norms)))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert_bits_equal(ours, expected)


@pytest.mark.parametrize("setting", ["0", "-1", "two", "1.5"])
def test_a_bad_number_of_threads_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", setting)
    with pytest.raises(ValueError, match=r"TURBOQUANT_NP_NUM_THREADS must be .* >= 1, got '"):
        TurboQuant(head_dim=64, bits=4, backend="cpu").encode(np.zeros((1, 64)))


def test_threads_by_default_are_the_cpus_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURBOQUANT_NP_NUM_THREADS", raising=False)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert _backend.load("cpu").describe()["threads"] == str(cpus)


def test_calls_from_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", "3")
    x = np.random.default_rng(6).standard_normal((8000, 128)).astype(np.float32)
    tq = TurboQuant(head_dim=128, bits=4, backend="cpu")
    expected, wrong = tq.encode(x), []

    def work() -> None:
        for _ in range(8):
            packed, norms = tq.encode(x)
            if not (np.array_equal(packed, expected[0]) and np.array_equal(norms, expected[1])):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong
    assert not any(worker.is_alive() for worker in workers)


def test_every_row_is_done_once_whatever_the_pool_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested and concurrent use, with a pool that has to grow in between."""
    pool = import_module("turboquant_np.backends.cpu.threads")
    done = np.zeros((4, 50), np.int64)

    def caller(k: int) -> None:
        def inner(start: int, stop: int) -> None:
            done[k, start:stop] += 1

        def outer(start: int, stop: int) -> None:
            for first in range(10 * start, 10 * stop, 10):
                pool.for_rows(10, pool.GRAIN, lambda a, b, first=first: inner(first + a, first + b))

        monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", str(k + 2))
        for _ in range(100):
            pool.for_rows(5, pool.GRAIN, outer)

    callers = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert (done == 100).all()


FORK = """
import os, numpy as np
from turboquant_np import TurboQuant
x = np.random.default_rng(0).standard_normal((20000, 128)).astype(np.float32)
tq = TurboQuant(head_dim=128, bits=4, backend="cpu")
packed, norms = tq.encode(x)
import warnings; warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
child = os.fork()
if child == 0:
    again = tq.encode(x)
    same = np.array_equal(packed, again[0]) and np.array_equal(norms, again[1])
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_a_forked_child() -> None:
    assert run_python("-c", FORK, TURBOQUANT_NP_NUM_THREADS="3").strip() == "0"


def test_flushing_subnormals_is_an_error() -> None:
    torch = pytest.importorskip("torch")
    tq = TurboQuant(head_dim=64, bits=4, backend="cpu")
    tq.encode(np.ones((1, 64), np.float32))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        with pytest.raises(RuntimeError, match="flushes subnormal numbers to zero"):
            tq.encode(np.ones((1, 64), np.float32))
    finally:
        torch.set_flush_denormal(False)
    tq.encode(np.ones((1, 64), np.float32))


# -- the cache of compiled kernels -----------------------------------------------------------------

ENCODE_ONCE = """
import numpy as np
from turboquant_np import TurboQuant, _backend
x = np.ones((1, 32), np.float32)
TurboQuant(head_dim=32, bits=4, hadamard_rounds=1, backend="cpu").encode(x)
from turboquant_np.backends.cpu.compile import compiled
from turboquant_np.backends.cpu.kernels import Plan
from turboquant_np.backends.cpu.quantize import cells_for
from turboquant_np.backends.cpu.simd import target
cells = cells_for(target(), TurboQuant(head_dim=32, bits=4)._spec)
stats = compiled(Plan("encode", 32, 4, cells=cells)).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
print(_backend.load("cpu").describe()["cache"])
"""


def test_a_second_process_finds_the_compiled_kernels(tmp_path: Path) -> None:
    where = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first = run_python("-c", ENCODE_ONCE, **where).split()
    files = sorted(tmp_path.rglob("*.nbc"))
    assert first[:2] == ["0", "1"]
    assert first[2].startswith(str(tmp_path))
    assert len(files) == 1
    assert run_python("-c", ENCODE_ONCE, **where).split()[:2] == ["1", "0"]
    assert sorted(tmp_path.rglob("*.nbc")) == files


def test_without_a_writable_directory_kernels_are_compiled_quietly() -> None:
    nowhere = (
        "import tempfile\n"
        "def refuse(*args, **kwargs): raise OSError(30, 'Read-only file system')\n"
        "tempfile.TemporaryFile = refuse\n"
    )
    out = run_python("-c", nowhere + ENCODE_ONCE, HOME="/nonexistent", NUMBA_CACHE_DIR="")
    assert out.splitlines()[-1].startswith("not writable")


if __name__ == "__main__":
    chosen = CASES[::4] + BATCH_CASES
    for chosen_case in chosen:
        check_case(chosen_case)
    level = _backend.load("cpu").describe()["simd"].split()[0]
    print(level, len(chosen))


def test_kernels_are_not_kept_beside_the_source() -> None:
    """They would outlive the package, and the folder left behind would shadow a new install."""
    backend: Any = _backend.load("cpu")
    package = Path(backend.__file__).parent
    assert package not in Path(backend.describe()["cache"]).parents
    assert not list(package.rglob("*.nbi"))
