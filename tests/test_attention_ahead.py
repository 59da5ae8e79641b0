"""Fetching the next tile ahead: every vector is asked for once, wherever the cursor is taken up."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numba import njit, types
from numba.extending import intrinsic

ahead, call, simd, tile = (
    import_module(f"turboquant_np.backends.cpu.{name}")
    for name in ("ahead", "attend_call", "simd", "tile")
)
Simd: Any = simd.Simd
SIZE, HEAD = 64, 80  # bytes of a vector, and from head to head


@pytest.mark.parametrize(("cpu", "level"), [("znver5", 1), ("emeraldrapids", 2), ("haswell", 2)])
def test_level_to_fetch_into(cpu: str, level: int) -> None:
    assert ahead.fetch_level(cpu) == level


class Recorder(Simd):  # type: ignore[misc]
    """Writes down addresses instead of fetching them: their number, then each."""

    log: Any = None

    def prefetch(self, address: Any, size: int, *, level: int = 1, write: bool = False) -> None:
        assert size == SIZE
        count = self.at(self.load(simd.I64, self.log), 1)
        self.store(count, self.log)
        self.store(address, self.at(self.log, self.times(count, 8)))


def visit(in_each_quarter: bool) -> Any:
    """A function that takes up a cursor for each head, as kernels do."""

    @intrinsic
    def body(context, fields, cursors, offsets, first, heads, log):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            fields, cursors, offsets, first, heads, log = arguments
            s = Recorder(builder, simd.target())
            s.log = log
            view = call.Fields(s, fields, call.CALL)
            ahead.begin_ahead(s, view, cursors, offsets, first, heads)
            with s.loop(heads):
                coming = ahead.Ahead(s, "value", SIZE, fields, cursors)
                with s.loop(tile.TILE // 4 if in_each_quarter else tile.TILE):
                    coming.step_in_each_quarter() if in_each_quarter else coming.step()
                coming.finish()
            return heads

        return types.int64(*[types.int64] * 6), codegen

    @njit
    def run(fields, cursors, offsets, first, heads, log):  # type: ignore[no-untyped-def]
        return body(fields, cursors, offsets, first, heads, log)

    return run


@pytest.mark.parametrize("in_each_quarter", [False, True])
def test_every_vector_is_asked_for_once(in_each_quarter: bool) -> None:
    run, rng = visit(in_each_quarter), np.random.default_rng(3)
    for first, heads in ((0, 8), (2, 3), (5, 1)):
        fields = np.zeros(len(call.CALL), np.int64)
        fields[call.CALL.index("value_codes")] = 10**9
        fields[call.CALL.index("value_head")] = HEAD
        offsets = np.zeros((len(call.OFFSETS), tile.TILE), np.int64)
        tokens = offsets[call.OFFSETS.index("value_codes")]
        tokens[:] = rng.permutation(1000)[: tile.TILE] * 1024
        cursors = np.zeros(call.CURSORS_BYTES // 8, np.int64)
        log = np.zeros(1 + tile.TILE * heads, np.int64)
        run(*(a.ctypes.data for a in (fields, cursors, offsets)), first, heads, log.ctypes.data)
        wanted = 10**9 + tokens[:, None] + HEAD * (first + np.arange(heads))
        assert log[0] == wanted.size
        assert sorted(log[1:]) == sorted(wanted.ravel())
        nearest = log[1:].reshape(-1, 4)[:, 0]  # those of one quarter go from head to head
        assert (np.diff(nearest) == HEAD).sum() == (heads - 1) * tile.TILE // 4
