"""`TurboQuant` as its users see it, and caches written by the package it succeeds."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import TurboQuant, TurboQuantConfig
from turboquant_np.codebook import get_codebook
from turboquant_np.testing import assert_bits_equal


def gaussian(*shape: int) -> npt.NDArray[np.float32]:
    generator = np.random.Generator(np.random.PCG64([3, *shape]))
    return generator.standard_normal(shape, np.float32)


# -- what it says of itself ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [2, 96, 128])
def test_sizes(d: int, bits: int) -> None:
    tq = TurboQuant(head_dim=d, bits=bits)
    assert (tq.head_dim, tq.bits, tq.num_levels) == (d, bits, 2**bits)
    assert tq.packed_dim == math.ceil(d * bits / 8)
    assert tq.centroids.shape == (2**bits,)
    assert tq.boundaries_inner.shape == (2**bits - 1,)
    assert tq.rotation.shape == (d, d)
    assert tq.centroids.dtype == tq.boundaries_inner.dtype == tq.rotation.dtype == np.float32


def test_centroids_are_those_of_the_codebook() -> None:
    tq = TurboQuant(head_dim=128, bits=3)
    centroids, boundaries, mse = get_codebook(128, 3)
    np.testing.assert_allclose(tq.centroids, centroids, rtol=2e-7)
    np.testing.assert_allclose(tq.boundaries_inner, boundaries, rtol=2e-7)
    assert tq.mse_total == mse


def test_compression_ratios_of_aither_kvcache() -> None:
    ratios = [TurboQuant(head_dim=128, bits=bits).compression_ratio() for bits in (2, 3, 4)]
    assert ratios == pytest.approx([7.1111, 4.9231, 3.7647], abs=5e-5)
    ratios = [TurboQuant(head_dim=128, bits=bits).compression_ratio_vs_fp8() for bits in (2, 3, 4)]
    assert ratios == pytest.approx([3.5556, 2.4615, 1.8824], abs=5e-5)


def test_repr() -> None:
    tq = TurboQuant(head_dim=128, bits=4, rotation="haar", scale="mse")
    parts = "d=128, bits=4, compress=3.8x, mse=0.0093, rotation=haar, scale=mse, engine=auto"
    assert repr(tq) == f"TurboQuant({parts})"


def test_defaults_are_those_of_the_documentation() -> None:
    config = TurboQuant().config
    assert (config.head_dim, config.bits, config.seed, config.hadamard_rounds) == (128, 4, 42, 3)
    assert (config.rotation_kind, config.scale, config.backend) == ("hadamard", "norm", "auto")
    assert TurboQuant().dtype == np.float16
    assert TurboQuant().device == "auto"


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"use_hadamard": True}, "hadamard"),
        ({"use_hadamard": False}, "haar"),
        ({"rotation": "haar"}, "haar"),
        ({"rotation": np.eye(128)}, "matrix"),
    ],
)
def test_rotation_kinds(settings: dict[str, Any], kind: str) -> None:
    assert TurboQuantConfig(**settings).rotation_kind == kind


# -- encoding and decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3, 2)])
def test_shapes_and_dtypes(batch: tuple[int, ...], backend: str) -> None:
    tq = TurboQuant(head_dim=100, bits=5, backend=backend)
    packed, norms = tq.encode(gaussian(*batch, 100))
    assert (packed.shape, packed.dtype) == ((*batch, 63), np.uint8)
    assert (norms.shape, norms.dtype) == (batch, np.float32)
    decoded = tq.decode(packed, norms)
    assert (decoded.shape, decoded.dtype) == ((*batch, 100), np.float16)
    scores = tq.inner_products(gaussian(4, 100), packed, norms)
    assert (scores.shape, scores.dtype) == ((4, *batch), np.float32)


def test_the_dtype_setting_is_the_output_dtype(backend: str) -> None:
    tq = TurboQuant(head_dim=100, bits=5, backend=backend, dtype=np.float64)
    assert tq.decode(*tq.encode(gaussian(2, 100))).dtype == np.float64


def test_more_bits_less_error() -> None:
    x = gaussian(100, 128)
    errors = [
        np.linalg.norm(tq.decode(*tq.encode(x), dtype=np.float32) - x)
        for tq in (TurboQuant(head_dim=128, bits=b, backend="reference") for b in range(1, 9))
    ]
    assert all(b < 0.62 * a for a, b in pairwise(errors))
    assert errors[-1] < 0.007 * np.linalg.norm(x)


def test_settings_that_decide_bits_do() -> None:
    x = gaussian(20, 64)
    base: dict[str, Any] = {"head_dim": 64, "bits": 4, "seed": 1}
    changes: list[dict[str, Any]] = [
        {"seed": 2},
        {"hadamard_rounds": 2},
        {"rotation": "haar"},
        {"rotation": "haar", "seed": 2},
    ]
    packed = [TurboQuant(**base | change).encode(x)[0].tobytes() for change in [{}, *changes]]
    assert len(set(packed)) == len(packed)
    assert TurboQuant(**base).encode(x)[0].tobytes() == packed[0]
    assert TurboQuant(**base | {"seed": 1 + 2**32}).encode(x)[0].tobytes() == packed[0]


def test_scales_differ_only_in_what_is_stored() -> None:
    x = gaussian(20, 64)
    encoded = {
        scale: TurboQuant(head_dim=64, bits=2, scale=scale).encode(x)
        for scale in ("norm", "mse", "unbiased")
    }
    for packed, _ in encoded.values():
        assert_bits_equal(packed, encoded["norm"][0])
    # d / <z, c> is above 1, as centroids are shorter than vectors; <z, c> / <c, c> is about 1
    assert (encoded["unbiased"][1] > encoded["norm"][1]).all()
    assert (np.abs(encoded["mse"][1] / encoded["norm"][1] - 1) < 0.2).all()
    assert (encoded["mse"][1] != encoded["norm"][1]).all()


def test_inner_products_are_those_of_decoded_vectors(backend: str) -> None:
    x, query = gaussian(2, 9, 80), gaussian(3, 80)
    tq = TurboQuant(head_dim=80, bits=3, scale="unbiased", backend=backend)
    packed, norms = tq.encode(x)
    scores = tq.inner_products(query, packed, norms)
    decoded = tq.decode(packed, norms, dtype=np.float64)
    np.testing.assert_allclose(scores, np.einsum("md,hnd->mhn", query, decoded), atol=1e-4)
    out = np.empty((3, 2, 9), np.float32)
    assert tq.inner_products(query, packed, norms, out=out) is out
    assert_bits_equal(out, scores)


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
def test_quantisers_can_be_pickled(rotation: str) -> None:
    x = gaussian(5, 80)
    tq = TurboQuant(head_dim=80, bits=3, rotation=rotation, scale="mse")
    before = tq.encode(x)
    for copied in (pickle.loads(pickle.dumps(tq)), copy.deepcopy(tq)):
        assert copied.config.bits == 3
        for ours, expected in zip(copied.encode(x), before, strict=True):
            assert_bits_equal(ours, expected)


def test_a_quantiser_may_be_used_by_many_threads(backend: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tq = TurboQuant(head_dim=96, bits=3, backend=backend)
    batches = [gaussian(200, n + 1, 96) for n in range(8)]
    expected = [tq.encode(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for (packed, norms), (p, n) in zip(pool.map(tq.encode, batches), expected, strict=True):
            assert_bits_equal(packed, p)
            assert_bits_equal(norms, n)


# -- self-tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4])
def test_validate_agrees_with_theory(bits: int, backend: str) -> None:
    result = TurboQuant(head_dim=64, bits=bits, backend=backend).validate(2000)
    assert abs(result["mse"] - result["mse_expected"]) < 6 * result["mse_standard_error"]
    assert result["ip_slope"] == pytest.approx(1 - result["mse_expected"], abs=0.02)
    assert abs(result["ip_bias"]) < 6 * math.sqrt(result["ip_mse"] / 2000)
    assert result["mse_theory_lower"] < result["mse"] < result["mse_theory_upper"]
    assert result["mse_ratio_to_lower"] == result["mse"] * 4**bits
    assert result["backend"] == backend
    assert result["triton_active"] is False


def test_validate_is_repeatable() -> None:
    tq = TurboQuant(head_dim=64, bits=2)
    assert tq.validate(100, seed=5) == tq.validate(100, seed=5)
    assert tq.validate(100, seed=5)["mse"] != tq.validate(100, seed=6)["mse"]
    with pytest.raises(ValueError, match="num_vectors must be at least 2, got 1"):
        tq.validate(1)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        tq.validate(10, device="tpu")


def test_benchmark_reports_times(backend: str) -> None:
    tq = TurboQuant(head_dim=64, bits=2, backend=backend)
    result = tq.benchmark(num_vectors=100, warmup=1, iters=3)
    assert result["encode_throughput_mvec_s"] == pytest.approx(100 / result["encode_us"])
    assert result["decode_throughput_mvec_s"] == pytest.approx(100 / result["decode_us"])
    assert (result["backend"], result["device"], result["num_vectors"]) == (backend, "cpu", 100)
    with pytest.raises(ValueError, match="must be positive, got 100 and 0"):
        tq.benchmark(num_vectors=100, iters=0)


# -- caches of aither-kvcache 0.1 ------------------------------------------------------------------

# Its codebooks are those of Lloyd and Max with errors up to 7e-4.
AITHER_CENTROIDS = {
    2: [0.452781, 1.510469],
    3: [0.245104, 0.756031, 1.344134, 2.152090],
    4: [0.128350, 0.388089, 0.656804, 0.942391, 1.256233, 1.618002, 2.069016, 2.733266],
}


def aither_encode(x: npt.NDArray[np.float32], bits: int, seed: int) -> tuple[Any, Any]:
    """What its TurboQuant(head_dim=d, bits=bits, seed=seed, use_hadamard=True) stores."""
    d = x.shape[1]
    rotation: Any = np.eye(d, dtype=np.float32)
    sylvester: Any = np.ones((1, 1), np.float32)
    while len(sylvester) < d:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    for r in range(3):
        raw = np.random.RandomState(seed + r).randint(0, 2**32, d, np.uint32)
        signs = (2.0 * (raw % 2) - 1).astype(np.float32)
        rotation = (sylvester / np.float32(math.sqrt(d)) * signs) @ rotation
    norms = np.sqrt((x * x).sum(axis=1, dtype=np.float32))
    y = (x / (norms[:, None] + np.float32(1e-10))) @ rotation.T
    positive = np.array(AITHER_CENTROIDS[bits]) / math.sqrt(d)
    centroids = np.concatenate([-positive[::-1], positive])
    boundaries = ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32)
    codes = np.searchsorted(boundaries, y)
    digits = (codes[..., None] >> np.arange(bits)[::-1]) & 1  # first code in the high bits
    return np.packbits(digits.reshape(len(x), -1).astype(bool), axis=1), norms


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_its_caches_decode_here(bits: int, backend: str) -> None:
    x = gaussian(2000, 128)
    tq = TurboQuant(head_dim=128, bits=bits, seed=42, use_hadamard=True, backend=backend)
    theirs, ours = aither_encode(x, bits, seed=42), tq.encode(x)
    errors = [
        float(((tq.decode(*encoded, dtype=np.float32) - x) ** 2).sum() / (x**2).sum())
        for encoded in (theirs, ours)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)
    np.testing.assert_allclose(theirs[1], ours[1], rtol=1e-6)
    assert (theirs[0] == ours[0]).mean() > 0.998
