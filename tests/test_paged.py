"""`encode_paged` on host memory: encode, then scatter; and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.paged import encode_paged

BLOCKS, BLOCK_SIZE, HEADS, D = 3, 4, 2, 16


def cache(tq: TurboQuant) -> tuple[Any, Any]:
    """Packed codes and norms of a cache, with bytes that no encoding writes there by chance."""
    packed = np.full((BLOCKS, BLOCK_SIZE, HEADS, tq.packed_dim), 0xA5, np.uint8)
    return packed, np.full((BLOCKS, BLOCK_SIZE, HEADS), -1.0, np.float32)


def tokens(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((n, HEADS, D)).astype(np.float32)


@pytest.fixture
def arguments(backend: str) -> dict[str, Any]:
    k, v = TurboQuant(head_dim=D, bits=4, backend=backend), TurboQuant(head_dim=D, bits=3, seed=7)
    (k_packed, k_norms), (v_packed, v_norms) = cache(k), cache(v)
    return {
        "keys": tokens(4, 1),
        "values": tokens(4, 2),
        "k_packed": k_packed,
        "k_norms": k_norms,
        "v_packed": v_packed,
        "v_norms": v_norms,
        "slot_mapping": np.array([5, -1, 0, 11]),
        "key_quantizer": k,
        "value_quantizer": v,
    }


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_tokens_land_in_their_slots_and_nothing_else_changes(
    arguments: dict[str, Any], index_dtype: Any
) -> None:
    slots = arguments["slot_mapping"] = arguments["slot_mapping"].astype(index_dtype)
    encode_paged(**arguments)
    for name, tq, side in (("keys", "key_quantizer", "k"), ("values", "value_quantizer", "v")):
        codes, scales = arguments[tq].encode(arguments[name])
        packed, norms = cache(arguments[tq])
        for token, slot in enumerate(slots):
            if slot >= 0:
                packed[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = codes[token]
                norms[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = scales[token]
        np.testing.assert_array_equal(arguments[f"{side}_packed"], packed)
        np.testing.assert_array_equal(arguments[f"{side}_norms"], norms)


def test_caches_may_have_strides(arguments: dict[str, Any]) -> None:
    strided = dict(arguments)
    packed = np.zeros(
        (HEADS, BLOCKS, 2 * BLOCK_SIZE, 8), np.uint8
    )  # heads first, every other token
    strided["k_packed"] = packed.transpose(1, 2, 0, 3)[:, ::2]
    strided["k_norms"] = np.zeros((HEADS, BLOCKS, BLOCK_SIZE), np.float32).transpose(1, 2, 0)
    encode_paged(**strided)
    encode_paged(**arguments)
    for name in ("k_packed", "k_norms"):
        np.testing.assert_array_equal(strided[name][1, 1], arguments[name][1, 1])


def test_one_quantizer_serves_keys_and_values(arguments: dict[str, Any]) -> None:
    tq = arguments["key_quantizer"]
    arguments |= {"value_quantizer": None, "values": arguments["keys"]}
    arguments["v_packed"], arguments["v_norms"] = cache(tq)
    encode_paged(**arguments)
    np.testing.assert_array_equal(arguments["k_packed"], arguments["v_packed"])
    np.testing.assert_array_equal(arguments["k_norms"], arguments["v_norms"])


@pytest.mark.parametrize("slot", [-2, BLOCKS * BLOCK_SIZE])
def test_slots_outside_of_the_cache(arguments: dict[str, Any], slot: int) -> None:
    arguments["slot_mapping"][3] = slot
    with pytest.raises(ValueError, match=rf"slot_mapping\[3\] is {slot}; slots go from 0 to 11"):
        encode_paged(**arguments)
    assert (arguments["k_norms"] == -1).all()
    encode_paged(**arguments, check=False)
    assert (arguments["k_norms"] > 0).sum() == 2 * HEADS


def test_equal_slots(arguments: dict[str, Any]) -> None:
    arguments["slot_mapping"][3] = 5
    with pytest.raises(ValueError, match="sends tokens 0 and 3 to slot 5"):
        encode_paged(**arguments)


def test_tokens_may_be_skipped_together(arguments: dict[str, Any]) -> None:
    arguments["slot_mapping"][:] = -1
    encode_paged(**arguments)
    assert (arguments["k_norms"] == -1).all()


def test_values_that_are_not_finite(arguments: dict[str, Any]) -> None:
    arguments["keys"][1, 0, 3] = np.inf  # a skipped token
    encode_paged(**arguments)
    arguments["values"][2, 1, 3] = np.nan
    with pytest.raises(ValueError, match="nan"):
        encode_paged(**arguments)
    encode_paged(**arguments, check=False)
    assert np.isnan(arguments["v_norms"][0, 0]).tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("keys", np.zeros((4, D), np.float32), ValueError, "num_tokens, num_kv_heads, 16"),
        ("keys", np.zeros((4, HEADS, D + 1), np.float32), ValueError, "Expected last dim 16"),
        ("values", np.zeros((3, HEADS, D), np.float32), ValueError, "same tokens"),
        ("values", np.zeros((4, HEADS, D), np.float16), ValueError, "dtype"),
        ("keys", np.zeros((4, HEADS, D), np.int32), TypeError, "keys must be float16"),
        ("k_packed", np.zeros((3, 4, 2, 8), np.int8), TypeError, "k_packed must be uint8"),
        ("v_packed", np.zeros((3, 4, 2, 8), np.uint8), ValueError, "num_blocks, block_size, 2, 6"),
        ("k_packed", np.zeros((3, 4, 2, 16), np.uint8)[..., ::2], ValueError, "contiguous"),
        ("k_norms", np.zeros((3, 4, 2)), TypeError, "k_norms must be float32"),
        ("k_norms", np.zeros((3, 5, 2), np.float32), ValueError, "k_norms must have shape"),
        ("slot_mapping", np.zeros(4), TypeError, "int32 or int64"),
        ("slot_mapping", np.zeros(3, np.int64), ValueError, "one slot a token"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: dict[str, Any], name: str, value: Any, error: type[Exception], match: str
) -> None:
    arguments[name] = value
    with pytest.raises(error, match=match):
        encode_paged(**arguments)


def test_a_read_only_cache(arguments: dict[str, Any]) -> None:
    arguments["v_norms"].setflags(write=False)
    with pytest.raises(ValueError, match="v_norms is read-only"):
        encode_paged(**arguments)
