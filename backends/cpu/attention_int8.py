"""Attention in 8-bit integers on the host side: whether it can be had, matrices that rotate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec

from .attention import PerPair, Prepared, attend, prepare, rotating_into, rotating_out_of
from .int8_layout import MOST_BITS, key_order, padded_dim, value_order
from .kernels import Plan
from .simd import target

_PROBE = """
define i32 @products(<64 x i8> %a, <64 x i8> %b) {
  %u = zext <64 x i8> %a to <64 x i32>
  %s = sext <64 x i8> %b to <64 x i32>
  %p = mul <64 x i32> %u, %s
  %r = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %p)
  ret i32 %r
}
declare i32 @llvm.vector.reduce.add.v64i32(<64 x i32>)
define <64 x i8> @permutation(<64 x i8> %a) {
  %r = shufflevector <64 x i8> %a, <64 x i8> poison, <64 x i32> <ORDER>
  ret <64 x i8> %r
}
"""


def attention_int8(key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch) -> None:
    """Fill batch.out and batch.lse.

    Raises
    ------
    ValueError
        If the processor or the quantisers do not suit this arithmetic.
    """
    attend(_prepare(key_spec, value_spec), batch)


@cache
def has_byte_products() -> bool:
    """Whether the CPU multiplies and adds bytes, and permutes them, 64 at a time."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    order = ", ".join(f"i32 {i * 37 % 64}" for i in range(64))
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROBE.replace("ORDER", order)))
    wide = target().level == "avx512"
    return wide and all(name in assembly for name in ("vpdpbusd", "vpermb"))


def why_no_int8(key_spec: CodecSpec, value_spec: CodecSpec) -> str | None:
    """None if this processor and these quantisers suit, else the reason and the remedy."""
    if not has_byte_products():
        return (
            "compute='int8' needs a processor with AVX-512 VNNI and VBMI, which "
            f"{target().cpu} ({target().level}) lacks; use compute='float32'"
        )
    for name, spec in (("keys", key_spec), ("values", value_spec)):
        if spec.bits > MOST_BITS:
            return (
                f"compute='int8' is for 1 to {MOST_BITS} bits, where rounding to 8 bits adds "
                f"little to the error of the codes; {name} have {spec.bits}: "
                "use compute='float32'"
            )
    return None


def _make(key_spec: CodecSpec, value_spec: CodecSpec) -> Prepared:
    if reason := why_no_int8(key_spec, value_spec):
        raise ValueError(reason)
    plan = Plan("attend_int8", key_spec.head_dim, key_spec.bits, value_bits=value_spec.bits)
    padded = padded_dim(plan.dim, plan.bits, plan.value_bits)
    into = rotating_into(key_spec, _padded(key_order(plan.dim, plan.bits), padded))
    out_of = rotating_out_of(value_spec, _padded(value_order(plan.dim, plan.value_bits), padded))
    return prepare(key_spec, value_spec, plan, (into, out_of))


def _padded(order: Sequence[int], size: int) -> list[int]:
    """An order with places of no coordinate behind it."""
    return [*order, *[size] * (size - len(order))]


_prepare = PerPair(_make)
