"""Arrays larger than memory, and files that appear complete or not at all."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import turboquant_np as tqn
from turboquant_np import QuantizedArray, TurboQuant
from turboquant_np.storage import stream
from turboquant_np.testing import assert_bits_equal
from turboquant_np.testing.strategies import shapes

FORMATS = ["npz", "safetensors"]


def normal(*shape: int, seed: int = 5) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def quantizer(head_dim: int, **settings: Any) -> TurboQuant:
    return TurboQuant(head_dim=head_dim, backend="reference", **settings)


def assert_encodes(source: Any, destination: Path, x: npt.NDArray[Any], **options: Any) -> None:
    """Encoding the source into a file gives what encoding `x` at once gives."""
    tq = quantizer(x.shape[-1], bits=3)
    tqn.encode_npy(source, destination, tq, **options)
    packed, norms = tq.encode(x)
    q = tqn.load(destination, backend="reference")
    assert q.dtype.name == x.dtype.name
    assert_bits_equal(q.packed, packed)
    assert_bits_equal(q.norms, norms)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 5 vectors of 8 numbers."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 5 * 8 * 4)
    return 5


# -- encoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_same_file_as_save(tmp_path: Path, small_blocks: int, suffix: str) -> None:
    x = normal(33, 8)
    for rotation in "hadamard", np.eye(8):
        tq = quantizer(8, rotation=rotation)
        np.save(tmp_path / "x.npy", x)
        tqn.encode_npy(tmp_path / "x.npy", tmp_path / f"a.{suffix}", tq)
        tqn.save(tmp_path / f"b.{suffix}", QuantizedArray.encode(x, tq))
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@given(shape=shapes(8, max_side=12), data=st.data())
def test_blocks_of_any_size_cover_any_shape(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], data: st.DataObject
) -> None:
    """Each block is bounded, C-ordered and follows the one before."""
    rows = data.draw(st.integers(1, 40))
    numbers = np.arange(np.prod(shape[:-1])).reshape(shape[:-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK_BYTES", rows * 8 * 4)
        blocks = [numbers[block].ravel() for block in stream._blocks(shape)]
    assert all(0 < len(block) <= rows for block in blocks)
    assert np.concatenate([np.zeros(0, int), *blocks]).tolist() == list(range(numbers.size))


def test_blocks_of_a_row_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1)
    assert list(stream._blocks((2, 2, 8))) == [
        (0, slice(0, 1)),
        (0, slice(1, 2)),
        (1, slice(0, 1)),
        (1, slice(1, 2)),
    ]


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_dtype_and_order(
    tmp_path: Path, small_blocks: int, dtype: str, order: Any
) -> None:
    x = np.asarray(normal(7, 3, 8), np.dtype(dtype), order=order)
    np.save(tmp_path / "x.npy", x)
    assert_encodes(tmp_path / "x.npy", tmp_path / "x.npz", x)
    assert_encodes(str(tmp_path / "x.npy"), tmp_path / "x.npz", x)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0, 8), (1, 8), (2, 3, 4, 8)], ids=str)
def test_npy_of_any_shape(tmp_path: Path, small_blocks: int, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", normal(*shape))
    assert_encodes(tmp_path / "x.npy", tmp_path / "x.npz", normal(*shape))


def test_bfloat16(tmp_path: Path) -> None:
    x = normal(7, 8).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(TypeError, match="dtype='bfloat16'"):
        tqn.encode_npy(tmp_path / "x.npy", tmp_path / "x.npz", quantizer(8))
    assert_encodes(tmp_path / "x.npy", tmp_path / "x.npz", x, dtype="bfloat16")
    q = tqn.open(tmp_path / "x.npz", backend="reference")
    tqn.decode_npy(q, tmp_path / "restored.npy")
    restored = np.load(tmp_path / "restored.npy").view(ml_dtypes.bfloat16)
    assert_bits_equal(restored, q.decode())


class Dataset:
    """What HDF5 and Zarr have in common; remembers what was asked for."""

    def __init__(self, x: npt.NDArray[Any]) -> None:
        self._x = x
        self.shape, self.dtype = x.shape, x.dtype
        self.indices: list[Any] = []

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        self.indices.append(index)
        part: npt.NDArray[Any] = self._x[index]
        return part


def test_anything_that_can_be_sliced(tmp_path: Path, small_blocks: int) -> None:
    x = normal(12, 8)
    dataset = Dataset(x)
    assert_encodes(dataset, tmp_path / "x.npz", x)
    assert dataset.indices == [(slice(0, 5),), (slice(5, 10),), (slice(10, 12),)]
    assert_encodes(x[::-1], tmp_path / "x.npz", x[::-1], dtype="float32")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_source_shorter_than_it_says(tmp_path: Path, small_blocks: int, suffix: str) -> None:
    dataset = Dataset(normal(12, 8))
    dataset.shape = (13, 8)
    with pytest.raises(ValueError, match="the rows written make"):
        tqn.encode_npy(dataset, tmp_path / f"x.{suffix}", quantizer(8))
    assert list(tmp_path.iterdir()) == []


def test_quantizing_again_with_other_settings(tmp_path: Path, small_blocks: int) -> None:
    tqn.save(tmp_path / "8.npz", QuantizedArray.encode(normal(12, 8), quantizer(8, bits=8)))
    q = tqn.open(tmp_path / "8.npz", backend="reference")
    assert_encodes(q, tmp_path / "3.npz", q.decode())


def test_progress_counts_rows(tmp_path: Path, small_blocks: int) -> None:
    calls: list[tuple[int, int]] = []
    tqn.encode_npy(
        normal(3, 4, 8), tmp_path / "x.npz", quantizer(8), progress=lambda *c: calls.append(c)
    )
    assert calls == [(4, 12), (8, 12), (12, 12)]
    calls.clear()
    q = tqn.open(tmp_path / "x.npz", backend="reference")
    tqn.decode_npy(q[0], tmp_path / "x.npy", progress=lambda *c: calls.append(c))
    assert calls == [(4, 4)]
    calls.clear()
    tqn.open(tmp_path / "x.npz", verify=True, progress=lambda *c: calls.append(c))
    assert calls[-1] == (12 * 8, 12 * 8)


def test_what_encoding_refuses(tmp_path: Path, small_blocks: int) -> None:
    tq, destination = quantizer(8), tmp_path / "x.npz"
    x = normal(3, 4, 8)
    x[1, 2, 5] = np.nan
    with pytest.raises(ValueError, match=re.escape("in x = source[1:2]: x[0, 2, 5] is nan")):
        tqn.encode_npy(x, destination, tq)
    tqn.encode_npy(x, destination, tq, check_finite=False)
    assert np.argwhere(np.isnan(tqn.load(destination).norms)).tolist() == [[1, 2]]
    destination.unlink()

    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    cases: list[tuple[Any, type[Exception], str]] = [
        (normal(3, 9), ValueError, "axis of length 8"),
        (np.float32(3), ValueError, "axis of length 8"),
        (np.zeros((3, 8), int), TypeError, "astype"),
        (tmp_path / "text.npy", ValueError, "cannot be read as a .npy file"),
        (tmp_path / "objects.npy", ValueError, "cannot be read as a .npy file"),
        (tmp_path / "missing.npy", FileNotFoundError, "missing"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message):
            tqn.encode_npy(source, destination, tq)
    with pytest.raises(TypeError, match="elements cannot be bfloat16"):
        tqn.encode_npy(np.zeros((3, 8), np.float16), destination, tq, dtype="bfloat16")
    with pytest.raises(ValueError, match=re.escape(".npz or .safetensors")):
        tqn.encode_npy(normal(3, 8), tmp_path / "x.npy", tq)
    assert not destination.exists()


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0, 8), (13, 8), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [None, "float16", "float64"])
def test_decoded_npy(
    tmp_path: Path, small_blocks: int, shape: tuple[int, ...], dtype: str | None
) -> None:
    q = QuantizedArray.encode(normal(*shape), quantizer(8))
    tqn.decode_npy(q, tmp_path / "x.npy", dtype=dtype)
    assert_bits_equal(np.load(tmp_path / "x.npy"), q.decode(dtype=dtype))


def test_decoding_a_file_verifies_it(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    q = QuantizedArray.encode(normal(30, 8), TurboQuant(head_dim=8))
    tqn.save(path, q)
    tqn.decode_npy(path, tmp_path / "x.npy")
    assert_bits_equal(np.load(tmp_path / "x.npy"), q.decode())
    (tmp_path / "x.npy").unlink()
    data = bytearray(path.read_bytes())
    data[data.index(q.packed.tobytes()) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(tqn.StorageError):
        tqn.decode_npy(path, tmp_path / "x.npy")
    with pytest.raises(ValueError, match=re.escape("must end in .npy")):
        tqn.decode_npy(q, tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == [path]


# -- all or nothing --------------------------------------------------------------------------------


def writers(path: Path) -> dict[str, Callable[[], None]]:
    """Ways to write several blocks under a name."""
    x = normal(4000, 64)
    q = QuantizedArray.encode(x, quantizer(64, bits=8))
    return {
        "save": lambda: tqn.save(path, q),
        "encode": lambda: tqn.encode_npy(x, path, q.quantizer),
        "decode": lambda: tqn.decode_npy(q, path.with_suffix(".npy")),
    }


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `nbytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("how", ["save", "encode", "decode"])
@pytest.mark.parametrize("nbytes", [0, 100, 100_000, 256_500])
def test_a_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, how: str, nbytes: int
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 2**16)
    write = writers(tmp_path / f"x.{suffix}")[how]
    with full_disk(nbytes), pytest.raises(OSError):
        write()
    assert list(tmp_path.iterdir()) == []
    for old in tmp_path / f"x.{suffix}", tmp_path / "x.npy":
        old.write_text("old")
    with full_disk(nbytes), pytest.raises(OSError):
        write()
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["old", "old"]
    write()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 2**16)

    def interrupt(done: int, total: int) -> None:
        assert len(list(tmp_path.iterdir())) == 1  # under another name
        assert not (tmp_path / f"x.{suffix}").exists()
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tqn.encode_npy(
            normal(4000, 64), tmp_path / f"x.{suffix}", quantizer(64), progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    q = QuantizedArray.encode(normal(3, 8), quantizer(8))
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    old = os.umask(0o027)
    try:
        tqn.save(tmp_path / "link.npz", q)
    finally:
        os.umask(old)
    assert (tmp_path / "link.npz").is_symlink()
    assert (tmp_path / "real.npz").stat().st_mode & 0o777 == 0o640
    assert tqn.load(tmp_path / "link.npz").shape == (3, 8)


# -- memory ----------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
import turboquant_np as tqn

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

folder, suffix, backend = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
tq = tqn.TurboQuant(head_dim=128, bits=8, backend=backend)
tqn.encode_npy(np.ones((40_000, 128)), folder / f"warm.{suffix}", tq)
tqn.decode_npy(tqn.open(folder / f"warm.{suffix}", backend=backend), folder / "warm.npy")
print(peak_mb())
tqn.encode_npy(folder / "x.npy", folder / f"x.{suffix}", tq)
print(peak_mb())
opened = tqn.open(folder / f"x.{suffix}", verify=True, backend=backend)
tqn.decode_npy(opened, folder / "y.npy")
print(peak_mb())
"""


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_does_not_grow_with_the_array(tmp_path: Path, suffix: str) -> None:
    """150 MB of float64 in, 19 MB of codes, 150 MB out; the peak includes mapped pages."""
    rows = 150_000_000 // (8 * 128)
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.dtype(np.float64), (rows, 128))
    x[:] = normal(1000, 128)[np.arange(rows) % 1000]
    del x
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), suffix, "auto"],
        capture_output=True,
        text=True,
        check=True,
    )
    before, encoded, decoded = map(float, result.stdout.split())
    assert encoded - before < 15
    assert decoded - before < 15
    assert (tmp_path / "y.npy").stat().st_size == (tmp_path / "x.npy").stat().st_size
