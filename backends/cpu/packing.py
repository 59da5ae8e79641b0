"""Codes between registers and the packed bit stream, 4 registers at a time.

Packing merges neighbours: two codes into a 16-bit lane, two of those into 32 bits, then 64, until
the field is a whole number of bytes; its bytes are then put in big-endian order, because the first
code has the high bits.  Unpacking gives each lane the two bytes its code may lie in, and shifts.
"""

from __future__ import annotations

from .simd import I8, I16, I32, I64, Offset, Register, Simd, Value, vector

GROUP = 4  # registers packed together: their bytes fill a register


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def store_codes(
    s: Simd, codes: list[Register], bits: int, address: Value, offset: Offset, count: int
) -> None:
    """Pack the first `count` codes of up to GROUP registers; zero bits fill the last byte.

    Lanes behind the last code must be zero.
    """
    zero = s.const_i(0)
    stream = _pack(s, codes + [zero] * (GROUP - len(codes)), bits)
    s.store(s.resize(stream, packed_bytes(count, bits)), address, offset)


def _pack(s: Simd, codes: list[Register], bits: int) -> Register:
    """GROUP registers of codes -> their bytes in order."""
    return _join_fields(s, _bytes_in_order(s, codes), bits)


def pack_words(s: Simd, words: Register, field: int) -> Register:
    """Words with a field of `field` bits each (low, garbage above) -> their bytes in order."""
    if field % 8:
        words = s.b.and_(words, s.const_i((1 << field) - 1))
    return _join_fields(s, words, field)


def _join_fields(s: Simd, stream: Register, field: int) -> Register:
    """Lanes with a field in their low bits -> the fields, big-endian, in bytes."""
    b, size = s.b, stream.type.element.width
    while field % 8:
        wide = vector({8: I16, 16: I32, 32: I64}[size], stream.type.count // 2)
        pair = b.bitcast(stream, wide)
        low = s.const_i((1 << size) - 1, wide.element, wide.count)
        by = s.const_i(field, wide.element, wide.count)
        across = s.const_i(size, wide.element, wide.count)
        stream = b.or_(b.shl(b.and_(pair, low), by), b.lshr(pair, across))
        field, size = 2 * field, 2 * size
    if field == 8:
        return stream if size == 8 else b.trunc(stream, vector(I8, stream.type.count))
    lanes, per_lane, used = stream.type.count, size // 8, field // 8
    order = [lane * per_lane + used - 1 - i for lane in range(lanes) for i in range(used)]
    return s.shuffle(b.bitcast(stream, vector(I8, lanes * per_lane)), None, order)


def _bytes_in_order(s: Simd, codes: list[Register]) -> Register:
    """The low bytes of GROUP registers, one after the other: a transposition of bytes."""
    b, quarter = s.b, s.width // 4
    mixed = codes[0]
    for k in range(1, GROUP):
        mixed = b.or_(mixed, b.shl(codes[k], s.const_i(8 * k)))
    # byte k of lane l is code l of register k; first within 16-byte parts, then across them
    within = [16 * g + 4 * i + k for g in range(quarter) for k in range(4) for i in range(4)]
    parts = s.shuffle(b.bitcast(mixed, vector(I8, 4 * s.width)), None, within)
    across = [4 * g + k for k in range(4) for g in range(quarter)]
    words = s.shuffle(b.bitcast(parts, s.ints), None, across)
    return b.bitcast(words, vector(I8, 4 * s.width))


def load_codes(s: Simd, bits: int, address: Value, offset: Offset, count: int) -> list[Register]:
    """Unpack `count` codes (at most GROUP registers of them); upper bits of lanes are garbage.

    Reads nothing beyond their bytes.
    """
    b, width = s.b, s.width
    stream = s.load(vector(I8, packed_bytes(count, bits)), address, offset)
    stream = s.resize(stream, packed_bytes(GROUP * width, bits))
    last = stream.type.count - 1
    registers = []
    for k in range(-(-count // width)):
        position = [(k * width + lane) * bits for lane in range(width)]
        first = [p // 8 for p in position]
        order = [byte for f in first for byte in (min(f + 1, last), f, f, f)]
        window = b.bitcast(s.shuffle(stream, None, order), s.ints)
        shift = s.const_i([16 - bits - p % 8 for p in position])
        registers.append(b.lshr(window, shift))
    return registers


def load_words(
    s: Simd, codes_per_word: int, bits: int, address: Value, offset: Offset, words: int
) -> Register:
    """A lane for each of up to `width` words of codes, the last code in the lowest bits; what is
    above the codes is garbage.
    """
    field = codes_per_word * bits
    stream = s.load(vector(I8, packed_bytes(words * field, 1)), address, offset)
    ends = [min(lane + 1, words) * field for lane in range(s.width)]
    order = [max(0, (end - 1) // 8 - byte) for end in ends for byte in range(4)]
    register = s.b.bitcast(s.shuffle(stream, None, order), s.ints)
    shift = [-end % 8 for end in ends]
    return s.b.lshr(register, s.const_i(shift)) if any(shift) else register
