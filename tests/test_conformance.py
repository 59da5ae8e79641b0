"""The built-in backends of host memory pass the conformance suite; a faulty one does not."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant, _backend
from turboquant_np.testing.conformance import BackendConformance

reference = _backend.load("reference")


class TestReference(BackendConformance):
    backend = "reference"


class TestCpu(BackendConformance):
    backend = "cpu"
    dtypes = ("float16", "bfloat16", "float32", "float64")
    every_combination = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def last_bit_of_a_scale(spec: Any, vectors: Any, packed: Any, scales: Any) -> None:
    reference.encode(spec, vectors, packed, scales)
    if scales.size > 36:
        scales[36] = np.nextafter(scales[36], np.float32(0))


def ties_go_up(spec: Any, vectors: Any, packed: Any, scales: Any) -> None:
    reference.encode(spec, vectors, packed, scales)
    if spec.bits == 1:  # a rotated coordinate of a zero row is on the only threshold
        packed[scales == 0] = np.packbits(np.ones(spec.head_dim, np.uint8))


def flushed_subnormals(spec: Any, packed: Any, scales: Any, out: Any) -> None:
    reference.decode(spec, packed, scales, out)
    out[np.abs(out) < np.finfo(np.float32).tiny] = 0


def products_in_half_precision(spec: Any, query: Any, packed: Any, scales: Any, out: Any) -> None:
    reference.inner_products(spec, query, packed, scales, out)
    out.view(np.uint32)[...] &= np.uint32(0xFFFFE000)  # leaves 11 significant bits


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ({"encode": last_bit_of_a_scale}, "test_every_setting_gives_the_reference_bits"),
        ({"encode": ties_go_up}, "test_every_setting_gives_the_reference_bits"),
        ({"decode": flushed_subnormals}, "test_every_code_decodes_to_the_reference_bits"),
        (
            {"inner_products": products_in_half_precision},
            "test_inner_products_agree_with_decoded_vectors",
        ),
        (
            {"first_non_finite": lambda scales: None},
            "test_the_first_non_finite_vector_is_named",
        ),
        (
            {"why_unavailable": lambda: "no such chip"},
            "test_it_is_available_and_describes_itself",
        ),
    ],
)
def test_faulty_backends_fail(
    fault: dict[str, Any], caught_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"faulty-{caught_by}-{next(iter(fault.values())).__name__}"
    register(name, fault, monkeypatch)

    class Suite(BackendConformance):
        backend = name
        head_dims = (2, 5, 8)

    with pytest.raises(AssertionError):
        getattr(Suite(), caught_by)()


def test_registered_backends_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    register("someone-elses", {}, monkeypatch)
    tq = TurboQuant(head_dim=8, backend="someone-elses")
    assert tq.encode(np.ones(8, np.float32))[1] == np.sqrt(np.float32(8))


def test_unavailable_backends_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    register("on-strike", {"why_unavailable": lambda: "needs a rest"}, monkeypatch)
    with pytest.raises(RuntimeError, match="'on-strike' is not available: needs a rest"):
        TurboQuant(head_dim=8, backend="on-strike").encode(np.ones(8, np.float32))


def register(name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference backend, changed, be found by name as that of an installed package."""
    members = {key: getattr(reference, key) for key in reference.__all__}  # type: ignore[attr-defined]
    backend = SimpleNamespace(**{**members, "name": name, **changes})
    entry_point = SimpleNamespace(name=name, load=lambda: backend)
    monkeypatch.setattr(_backend, "entry_points", lambda group: [entry_point])
