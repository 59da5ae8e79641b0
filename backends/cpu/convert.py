"""Element types on their way in and out of float32 registers.

float16 comes in exactly and goes out rounded to nearest even, by the CPU's instructions where it
has them and else by integer arithmetic; bfloat16 is the upper half of float32.
"""

from __future__ import annotations

from .simd import CACHE_LINE, F32, F64, HALF, I16, Offset, Register, Simd, Value, vector

ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_STORED = {"float16": I16, "bfloat16": I16, "float32": F32, "float64": F64}


def load_floats(s: Simd, dtype: str, address: Value, offset: Offset, count: int) -> Register:
    """`count` elements as float32, the other lanes 0; reads nothing beyond them."""
    raw = s.resize(s.load(vector(_STORED[dtype], count), address, offset), s.width)
    if dtype == "float32":
        return raw
    if dtype == "float64":
        return s.b.fptrunc(raw, s.floats)
    if dtype == "bfloat16":
        return s.as_floats(s.b.shl(s.b.zext(raw, s.ints), s.const_i(16)))
    if s.target.has_half:
        return s.b.fpext(s.b.bitcast(raw, vector(HALF, s.width)), s.floats)
    return _half_to_float(s, s.b.zext(raw, s.ints))


def store_floats(
    s: Simd,
    dtype: str,
    value: Register,
    address: Value,
    offset: Offset,
    count: int,
    *,
    streams: bool = False,
) -> None:
    """The first `count` lanes, converted; writes nothing beyond them.

    streams : whether they go past the caches; then all lanes, and rows begin at cache lines
    """
    if dtype == "float64":
        value = s.b.fpext(value, vector(F64, s.width))
    elif dtype == "bfloat16":
        value = s.b.trunc(_float_to_bfloat(s, value), vector(I16, s.width))
    elif dtype == "float16":
        if s.target.has_half:
            value = s.b.fptrunc(value, vector(HALF, s.width))
        else:
            value = s.b.trunc(_float_to_half(s, value), vector(I16, s.width))
    if streams:
        s.stream(value, address, offset, min(CACHE_LINE, ITEM_SIZE[dtype] * s.width))
    else:
        s.store(s.resize(value, count), address, offset)


def _half_to_float(s: Simd, half: Register) -> Register:
    """Shift the fields into place and let a multiplication by 2**112 mend the exponent, which is
    exact and turns subnormal halves into normal floats."""
    b = s.b
    magnitude = b.and_(half, s.const_i(0x7FFF))
    scaled = b.fmul(s.as_floats(b.shl(magnitude, s.const_i(13))), s.const_f(2.0**112))
    not_finite = b.icmp_signed(">", magnitude, s.const_i(0x7BFF))
    bits = b.or_(s.as_ints(scaled), b.select(not_finite, s.const_i(0x7F800000), s.const_i(0)))
    return s.as_floats(b.or_(bits, b.shl(b.and_(half, s.const_i(0x8000)), s.const_i(16))))


def _float_to_half(s: Simd, value: Register) -> Register:
    """Round to nearest even on the integers; below 2**-14 a float addition does the rounding."""
    b = s.b
    bits = s.as_ints(value)
    sign = b.lshr(b.and_(bits, s.const_i(-(2**31))), s.const_i(16))
    magnitude = b.and_(bits, s.const_i(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, s.const_i(13)), s.const_i(1))
    rounded = b.add(b.add(magnitude, s.const_i(0xFFF - (112 << 23))), odd)
    normal = b.lshr(rounded, s.const_i(13))
    # 0.5 has the unit 2**-24 in its last place, which is the unit of subnormal halves
    tiny = b.fadd(s.as_floats(magnitude), s.const_f(0.5))
    subnormal = b.sub(s.as_ints(tiny), s.const_i(0x3F000000))
    small = b.icmp_signed("<", magnitude, s.const_i(113 << 23))
    result = b.select(small, subnormal, normal)
    large = b.icmp_signed(">=", magnitude, s.const_i(0x477FF000))  # 65520 rounds to infinity
    result = b.select(large, s.const_i(0x7C00), result)
    nan = b.icmp_signed(">", magnitude, s.const_i(0x7F800000))
    payload = b.or_(b.and_(b.lshr(magnitude, s.const_i(13)), s.const_i(0x3FF)), s.const_i(0x7E00))
    return b.or_(b.select(nan, payload, result), sign)


def _float_to_bfloat(s: Simd, value: Register) -> Register:
    """Round to nearest even on the integers; NaN keeps its sign and loses its payload."""
    b = s.b
    bits = s.as_ints(value)
    odd = b.and_(b.lshr(bits, s.const_i(16)), s.const_i(1))
    rounded = b.lshr(b.add(b.add(bits, s.const_i(0x7FFF)), odd), s.const_i(16))
    nan = b.fcmp_unordered("uno", value, value)
    sign = b.lshr(b.and_(bits, s.const_i(-(2**31))), s.const_i(16))
    return b.select(nan, b.or_(sign, s.const_i(0x7FC0)), rounded)
