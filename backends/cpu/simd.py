"""Vector code for any CPU: a thin layer over an LLVM IR builder.

Kernels are written once, over registers of `width` float32 lanes.  What differs between CPUs is a
handful of operations at the end of this file (table look-ups, fused multiply-add, half precision);
which of them a CPU has is found by asking LLVM to compile a probe and reading its assembly, so that
no list of CPU names is needed and NUMBA_CPU_NAME / NUMBA_CPU_FEATURES are honoured.

Nothing here lets LLVM contract or reorder floating-point operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
HALF, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

CACHE_LINE, PAGE = 64, 4096  # bytes

Value = Any  # an llvmlite value
Register = Any  # an llvmlite value of a vector type
Offset = Any  # bytes: an int, or an i64 value

_PROBE = """
define <16 x float> @add(<16 x float> %a, <16 x float> %b) {
  %r = fadd <16 x float> %a, %b
  ret <16 x float> %r
}
define <8 x i32> @add_integers(<8 x i32> %a, <8 x i32> %b) {
  %r = add <8 x i32> %a, %b
  ret <8 x i32> %r
}
define <4 x float> @fused(<4 x float> %a, <4 x float> %b, <4 x float> %c) {
  %r = call <4 x float> @llvm.fma.v4f32(<4 x float> %a, <4 x float> %b, <4 x float> %c)
  ret <4 x float> %r
}
declare <4 x float> @llvm.fma.v4f32(<4 x float>, <4 x float>, <4 x float>)
define <16 x i32> @funnel(<16 x i32> %a, <16 x i32> %b) {
  %r = call <16 x i32> @llvm.fshl.v16i32(<16 x i32> %a, <16 x i32> %b, <16 x i32> splat (i32 4))
  ret <16 x i32> %r
}
declare <16 x i32> @llvm.fshl.v16i32(<16 x i32>, <16 x i32>, <16 x i32>)
define <64 x i8> @permute(<64 x i8> %a, <64 x i8> %b) {
  %r = shufflevector <64 x i8> %a, <64 x i8> %b, <64 x i32> <ORDER>
  ret <64 x i8> %r
}
define <4 x float> @extend(<4 x half> %a) {
  %r = fpext <4 x half> %a to <4 x float>
  ret <4 x float> %r
}
"""


@dataclass(frozen=True)
class Target:
    """The CPU that kernels are compiled for."""

    cpu: str
    level: str  # "avx512", "avx2" or "generic"
    width: int  # float32 lanes of a register
    registers: int  # registers that a block of a row may fill
    has_fma: bool
    has_half: bool
    has_pause: bool
    has_funnel: bool  # a shift across two registers in one instruction
    permutes_bytes: bool  # of two registers of 64, in one instruction


@cache
def target() -> Target:
    """The CPU Numba compiles for, and what LLVM makes of it."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    order = ", ".join(f"i32 {i * 37 % 128}" for i in range(64))
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROBE.replace("ORDER", order)))
    x86 = triple.startswith("x86_64")
    if x86 and "zmm" in assembly:
        level, width, registers = "avx512", 16, 16
    elif x86 and "vpaddd\t%ymm" in assembly:
        level, width, registers = "avx2", 8, 8
    else:
        level, width, registers = "generic", 4, 16
    has_fma = any(name in assembly for name in ("vfmadd", "fmla"))
    has_half = any(name in assembly for name in ("vcvtph2ps", "fcvtl"))
    funnel, permutes = "vpshldd" in assembly, "vpermt2b" in assembly or "vpermi2b" in assembly
    return Target(cpu, level, width, registers, has_fma, has_half, x86, funnel, permutes)


def vector(of: Any, lanes: int) -> Any:
    return ir.VectorType(of, lanes)


class Simd:
    """Emits vector instructions at the builder's position."""

    def __init__(self, builder: Any, target: Target) -> None:
        self.b = builder
        self.target = target
        self.width = target.width
        self.floats = vector(F32, self.width)
        self.ints = vector(I32, self.width)

    # -- constants ---------------------------------------------------------------------------------

    def const_f(self, values: float | Sequence[float]) -> Register:
        return self._constant(F32, values, self.width, float)

    def const_i(
        self, values: int | Sequence[int], of: Any = I32, lanes: int | None = None
    ) -> Register:
        return self._constant(of, values, lanes or self.width, int)

    def like(self, value: Value, of: Any) -> Any:
        """The type with elements `of` and as many lanes as `value`, a scalar or a register."""
        is_register = isinstance(value.type, ir.VectorType)
        return vector(of, value.type.count) if is_register else of

    def constant_like(self, value: Value, number: float) -> Value:
        """A number in every lane, of the type of `value`, a scalar or a register."""
        if isinstance(value.type, ir.VectorType):
            return ir.Constant(value.type, [number] * value.type.count)
        return ir.Constant(value.type, number)

    def _constant(self, of: Any, values: Any, lanes: int, cast: Any) -> Register:
        many = list(values) if isinstance(values, Sequence) else [values] * lanes
        return ir.Constant(vector(of, len(many)), [ir.Constant(of, cast(v)) for v in many])

    def int64(self, value: int) -> Value:
        return ir.Constant(I64, value)

    # -- memory ------------------------------------------------------------------------------------

    def at(self, address: Value, offset: Offset = 0) -> Value:
        """address + offset, folding a constant 0."""
        if isinstance(offset, int):
            return self.b.add(address, self.int64(offset)) if offset else address
        return self.b.add(address, offset)

    def load(self, of: Any, address: Value, offset: Offset = 0) -> Value:
        value = self.b.load(self._pointer(address, offset), typ=of)
        value.align = 1
        return value

    def store(self, value: Value, address: Value, offset: Offset = 0) -> None:
        self.b.store(value, self._pointer(address, offset)).align = 1

    def stream(self, value: Value, address: Value, offset: Offset, align: int) -> None:
        """Store past the caches, on x86; `finish_streams` has to follow the last of them.

        align : bytes of which the place is a multiple, at least those of `value` or of a register
        """
        instruction = self.b.store(value, self._pointer(address, offset))
        instruction.align = align
        hint = self.b.module.add_metadata([ir.Constant(I32, 1)])
        instruction.set_metadata("nontemporal", hint)

    def finish_streams(self) -> None:
        """Let whoever is told that the work is done see what was streamed."""
        self.call("llvm.x86.sse.sfence", ir.VoidType())

    def prefetch(self, address: Value, size: int, *, level: int = 1, write: bool = False) -> None:
        """Ask for `size` bytes from `address` on in a level of the cache; any address will do.

        write : whether they will be written
        """
        pointer = ir.PointerType()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        for line in range(0, size, CACHE_LINE):
            hints = (ir.Constant(I32, hint) for hint in (int(write), 4 - level, 1))  # 1: data
            self.b.call(function, [self._pointer(address, line), *hints])

    def pause(self) -> None:
        """Tell a CPU that has an instruction for it that this thread waits for another one."""
        if self.target.has_pause:
            self.call("llvm.x86.sse2.pause", ir.VoidType())

    def _pointer(self, address: Value, offset: Offset) -> Value:
        return self.b.inttoptr(self.at(address, offset), ir.PointerType())

    def times(self, index: Value, factor: int) -> Value:
        """index * factor for addresses."""
        return self.b.mul(index, self.int64(factor))

    @contextmanager
    def loop(self, count: int | Value) -> Iterator[Value]:
        """for index in range(count), an i64; a single turn is emitted straight."""
        if isinstance(count, int):
            if count == 1:
                yield self.int64(0)
                return
            count = self.int64(count)
        with cgutils.for_range(self.b, count) as turn:
            yield turn.index

    def outlined(self, name: str, body: Callable[..., None], *arguments: Value) -> None:
        """body(s, *arguments) as a function of its own, which has all registers to itself.

        name : unique within the kernel
        """
        function = self.b.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
            function = ir.Function(self.b.module, kind, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            inner = Simd(ir.IRBuilder(function.append_basic_block()), self.target)
            body(inner, *function.args)
            inner.b.ret_void()
        self.b.call(function, arguments)

    # -- lanes -------------------------------------------------------------------------------------

    def shuffle(self, a: Register, b: Register | None, lanes: Sequence[int]) -> Register:
        """Lanes of a and b, counted through both."""
        other = ir.Constant(a.type, ir.Undefined) if b is None else b
        return self.b.shuffle_vector(a, other, self.const_i([int(i) for i in lanes]))

    def splat(self, scalar: Value, lanes: int | None = None) -> Register:
        lanes = lanes or self.width
        start = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        one = self.b.insert_element(start, scalar, ir.Constant(I32, 0))
        return self.shuffle(one, None, [0] * lanes)

    def first(self, register: Register) -> Value:
        return self.b.extract_element(register, ir.Constant(I32, 0))

    def resize(self, register: Register, lanes: int) -> Register:
        """The first lanes; new ones are zero."""
        have = register.type.count
        if have == lanes:
            return register
        zero = ir.Constant(register.type, None)
        return self.shuffle(register, zero, [min(i, have) for i in range(lanes)])

    def concat(self, registers: Sequence[Register]) -> Register:
        """Registers, a power of two of them, in one wide vector."""
        parts = list(registers)
        while len(parts) > 1:
            lanes = range(2 * parts[0].type.count)
            parts = [
                self.shuffle(a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    def keep_lanes(self, register: Register, count: int) -> Register:
        """Zero the lanes from `count` on."""
        zero = ir.Constant(register.type, None)
        return self.shuffle(
            register, zero, [i if i < count else self.width for i in range(self.width)]
        )

    # -- arithmetic --------------------------------------------------------------------------------

    def call(self, name: str, result: Any, *args: Value) -> Value:
        function = ir.FunctionType(result, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), args)

    def multiply_add(self, a: Register, b: Register, c: Register) -> Register:
        """a * b + c, rounded once or twice: where both give the same bits, or bits are free."""
        if self.target.has_fma:
            return self.call(f"llvm.fma.v{self.width}f32", a.type, a, b, c)
        return self.b.fadd(self.b.fmul(a, b), c)

    def funnel(self, word: Register, other: Register, bits: int) -> Register:
        """word << bits, with the upper bits of `other` below."""
        name = f"llvm.fshl.v{self.width}i32"
        return self.call(name, self.ints, word, other, self.const_i(bits))

    def maximum(self, a: Register, b: Register) -> Register:
        """The larger one; b if a is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: Register, b: Register) -> Register:
        """The smaller one; b if a is NaN."""
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def as_ints(self, register: Register) -> Register:
        return self.b.bitcast(register, vector(I32, register.type.count))

    def as_floats(self, register: Register) -> Register:
        return self.b.bitcast(register, vector(F32, register.type.count))

    def any_lane(self, condition: Register) -> Value:
        """Whether a comparison of registers holds in some lane."""
        lanes = ir.IntType(condition.type.count)
        return self.b.icmp_unsigned("!=", self.b.bitcast(condition, lanes), ir.Constant(lanes, 0))


class Table:
    """Look-up of float32 or int32 entries by lane, the table in registers where it fits.

    entries : a power of two; the memory at `address` holds the table, repeated up to 32 entries.
    """

    def __init__(self, s: Simd, address: Value, entries: int) -> None:
        self.s = s
        self.address = address
        self.entries = entries
        held = {"avx512": 128, "avx2": 16, "generic": 0}[s.target.level]
        count = max(1, entries // s.width) if entries <= held else 0
        self.registers = [s.load(s.floats, address, 4 * s.width * i) for i in range(count)]

    def __call__(self, index: Register) -> Register:
        """Entries as floats; index bits above the table's size are ignored."""
        if not self.registers:
            return self._gather(self.s.b.and_(index, self.s.const_i(self.entries - 1)))
        parts = self.registers
        if self.s.target.level == "avx512":
            if len(parts) == 1:
                return self._permute_one(parts[0], index)
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self._permute_two(low, index, high) for low, high in pairs]
            bit = 5
        else:
            parts = [self._permute_one(part, index) for part in parts]
            bit = 3
        b, s = self.s.b, self.s
        while len(parts) > 1:
            upper = b.icmp_signed("<", b.shl(index, s.const_i(31 - bit)), s.const_i(0))
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [b.select(upper, high, low) for low, high in pairs]
            bit += 1
        return parts[0]

    def ints(self, index: Register) -> Register:
        return self.s.as_ints(self(index))

    def _permute_one(self, table: Register, index: Register) -> Register:
        s = self.s
        if s.target.level == "avx512":
            return s.call("llvm.x86.avx512.permvar.sf.512", s.floats, table, index)
        return s.call("llvm.x86.avx2.permps", s.floats, table, index)

    def _permute_two(self, low: Register, index: Register, high: Register) -> Register:
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        return self.s.call(name, self.s.floats, low, index, high)

    def _gather(self, index: Register) -> Register:
        s, b = self.s, self.s.b
        pointer = b.inttoptr(self.address, ir.PointerType())
        zero = ir.Constant(s.floats, None)
        if s.target.level == "avx512":
            every = ir.Constant(vector(I1, 16), [1] * 16)
            name, scale = "llvm.x86.avx512.mask.gather.dps.512", ir.Constant(I32, 4)
            return s.call(name, s.floats, zero, pointer, index, every, scale)
        if s.target.level == "avx2":
            every = s.as_floats(s.const_i(-1))
            name, scale = "llvm.x86.avx2.gather.d.ps.256", ir.Constant(I8, 4)
            return s.call(name, s.floats, zero, pointer, index, every, scale)
        result = zero
        for lane in range(s.width):
            position = b.zext(b.extract_element(index, ir.Constant(I32, lane)), I64)
            entry = s.load(F32, self.address, s.times(position, 4))
            result = b.insert_element(result, entry, ir.Constant(I32, lane))
        return result
