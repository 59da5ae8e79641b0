"""Quantised arrays beside ordinary tensors in one safetensors file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import QuantizedArray, StorageError, TurboQuant
from turboquant_np.testing import assert_bits_equal

safetensors = pytest.importorskip("safetensors", reason="needs the io extra")

import safetensors.numpy  # noqa: E402, F811

from turboquant_np.safetensors import TensorFile, save_file  # noqa: E402

ORTHOGONAL = np.linalg.qr(np.random.default_rng(5).standard_normal((24, 24)))[0]


def quantized(d: int = 24, shape: tuple[int, ...] = (50,), **settings: Any) -> QuantizedArray:
    x = np.random.default_rng(7).standard_normal((*shape, d)).astype("f4")
    return QuantizedArray.encode(x, TurboQuant(head_dim=d, **settings))


@pytest.fixture
def model() -> dict[str, Any]:
    """Packed weights, a key cache, an embedding with a matrix of its own, and ordinary tensors."""
    rng = np.random.default_rng(8)
    return {
        "layer.0.weight": quantized(d=64, bits=3),
        "cache.keys": quantized(shape=(4, 2, 16), bits=4, scale="unbiased"),
        "embedding": quantized(bits=5, rotation=ORTHOGONAL),
        "layer.0.bias": rng.standard_normal(64).astype("f2"),
        "counts": np.arange(6).reshape(2, 3)[:, ::-1],
        "temperature": np.float64(0.7) * np.ones(()),
        "mask": np.array([True, False]),
    }


@pytest.fixture
def path(model: dict[str, Any], tmp_path: Path) -> Path:
    save_file(model, tmp_path / "model.safetensors", metadata={"made by": "a test"})
    return tmp_path / "model.safetensors"


def test_everything_comes_back_by_name(model: dict[str, Any], path: Path) -> None:
    file = TensorFile(path, verify=True)
    assert list(file) == sorted(model)
    assert file.metadata == {"made by": "a test"}
    for name, value in model.items():
        restored = file[name]
        if isinstance(value, QuantizedArray):
            assert (restored.shape, restored.dtype) == (value.shape, value.dtype)
            assert_bits_equal(restored.packed, value.packed)
            assert_bits_equal(restored.norms, value.norms)
            assert_bits_equal(restored.decode(), value.decode())
        else:
            assert (restored.dtype, restored.shape) == (value.dtype, value.shape)
            assert_bits_equal(restored, np.ascontiguousarray(value).reshape(value.shape))


def test_nothing_is_copied(path: Path) -> None:
    file = TensorFile(path)
    keys = file["cache.keys"]
    for array in (keys.packed, keys.norms, file["layer.0.bias"]):
        assert np.shares_memory(array, file._data)
        assert not array.flags.writeable


def test_other_programs_see_plain_tensors(model: dict[str, Any], path: Path) -> None:
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {
        *("layer.0.weight.packed", "layer.0.weight.norms", "cache.keys.packed", "cache.keys.norms"),
        *("embedding.packed", "embedding.norms", "embedding.rotation"),
        *("layer.0.bias", "counts", "temperature", "mask"),
    }
    assert_bits_equal(tensors["cache.keys.packed"], model["cache.keys"].packed)


def test_files_of_other_programs(tmp_path: Path) -> None:
    tensors = {"a": np.arange(5, dtype="i2"), "b": np.ones((2, 2), "f8")}
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    file = TensorFile(tmp_path / "other.safetensors")
    assert {name: file[name].tolist() for name in file} == {
        name: array.tolist() for name, array in tensors.items()
    }


def test_bfloat16_tensors(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the bfloat16 extra")
    x = np.linspace(-3, 3, 64).astype(ml_dtypes.bfloat16)
    tq = TurboQuant(head_dim=64)
    save_file({"x": x, "q": QuantizedArray.encode(x, tq)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file["x"].dtype == x.dtype
    assert_bits_equal(file["x"].view("u2"), x.view("u2"))
    assert file["q"].decode().dtype == x.dtype


def test_torch_reads_and_writes_the_same_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import safetensors.torch

    bias = torch.arange(4, dtype=torch.float32)
    save_file({"bias": bias, "w": quantized(bits=4)}, tmp_path / "m.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert torch.equal(tensors["bias"], bias)
    tq = TurboQuant(head_dim=24, bits=4)
    restored = tq.decode(tensors["w.packed"], tensors["w.norms"], dtype=torch.float32)
    assert_bits_equal(restored.numpy(), TensorFile(tmp_path / "m.safetensors")["w"].decode())


def test_names_that_are_not_there(path: Path) -> None:
    file = TensorFile(path)
    for name in ("nothing", "cache.keys.packed"):
        with pytest.raises(KeyError, match=r"model.safetensors has cache.keys, counts"):
            file[name]


def test_names_that_clash(tmp_path: Path) -> None:
    tensors = {"w": quantized(), "w.norms": np.ones(3)}
    with pytest.raises(ValueError, match=r"two tensors would be called w.norms"):
        save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="metadata keys that start with turboquant_np are ours"):
        save_file({}, tmp_path / "x.safetensors", metadata={"turboquant_np.w": "{}"})
    with pytest.raises(TypeError, match="w must be a NumPy or CuPy array"):
        save_file({"w": [1.0, 2.0]}, tmp_path / "x.safetensors")


# -- damage ----------------------------------------------------------------------------------------


def edit_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_files_cut_off(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(StorageError, match=r"not a readable .safetensors file"):
        TensorFile(path)


def test_flipped_bits_are_found_when_asked_for(path: Path) -> None:
    packed = TensorFile(path)["cache.keys"].packed
    data = bytearray(path.read_bytes())
    data[data.index(packed.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"'cache.keys.packed' is damaged: its checksum is"):
        TensorFile(path, verify=True)


def test_a_flipped_bit_of_a_rotation_is_always_found(path: Path) -> None:
    rotation = safetensors.numpy.load_file(path)["embedding.rotation"]
    data = bytearray(path.read_bytes())
    data[data.index(rotation.tobytes()) + 9] ^= 64
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"'embedding.rotation' is damaged"):
        TensorFile(path)["embedding"]


def test_tensors_of_another_shape(path: Path) -> None:
    def change(header: Any) -> None:
        header["cache.keys.norms"]["shape"] = [128]

    edit_header(path, change)
    with pytest.raises(StorageError, match=r"promise a tensor 'cache.keys.norms', float32 \[4, 2"):
        TensorFile(path)


def test_tensors_that_are_gone(path: Path) -> None:
    def change(header: Any) -> None:
        header["renamed"] = header.pop("cache.keys.norms")

    edit_header(path, change)
    with pytest.raises(StorageError, match=r"'cache.keys.norms'.*found missing"):
        TensorFile(path)


def test_a_newer_format(path: Path) -> None:
    def change(header: Any) -> None:
        text = header["__metadata__"]["turboquant_np.embedding"]
        header["__metadata__"]["turboquant_np.embedding"] = text.replace(
            '"format_version":1', '"format_version":2'
        )

    edit_header(path, change)
    with pytest.raises(StorageError, match=r"embedding: .*format version 2"):
        TensorFile(path)
