"""From rotated coordinates to codes: three exact ways to count the thresholds below a number.

* count: compare with every threshold and add up; best for up to three thresholds.
* search: binary search, the thresholds of each level in a table; best where registers hold 8 lanes.
* grid: round z to a cell of a uniform grid fine enough that no cell holds two thresholds.  The cell
  tells how many thresholds lie below it, and one comparison settles the threshold inside it.  This
  is exact whatever the rounding of the cell number does, because rounding is monotone: all that
  counts is that each threshold falls into the cell it is filed under.

The tables of one quantiser travel in one float32 array: a header, then sections.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from turboquant_np._spec import CodecSpec

from .simd import F32, Register, Simd, Table, Target, Value

Float32s = npt.NDArray[np.float32]

HEADER = 16  # float32s in front of the sections
GAIN, DIM, GRID_LOW, GRID_HIGH, GRID_SCALE, SMALLEST_NORMAL, ONE = range(7)  # in the header
SHORTEST_TABLE = 32
MAX_CELLS = 4096
MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer and leaves it in the low bits


class Grid(NamedTuple):
    """Cells of the uniform grid."""

    scale: np.float32  # cells per unit of z
    thresholds: Float32s  # [cells] the threshold inside, or infinity
    below: npt.NDArray[np.int32]  # [cells] thresholds below the cell


def method_for(target: Target, bits: int) -> str:
    """Which way to count is fastest on a CPU."""
    if bits <= 2:
        return "count"
    if target.level == "avx2":
        return "search" if bits <= 5 else "grid"
    return "count" if target.level == "generic" and bits == 3 else "grid"


def find_grid(thresholds: Float32s) -> Grid:
    """The smallest grid that separates the thresholds, with room for rounding errors."""
    limit = float(np.abs(thresholds).max())
    cells = 16
    while cells <= MAX_CELLS:
        widest = (cells / 2 - 0.75) / limit
        for scale in np.linspace(widest, 0.6 * widest, 400).astype(np.float32):
            position = thresholds.astype(np.float64) * np.float64(scale)
            cell = np.rint(position)
            margin = 0.5 - np.abs(position - cell).max()
            if margin > 1e-3 and len(np.unique(cell)) == len(cell):
                index = cell.astype(np.int64) + cells // 2
                inside = np.full(cells, np.inf, np.float32)
                inside[index] = thresholds
                below = np.searchsorted(index, np.arange(cells)).astype(np.int32)
                return Grid(scale, inside, below)
        cells *= 2
    raise AssertionError(f"no grid of {MAX_CELLS} cells separates {thresholds}")


@lru_cache(maxsize=64)
def _grid_of(thresholds: bytes) -> Grid:
    return find_grid(np.frombuffer(thresholds, np.float32))


def cells_for(target: Target, spec: CodecSpec) -> int:
    """Cells of the grid, or 0 if another method is used."""
    if method_for(target, spec.bits) != "grid":
        return 0
    return len(_grid_of(spec.thresholds.tobytes()).below)


def host_tables(target: Target, spec: CodecSpec, values: Float32s) -> Float32s:
    """All the constants that kernels read, in the layout that `Quantizer` and `Values` expect.

    values : [2**bits] what a code stands for
    """
    header = np.zeros(HEADER, np.float32)
    header[GAIN], header[DIM] = spec.encode_gain, spec.head_dim
    header[SMALLEST_NORMAL] = np.finfo(np.float32).tiny
    header.view(np.int32)[ONE] = 1
    sections: list[npt.NDArray[Any]] = [values]
    method = method_for(target, spec.bits)
    if method == "count":
        sections.append(spec.thresholds)
    elif method == "search":
        sections += [spec.thresholds[_level(spec.bits, level)] for level in range(spec.bits)]
    else:
        grid = _grid_of(spec.thresholds.tobytes())
        half = len(grid.below) / 2
        header[GRID_LOW] = (0.25 - half) / grid.scale
        header[GRID_HIGH] = (half - 0.75) / grid.scale
        header[GRID_SCALE] = grid.scale
        sections += [grid.thresholds, grid.below.view(np.float32)]
    return np.concatenate([header, *[_repeat(section) for section in sections]])


def _level(bits: int, level: int) -> slice:
    """The thresholds asked for at one level of a binary search."""
    step = 1 << (bits - level)
    return slice(step // 2 - 1, None, step)


def _repeat(section: npt.NDArray[Any]) -> Float32s:
    return np.resize(section, max(SHORTEST_TABLE, len(section)))


def _section(s: Simd, tables: Value, bits: int, index: int, later: int) -> Value:
    """Address of section 0 (values) or of the index-th one behind, `later` entries each."""
    start = HEADER + (max(SHORTEST_TABLE, 1 << bits) + (index - 1) * later if index else 0)
    return s.at(tables, 4 * start)


def header_value(s: Simd, tables: Value, field: int) -> Register:
    """One number of the header in all lanes."""
    return s.splat(s.load(F32, tables, 4 * field))


def values_table(s: Simd, tables: Value, bits: int) -> Table:
    """What codes stand for."""
    return Table(s, _section(s, tables, bits, 0, 0), 1 << bits)


class Quantizer:
    """Emits the counting; loads its tables where it is made, so make it outside of loops.

    shift : of codes to the left, for nothing with "count" and "grid"; "search" has none
    """

    def __init__(self, s: Simd, tables: Value, bits: int, cells: int, shift: int = 0) -> None:
        self.s, self.bits, self.cells = s, bits, cells
        self.method = method_for(s.target, bits)
        self.shift = s.const_i(shift) if shift else None
        # from memory, because LLVM turns a constant 1 behind a mask into two instructions
        self.one = self._shifted(s.as_ints(header_value(s, tables, ONE)))
        if self.method == "count":
            start = _section(s, tables, bits, 1, 0)
            count = (1 << bits) - 1
            self.bounds = [s.splat(s.load(F32, start, 4 * i)) for i in range(count)]
        elif self.method == "search":
            address = [_section(s, tables, bits, 1 + i, SHORTEST_TABLE) for i in range(bits)]
            self.root = s.splat(s.load(F32, address[0]))
            self.levels = [Table(s, address[i], 1 << i) for i in range(1, bits)]
        else:
            length = max(SHORTEST_TABLE, cells)
            self.inside = Table(s, _section(s, tables, bits, 1, length), cells)
            self.below = Table(s, _section(s, tables, bits, 2, length), cells)
            below = [self._shifted(s.as_ints(table)) for table in self.below.registers]
            self.below.registers = [s.as_floats(table) for table in below]
            self.low, self.high, self.scale = (
                header_value(s, tables, field) for field in (GRID_LOW, GRID_HIGH, GRID_SCALE)
            )

    def __call__(self, z: Register) -> Register:
        """[width] int32 codes; NaN gives 0, because every comparison with it is false."""
        if self.method == "count":
            code = self._exceeds(z, self.bounds[0])
            for bound in self.bounds[1:]:
                code = self.s.b.add(code, self._exceeds(z, bound))
            return code
        if self.method == "search":
            code = self._exceeds(z, self.root)
            for level in self.levels:
                code = self.s.b.add(self.s.b.add(code, code), self._exceeds(z, level(code)))
            return code
        s = self.s
        clamped = s.minimum(s.maximum(z, self.low), self.high)  # NaN becomes low
        magic = s.const_f(MAGIC + self.cells // 2)
        cell = s.as_ints(s.multiply_add(clamped, self.scale, magic))
        below = self.below.ints(cell)
        if not self.below.registers:
            below = self._shifted(below)
        return s.b.add(below, self._exceeds(z, self.inside(cell)))

    def _shifted(self, code: Register) -> Register:
        return code if self.shift is None else self.s.b.shl(code, self.shift)

    def _exceeds(self, z: Register, bound: Register) -> Register:
        exceeds = self.s.b.fcmp_ordered(">", z, bound)
        return self.s.b.select(exceeds, self.one, self.s.const_i(0))
