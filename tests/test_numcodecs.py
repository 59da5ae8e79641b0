"""The codec for numcodecs and Zarr format 2: values, configuration, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import StorageError, TurboQuant
from turboquant_np.testing import assert_bits_equal

numcodecs = pytest.importorskip("numcodecs", reason="needs the zarr extra")
zarr = pytest.importorskip("zarr", reason="needs the zarr extra")

from turboquant_np.numcodecs import TurboQuantCodec  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "zarr"


@pytest.fixture(scope="module")
def x() -> Any:
    return np.random.default_rng(7).standard_normal((30, 4, 64)).astype("f4")


def direct(x: Any, **settings: Any) -> Any:
    tq = TurboQuant(head_dim=64, **settings)
    return tq.decode(*tq.encode(x), dtype=x.dtype.newbyteorder("=")).astype(x.dtype)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_decoding_gives_the_bits_of_the_quantiser(dtype: str, x: Any) -> None:
    x = x.astype(dtype)
    codec = TurboQuantCodec(head_dim=64, bits=3, dtype=dtype)
    decoded = codec.decode(codec.encode(x).tobytes())
    assert decoded.dtype == x.dtype
    assert_bits_equal(decoded.reshape(x.shape), direct(x, bits=3))


def test_decoding_into_a_given_array(x: Any) -> None:
    codec, out = TurboQuantCodec(head_dim=64), np.empty(x.shape, "f4")
    codec.decode(codec.encode(x), out=out)
    assert_bits_equal(out, direct(x))


def test_the_configuration_comes_back_exactly() -> None:
    int64: Any = np.int64(64)
    codec = TurboQuantCodec(
        head_dim=int64, bits=5, seed=9, rotation="haar", scale="mse", dtype=np.float16
    )
    config = json.loads(json.dumps(codec.get_config()))
    assert config == {
        "id": "turboquant",
        "head_dim": 64,
        "bits": 5,
        "seed": 9,
        "rotation": "haar",
        "hadamard_rounds": 3,
        "scale": "mse",
        "format_version": 1,
        "dtype": "<f2",
    }
    again = numcodecs.get_codec(config)
    assert again == codec
    assert again.get_config() == config
    assert eval(repr(codec), {"TurboQuantCodec": TurboQuantCodec}) == codec
    assert codec != TurboQuantCodec(head_dim=64, bits=4, seed=9, rotation="haar", scale="mse")


@pytest.mark.parametrize("place", ["compressors", "filters"])
def test_zarr_format_2(place: str, x: Any) -> None:
    codec = TurboQuantCodec(head_dim=64, bits=3)
    settings = {"compressors": codec} if place == "compressors" else {"filters": [codec]}
    store = zarr.storage.MemoryStore()
    array = zarr.create_array(
        store, shape=x.shape, chunks=(20, 2, 64), dtype="float32", zarr_format=2, **settings
    )
    array[:] = x
    again = zarr.open_array(store)
    assert_bits_equal(again[:], direct(x, bits=3))
    assert_bits_equal(again[7:25, 1], direct(x, bits=3)[7:25, 1])


def test_the_golden_store() -> None:
    golden = zarr.open_array(GOLDEN / "format_2.zarr", mode="r")
    assert_bits_equal(golden[:], np.load(GOLDEN / "format_2.npy"))
    codec = golden.metadata.compressor
    x = np.load(GOLDEN / "vectors.npy")[:6]
    assert codec.encode(x).tobytes() == (GOLDEN / "format_2.zarr" / "0.0.0").read_bytes()


@pytest.mark.parametrize("x", [np.zeros((4, 64)), np.zeros((4, 64), int)], ids=["f8", "int"])
def test_arrays_of_another_dtype(x: Any) -> None:
    with pytest.raises(TypeError, match="this codec encodes float32 arrays, got"):
        TurboQuantCodec(head_dim=64).encode(x)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_dtypes_that_are_no_floats(dtype: str) -> None:
    with pytest.raises(TypeError, match="dtype must be float16"):
        TurboQuantCodec(head_dim=64, dtype=dtype)


def test_arrays_of_another_shape_or_order(x: Any) -> None:
    codec = TurboQuantCodec(head_dim=48)
    with pytest.raises(ValueError, match="multiple of head_dim = 48"):
        codec.encode(x)
    with pytest.raises(ValueError, match="must be in C order"):
        TurboQuantCodec(head_dim=64).encode(np.asfortranarray(x))


@pytest.mark.parametrize("size", [1, 35, 37])
def test_bytes_that_are_no_whole_vectors(size: int) -> None:
    with pytest.raises(StorageError, match=rf"a vector takes 36 bytes .* got {size} bytes"):
        TurboQuantCodec(head_dim=64).decode(bytes(size))


def test_a_scale_that_cannot_be() -> None:
    with pytest.raises(StorageError, match="NaN or infinite"):
        TurboQuantCodec(head_dim=64).decode(bytes(32) + np.float32(np.inf).tobytes())


def test_configurations_of_a_newer_release() -> None:
    config = TurboQuantCodec(head_dim=64).get_config()
    with pytest.raises(StorageError, match="format version 2"):
        numcodecs.get_codec(config | {"format_version": 2})
    with pytest.raises(StorageError, match=r"unknown settings .*: lanes"):
        numcodecs.get_codec(config | {"lanes": 4})


def test_configurations_with_something_missing() -> None:
    with pytest.raises(TypeError, match="head_dim"):
        numcodecs.get_codec({"id": "turboquant", "bits": 4})
