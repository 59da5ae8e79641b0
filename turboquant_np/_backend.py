"""The contract every backend fulfils, and the one place that loads them."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast

from ._spec import CodecSpec

if TYPE_CHECKING:
    from ._attention_checks import AttentionBatch

ENTRY_POINT_GROUP = "turboquant_np.backends"
BUILT_IN = ("reference", "cpu", "cuda")


class Backend(Protocol):
    """What computes.  A backend is a module or an object with these members.

    Arrays are NumPy arrays or, for a backend whose `device` is "cuda", CuPy arrays.  The caller has
    checked shapes and dtypes.  n stands for any number of leading axes, d for spec.head_dim.

    ============  ====================  =======================================================
    argument      shape                 dtype and layout
    ============  ====================  =======================================================
    vectors       [*n, d]               float16, bfloat16, float32 or float64; native byte
                                        order, any strides
    packed        [*n, packed_dim]      uint8, C-contiguous
    scales        [*n]                  float32, C-contiguous
    out (decode)  [*n, d]               float16, bfloat16, float32 or float64; C-contiguous
    query         [*m, d]               as vectors
    scores        [*m, *n]              float32, C-contiguous
    ============  ====================  =======================================================

    `encode` and `decode` give the bits that docs/format.md prescribes, which are those of the
    ``reference`` backend; turboquant_np.testing.conformance checks that.
    """

    name: str
    device: str

    def why_unavailable(self) -> str | None:
        """None if the backend works on this machine, else the reason and the remedy."""

    def describe(self) -> dict[str, str]:
        """Facts for ``turboquant-np doctor``: versions, SIMD level, threads, caches."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """An uninitialised C-contiguous array on the device of `like`."""

    def first_non_finite(self, scales: Any) -> int | None:
        """Flat index of the first NaN or infinity among stored scales (may synchronise)."""

    def encode(self, spec: CodecSpec, vectors: Any, packed: Any, scales: Any) -> None:
        """Fill `packed` and `scales`.  A row with NaN or infinity gets codes 0 and scale NaN."""

    def decode(self, spec: CodecSpec, packed: Any, scales: Any, out: Any) -> None:
        """Fill `out` with the decoded vectors."""

    def inner_products(
        self, spec: CodecSpec, query: Any, packed: Any, scales: Any, scores: Any
    ) -> None:
        """scores[m, n] = <query[m], decoded[n]>, from the packed codes; to float32 accuracy."""

    def encode_paged(
        self,
        key_spec: CodecSpec,
        value_spec: CodecSpec,
        keys: Any,
        values: Any,
        k_packed: Any,
        k_norms: Any,
        v_packed: Any,
        v_norms: Any,
        slot_mapping: Any,
    ) -> None:
        """Encode into the slots of a paged cache; slots outside of it are skipped.

        Shapes as in turboquant_np.paged.encode_paged; the last axis of packed is contiguous.
        """

    def attention(self, key_spec: CodecSpec, value_spec: CodecSpec, batch: AttentionBatch) -> None:
        """Fill batch.out and batch.lse; see AttentionBatch for shapes.

        A backend may have `attention_int8` as well, with the same arguments, for
        ``compute="int8"``; it raises ValueError where that cannot be had.  Then it also has
        `why_no_int8`, which tells that from the two specs alone, as `why_unavailable` would.
        """


@cache
def load(name: str) -> Backend:
    """Load a backend by name, built in or registered as an entry point.

    Raises
    ------
    ValueError
        If no backend has that name; the known ones are listed.
    """
    if name in BUILT_IN:
        return cast(Backend, importlib.import_module(f"turboquant_np.backends.{name}"))
    others = {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP)}
    if name in others:
        return cast(Backend, others[name].load())
    known = ", ".join([*BUILT_IN, *sorted(others)])
    raise ValueError(f"unknown backend {name!r}; known: auto, {known}")


def device_of(array: Any) -> str:
    """ "cuda" for a CuPy array, else "cpu"; imports nothing."""
    cupy = sys.modules.get("cupy")
    return "cuda" if cupy is not None and isinstance(array, cupy.ndarray) else "cpu"


def array_module(array: Any) -> Any:
    """The cupy module for a CuPy array, else numpy."""
    return sys.modules["cupy" if device_of(array) == "cuda" else "numpy"]


def backend_for(array: Any, name: str = "auto") -> Backend:
    """The backend called `name`, or the default one for the device of `array`.

    Raises
    ------
    ValueError
        If the backend works on another device than the array lives on.
    RuntimeError
        If the backend does not work on this machine.
    """
    device = device_of(array)
    backend = load(device if name == "auto" else name)
    if backend.device != device:
        where = {"cpu": "host memory (NumPy)", "cuda": "a GPU (CuPy)"}
        raise ValueError(
            f"backend {backend.name!r} works on {where[backend.device]}, the array is in "
            f"{where[device]}; use backend='auto' or move the array"
        )
    if reason := backend.why_unavailable():
        raise RuntimeError(f"backend {backend.name!r} is not available: {reason}")
    return backend
