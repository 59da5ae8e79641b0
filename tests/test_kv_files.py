"""Files of PagedKVCache: what comes back, what older and newer versions and damage do."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np._kv_files import FILE_VERSION
from turboquant_np.kv_cache import OutOfPagesError, PagedKVCache
from turboquant_np.storage import StorageError
from turboquant_np.testing import assert_bits_equal

BY_LAYER: dict[str, Any] = {"num_layers": 3, "key_bits": [4, 2, 4], "value_bits": (3, 3, 3)}


def filled(count: int, **changes: Any) -> tuple[PagedKVCache, int]:
    """A cache with a sequence of `count` tokens, and the sequence."""
    sizes: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "num_blocks": 40}
    cache = PagedKVCache(**sizes | changes)
    rng = np.random.Generator(np.random.PCG64(31))
    sequence = cache.allocate()
    cache.append(sequence, *rng.standard_normal((2, cache.num_layers, count, 2, 32), np.float32))
    return cache, sequence


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_save_and_load(tmp_path: Path, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    matrix = np.linalg.qr(np.random.Generator(np.random.PCG64(3)).standard_normal((32, 32)))[0]
    quantizer = TurboQuant(head_dim=32, bits=5, rotation=matrix, scale="mse")
    cache, a = filled(130, dtype=dtype, value_quantizer=quantizer)
    b = cache.fork(a)
    cache.append(b, *np.ones((2, 2, 9, 2, 32), np.float32))
    cache.save(tmp_path / "cache.npz")
    loaded = PagedKVCache.load(tmp_path / "cache.npz")
    assert loaded.sequences == [a, b]
    assert loaded.stats() == cache.stats()
    for sequence in (a, b):
        for layer in range(2):
            for one, other in zip(
                loaded.read(sequence, layer), cache.read(sequence, layer), strict=True
            ):
                assert_bits_equal(one, other)
    assert loaded.allocate() == b + 1
    with pytest.raises(OutOfPagesError):
        PagedKVCache.load(tmp_path / "cache.npz", num_blocks=1)


def test_save_and_load_by_layer(tmp_path: Path) -> None:
    cache, a = filled(130, **BY_LAYER)
    cache.save(tmp_path / "cache.npz")
    loaded = PagedKVCache.load(tmp_path / "cache.npz", num_blocks=50)
    assert [q.bits for q in loaded.key_quantizers] == [4, 2, 4]
    for layer in range(3):
        for one, other in zip(loaded.read(a, layer), cache.read(a, layer), strict=True):
            assert_bits_equal(one, other)
    packed = [len(np.unique([id(q) for q in group])) for group in (loaded.key_quantizers,)]
    assert packed == [2]  # layers with equal bits share a quantiser again


GOLDEN = Path(__file__).parent / "golden" / "kv_cache"


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.npz")))
def test_golden_files_still_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GOLDEN)
    golden: Any = importlib.import_module("make_caches")
    loaded, expected = PagedKVCache.load(GOLDEN / name), golden.make_cache(name)
    assert loaded.settings == expected.settings
    assert loaded.stats() == expected.stats()
    assert loaded.sequences == expected.sequences
    for sequence in expected.sequences:
        for layer in range(golden.LAYERS):
            for one, other in zip(
                loaded.read(sequence, layer), expected.read(sequence, layer), strict=True
            ):
                assert_bits_equal(one, other)


def test_golden_files_of_all_versions_are_there() -> None:
    versions = {path.name.split("_")[0] for path in GOLDEN.glob("*.npz")}
    assert versions == {f"v{n}" for n in range(1, FILE_VERSION + 1)}


def test_newer_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.npz"
    with monkeypatch.context() as patch:
        patch.setattr("turboquant_np._kv_files.FILE_VERSION", FILE_VERSION + 1)
        filled(0)[0].save(path)
    with pytest.raises(StorageError, match=f"of version {FILE_VERSION + 1}, .* to {FILE_VERSION};"):
        PagedKVCache.load(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    cache, a = filled(100)
    path = tmp_path / "cache.npz"
    cache.save(path)
    data = path.read_bytes()
    for at in range(0, len(data), 997):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            loaded = PagedKVCache.load(path)
        except StorageError:
            continue
        for layer in range(2):  # a bit that carries nothing
            for one, other in zip(loaded.read(a, layer), cache.read(a, layer), strict=True):
                assert_bits_equal(one, other)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError):
        PagedKVCache.load(path)
    np.savez(path, packed=np.zeros(3))
    with pytest.raises(StorageError, match="not a complete cache file"):
        PagedKVCache.load(path)
