"""Dask chunks and Zarr buffers on a GPU: CuPy in, CuPy out, the bits of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.testing import assert_bits_equal

cupy = pytest.importorskip("cupy")


@pytest.fixture
def x() -> Any:
    return np.random.default_rng(7).standard_normal((1000, 64)).astype("f4")


def test_dask_chunks_stay_on_the_gpu(x: Any) -> None:
    dask = pytest.importorskip("dask")
    da = pytest.importorskip("dask.array")
    import turboquant_np.dask as tqd

    tq = TurboQuant(head_dim=64, bits=3)
    packed, norms = tqd.encode(da.from_array(cupy.asarray(x), chunks=(130, 64), asarray=False), tq)
    restored = tqd.decode(packed, norms, tq, dtype="float32")
    query = cupy.asarray(x[:5])
    scores, indices = tqd.topk(query, packed, norms, tq, 4)
    lazy = packed, norms, restored, scores, indices
    assert all(isinstance(array._meta, cupy.ndarray) for array in lazy)
    computed = dask.compute(*lazy, scheduler="synchronous")
    assert all(isinstance(array, cupy.ndarray) for array in computed)
    direct = tq.encode(x)
    assert_bits_equal(computed[0].get(), direct[0])
    assert_bits_equal(computed[1].get(), direct[1])
    assert_bits_equal(computed[2].get(), tq.decode(*direct, dtype="float32"))
    assert computed[4][:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="query and packed must live in the same memory"):
        tqd.inner_products(x[:5], packed, norms, tq)


def test_zarr_reads_and_writes_gpu_memory(x: Any) -> None:
    zarr = pytest.importorskip("zarr")
    from turboquant_np.zarr import TurboQuantCodec

    store = zarr.storage.MemoryStore()
    settings = {"shape": x.shape, "chunks": (300, 64), "dtype": "f4", "compressors": None}
    with zarr.config.enable_gpu():
        array = zarr.create_array(store, serializer=TurboQuantCodec(bits=3), **settings)
        array[:] = cupy.asarray(x)
        array[7] = cupy.asarray(x[8])
        part = array[5:400]
    assert isinstance(part, cupy.ndarray)
    expected = x.copy()
    expected[7] = x[8]
    tq = TurboQuant(head_dim=64, bits=3)
    direct = tq.decode(*tq.encode(expected), dtype="float32")
    assert_bits_equal(part.get(), direct[5:400])
    assert_bits_equal(zarr.open_array(store)[:], direct)  # the same store from the host
