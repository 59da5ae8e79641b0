"""Where a tile's tokens lie in pages: their byte offsets, once for all heads, and their norms."""

from __future__ import annotations

from numba.core import cgutils

from .attend_call import CALL, OFFSETS, Fields
from .simd import CACHE_LINE, F32, I64, Simd, Value
from .tile import TILE, Address


def locate(s: Simd, call: Fields, unit: Fields, first: Value, heads: Value, offsets: Value) -> None:
    """Byte offsets of TILE tokens from `first` on; behind the last token, the last one again.

    heads : offsets are those of a head so much further on

    The norms there, of the first heads at least, are fetched into the cache: they are few.
    """
    b = s.b
    block_size, final = call["block_size"], b.sub(unit["stop"], s.int64(1))
    start = b.select(b.icmp_signed("<", first, final), first, final)
    strides = [_strides_of(name) for name in OFFSETS]
    by_block = [call[f"{stride}_block"] for stride in strides]
    by_token = [call[f"{stride}_token"] for stride in strides]
    skips = [b.mul(heads, call[f"{stride}_head"]) for stride in strides]
    table = s.at(call["blocks"], b.mul(unit["seq"], call["blocks_pitch"]))
    page, slot = cgutils.alloca_once(b, I64), cgutils.alloca_once(b, I64)
    b.store(b.udiv(start, block_size), page)
    b.store(b.urem(start, block_size), slot)
    with s.loop(TILE) as j:
        block = s.load(I64, table, s.times(b.load(page), 8))
        for i, name in enumerate(OFFSETS):
            offset = b.add(b.mul(block, by_block[i]), b.mul(b.load(slot), by_token[i]))
            offset = b.add(offset, skips[i])
            s.store(offset, offsets, s.at(s.times(j, 8), 8 * TILE * i))
            if name.endswith("norms"):
                s.prefetch(s.at(call[name], offset), CACHE_LINE)
        more = b.zext(b.icmp_signed("<", b.add(first, j), final), I64)
        following = b.add(b.load(slot), more)
        turned = b.icmp_signed("==", following, block_size)
        b.store(b.select(turned, s.int64(0), following), slot)
        b.store(b.add(b.load(page), b.zext(turned, I64)), page)


def places_of(s: Simd, name: str, call_address: Value, head: Value, offsets: Value) -> Address:
    """Where one head of a tile's tokens lies in an array."""
    call = Fields(s, call_address, CALL)
    base = s.at(call[name], s.b.mul(head, call[f"{_strides_of(name)}_head"]))
    column = 8 * TILE * OFFSETS.index(name)
    return lambda token: s.at(base, s.load(I64, offsets, s.at(s.times(token, 8), column)))


def _strides_of(name: str) -> str:
    """What the strides of an array are called after: "key_codes" has "key_head"."""
    return name.replace("_codes", "").replace("_norms", "_norm")


def gather_norms(s: Simd, call_address: Value, head: Value, here: Value, norms: Value) -> None:
    """Norms of the tile's tokens side by side: [2 (keys, values), TILE]."""
    places = [places_of(s, f"{side}_norms", call_address, head, here) for side in ("key", "value")]
    with s.loop(TILE) as token:
        for i, place in enumerate(places):
            s.store(s.load(F32, place(token)), norms, s.at(s.times(token, 4), 4 * TILE * i))
