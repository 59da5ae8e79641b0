"""Bringing the next tile's packed vectors nearer while this one is worked on.

The heads of a token lie side by side, and tokens of a page follow each other.  Each quarter of a
tile is gone through in that order, the quarters in turn, evenly over the time a tile takes.  If
each head asked for its own vectors of all tokens instead, addresses would be a power of two apart,
which costs some processors half the speed of memory.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .attend_call import CALL, CURSOR, OFFSETS, SIDES, Fields
from .simd import I1, I64, Simd, Value
from .tile import TILE

QUARTER = 8 * TILE // 4  # bytes of offsets


def fetch_level(cpu: str) -> int:
    """The level of the cache to fetch into.

    Measured: the first is 3 to 8 % faster on a Zen 5, the second 5 % on an Emerald Rapids.
    """
    return 1 if cpu.startswith("znver") else 2


def begin_ahead(
    s: Simd, call: Fields, cursors: Value, offsets: Value, first_head: Value, heads: Value
) -> None:
    """Let the cursors stand at the first of `heads` heads of a tile.

    cursors : int64 [len(SIDES), len(CURSOR)]
    offsets : of the tile's tokens, counted from `first_head` on
    """
    for number, side in enumerate(SIDES):
        pitch = call[f"{side}_head"]
        slot = s.at(offsets, 8 * TILE * OFFSETS.index(f"{side}_codes"))
        fields = {
            "base": s.at(call[f"{side}_codes"], s.b.mul(first_head, pitch)),
            "end": s.b.mul(heads, pitch),
            "last": s.at(slot, QUARTER - 8),
            "slot": slot,
            "quarter": s.int64(0),
            "skip": s.int64(0),
        }
        cursor = Fields(s, s.at(cursors, 8 * len(CURSOR) * number), CURSOR)
        for name, value in fields.items():
            s.store(value, cursor.place(name))


class Ahead:
    """Fetches vectors of one side from where its cursor stands; `finish` leaves it there.

    size : bytes of a packed vector
    """

    def __init__(self, s: Simd, side: str, size: int, call_address: Value, cursors: Value) -> None:
        self.s, self.size = s, size
        self.pitch = Fields(s, call_address, CALL)[f"{side}_head"]
        address = s.at(cursors, 8 * len(CURSOR) * SIDES.index(side))
        self.cursor = Fields(s, address, CURSOR)
        self.base, self.end, self.last = (self.cursor[n] for n in ("base", "end", "last"))
        self.moving = {name: cgutils.alloca_once(s.b, I64) for name in ("slot", "quarter", "skip")}
        for name, cell in self.moving.items():
            s.b.store(self.cursor[name], cell)

    def step(self) -> None:
        """Ask for the next vector; at the end, for those of the last tokens again."""
        s, b = self.s, self.s.b
        quarter = b.load(self.moving["quarter"])
        self._fetch(quarter)
        quarter = b.and_(s.at(quarter, QUARTER), s.int64(4 * QUARTER - 1))
        b.store(quarter, self.moving["quarter"])
        self._advance(b.icmp_signed("==", quarter, s.int64(0)))

    def step_in_each_quarter(self) -> None:
        """What four steps do, in fewer instructions."""
        for quarter in range(4):
            self._fetch(self.s.int64(QUARTER * quarter))
        self._advance(ir.Constant(I1, 1))

    def _fetch(self, quarter: Value) -> None:
        s, b = self.s, self.s.b
        offset = s.load(I64, b.load(self.moving["slot"]), quarter)
        place = s.at(s.at(self.base, offset), b.load(self.moving["skip"]))
        s.prefetch(place, self.size, level=fetch_level(s.target.cpu))

    def _advance(self, ready: Value) -> None:
        """To the next head, and from the last one to the next token, if `ready`."""
        s, b = self.s, self.s.b
        slot, skip = (self.moving[name] for name in ("slot", "skip"))
        following = b.select(ready, s.at(b.load(skip), self.pitch), b.load(skip))
        turned = b.icmp_signed("==", following, self.end)
        b.store(b.select(turned, s.int64(0), following), skip)
        more = b.and_(turned, b.icmp_unsigned("<", b.load(slot), self.last))
        b.store(s.at(b.load(slot), s.times(b.zext(more, I64), 8)), slot)

    def finish(self) -> None:
        """Remember the place for whoever goes on."""
        for name, cell in self.moving.items():
            self.s.store(self.s.b.load(cell), self.cursor.place(name))
