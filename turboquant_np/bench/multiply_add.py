"""The peak of a CPU's arithmetic: fused multiply-adds in registers, as many as it can begin."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["OPERATIONS_PER_ROUND", "multiply_add", "vector_width"]

CHAINS = 12  # independent: more than latency times units (8 to 10), and they fit in 16 registers
F32, I64 = ir.FloatType(), ir.IntType(64)


def vector_width() -> int:
    """float32 lanes of the registers this library's CPU kernels use."""
    from ..backends.cpu.simd import target

    return int(target().width)


OPERATIONS_PER_ROUND = CHAINS  # times vector_width() multiply-adds


@intrinsic
def _rounds(typing_context, rounds):  # type: ignore[no-untyped-def]
    """`rounds` times one multiply-add in each chain; the sum of what they end with."""
    del typing_context

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        width = vector_width()
        vector = ir.VectorType(F32, width)
        name = f"llvm.fmuladd.v{width}f32"
        kind = ir.FunctionType(vector, [vector] * 3)
        fused = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        factor, addend = (ir.Constant(vector, [x] * width) for x in (0.999, 0.001))
        before = builder.block
        loop, done = builder.append_basic_block("rounds"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        count = builder.phi(I64)
        count.add_incoming(ir.Constant(I64, 0), before)
        chains = [builder.phi(vector) for _ in range(CHAINS)]
        results = [builder.call(fused, [chain, factor, addend]) for chain in chains]
        following = builder.add(count, ir.Constant(I64, 1))
        count.add_incoming(following, loop)
        for i, (chain, result) in enumerate(zip(chains, results, strict=True)):
            chain.add_incoming(ir.Constant(vector, [float(i + j) for j in range(width)]), before)
            chain.add_incoming(result, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[0]), loop, done)
        builder.position_at_end(done)
        total = results[0]
        for result in results[1:]:
            total = builder.fadd(total, result)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64), codegen


@njit(nogil=True)  # type: ignore[untyped-decorator]
def multiply_add(rounds: int) -> float:
    """Do ``rounds * OPERATIONS_PER_ROUND * vector_width()`` fused multiply-adds of float32."""
    result: float = _rounds(rounds)
    return result
