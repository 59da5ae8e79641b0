"""Compiled kernels, and Numba's cache of them on disk.

A kernel is an intrinsic inside a one-line function whose only constant is a text: the plan and a
digest of this package's source.  Numba's cache files are keyed by the values a function closes
over, so each plan has its own entry, entries of an older source are never used, and a second
process loads in milliseconds.  The files lie in the user's cache directory, not beside the source
as Numba would have it: there they would outlive the package, and Python would take the folder they
are left in for a package of that name.  Where no cache directory can be written, kernels are
compiled in every process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.extending import intrinsic

from .attend_tasks import emit_attend
from .decode import emit_decode, emit_look_up, emit_look_up_scaled, emit_score
from .decode_batch import emit_decode_batch
from .dense import emit_decode_product, emit_encode_product, emit_fix
from .encode import emit_encode
from .encode_batch import emit_encode_batch
from .kernels import FLUSHES_SUBNORMALS, OK, Arguments, Plan, subnormals_survive
from .simd import I64, Simd, target

Kernel = Callable[..., int]

BODIES = {
    "encode": emit_encode,
    "encode_batch": emit_encode_batch,
    "fix": emit_fix,
    "encode_product": emit_encode_product,
    "decode": emit_decode,
    "decode_batch": emit_decode_batch,
    "look_up": emit_look_up,
    "look_up_scaled": emit_look_up_scaled,
    "score": emit_score,
    "decode_product": emit_decode_product,
    "attend": emit_attend,
    "attend_int8": emit_attend,
}
SIGNATURE = types.int64(*[types.int64] * len(Arguments._fields))


@cache
def source_digest() -> int:
    """Changes whenever a module of this backend does."""
    package = files(__package__)
    modules = sorted((f for f in package.iterdir() if f.name.endswith(".py")), key=lambda f: f.name)
    return zlib.crc32(b"".join(f.read_bytes() for f in modules))


@intrinsic(prefer_literal=True)
def _kernel_body(  # type: ignore[no-untyped-def]
    typing_context, text, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9
):
    """The code of the plan written in `text`."""
    if not isinstance(text, types.StringLiteral):
        return None
    plan = Plan.from_key(text.literal_value.partition("|")[0])

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        s = Simd(builder, target())
        a = Arguments(*arguments[1:])
        runs = subnormals_survive(s, a.tables)
        before = builder.block
        with builder.if_then(runs, likely=True):
            BODIES[plan.kind](s, plan, a)
            after = builder.block
        status = builder.phi(I64)
        status.add_incoming(ir.Constant(I64, FLUSHES_SUBNORMALS), before)
        status.add_incoming(ir.Constant(I64, OK), after)
        return status

    return types.int64(text, *[types.int64] * len(Arguments._fields)), codegen


def _function(text: str) -> Callable[..., Any]:
    def kernel(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9):  # type: ignore[no-untyped-def]
        return _kernel_body(text, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9)

    return kernel


class _KernelFiles(CompileResultCacheImpl):  # type: ignore[misc]
    """Where NUMBA_CACHE_DIR says, else in the user's cache directory, else beside the source."""

    _locator_classes = sorted(
        CompileResultCacheImpl._locator_classes, key=lambda c: "InTree" in c.__name__
    )


class _KernelCache(FunctionCache):  # type: ignore[misc]
    _impl_class = _KernelFiles


@cache
def compiled(plan: Plan) -> Kernel:
    """The compiled kernel of a plan; compiles (or loads) it on first use."""
    return compile_function(_function(f"{plan.key()}|{source_digest()}"), SIGNATURE)


def compile_function(function: Callable[..., Any], signature: Any) -> Kernel:
    """A function compiled for arguments of certain types only, without the GIL."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    if cache_directory() is not None:
        dispatcher._cache = _KernelCache(function)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    kernel: Kernel = dispatcher
    return kernel


@cache
def cache_directory() -> str | None:
    """Where compiled kernels are kept on disk; None if nowhere can be written."""
    try:
        return str(_KernelCache(_function("")).cache_path)
    except RuntimeError:
        return None
