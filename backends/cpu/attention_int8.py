"""Attention in 8-bit integers on the host side: whether it can be had, matrices that rotate."""

from __future__ import annotations

from functools import cache
from weakref import WeakKeyDictionary

import llvmlite.binding as llvm
import numpy as np
from numba.core.registry import cpu_target

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np._spec import CodecSpec

from .attention import Float32s, Prepared, attend, prepare
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


def _check(key_spec: CodecSpec, value_spec: CodecSpec) -> None:
    if not has_byte_products():
        raise ValueError(
            "compute='int8' needs a processor with AVX-512 VNNI and VBMI, which "
            f"{target().cpu} ({target().level}) lacks; use compute='float32'"
        )
    for name, spec in (("keys", key_spec), ("values", value_spec)):
        if spec.bits > MOST_BITS:
            raise ValueError(
                f"compute='int8' is for 1 to {MOST_BITS} bits, where rounding to 8 bits adds "
                f"little to the error of the codes; {name} have {spec.bits}: "
                "use compute='float32'"
            )


_prepared: WeakKeyDictionary[CodecSpec, WeakKeyDictionary[CodecSpec, Prepared]]
_prepared = WeakKeyDictionary()


def _prepare(key_spec: CodecSpec, value_spec: CodecSpec) -> Prepared:
    of_key = _prepared.setdefault(key_spec, WeakKeyDictionary())
    known = of_key.get(value_spec)
    if known is None:
        _check(key_spec, value_spec)
        plan = Plan("attend_int8", key_spec.head_dim, key_spec.bits, value_bits=value_spec.bits)
        padded = padded_dim(plan.dim, plan.bits, plan.value_bits)
        matrices = _into_places(key_spec, padded), _out_of_places(value_spec, padded)
        known = of_key[value_spec] = prepare(key_spec, value_spec, plan, matrices)
    return known


def _into_places(spec: CodecSpec, size: int) -> Float32s:
    """Column i of the rotation's transpose in the place of coordinate i of a key."""
    matrix, dim = np.zeros((size, size), np.float32), spec.head_dim
    order = np.array(key_order(dim, spec.bits))
    (inside,) = np.nonzero(order < dim)
    matrix[:dim, inside] = spec.rotation.matrix[order[inside]].T
    return matrix


def _out_of_places(spec: CodecSpec, size: int) -> Float32s:
    """Row i of the rotation in the place of coordinate i of a value, for centroids of z."""
    matrix, dim = np.zeros((size, size), np.float32), spec.head_dim
    order = np.array(value_order(dim, spec.bits))
    (inside,) = np.nonzero(order < dim)
    matrix[inside, :dim] = spec.rotation.matrix[order[inside]] * np.float32(dim**-0.5)
    return matrix
