"""Damaged, foreign and newer files: a clear error, never wrong vectors."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import turboquant_np as tqn
from turboquant_np import QuantizedArray, StorageError, TurboQuant
from turboquant_np.storage import files

FORMATS = ["npz", "safetensors"]

Arrays = dict[str, npt.NDArray[Any]]


def quantized(rotation: Any = "hadamard") -> QuantizedArray:
    x = np.random.default_rng(5).standard_normal((3, 4))
    tq = TurboQuant(head_dim=4, bits=3, seed=1, rotation=rotation, backend="reference")
    return QuantizedArray.encode(x, tq)


def contents(q: QuantizedArray) -> tuple[Any, ...]:
    """Everything that decides what the array decodes to."""
    config = q.quantizer.config
    return (
        q.shape,
        q.dtype.name,
        q.packed.tobytes(),
        q.norms.tobytes(),
        (config.bits, config.head_dim, config.scale, config.rotation_kind),
        (config.seed, config.hadamard_rounds),
        q.quantizer.rotation.tobytes() if config.rotation_kind == "matrix" else None,
    )


@pytest.fixture(
    scope="module", params=[f"{r}.{s}" for r in ("hadamard", "matrix") for s in FORMATS]
)
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of each format, with and without a rotation matrix."""
    name: str = request.param
    path = tmp_path_factory.mktemp("intact") / name
    matrix = np.linalg.qr(np.random.default_rng(4).standard_normal((4, 4)))[0]
    tqn.save(path, quantized(matrix if name.startswith("matrix") else "hadamard"))
    return path


@cache
def intact_contents(path: Path) -> tuple[Any, ...]:
    return contents(tqn.load(path))


def assert_rejected_or_identical(data: bytes, intact: Path) -> None:
    """Nothing but a StorageError, or what the intact file holds."""
    path = intact.with_name("damaged" + intact.suffix)
    path.write_bytes(data)
    expected = intact_contents(intact)
    try:
        loaded = contents(tqn.load(path))
    except StorageError:
        pass
    else:
        assert loaded == expected
    try:
        opened = contents(tqn.open(path))
    except StorageError:
        pass
    else:  # codes and scales are not verified, everything else is
        assert opened[:2] == expected[:2]
        assert opened[4:] == expected[4:]
        assert [len(part) for part in opened[2:4]] == [len(part) for part in expected[2:4]]


def test_flipping_a_bit_of_every_byte(intact: Path) -> None:
    data = intact.read_bytes()
    for at in range(len(data)):
        flipped = bytes([data[at] ^ (1 << (5 * at % 8))])
        assert_rejected_or_identical(data[:at] + flipped + data[at + 1 :], intact)


@given(data=st.data())
def test_changing_any_byte(intact: Path, data: st.DataObject) -> None:
    damaged = bytearray(intact.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert_rejected_or_identical(bytes(damaged), intact)


@given(data=st.data())
def test_flipping_several_bytes(intact: Path, data: st.DataObject) -> None:
    damaged = bytearray(intact.read_bytes())
    positions = st.integers(0, len(damaged) - 1)
    for at, value in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)), max_size=8)):
        damaged[at] = value
    assert_rejected_or_identical(bytes(damaged), intact)


@given(data=st.data())
def test_moving_a_piece(intact: Path, data: st.DataObject) -> None:
    """A piece deleted, doubled or put elsewhere."""
    whole = intact.read_bytes()
    start, stop, target = (data.draw(st.integers(0, len(whole))) for _ in range(3))
    piece = whole[min(start, stop) : max(start, stop)]
    rest = whole[: min(start, stop)] + whole[max(start, stop) :]
    base = data.draw(st.sampled_from([whole, rest]))
    assert_rejected_or_identical(base[:target] + piece + base[target:], intact)


def test_every_truncation_is_rejected(intact: Path) -> None:
    data = intact.read_bytes()
    path = intact.with_name("short" + intact.suffix)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        for read in tqn.load, tqn.open:
            with pytest.raises(StorageError, match=re.escape(str(path))):
                read(path)


def test_only_verification_reads_the_codes(tmp_path: Path) -> None:
    tq = TurboQuant(head_dim=64, backend="reference")
    q = QuantizedArray(np.zeros((1000, 32), np.uint8), np.ones(1000, np.float32), tq)
    for suffix in FORMATS:
        path = tmp_path / f"q.{suffix}"
        tqn.save(path, q)
        data = bytearray(path.read_bytes())
        data[data.index(q.packed.tobytes()) + 31_999] ^= 1
        path.write_bytes(data)
        opened = tqn.open(path, backend="reference")
        assert opened[:999].packed.tobytes() == q[:999].packed.tobytes()
        for read in tqn.load, lambda p: tqn.open(p, verify=True):
            with pytest.raises(StorageError, match="'packed' is damaged"):
                read(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_wrong_extension(tmp_path: Path, suffix: str) -> None:
    other = {"npz": "safetensors", "safetensors": "npz"}[suffix]
    tqn.save(tmp_path / f"q.{suffix}", quantized())
    (tmp_path / f"q.{suffix}").rename(tmp_path / f"q.{other}")
    with pytest.raises(StorageError, match=f"not a readable .{other} file"):
        tqn.load(tmp_path / f"q.{other}")
    with pytest.raises(
        ValueError, match=re.escape("must end in .npz or .safetensors, got 'q.bin'")
    ):
        tqn.load("q.bin")


def test_missing_file(tmp_path: Path) -> None:
    for suffix in FORMATS:
        with pytest.raises(FileNotFoundError):
            tqn.load(tmp_path / f"q.{suffix}")


# -- files that are sound, but not ours ------------------------------------------------------------


def write_npz(path: Path, arrays: Arrays) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def write_safetensors(path: Path, arrays: Arrays) -> None:
    from safetensors.numpy import save_file

    tensors = dict(arrays)
    text = tensors.pop("metadata", None)
    save_file(tensors, path, None if text is None else {"turboquant_np": text.item().decode()})


WRITERS: dict[str, Callable[[Path, Arrays], None]] = {
    "npz": write_npz,
    "safetensors": write_safetensors,
}


def arrays_of(q: QuantizedArray, tmp_path: Path) -> Arrays:
    tqn.save(tmp_path / "source.npz", q)
    with np.load(tmp_path / "source.npz") as arrays:
        return dict(arrays)


def signed(record: dict[str, Any]) -> npt.NDArray[np.bytes_]:
    """Metadata with the checksum that belongs to them."""
    record["crc32"].pop("metadata", None)
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    record["crc32"]["metadata"] = f"{zlib.crc32(canonical):08x}"
    return np.array(json.dumps(record).encode())


def assert_rejected(tmp_path: Path, arrays: Arrays, match: str) -> None:
    for suffix, write in WRITERS.items():
        path = tmp_path / f"foreign.{suffix}"
        write(path, arrays)
        for read in tqn.load, tqn.open:
            with pytest.raises(StorageError, match=match):
                read(path)


def test_the_test_writers_write_readable_files(tmp_path: Path) -> None:
    arrays = arrays_of(quantized(), tmp_path)
    record = json.loads(arrays["metadata"].item())
    for suffix, write in WRITERS.items():
        write(tmp_path / f"q.{suffix}", arrays | {"metadata": signed(record)})
        assert contents(tqn.load(tmp_path / f"q.{suffix}")) == contents(quantized())


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"format_version": 2}, "format version 2, this release reads up to 1; upgrade"),
    ({"format_version": 0}, "unknown format version 0"),
    ({"format_version": "1"}, "unknown format version 1"),
    ({"format": "other"}, "not those of a turboquant_np file"),
    ({"shape": [3, 5]}, "shape must be a list ending in head_dim = 4"),
    ({"shape": [-3, 4]}, "shape must be a list"),
    ({"shape": [3.0, 4]}, "shape must be a list"),
    ({"shape": []}, "shape must be a list"),
    ({"shape": 4}, "shape must be a list"),
    ({"shape": [2, 4]}, "do not fit the metadata"),
    ({"shape": [1, 3, 4]}, "do not fit the metadata"),
    ({"bits": 5}, "do not fit the metadata"),
    ({"bits": 9}, "impossible settings: .*Got 9"),
    ({"bits": None}, "impossible settings"),
    ({"head_dim": 1, "shape": [3, 1]}, "impossible settings: .*head_dim"),
    ({"head_dim": 4.0}, "impossible settings: .*head_dim"),
    ({"dtype": "int8"}, "dtype int8"),
    ({"scale": "max"}, "impossible settings: .*scale"),
    ({"seed": None}, "impossible settings: .*seed"),
    ({"seed": "1"}, "impossible settings: .*seed"),
    ({"hadamard_rounds": 0}, "impossible settings: .*hadamard_rounds"),
    ({"rotation": "butterfly"}, "unknown rotation 'butterfly'"),
    ({"rotation": "matrix"}, "checksums of"),
    ({"rotation": None}, "unknown rotation None"),
    ({"comment": "hello"}, "must have the fields"),
    ({"crc32": {"packed": "00000000"}}, "checksums of packed"),
]


@pytest.mark.parametrize(("changes", "match"), CHANGES, ids=[str(c) for c, _ in CHANGES])
def test_metadata_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    arrays = arrays_of(quantized(), tmp_path)
    record = json.loads(arrays["metadata"].item()) | changes
    assert_rejected(tmp_path, arrays | {"metadata": signed(record)}, match)


def test_metadata_without_a_field(tmp_path: Path) -> None:
    arrays = arrays_of(quantized(), tmp_path)
    for field in "bits", "seed", "dtype", "shape", "rotation":
        record = json.loads(arrays["metadata"].item())
        del record[field]
        assert_rejected(tmp_path, arrays | {"metadata": signed(record)}, "must have the fields")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 10_000, "not JSON"),
        (b"[1, 2]", "not those of a turboquant_np file"),
        (b'{"format": "turboquant_np"}', "no checksum"),
        (b'{"format": "turboquant_np", "crc32": 3}', "no checksum"),
        (b'{"format": "turboquant_np", "crc32": {"metadata": 3}}', "checksum does not match"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_metadata_that_are_no_metadata(tmp_path: Path, text: bytes, match: str) -> None:
    arrays = arrays_of(quantized(), tmp_path) | {"metadata": np.array(text)}
    write_npz(tmp_path / "q.npz", arrays)
    with pytest.raises(StorageError, match=match):
        tqn.load(tmp_path / "q.npz")


def test_changed_metadata_without_a_new_checksum(tmp_path: Path) -> None:
    arrays = arrays_of(quantized(), tmp_path)
    text = arrays["metadata"].item().replace(b'"seed":1', b'"seed":2')
    assert_rejected(tmp_path, arrays | {"metadata": np.array(text)}, "checksum does not match")


@pytest.mark.parametrize("name", ["packed", "norms", "rotation"])
def test_missing_array(tmp_path: Path, name: str) -> None:
    arrays = arrays_of(quantized(np.eye(4)), tmp_path)
    del arrays[name]
    assert_rejected(tmp_path, arrays, "do not fit the metadata")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("packed", np.zeros((3, 2), np.int8)),
        ("packed", np.zeros((3, 3), np.uint8)),
        ("packed", np.zeros((2, 2), np.uint8)),
        ("packed", np.zeros((6,), np.uint8)),
        ("norms", np.zeros(3, np.float64)),
        ("norms", np.zeros((3, 1), np.float32)),
        ("norms", np.zeros(3, np.float16)),
        ("extra", np.zeros(3, np.float32)),
        ("rotation", np.zeros((4, 4), np.int32)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}{value.shape}",
)
def test_wrong_array(tmp_path: Path, name: str, array: npt.NDArray[Any]) -> None:
    arrays = arrays_of(quantized(), tmp_path)
    assert_rejected(tmp_path, arrays | {name: array}, "do not fit the metadata")


def test_rotation_that_is_not_orthogonal(tmp_path: Path) -> None:
    arrays = arrays_of(quantized(np.eye(4)), tmp_path)
    arrays["rotation"] = 2 * arrays["rotation"]
    record = json.loads(arrays["metadata"].item())
    record["crc32"]["rotation"] = f"{zlib.crc32(arrays['rotation'].tobytes()):08x}"
    arrays["metadata"] = signed(record)
    assert_rejected(tmp_path, arrays, "impossible settings: .*orthogonal")


def test_foreign_files(tmp_path: Path) -> None:
    arrays = {"a": np.zeros(3, np.float32)}
    write_npz(tmp_path / "a.npz", arrays)
    write_safetensors(tmp_path / "a.safetensors", arrays)
    for suffix, message in {"npz": "no metadata.npy", "safetensors": "no metadata"}.items():
        with pytest.raises(StorageError, match=message):
            tqn.load(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("name", ["packed", "metadata"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "exploded", ""))

    arrays = arrays_of(quantized(), tmp_path)
    write_npz(tmp_path / "q.npz", arrays | {name: np.array([Bomb()], object)})
    for read in tqn.load, tqn.open:
        with pytest.raises(StorageError, match="Python objects"):
            read(tmp_path / "q.npz")
    assert not (tmp_path / "exploded").exists()


def test_other_kinds_of_npz(tmp_path: Path) -> None:
    arrays = arrays_of(quantized(), tmp_path)
    np.savez_compressed(tmp_path / "q.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="is compressed"):
        tqn.load(tmp_path / "q.npz")
    write_npz(tmp_path / "q.npz", arrays | {"packed": np.asfortranarray(arrays["packed"])})
    with pytest.raises(StorageError, match="Fortran order"):
        tqn.load(tmp_path / "q.npz")
    write_npz(tmp_path / "q.npz", arrays | {"norms": arrays["norms"].astype(">f4")})
    with pytest.raises(StorageError, match="norms >f4"):
        tqn.load(tmp_path / "q.npz")
    write_npz(tmp_path / "q.npz", arrays | {"metadata": np.zeros(2**17, np.uint8)})
    with pytest.raises(StorageError, match=r"no metadata\.npy as this library writes it"):
        tqn.load(tmp_path / "q.npz")


def npy(array: npt.NDArray[Any], version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def write_zip(path: Path, members: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)


def test_npz_that_numpy_would_not_write(tmp_path: Path) -> None:
    path = tmp_path / "q.npz"
    members = {f"{n}.npy": npy(a) for n, a in arrays_of(quantized(), tmp_path).items()}
    write_zip(path, list(members.items()))
    assert contents(tqn.load(path)) == contents(quantized())
    packed = members["packed.npy"]
    for name, content, match in [
        ("packed.npy", packed + b"x", "has another size than its header says"),
        ("packed.npy", packed[:-1], "has another size than its header says"),
        ("packed.npy", npy(quantized().packed, (2, 0)), r"has \.npy version \(2, 0\)"),
        ("packed.npy", b"", "not a readable .npz file"),
        ("notes.txt", b"hello", "not a readable .npz file"),
    ]:
        write_zip(path, list((members | {name: content}).items()))
        with pytest.raises(StorageError, match=match):
            tqn.load(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(path, [*members.items(), ("packed.npy", packed)])
    with pytest.raises(StorageError, match="names a member twice"):
        tqn.load(path)


def test_a_zip_directory_that_promises_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "q.npz"
    arrays = arrays_of(quantized(), tmp_path)
    rows = 10**6
    arrays["metadata"] = signed(json.loads(arrays["metadata"].item()) | {"shape": [rows, 4]})
    arrays["norms"] = np.zeros(rows, np.float32)
    members = {f"{n}.npy": npy(a) for n, a in arrays.items() if n != "packed"}
    packed = npy(np.zeros((rows, 2), np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("packed.npy", packed[:5000])
        directory_entry = archive.getinfo("packed.npy")
        directory_entry.file_size = directory_entry.compress_size = len(packed)
    for read in tqn.load, tqn.open:
        with pytest.raises(StorageError, match="the file is cut off"):
            read(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"q.{suffix}"
    tq = TurboQuant(head_dim=64, bits=8, backend="reference")
    tqn.save(
        path, QuantizedArray(np.zeros((10_000, 64), np.uint8), np.ones(10_000, np.float32), tq)
    )
    with files.reading(path) as opened:
        os.truncate(path, 100_000)
        with pytest.raises(StorageError, match="the file is cut off"):
            files.verify_checksums(opened)
        with pytest.raises(StorageError, match="the file is cut off"):
            files._assemble(opened, files._read_array, "auto")
