"""turboquant_np.testing: the comparison, the strategies, the pytest plugin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from turboquant_np import TurboQuant, TurboQuantConfig
from turboquant_np.testing import assert_bits_equal
from turboquant_np.testing.strategies import LAYOUTS, configs, float_arrays, lay_out, shapes

# -- assert_bits_equal -----------------------------------------------------------------------------


@given(float_arrays(shapes(3)))
def test_equal_bits_pass(x: Any) -> None:
    assert_bits_equal(x, x.copy())
    assert_bits_equal(x, lay_out(x, "reversed"))


def test_nans_are_compared_by_their_bits() -> None:
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert_bits_equal(quiet, quiet)
    with pytest.raises(AssertionError, match=r"nan \(0x7fc00000\) != nan \(0x7fc00001\)"):
        assert_bits_equal(quiet, other)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), r"shapes differ: \(2, 3\) != \(2, 4\)"),
        (np.zeros(2, "f4"), np.zeros(2, "f8"), "dtypes differ: float32 != float64"),
        (np.zeros(2, ">f4"), np.zeros(2, "<f4"), "dtypes differ: >f4 != float32"),
        (np.zeros(1), -np.zeros(1), r"1 of 1 .* first at \[0\]: 0.0 \(0x0{16}\) != -0.0 \(0x80"),
        (np.uint8(3), np.uint8(4), r"first at \[\.\.\.\]: 3 \(0x03\) != 4 \(0x04\)"),
    ],
)
def test_differences_are_described(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_bits_equal(actual, expected)


def test_the_first_coordinate_is_named() -> None:
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    b = a.copy()
    b[0, 2, 1] = np.nextafter(b[0, 2, 1], np.float32(99))
    b[1, 1, 1] = 7
    message = r"2 of 24 float32 values differ, first at \[0, 2, 1\]: 9.0 \(0x41100000\) != 9.000001"
    with pytest.raises(AssertionError, match=message):
        assert_bits_equal(a, b)
    with pytest.raises(AssertionError, match=r"first at \[0, 2, 1\]"):
        assert_bits_equal(np.asfortranarray(a), b)


def test_what_has_no_bits_is_refused() -> None:
    with pytest.raises(TypeError, match="actual must be a NumPy or CuPy array, got list"):
        assert_bits_equal([1.0], np.ones(1))
    with pytest.raises(TypeError, match="expected holds Python objects"):
        assert_bits_equal(np.ones(1), np.ones(1, object))


# -- strategies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    y = lay_out(x, layout)
    assert (x == y).all()
    assert y.shape == x.shape
    traits = {
        "C": y.flags.c_contiguous,
        "F": y.flags.f_contiguous and not y.flags.c_contiguous,
        "reversed": max(y.strides) < 0,
        "strided": not y.flags.forc and min(y.strides) > 0,
        "offset": not y.flags.aligned,
        "read-only": not y.flags.writeable,
        "swapped": not y.dtype.isnative,
    }
    assert traits[layout]


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout must be one of C, F, .*, got 'diagonal'"):
        lay_out(np.zeros(3), "diagonal")


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: x.ndim == 4 and x.size > 0,
        lambda x: x.size == 0 and x.ndim > 1,
        lambda x: x.ndim == 1,
        lambda x: np.isnan(x).any(),
        lambda x: np.isinf(x).any(),
        lambda x: (x != 0).any() and np.nanmax(np.abs(x)) < 1e-30,
        lambda x: x.dtype == np.float16,
        lambda x: not x.dtype.isnative,
        lambda x: x.size > 8 and not x.flags.forc,
    ],
)
def test_arrays_of_all_kinds_are_drawn(wanted: Any) -> None:
    assert wanted(find(float_arrays(shapes(8)), wanted))


@given(st.data(), st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
def test_finite_arrays_are_finite(data: st.DataObject, dtype: str) -> None:
    x = data.draw(float_arrays(shapes(8), dtypes=[dtype], finite=True))
    assert x.dtype.name == dtype
    assert np.isfinite(x.astype(np.float32)).all()


@given(configs(head_dims=[6, 8], bits=[3], scales=["mse"], backend="reference"))
def test_configs_are_as_asked_for(config: TurboQuantConfig) -> None:
    tq = TurboQuant(config)
    assert tq.packed_dim == 3
    assert (config.scale, config.backend) == ("mse", "reference")


# -- the plugin, and what the extra is for ---------------------------------------------------------


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_plugin_registers_its_marker(tmp_path: Path) -> None:
    assert "@pytest.mark.cuda: needs CuPy" in run("-m", "pytest", "--markers", cwd=tmp_path).stdout


def test_the_plugin_itself_imports_nothing() -> None:
    code = (
        "import sys, turboquant_np, turboquant_np.testing\n"
        "before = set(sys.modules)\n"
        "import turboquant_np.testing.pytest_plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    assert run("-c", code).stdout.strip() == "['turboquant_np.testing.pytest_plugin']"


@pytest.mark.parametrize("module", ["strategies", "conformance"])
def test_without_hypothesis_the_extra_is_named(module: str) -> None:
    code = f"import sys; sys.modules['hypothesis'] = None; import turboquant_np.testing.{module}"
    error = run("-c", code).stderr
    assert f"turboquant_np.testing.{module}" in error
    assert "need Hypothesis: pip install 'turboquant-np[testing]'" in error


def test_without_hypothesis_bits_can_be_compared() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None; import turboquant_np.testing as t; print(t)"
    )
    assert run("-c", code).returncode == 0
