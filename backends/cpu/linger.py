"""Threads that look for more work for a moment before they leave a kernel.

Waking a sleeping thread takes the system tens of microseconds, on both sides.  A thread that has
just helped with a call looks into a box of its own for a while, inside the kernel, as it could not
come back from there before the GIL is free; the next caller hires it from inside its own kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .simd import CACHE_LINE, I64, Simd, Value

NOBODY, WAITS, HIRED = range(3)  # what a box says; HIRED means nothing where nobody waits
LOOKS = 8000  # some 400 microseconds
BOX = CACHE_LINE // 8  # int64: what it says; whether its thread was hired when it last waited


def boxes(count: int) -> Any:
    """int64 [count, BOX]"""
    return np.zeros((count, BOX), np.int64)


def emit_hire(s: Simd, first_box: Value, count: Value, wanted: Value) -> None:
    """Hire threads that wait at some of `count` boxes until there are `wanted` of them."""
    b = s.b
    left = cgutils.alloca_once(b, I64)
    b.store(wanted, left)
    with s.loop(count) as i, b.if_then(b.icmp_signed(">", b.load(left), s.int64(0))):
        before = _write(s, s.at(first_box, s.times(i, CACHE_LINE)), HIRED)
        hired = b.zext(b.icmp_signed("==", before, s.int64(WAITS)), I64)
        b.store(b.sub(b.load(left), hired), left)


def emit_wait(s: Simd, box: Value) -> None:
    """Wait at a box until hired, or for a while."""
    b = s.b
    looks = cgutils.alloca_once(b, I64)
    b.store(s.int64(0), looks)
    _write(s, box, WAITS)
    look, again, done = (b.append_basic_block(name) for name in ("look", "again", "done"))
    b.branch(look)
    b.position_at_end(look)
    says = b.load_atomic(b.inttoptr(box, ir.PointerType()), "monotonic", 8, typ=I64)
    hired = b.icmp_signed("==", says, s.int64(HIRED))
    tired = b.icmp_signed(">=", b.load(looks), s.int64(LOOKS))
    b.cbranch(b.or_(hired, tired), done, again)
    b.position_at_end(again)
    s.pause()
    b.store(s.at(b.load(looks), 1), looks)
    b.branch(look)
    b.position_at_end(done)
    hired = b.icmp_signed("==", _write(s, box, NOBODY), s.int64(HIRED))
    s.store(b.zext(hired, I64), box, 8)


def _write(s: Simd, box: Value, number: int) -> Value:
    """What a box said before."""
    pointer = s.b.inttoptr(box, ir.PointerType())
    return s.b.atomic_rmw("xchg", pointer, s.int64(number), "seq_cst")
