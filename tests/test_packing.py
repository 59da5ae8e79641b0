"""The bit layout, against known bytes and an implementation with big integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_np.packing import pack, packed_size, unpack


def pack_as_integer(codes: list[int], bits: int) -> bytes:
    """The row is one number in base 2**bits, first code leading, shifted up to whole bytes."""
    number = 0
    for code in codes:
        number = number * 2**bits + code
    size = (len(codes) * bits + 7) // 8
    return (number << (8 * size - len(codes) * bits)).to_bytes(size, "big")


def code_lists(bits: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 2**bits - 1), max_size=70)


bits_and_codes = st.integers(1, 8).flatmap(lambda bits: st.tuples(st.just(bits), code_lists(bits)))


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], "8180"),
        (2, [0, 1, 2, 3], "1b"),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], "053977"),
        (3, [7], "e0"),
        (4, [1, 2], "12"),
        (4, [1, 2, 3], "1230"),
        (5, [31, 0, 31], "f83e"),
        (6, [63, 0, 1, 2], "fc0042"),
        (7, [64, 1], "8004"),
        (8, [0, 127, 255], "007fff"),
    ],
)
def test_known_bytes(bits: int, codes: list[int], packed: str) -> None:
    assert pack(codes, bits).tobytes().hex() == packed
    assert (
        unpack(np.frombuffer(bytes.fromhex(packed), np.uint8), bits, len(codes)).tolist() == codes
    )


@given(bits_and_codes)
def test_bytes_are_those_of_one_big_integer(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(np.array(codes, np.int64), bits)
    assert packed.tobytes() == pack_as_integer(codes, bits)
    assert packed.shape == (packed_size(len(codes), bits),)
    unpacked = unpack(packed, bits, len(codes))
    assert unpacked.dtype == np.uint8
    assert unpacked.tolist() == codes


@given(st.integers(1, 8), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 40))
def test_leading_axes_are_kept(bits: int, leading: list[int], d: int) -> None:
    codes = np.arange(int(np.prod([*leading, d]))).reshape(*leading, d) % 2**bits
    packed = pack(codes, bits)
    assert packed.shape == (*leading, packed_size(d, bits))
    assert packed.dtype == np.uint8
    assert (unpack(packed, bits, d) == codes).all()
    for index in np.ndindex(*leading):
        assert packed[index].tobytes() == pack_as_integer(codes[index].tolist(), bits)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint64"])
@pytest.mark.parametrize("bits", [1, 7, 8])
def test_integers_of_any_width(dtype: str, bits: int) -> None:
    codes = np.array([0, 1, 2 ** min(bits, 7) - 1], dtype)
    assert pack(codes, bits).tobytes() == pack_as_integer(codes.tolist(), bits)


def test_non_contiguous_input() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert (pack(codes.T, 4) == pack(codes.T.copy(), 4)).all()
    assert (unpack(pack(codes, 4)[::-1], 4, 4) == codes[::-1]).all()


def test_bits_behind_the_last_code_are_ignored_in_reading() -> None:
    assert unpack(np.array([0b101_11111], np.uint8), 3, 1).tolist() == [5]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_out_of_range_are_named(bits: int) -> None:
    codes = np.zeros((3, 4), np.int64)
    codes[2, 1] = 2**bits
    with pytest.raises(
        ValueError, match=rf"code {2**bits} at index \(2, 1\) does not fit {bits} b"
    ):
        pack(codes, bits)
    codes[1, 3] = -1
    with pytest.raises(ValueError, match=r"code -1 at index \(1, 3\)"):
        pack(codes, bits)


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros(4, bool), np.zeros(4, complex), ["a"]])
def test_codes_must_be_integers(wrong: Any) -> None:
    with pytest.raises(TypeError, match="codes must be integers"):
        pack(wrong, 4)


def test_shapes_and_dtypes_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one axis"):
        pack(np.int64(3), 4)
    with pytest.raises(TypeError, match="must be uint8, got int64"):
        unpack(np.zeros(4, np.int64), 4, 8)
    with pytest.raises(ValueError, match=r"8 codes of 3 bits take 3 bytes, got shape \(2, 4\)"):
        unpack(np.zeros((2, 4), np.uint8), 3, 8)
    with pytest.raises(ValueError, match="got shape"):
        unpack(np.uint8(3), 8, 1)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="Supported bit-widths"):
            pack([0], bits)
    with pytest.raises(ValueError, match="must not be negative"):
        packed_size(-1, 4)


def test_packed_size_rounds_up() -> None:
    assert [packed_size(127, bits) for bits in range(1, 9)] == [16, 32, 48, 64, 80, 96, 112, 127]
    assert packed_size(0, 5) == 0
