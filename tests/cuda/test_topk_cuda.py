"""`topk` on a GPU: what it finds on the CPU, in CuPy arrays."""

from __future__ import annotations

import numpy as np
import pytest

from turboquant_np import TurboQuant, _topk
from turboquant_np.testing import assert_bits_equal

cupy = pytest.importorskip("cupy")


@pytest.mark.parametrize("k", [1, 100, 3000])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_topk(k: int, with_offsets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_topk, "SCORES_AT_ONCE", 5 * 3000)
    rng = np.random.default_rng(7)
    x, queries = rng.standard_normal((9000, 64), "f4"), rng.standard_normal((6, 64), "f4")
    x[5000:6000] = x[:1000]
    tq = TurboQuant(head_dim=64, bits=3, scale="unbiased")
    packed, norms = (cupy.asarray(array) for array in tq.encode(x))
    offsets = cupy.asarray(rng.standard_normal(9000)) if with_offsets else None
    scores, found = tq.topk(cupy.asarray(queries), packed, norms, k, offsets=offsets)
    assert isinstance(scores, cupy.ndarray)
    assert isinstance(found, cupy.ndarray)
    everything = tq.inner_products(cupy.asarray(queries), packed, norms).get()
    if offsets is not None:
        everything += offsets.get().astype(np.float32)
    np.testing.assert_allclose(scores.get(), -np.sort(-everything)[:, :k], rtol=0, atol=1e-4)
    there = np.take_along_axis(everything, found.get(), axis=1)
    np.testing.assert_allclose(scores.get(), there, rtol=0, atol=1e-4)
    assert all(len({*row}) == k for row in found.tolist())


def test_largest_is_that_of_the_host() -> None:
    scores = np.random.default_rng(8).integers(-40, 40, (20, 2000)).astype("f4")
    scores[:, ::100] = np.nan
    for k in (1, 50, 2000):
        expected = _topk.largest(scores, k)
        got = _topk.largest(cupy.asarray(scores), k)
        for ours, theirs in zip(got, expected, strict=True):
            assert_bits_equal(ours.get(), theirs)


def test_topk_refuses_arrays_of_different_memory() -> None:
    tq = TurboQuant(head_dim=64, bits=3)
    x = np.ones((5, 64), np.float32)
    packed, norms = tq.encode(cupy.asarray(x))
    with pytest.raises(ValueError, match="query and packed must live in the same memory"):
        tq.topk(x, packed, norms, 2)
    with pytest.raises(ValueError, match="offsets and norms must live in the same memory"):
        tq.topk(cupy.asarray(x), packed, norms, 2, offsets=np.ones(5))
