"""Quantised arrays as values and in files: round trips, partial reads, golden files."""

from __future__ import annotations

import importlib
import json
import mmap
import re
import subprocess
import sys
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import turboquant_np as tqn
from turboquant_np import QuantizedArray, TurboQuant, TurboQuantConfig
from turboquant_np._backend import load as load_backend
from turboquant_np.testing import assert_bits_equal
from turboquant_np.testing.strategies import configs, float_arrays, shapes

GOLDEN = Path(__file__).parent / "golden" / "storage"
FORMATS = ["npz", "safetensors"]
DTYPES = ["float16", "bfloat16", "float32", "float64"]

sys.path.insert(0, str(GOLDEN))
try:
    golden: Any = importlib.import_module("make_golden")
finally:
    sys.path.pop(0)


def normal(*shape: int, seed: int = 5) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def orthogonal(d: int) -> npt.NDArray[np.float64]:
    q: npt.NDArray[np.float64] = np.linalg.qr(np.random.default_rng(99).standard_normal((d, d)))[0]
    return q


def quantized(*shape: int, **settings: Any) -> QuantizedArray:
    quantizer = TurboQuant(head_dim=shape[-1], backend="reference", **settings)
    return QuantizedArray.encode(normal(*shape), quantizer)


def assert_same(actual: QuantizedArray, expected: QuantizedArray) -> None:
    """Equal codes, scales, dtype, and equal decoded vectors."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert_bits_equal(np.asarray(actual.packed), np.asarray(expected.packed))
    assert_bits_equal(np.asarray(actual.norms), np.asarray(expected.norms))
    assert actual.quantizer.config.scale == expected.quantizer.config.scale
    assert_bits_equal(actual.decode(dtype=np.float32), expected.decode(dtype=np.float32))


# -- the value -------------------------------------------------------------------------------------


def test_sizes_and_text() -> None:
    q = quantized(7, 3, 10, bits=3)
    assert (q.shape, q.ndim, len(q)) == ((7, 3, 10), 3, 7)
    assert q.nbytes == 7 * 3 * (4 + 4)
    assert repr(q) == "QuantizedArray(shape=(7, 3, 10), dtype=float32, bits=3, nbytes=168)"


def test_dtype_is_that_of_the_original_else_of_the_quantizer() -> None:
    tq = TurboQuant(head_dim=8, dtype="float64", backend="reference")
    packed, norms = tq.encode(normal(2, 8))
    assert QuantizedArray(packed, norms, tq).decode().dtype == np.float64
    assert QuantizedArray(packed, norms, tq, "float16").decode().dtype == np.float16
    assert QuantizedArray.encode(normal(2, 8), tq).decode().dtype == np.float32
    assert QuantizedArray.encode(normal(2, 8), tq).decode(dtype="float16").dtype == np.float16


def test_decode_and_inner_products_are_those_of_the_quantizer() -> None:
    q = quantized(6, 16, bits=5)
    expected = q.quantizer.decode(q.packed, q.norms, dtype=np.float32)
    assert_bits_equal(q.decode(), expected)
    out = np.empty((6, 16), np.float64)
    assert q.decode(out=out) is out
    assert_bits_equal(out, expected.astype(np.float64))
    query = normal(2, 16, seed=6)
    assert_bits_equal(q.inner_products(query), q.quantizer.inner_products(query, q.packed, q.norms))


@pytest.mark.parametrize(
    "index",
    [
        3,
        -1,
        slice(1, 3),
        slice(None, None, -2),
        (2, 1),
        (slice(None), 1),
        ...,
        (..., 1),
        (1, ...),
        None,
        (None, 2),
        (..., None),
        [0, 3, 3],
        np.array([True, False, True, False]),
        ([1, 2], [0, 2]),
        slice(2, 2),
    ],
    ids=str,
)
def test_index_selects_vectors_as_in_numpy(index: Any) -> None:
    q = quantized(4, 3, 8)
    rows = np.arange(12).reshape(4, 3)[index]
    selected = q[index]
    assert selected.shape == (*rows.shape, 8)
    assert_bits_equal(selected.decode(), q.decode().reshape(12, 8)[rows])


def test_contiguous_rows_are_views() -> None:
    q = quantized(10, 8)
    assert np.shares_memory(q[2:5].packed, q.packed)
    assert np.shares_memory(q[3].norms, q.norms)


@pytest.mark.parametrize("index", [(0, 0, 0), (0, slice(None), 1), (..., 0, 0, 0), 4])
def test_index_must_stay_in_the_leading_axes(index: Any) -> None:
    with pytest.raises(IndexError):
        quantized(4, 3, 8)[index]


def test_a_single_vector() -> None:
    q = quantized(8)
    assert q.decode().shape == (8,)
    with pytest.raises(IndexError):
        q[0]
    with pytest.raises(TypeError, match="single vector"):
        len(q)


def test_iteration_and_numpy_conversion() -> None:
    q = quantized(3, 8)
    assert_bits_equal(np.stack([row.decode() for row in q]), q.decode())
    assert_bits_equal(np.asarray(q), q.decode())
    assert_bits_equal(np.asarray(q, dtype=np.float64), q.decode().astype(np.float64))
    with pytest.raises(ValueError, match="view"):
        np.asarray(q, copy=False)


def test_parts_must_fit() -> None:
    q = quantized(3, 8)
    with pytest.raises(ValueError, match="norms must have the shape"):
        QuantizedArray(q.packed, q.norms[:2], q.quantizer)
    with pytest.raises(ValueError, match="4 bytes"):
        QuantizedArray(q.packed[:, :3], q.norms, q.quantizer)
    with pytest.raises(TypeError, match="must be a TurboQuant"):
        QuantizedArray(q.packed, q.norms, q.quantizer.config)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype must be one of"):
        QuantizedArray(q.packed, q.norms, q.quantizer, "int8")


# -- round trips -----------------------------------------------------------------------------------


def assert_round_trip(q: QuantizedArray, path: Path) -> None:
    tqn.save(path, q)
    assert_same(tqn.load(path, backend="reference"), q)
    assert_same(tqn.open(path, backend="reference"), q)
    assert_same(tqn.open(path, verify=True, backend="reference"), q)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (3, 0, 8), (5, 8), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_round_trip_of_shapes(tmp_path: Path, suffix: str, shape: Any, bits: int) -> None:
    assert_round_trip(quantized(*shape, bits=bits), tmp_path / f"q.{suffix}")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_dtypes(tmp_path: Path, suffix: str, dtype: str) -> None:
    tq = TurboQuant(head_dim=24, backend="reference")
    q = QuantizedArray(*tq.encode(normal(4, 24)), tq, dtype)
    assert_round_trip(q, tmp_path / f"q.{suffix}")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("scale", ["norm", "mse", "unbiased"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(rotation="hadamard", seed=3, hadamard_rounds=1),
        dict(rotation="hadamard", seed=-(2**40)),
        dict(rotation="haar", seed=2**32 + 9),
        dict(rotation=orthogonal(12)),
        dict(rotation=orthogonal(12).astype(np.float32)),
        dict(use_hadamard=False),
    ],
    ids=["rounds=1", "seed<0", "haar", "matrix", "matrix32", "use_hadamard"],
)
def test_round_trip_of_settings(
    tmp_path: Path, suffix: str, scale: str, settings: dict[str, Any]
) -> None:
    q = quantized(5, 12, scale=scale, **settings)
    path = tmp_path / f"q.{suffix}"
    assert_round_trip(q, path)
    loaded = tqn.load(path).quantizer
    assert_bits_equal(loaded.rotation, q.quantizer.rotation)
    assert loaded.config.rotation_kind == q.quantizer.config.rotation_kind


def test_a_barely_orthogonal_matrix_is_accepted_again(tmp_path: Path) -> None:
    """What was accepted when the file was made must never be refused when it is read."""
    q = orthogonal(6)
    low, high = 0.0, 1e-3
    for _ in range(60):  # the largest stretch that is still accepted
        middle = (low + high) / 2
        try:
            TurboQuantConfig(head_dim=6, rotation=q * (1 + middle)).make_spec()
        except ValueError:
            high = middle
        else:
            low = middle
    assert_round_trip(quantized(2, 6, rotation=q * (1 + low)), tmp_path / "q.npz")


@given(data=st.data(), suffix=st.sampled_from(FORMATS))
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    config = data.draw(configs(head_dims=[2, 5, 8, 33], backend="reference"))
    x = data.draw(float_arrays(shapes(config.head_dim), dtypes=DTYPES))
    q = QuantizedArray.encode(x, TurboQuant(config), check_finite=False)
    path = tmp_path_factory.getbasetemp() / f"anything.{suffix}"
    tqn.save(path, q)
    for loaded in tqn.load(path, backend="reference"), tqn.open(path, backend="reference"):
        assert_bits_equal(loaded.packed, q.packed)
        assert_bits_equal(loaded.norms, q.norms)
        assert loaded.dtype.name == x.dtype.name
        assert_bits_equal(loaded.decode(dtype="float32"), q.decode(dtype="float32"))


def test_noncontiguous_rows_are_saved_in_order(tmp_path: Path) -> None:
    q = quantized(6, 4, 8)[::-2, 1:3]
    assert_round_trip(q, tmp_path / "q.npz")


def test_other_programs_read_the_arrays(tmp_path: Path) -> None:
    q = quantized(5, 12, rotation=orthogonal(12))
    tqn.save(tmp_path / "q.npz", q)
    tqn.save(tmp_path / "q.safetensors", q)
    fixed = np.rint(orthogonal(12) * 2**24).astype(np.int32)
    tensors = importlib.import_module("safetensors.numpy").load_file(tmp_path / "q.safetensors")
    with np.load(tmp_path / "q.npz") as arrays:
        assert sorted(arrays) == ["metadata", "norms", "packed", "rotation"]
        for found in arrays, tensors:
            assert_bits_equal(found["packed"], q.packed)
            assert_bits_equal(found["norms"], q.norms)
            assert_bits_equal(found["rotation"], fixed)
        assert json.loads(arrays["metadata"].item())["bits"] == 4
    with zipfile.ZipFile(tmp_path / "q.npz") as archive:
        assert archive.testzip() is None


def test_a_file_rewritten_by_numpy_opens(tmp_path: Path) -> None:
    """`numpy.savez` neither aligns data nor keeps the order of members."""
    q = quantized(5, 3, bits=1)
    tqn.save(tmp_path / "q.npz", q)
    with np.load(tmp_path / "q.npz") as arrays:
        names = ["metadata", "packed", "norms"]
        np.savez(tmp_path / "again.npz", **{name: arrays[name] for name in names})
    assert_same(tqn.open(tmp_path / "again.npz", verify=True, backend="reference"), q)


def test_equal_arrays_make_equal_files(tmp_path: Path) -> None:
    for suffix in FORMATS:
        for name in "a", "b":
            tqn.save(tmp_path / f"{name}.{suffix}", quantized(5, 8))
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_what_save_refuses(tmp_path: Path) -> None:
    q = quantized(2, 8)
    with pytest.raises(TypeError, match=r"QuantizedArray\(packed, norms, quantizer\)"):
        tqn.save(tmp_path / "q.npz", (q.packed, q.norms))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(".npz or .safetensors")):
        tqn.save(tmp_path / "q.bin", q)
    with pytest.raises(FileNotFoundError):
        tqn.save(tmp_path / "nowhere" / "q.npz", q)
    assert list(tmp_path.iterdir()) == []


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.safetensors"
    tqn.save(path, quantized(2, 8))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: tqn.load(path), lambda: tqn.save(path, quantized(3, 8))):
        with pytest.raises(ImportError, match=re.escape("turboquant-np[io]")):
            call()
    monkeypatch.undo()
    assert tqn.load(path).shape == (2, 8)  # the failed save left the file alone


# -- memory maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_opened_arrays_are_read_only_aligned_maps(tmp_path: Path, suffix: str) -> None:
    tqn.save(tmp_path / f"q.{suffix}", quantized(5, 3, bits=3))
    q = tqn.open(tmp_path / f"q.{suffix}")
    for array in q.packed, q.norms:
        assert not array.flags.writeable
        assert array.flags.aligned
    if suffix == "npz":
        assert q.packed.ctypes.data % 64 == q.norms.ctypes.data % 64 == 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_decoding_a_row_reads_only_its_pages(tmp_path: Path, suffix: str) -> None:
    rows = 100_000
    tq = TurboQuant(head_dim=128, bits=8, backend="reference")
    packed = np.zeros((rows, 128), np.uint8)
    packed[70_000] = 255
    tqn.save(tmp_path / f"q.{suffix}", QuantizedArray(packed, np.ones(rows, np.float32), tq))
    q = tqn.open(tmp_path / f"q.{suffix}", backend="reference")
    row = q[70_000].decode(dtype=np.float32)
    assert_bits_equal(row, tq.decode(packed[70_000], np.ones((), np.float32), dtype=np.float32))
    assert resident_bytes(tmp_path / f"q.{suffix}") < packed.nbytes / 2  # the kernel reads ahead


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    resident, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    return resident


def test_a_map_survives_the_replacement_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "q.npz"
    tqn.save(path, quantized(5, 8))
    q = tqn.open(path, backend="reference")
    tqn.save(path, quantized(50, 8, seed=8))
    assert_same(q, quantized(5, 8))
    assert tqn.open(path).shape == (50, 8)


def test_open_leaves_no_file_open(tmp_path: Path) -> None:
    """The map ends with the array, and pytest turns unclosed files into errors."""
    path = tmp_path / "q.npz"
    tqn.save(path, quantized(5, 8))
    q = tqn.open(path)
    base = q.packed
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    assert isinstance(mapped, mmap.mmap)
    assert resident_bytes(path) >= 0
    assert str(path) in Path("/proc/self/maps").read_text()
    del q, base, mapped
    assert str(path) not in Path("/proc/self/maps").read_text()


# -- arrays on a GPU -------------------------------------------------------------------------------


def test_cupy_arrays(tmp_path: Path) -> None:
    if find_spec("cupy") is None or (reason := load_backend("cuda").why_unavailable()):
        pytest.skip("no CuPy" if find_spec("cupy") is None else str(reason))
    cupy: Any = importlib.import_module("cupy")
    expected = QuantizedArray.encode(normal(7, 3, 64), TurboQuant(head_dim=64, backend="reference"))
    tq = TurboQuant(head_dim=64)
    x = cupy.asarray(normal(7, 3, 64))
    q = QuantizedArray.encode(x, tq)
    assert isinstance(q[2:4].decode(), cupy.ndarray)
    assert_bits_equal(q[..., 1].decode().get(), expected[..., 1].decode())
    with pytest.raises(TypeError):
        np.asarray(q)
    for suffix in FORMATS:
        tqn.save(tmp_path / f"a.{suffix}", q)
        tqn.encode_npy(x, tmp_path / f"b.{suffix}", tq)
        for name in "ab":
            assert_same(tqn.load(tmp_path / f"{name}.{suffix}", backend="reference"), expected)
    tqn.decode_npy(q, tmp_path / "x.npy")
    assert_bits_equal(np.load(tmp_path / "x.npy"), expected.decode())


# -- golden files ----------------------------------------------------------------------------------


def golden_files() -> list[str]:
    return sorted(p.name for p in GOLDEN.glob("v*") if p.suffix in (".npz", ".safetensors"))


def test_every_golden_file_is_there() -> None:
    assert {f"v{tqn.FORMAT_VERSION}_{name}" for name in golden.CASES} <= set(golden_files())


@pytest.mark.parametrize("name", golden_files())
def test_golden_files_still_decode(name: str) -> None:
    version, _, case = name.partition("_")
    expected = json.loads((GOLDEN / f"{version}_decoded.json").read_text())[case]
    for read in tqn.load, tqn.open:
        decoded = read(GOLDEN / name, backend="reference").decode(dtype=np.float32)
        assert decoded.astype("<f4").tobytes().hex() == expected


@pytest.mark.parametrize("case", golden.CASES)
def test_files_are_those_on_record(tmp_path: Path, case: str) -> None:
    """Byte for byte: header, metadata, alignment, order."""
    tqn.save(tmp_path / case, golden.quantize(case))
    recorded = (GOLDEN / f"v{tqn.FORMAT_VERSION}_{case}").read_bytes()
    assert (tmp_path / case).read_bytes() == recorded


def test_metadata_text_on_record() -> None:
    with zipfile.ZipFile(GOLDEN / "v1_matrix.npz") as archive:
        member = archive.read("metadata.npy")
    text = member[128:].decode()
    assert member.startswith(b"\x93NUMPY\x01\x00v\x00{'descr': '|S")
    record = json.loads(text)
    crc32 = record["crc32"].pop("metadata")
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert crc32 == f"{zlib.crc32(canonical.encode()):08x}"
    with np.load(GOLDEN / "v1_matrix.npz") as arrays:
        for name in "packed", "norms", "rotation":
            assert record["crc32"].pop(name) == f"{zlib.crc32(arrays[name].tobytes()):08x}"
    assert record == {
        "bits": 2,
        "crc32": {},
        "dtype": "bfloat16",
        "format": "turboquant_np",
        "format_version": 1,
        "hadamard_rounds": None,
        "head_dim": 4,
        "rotation": "matrix",
        "scale": "unbiased",
        "seed": None,
        "shape": [3, 4],
    }


def test_importing_the_package_loads_no_optional_library() -> None:
    code = (
        "import sys, turboquant_np;"
        "print({'safetensors', 'ml_dtypes', 'cupy', 'numba'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
