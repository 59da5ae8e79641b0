"""Zarr format 3: what is stored, read in parts, rewritten in parts, and refused.

Everything with Zarr's usual codec pipeline and with ours, which must not differ.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import StorageError, TurboQuant
from turboquant_np.testing import assert_bits_equal

zarr = pytest.importorskip("zarr", reason="needs the zarr extra")

from turboquant_np import zarr_pipeline  # noqa: E402
from turboquant_np.zarr import TurboQuantCodec  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "zarr"

SHAPE, CHUNKS, SHARDS = (100, 8, 64), (40, 4, 64), (80, 8, 64)
LAYOUTS = pytest.mark.parametrize("shards", [None, SHARDS], ids=["chunks", "shards"])


def random_vectors(shape: tuple[int, ...], seed: int = 7, dtype: Any = "f4") -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def create(store: Any = None, **settings: Any) -> Any:
    """An array of SHAPE, 3 bits, unless `settings` say otherwise."""
    store = zarr.storage.MemoryStore() if store is None else store
    defaults = {
        "shape": SHAPE,
        "chunks": CHUNKS,
        "dtype": "float32",
        "serializer": TurboQuantCodec(bits=3),
        "compressors": None,
    }
    return zarr.create_array(store, **(defaults | settings))


def direct(x: Any, tq: TurboQuant | None = None) -> Any:
    """What reading must give: the vectors encoded and decoded with no store in between."""
    tq = tq or TurboQuant(head_dim=64, bits=3)
    return tq.decode(*tq.encode(x), dtype=x.dtype.newbyteorder("=")).astype(x.dtype)


@pytest.fixture(autouse=True, params=["usual", "ours"])
def pipeline(request: pytest.FixtureRequest) -> Iterator[None]:
    with zarr_pipeline.enable() if request.param == "ours" else nullcontext():
        yield


@pytest.fixture(scope="module")
def x() -> Any:
    return random_vectors(SHAPE)


# -- round trips ---------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_reading_gives_the_bits_of_encode_and_decode(dtype: str, shards: Any, x: Any) -> None:
    x = x.astype(dtype)
    array = create(dtype=dtype, shards=shards)
    array[:] = x
    assert_bits_equal(np.asarray(array[:]).astype(x.dtype), direct(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 8, "seed": 3},
        {"bits": 4, "rotation": "haar", "seed": 5},
        {"bits": 2, "scale": "unbiased"},
        {"bits": 5, "scale": "mse", "hadamard_rounds": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [24, 64])
def test_every_setting_reaches_the_quantiser(settings: dict[str, Any], d: int) -> None:
    x = random_vectors((50, d))
    array = create(
        shape=x.shape, chunks=(20, d), serializer=TurboQuantCodec(**settings), dtype="float32"
    )
    array[:] = x
    assert_bits_equal(array[:], direct(x, TurboQuant(head_dim=d, **settings)))


def test_a_chunk_holds_the_codes_and_then_the_scales(x: Any) -> None:
    store = zarr.storage.MemoryStore()
    create(store)[:] = x
    packed, norms = TurboQuant(head_dim=64, bits=3).encode(x[40:80, 4:8])
    assert store._store_dict["c/1/1/0"].to_bytes() == packed.tobytes() + norms.tobytes()


def test_scales_behind_an_odd_number_of_code_bytes() -> None:
    x = np.random.default_rng(4).standard_normal((9, 3, 50), dtype=np.float32)
    store = zarr.storage.MemoryStore()
    create(store, shape=x.shape, chunks=(3, 1, 50), serializer=TurboQuantCodec(bits=4))[:] = x
    packed, norms = TurboQuant(head_dim=50, bits=4).encode(x[6:, 1:2])  # 3 x 25 bytes, no copy
    assert store._store_dict["c/2/1/0"].to_bytes() == packed.tobytes() + norms.tobytes()


def test_rows_longer_than_head_dim_are_cut_into_vectors(x: Any) -> None:
    rows = x.reshape(100, 512)
    array = create(
        shape=(100, 512), chunks=(30, 256), serializer=TurboQuantCodec(head_dim=64, bits=3)
    )
    array[:] = rows
    assert_bits_equal(array[:], direct(x).reshape(100, 512))


def test_one_dimensional_arrays(x: Any) -> None:
    flat = x.reshape(-1)
    array = create(
        shape=flat.shape, chunks=(6400,), serializer=TurboQuantCodec(head_dim=64, bits=3)
    )
    array[:] = flat
    assert_bits_equal(array[100:9000], direct(x).reshape(-1)[100:9000])


def test_missing_and_zero_chunks_take_no_bytes(x: Any) -> None:
    store = zarr.storage.MemoryStore()
    array = create(store)
    array[:40] = x[:40]
    array[40:] = 0
    assert {key for key in store._store_dict if key != "zarr.json"} == {"c/0/0/0", "c/0/1/0"}
    assert not array[40:].any()
    array[:] = 0
    assert set(store._store_dict) == {"zarr.json"}


def test_empty_chunks_are_written_if_the_array_is_told_so() -> None:
    store = zarr.storage.MemoryStore()
    create(store, config={"write_empty_chunks": True})[:] = 0
    assert len(store._store_dict) == 7


def test_a_checksum_codec_may_follow(x: Any) -> None:
    array = create(compressors=[zarr.codecs.Crc32cCodec()])
    array[:] = x
    assert_bits_equal(array[3:77], direct(x)[3:77])


# -- parts -----------------------------------------------------------------------------------------

SELECTIONS = [
    np.s_[3:50],
    np.s_[7],
    np.s_[-1],
    np.s_[:0],
    np.s_[::7, 2:5],
    np.s_[1:95:13, 3, 10:20],
    np.s_[5, 3, 2],
    np.s_[..., 5],
]


@LAYOUTS
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_reading_parts(selection: Any, shards: Any, x: Any) -> None:
    array = create(shards=shards)
    array[:] = x
    assert_bits_equal(np.asarray(array[selection]), np.asarray(direct(x)[selection]))


@LAYOUTS
def test_reading_rows_out_of_order_and_masks(shards: Any, x: Any) -> None:
    array, expected = create(shards=shards), direct(x)
    array[:] = x
    rows, heads = [2, 50, 51, 99], [0, 6]
    assert_bits_equal(array.oindex[rows, heads], expected[np.ix_(rows, heads)])
    points = ([90, 5, 5], [7, 0, 3], [63, 1, 1])
    assert_bits_equal(array.vindex[points], expected[points])
    mask = np.zeros(SHAPE, bool)
    mask[3, 1], mask[60:62, 7, 5:9] = True, True
    assert_bits_equal(array.vindex[mask], expected[mask])
    step = (shards or CHUNKS)[0]
    assert_bits_equal(array.blocks[1], expected[step : 2 * step])


class CountingStore(zarr.storage.WrapperStore):  # type: ignore[misc,name-defined]
    """A store that counts the bytes it hands out."""

    bytes_read = 0

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        data = await super().get(key, prototype, byte_range)
        self.bytes_read += 0 if data is None else len(data)
        return data


def test_reading_a_row_reads_its_codes_and_no_others() -> None:
    store = CountingStore(zarr.storage.MemoryStore())
    x = random_vectors((1000, 64))
    array = create(store, shape=x.shape, chunks=(1000, 64))
    array[:] = x
    before = store.bytes_read
    assert_bits_equal(array[990:995], direct(x)[990:995])
    assert store.bytes_read - before == 5 * 24 + 10 * 4  # scales from row 990 to the end


@LAYOUTS
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_writing_parts_leaves_the_other_vectors_as_they_are(
    selection: Any, shards: Any, x: Any
) -> None:
    array = create(shards=shards)
    array[:] = x
    y = random_vectors(SHAPE, seed=8)
    merged, changed = direct(x), np.zeros(SHAPE, bool)
    merged[selection], changed[selection] = y[selection], True
    touched = changed.any(axis=-1)
    expected = direct(x)
    expected[touched] = direct(merged[touched])
    array[selection] = y[selection]
    assert_bits_equal(array[:], expected)


def test_writing_with_index_arrays(x: Any) -> None:
    array, y = create(), random_vectors(SHAPE, seed=8)
    array[:] = x
    expected = direct(x)
    rows = [2, 50, 99]
    array.oindex[rows, 2] = y[rows, 2]
    array.oindex[[5, 60], [1, 6], :] = y[np.ix_([5, 60], [1, 6])]
    expected[rows, 2] = direct(y)[rows, 2]
    expected[np.ix_([5, 60], [1, 6])] = direct(y)[np.ix_([5, 60], [1, 6])]
    assert_bits_equal(array[:], expected)


def test_rewriting_one_vector_a_hundred_times_does_not_wear_out_its_neighbours() -> None:
    x = random_vectors((20, 64))
    array = create(shape=x.shape, chunks=(20, 64), serializer=TurboQuantCodec(bits=1))
    array[:] = x
    before = array[:]
    for i in range(100):
        array[3] = random_vectors((64,), seed=i)
    after = array[:]
    kept = np.arange(20) != 3
    assert_bits_equal(after[kept], before[kept])


# -- the pipeline without an event loop (Zarr 3.4 and later, not the default) ----------------------


@pytest.fixture
def fused() -> Iterator[None]:
    if not hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
        pytest.skip(f"zarr {zarr.__version__} has no FusedCodecPipeline")
    path = "zarr.core.codec_pipeline.FusedCodecPipeline"
    with zarr.config.set({"codec_pipeline.path": path}):
        yield


@pytest.mark.usefixtures("fused")
@LAYOUTS
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_reading_parts_without_an_event_loop(selection: Any, shards: Any, x: Any) -> None:
    array = create(shards=shards)
    array[:] = x
    assert_bits_equal(np.asarray(array[selection]), direct(x)[selection])


@pytest.mark.usefixtures("fused")
def test_writing_parts_without_an_event_loop_wears_out_no_neighbours() -> None:
    x = random_vectors((20, 64))
    array = create(shape=x.shape, chunks=(20, 64), serializer=TurboQuantCodec(bits=1))
    array[:] = x
    for i in range(100):
        array[3] = x[3] + i
    tq = TurboQuant(head_dim=64, bits=1)
    expected = direct(x, tq)
    expected[3] = direct(x[3] + 99, tq)
    assert_bits_equal(array[:], expected)
    array[:] = 0
    assert array.nchunks_initialized == 0


# -- asynchronous, from threads, by name -----------------------------------------------------------


def test_the_asynchronous_interface(x: Any) -> None:
    async def run() -> npt.NDArray[Any]:
        array = await zarr.api.asynchronous.create_array(
            zarr.storage.MemoryStore(),
            shape=SHAPE,
            chunks=CHUNKS,
            dtype="float32",
            serializer=TurboQuantCodec(bits=3),
            compressors=None,
        )
        await asyncio.gather(
            *(array.setitem(slice(i, i + 40), x[i : i + 40]) for i in range(0, 100, 40))
        )
        parts = await asyncio.gather(*(array.getitem(slice(i, i + 30)) for i in range(0, 100, 30)))
        return np.concatenate(parts)

    assert_bits_equal(asyncio.run(run()), direct(x))


def test_many_threads_at_once(x: Any) -> None:
    array, expected = create(), direct(x)

    def work(i: int) -> Any:
        array[40 * i : 40 * i + 40] = x[40 * i : 40 * i + 40]
        return array[40 * i : 40 * i + 40]

    with ThreadPoolExecutor(8) as pool:
        for i, part in zip([0, 1, 2] * 8, pool.map(work, [0, 1, 2] * 8), strict=True):
            assert_bits_equal(part, expected[40 * i : 40 * i + 40])


def test_the_metadata_say_everything_and_come_back(tmp_path: Path) -> None:
    int5: Any = np.int64(5)
    codec = TurboQuantCodec(bits=int5, seed=9, rotation="haar", scale="mse")
    create(str(tmp_path / "z"), serializer=codec)
    (stored,) = json.loads((tmp_path / "z" / "zarr.json").read_text())["codecs"]
    assert stored == {
        "name": "turboquant",
        "configuration": {
            "head_dim": 64,
            "bits": 5,
            "seed": 9,
            "rotation": "haar",
            "hadamard_rounds": 3,
            "scale": "mse",
            "format_version": 1,
        },
    }
    assert TurboQuantCodec.from_dict(stored).to_dict() == stored
    assert zarr.open_array(tmp_path / "z").metadata.codecs == (
        TurboQuantCodec(head_dim=64, bits=5, seed=9, rotation="haar", scale="mse"),
    )


def test_a_reader_imports_nothing_of_this_package(tmp_path: Path, x: Any) -> None:
    create(str(tmp_path / "z"))[:] = x
    script = f"import zarr; print(float(zarr.open_array({str(tmp_path / 'z')!r})[7, 3, 5]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.float32(done.stdout) == direct(x)[7, 3, 5]


# -- refused at creation ---------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "uint8"])
def test_dtypes_that_are_no_floats(dtype: str, shards: Any) -> None:
    with pytest.raises(TypeError, match=f"stores float16.* arrays, got {dtype}"):
        create(dtype=dtype, shards=shards)


@LAYOUTS
@pytest.mark.parametrize("fill_value", [1.0, np.nan, np.inf])
def test_fill_values_other_than_zero(fill_value: float, shards: Any) -> None:
    with pytest.raises(ValueError, match="fill_value must be 0, got"):
        create(fill_value=fill_value, shards=shards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": (40, 4, 32)}, "vectors of 64 values would be cut"),
        ({"shape": (100, 8, 100)}, "vectors of 100 values would be cut"),
        ({"serializer": TurboQuantCodec(head_dim=48)}, "multiple of head_dim = 48"),
        ({"shape": (), "chunks": ()}, "a last axis of length >= 2"),
        ({"shape": (10, 0), "chunks": (10, 1)}, "a last axis of length >= 2"),
        ({"shape": (10, 1), "chunks": (10, 1)}, "head_dim must be an integer >= 2"),
    ],
    ids=str,
)
def test_shapes_that_would_cut_vectors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(**settings)


def test_shards_with_a_head_dim_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"multiples? of head_dim"):
        create(shards=SHARDS, serializer=TurboQuantCodec(head_dim=48))


def test_a_grid_that_is_not_regular() -> None:
    codec = TurboQuantCodec(head_dim=64)
    dtype = create().metadata.data_type
    with pytest.raises(ValueError, match="needs a regular chunk grid, got object"):
        codec.validate(shape=(10, 64), dtype=dtype, chunk_grid=object())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 9}, ValueError, "Supported bit-widths"),
        ({"bits": 2.5}, TypeError, "bits must be an integer"),
        ({"rotation": np.eye(64)}, TypeError, "not hold a matrix"),
        ({"rotation": "none"}, ValueError, "rotation must be one of"),
        ({"scale": "max"}, ValueError, "scale must be one of"),
        ({"head_dim": 1}, ValueError, "head_dim must be"),
    ],
    ids=str,
)
def test_settings_out_of_range(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TurboQuantCodec(**settings)


def test_changing_the_length_of_vectors() -> None:
    array = create()
    with pytest.raises(ValueError, match="multiple of head_dim = 64"):
        array.resize((100, 8, 80))
    array.resize((120, 8, 64))  # more vectors are fine
    assert not array[100:].any()


def test_values_that_are_not_finite(x: Any) -> None:
    array = create()
    bad = x.copy()
    bad[41, 2, 5] = np.nan
    with pytest.raises(ValueError, match="is nan"):
        array[:] = bad


# -- damaged or foreign stores ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, x: Any) -> Path:
    create(str(tmp_path / "z"))[:] = x
    return tmp_path / "z"


READS = pytest.mark.parametrize("rows", [slice(None), slice(3, 5)], ids=["whole", "part"])


@READS
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:100]])
def test_chunks_of_another_size(folder: Path, rows: slice, change: Any) -> None:
    chunk = folder / "c/0/0/0"
    chunk.write_bytes(change(chunk.read_bytes()))
    with pytest.raises(StorageError, match=r"expected \d+ bytes of a chunk .* damaged"):
        zarr.open_array(folder)[rows]


@READS
def test_scales_that_cannot_be(folder: Path, rows: slice) -> None:
    chunk = folder / "c/0/0/0"
    data = bytearray(chunk.read_bytes())
    at = 40 * 4 * 24 + 3 * 4 * 4  # the scale of vector [3, 0]
    data[at : at + 4] = np.float32(np.nan).tobytes()
    chunk.write_bytes(data)
    with pytest.raises(StorageError, match="a scale in the chunk is NaN or infinite"):
        zarr.open_array(folder)[rows]


def edit(folder: Path, **configuration: Any) -> None:
    path = folder / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["codecs"][0]["configuration"] |= configuration
    path.write_text(json.dumps(metadata))


@READS
def test_metadata_with_another_number_of_bits(folder: Path, rows: slice) -> None:
    edit(folder, bits=4)
    with pytest.raises(StorageError, match="shape or settings were changed"):
        zarr.open_array(folder)[rows]


def test_metadata_with_another_shape(folder: Path) -> None:
    path = folder / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["shape"][-1] = metadata["chunk_grid"]["configuration"]["chunk_shape"][-1] = 96
    path.write_text(json.dumps(metadata))
    with pytest.raises(
        ValueError, match=r"multiple of head_dim = 64 long, got shape \(100, 8, 96\)"
    ):
        zarr.open_array(folder)


def test_a_newer_format(folder: Path) -> None:
    edit(folder, format_version=2)
    with pytest.raises(StorageError, match=r"format version 2, this release reads 1; upgrade"):
        zarr.open_array(folder)


def test_settings_of_a_newer_release(folder: Path) -> None:
    edit(folder, entropy_coding=True)
    with pytest.raises(StorageError, match=r"unknown settings of .*: entropy_coding"):
        zarr.open_array(folder)


# -- golden stores ---------------------------------------------------------------------------------


def stored_chunks(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.glob("c/**/*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_golden_stores_are_read_to_the_same_bits(name: str) -> None:
    golden = zarr.open_array(GOLDEN / f"{name}.zarr", mode="r")
    assert_bits_equal(golden[:], np.load(GOLDEN / f"{name}.npy"))


def test_the_golden_store_is_written_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_bytes((GOLDEN / "plain.zarr" / "zarr.json").read_bytes())
    zarr.open_array(tmp_path)[:] = np.load(GOLDEN / "vectors.npy")
    written = stored_chunks(tmp_path)
    assert set(written) == {"c/0/0/0", "c/0/1/0", "c/1/0/0", "c/1/1/0"}
    assert written == stored_chunks(GOLDEN / "plain.zarr")
