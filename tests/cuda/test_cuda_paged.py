"""`encode_paged` on a GPU equals the reference, byte for byte, and writes nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.paged import encode_paged
from turboquant_np.testing import assert_bits_equal

cupy: Any = pytest.importorskip("cupy")

BLOCKS, BLOCK_SIZE = 9, 16


def caches(specs: list[TurboQuant], heads: int, seed: int) -> list[Any]:
    """Random bytes, so that a stray write shows."""
    rng = np.random.default_rng(seed)
    arrays = []
    for tq in specs:
        shape = (BLOCKS, BLOCK_SIZE, heads, tq.packed_dim)
        arrays.append(rng.integers(0, 256, shape, dtype=np.uint8))
        arrays.append(rng.standard_normal(shape[:3]).astype(np.float32))
    return arrays


def named(arrays: list[Any]) -> dict[str, Any]:
    return dict(zip(("k_packed", "k_norms", "v_packed", "v_norms"), arrays, strict=True))


def check_equal(
    key: dict[str, Any],
    value: dict[str, Any],
    heads: int = 3,
    dtype: Any = np.float16,
    slot_dtype: Any = np.int64,
) -> None:
    rng = np.random.default_rng(heads)
    specs = [TurboQuant(**key), TurboQuant(**value)]
    expected = [TurboQuant(**s, backend="reference") for s in (key, value)]
    n = 77
    slots = rng.permutation(BLOCKS * BLOCK_SIZE)[:n].astype(slot_dtype)
    slots[rng.integers(0, n, 9)] = -1
    keys, values = (rng.standard_normal((n, heads, s.head_dim)).astype(dtype) for s in specs)
    host = caches(specs, heads, 1)
    device = [cupy.asarray(a) for a in host]
    encode_paged(
        keys,
        values,
        **named(host),
        slot_mapping=slots,
        key_quantizer=expected[0],
        value_quantizer=expected[1],
    )
    encode_paged(
        cupy.asarray(keys),
        cupy.asarray(values),
        **named(device),
        slot_mapping=cupy.asarray(slots),
        key_quantizer=specs[0],
        value_quantizer=specs[1],
    )
    for got, want in zip(device, host, strict=True):
        assert_bits_equal(got.get(), want)


@pytest.mark.parametrize("bits", [(4, 4), (4, 2), (3, 8), (1, 7), (5, 6)])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_one_launch_for_keys_and_values(bits: tuple[int, int], d: int) -> None:
    k, v = ({"head_dim": d, "bits": b, "seed": b} for b in bits)
    check_equal(k | {"scale": "unbiased"}, v | {"scale": "mse"}, slot_dtype=np.int32)
    check_equal(k, v, heads=8, dtype=np.float32)


def test_other_kinds() -> None:
    check_equal({"head_dim": 128, "bits": 4}, {"head_dim": 64, "bits": 4})
    check_equal({"head_dim": 100, "bits": 3}, {"head_dim": 128, "bits": 4}, heads=1)
    check_equal({"head_dim": 64, "bits": 3, "rotation": "haar"}, {"head_dim": 64, "bits": 4})
    rounds = {"head_dim": 128, "bits": 4, "hadamard_rounds": 1}
    check_equal(rounds, {"head_dim": 128, "bits": 4, "hadamard_rounds": 5})


def test_strided_caches_and_vectors() -> None:
    tq = TurboQuant(head_dim=128, bits=4)
    rng = np.random.default_rng(0)
    fused = cupy.asarray(
        rng.standard_normal((20, 12, 128)).astype(np.float16)
    )  # queries, keys, values
    keys, values = fused[:, 8:10], fused[:, 10:]
    slots = cupy.asarray(rng.permutation(BLOCKS * BLOCK_SIZE)[:20])
    plain = [cupy.zeros_like(cupy.asarray(a)) for a in caches([tq, tq], 2, 0)]
    encode_paged(keys, values, **named(plain), slot_mapping=slots, key_quantizer=tq)
    # heads first in memory, keys and values interleaved, rows padded to an odd number of bytes
    both = cupy.zeros((2, BLOCKS, 2, BLOCK_SIZE, 67), np.uint8)
    norms = cupy.zeros((2, BLOCKS, BLOCK_SIZE, 2, 3), np.float32)
    strided = []
    for i in range(2):
        strided += [both[:, :, i, :, :64].transpose(1, 2, 0, 3), norms[i, ..., 1]]
    encode_paged(keys, values, **named(strided), slot_mapping=slots, key_quantizer=tq)
    for got, want in zip(strided, plain, strict=True):
        assert (got == want).all()
    assert not both[..., 64:].any()
    assert not norms[..., ::2].any()


def test_slots_outside_of_the_cache() -> None:
    tq = TurboQuant(head_dim=64, bits=4)
    k = cupy.ones((3, 1, 64), np.float16)
    arrays = [cupy.zeros_like(cupy.asarray(a)) for a in caches([tq, tq], 1, 0)]
    for wrong in (-2, BLOCKS * BLOCK_SIZE, 2**31 - 1):
        slots = cupy.array([0, wrong, 1], np.int32)
        with pytest.raises(ValueError, match=r"slot_mapping\[1\]"):
            encode_paged(k, k, **named(arrays), slot_mapping=slots, key_quantizer=tq)
        encode_paged(k, k, **named(arrays), slot_mapping=slots, key_quantizer=tq, check=False)
    assert int((arrays[1] != 0).sum()) == 2
    with pytest.raises(ValueError, match="to slot 4"):
        encode_paged(k, k, **named(arrays), slot_mapping=cupy.array([4, 1, 4]), key_quantizer=tq)
    with pytest.raises(ValueError, match="same memory"):
        encode_paged(k, k, **named(arrays), slot_mapping=np.array([4, 1, 5]), key_quantizer=tq)
    k[2, 0, 5] = np.nan
    with pytest.raises(ValueError, match="nan"):
        encode_paged(k, k, **named(arrays), slot_mapping=cupy.array([4, 1, 5]), key_quantizer=tq)
