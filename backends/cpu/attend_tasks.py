"""A whole call of attention as one kernel, which any number of threads run at once.

Its tasks, one after another: rows of the query are rotated, units of work leave partial results,
and these are merged and rotated back.  A thread claims the next task that nobody has begun; where
it needs the results of all tasks of the kind before, it waits for those that others still work on.
What has been claimed is being worked on, so that ends; threads may come late, or not at all.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

from .attend_call import CALL, Fields
from .attend_int8 import attend_head_int8
from .attend_rows import merge_rows, rotate_rows
from .attend_units import attend_head, attend_unit
from .kernels import Arguments, Plan
from .linger import emit_hire, emit_wait
from .simd import I32, I64, Simd, Value

PATIENCE = 1000  # looks at what others have done, before the CPU is offered to them each time


class Tasks:
    """Claiming tasks of a call, and waiting for those of others."""

    def __init__(self, s: Simd, call: Fields) -> None:
        self.s = s
        self.claimed, self.finished = (
            s.b.inttoptr(call.place(name), ir.PointerType()) for name in ("claimed", "finished")
        )
        self._current = cgutils.alloca_once(s.b, I64)

    @property
    def current(self) -> Value:
        """Number of the task that was claimed last, or beyond the last one."""
        return self.s.b.load(self._current)

    def claim(self) -> None:
        """Make the next task that nobody has begun the current one."""
        b, one = self.s.b, self.s.int64(1)
        b.store(b.atomic_rmw("add", self.claimed, one, "monotonic"), self._current)

    def finish(self) -> None:
        """Show others what was done."""
        self.s.b.atomic_rmw("add", self.finished, self.s.int64(1), "release")

    def wait_for(self, count: Value) -> None:
        """Until `count` tasks are finished."""
        s, b = self.s, self.s.b
        looks = cgutils.alloca_once(b, I64)
        b.store(s.int64(0), looks)
        look, wait, go_on = (b.append_basic_block(name) for name in ("look", "wait", "go_on"))
        b.branch(look)
        b.position_at_end(look)
        done = b.load_atomic(self.finished, "acquire", 8, typ=I64)
        b.cbranch(b.icmp_signed(">=", done, count), go_on, wait)
        b.position_at_end(wait)
        s.pause()
        b.store(s.at(b.load(looks), 1), looks)
        if llvm.address_of_symbol("sched_yield"):
            with b.if_then(b.icmp_signed(">", b.load(looks), s.int64(PATIENCE)), likely=False):
                s.call("sched_yield", I32)
        b.branch(look)
        b.position_at_end(go_on)


def emit_attend(s: Simd, plan: Plan, a: Arguments) -> None:
    """Do tasks of the call at a.source until all are claimed, and if a.parameter is 1, finished.

    First, a.scales of the threads that wait at a.rows boxes from a.target on are hired.  In the
    end this thread waits at the box a.exponents, if that isn't 0.

    a.tables holds the tables of the keys, a.signs those of the values.
    """
    b, call = s.b, Fields(s, a.source, CALL)
    emit_hire(s, a.target, a.rows, a.scales)
    units_from = call["rotations"]
    merges_from = b.add(units_from, call["units"])
    every_task = b.add(merges_from, call["merges"])
    tasks = Tasks(s, call)
    check, begin, end = (b.append_basic_block(name) for name in ("check", "begin", "end"))
    tasks.claim()
    b.branch(check)
    b.position_at_end(check)
    number = tasks.current
    b.cbranch(b.icmp_signed("<", number, every_task), begin, end)

    b.position_at_end(begin)
    with b.if_else(b.icmp_signed("<", number, units_from)) as (first, later):
        with first:
            rotate_rows(s, plan, a, call, number)
            tasks.claim()
        with later, b.if_else(b.icmp_signed("<", number, merges_from)) as (second, third):
            with second:
                tasks.wait_for(units_from)

                def next_unit() -> Value:
                    """The unit that this thread does next, or the same again."""
                    tasks.claim()
                    here = b.icmp_signed("<", tasks.current, merges_from)
                    return b.sub(b.select(here, tasks.current, number), units_from)

                head = attend_head_int8 if plan.kind == "attend_int8" else attend_head
                attend_unit(s, plan, a, call, b.sub(number, units_from), next_unit, head)
            with third:
                tasks.wait_for(merges_from)
                merge_rows(s, plan, a, call, b.sub(number, merges_from))
                tasks.claim()
    tasks.finish()
    b.branch(check)

    b.position_at_end(end)
    with b.if_then(b.icmp_signed("!=", a.parameter, s.int64(0))):
        tasks.wait_for(every_task)
    with b.if_then(b.icmp_signed("!=", a.exponents, s.int64(0))):
        emit_wait(s, a.exponents)
