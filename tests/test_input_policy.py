"""What is accepted, what is refused, and what the error says: one test for each policy."""

from __future__ import annotations

import dataclasses
import re
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_np import TurboQuant, TurboQuantConfig
from turboquant_np.testing import assert_bits_equal
from turboquant_np.testing.strategies import LAYOUTS, float_arrays, lay_out, shapes

BITS = 3
DIM = 48
BYTES = DIM * BITS // 8


@pytest.fixture(scope="module")
def tq(backend: str) -> TurboQuant:
    return TurboQuant(head_dim=DIM, bits=BITS, backend=backend)


def gaussian(*shape: int) -> Any:
    return np.random.Generator(np.random.PCG64([1, *shape])).standard_normal(shape, np.float32)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_named(tq: TurboQuant, value: float) -> None:
    x = gaussian(4, 5, DIM)
    x[2, 1, 7] = value
    x[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match=rf"x\[2, 1, 7\] is {value}; clean the input, or pass che"):
        tq.encode(x)
    with pytest.raises(ValueError, match=rf"x\[7\] is {value}"):
        tq.encode(x[2, 1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_unchecked_non_finite_vectors_decode_to_nan(tq: TurboQuant, value: float) -> None:
    x = gaussian(3, DIM)
    expected = tq.encode(x)
    x[1, 7] = value
    packed, norms = tq.encode(x, check_finite=False)
    assert np.isnan(norms).tolist() == [False, True, False]
    assert not packed[1].any()
    assert np.isnan(tq.decode(packed, norms)[1]).all()
    assert_bits_equal(packed[::2], expected[0][::2])
    assert_bits_equal(norms[::2], expected[1][::2])


@pytest.mark.parametrize("scale", ["norm", "mse", "unbiased"])
def test_zero_vectors_are_restored_exactly(scale: Any, backend: str) -> None:
    tq = TurboQuant(head_dim=DIM, bits=BITS, scale=scale, backend=backend)
    x = gaussian(3, DIM)
    x[1] = 0
    x[2] = -0.0
    packed, norms = tq.encode(x)
    assert norms[0] > 0
    assert norms[1:].tolist() == [0, 0]
    assert packed[1].tobytes() == bytes.fromhex("6db6db") * (BYTES // 3)  # code 3, below the middle
    assert (tq.decode(packed, norms)[1:] == 0).all()


def test_subnormal_values_are_quantised_like_others(tq: TurboQuant) -> None:
    x = gaussian(200, DIM)
    tiny = np.ldexp(x, -135)  # magnitudes around 2e-41, with 14 bits left
    assert (np.abs(tiny) < np.finfo(np.float32).tiny).all()
    packed, norms = tq.encode(tiny)
    assert (norms > 0).all()
    decoded = tq.decode(packed, norms, dtype=np.float64) * 2.0**135
    plain = tq.decode(*tq.encode(x), dtype=np.float64)
    assert ((decoded - x) ** 2).sum() == pytest.approx(((plain - x) ** 2).sum(), rel=1e-2)


def test_float64_is_rounded_to_float32(tq: TurboQuant) -> None:
    x = np.random.default_rng(2).standard_normal((20, DIM))
    for ours, expected in zip(tq.encode(x), tq.encode(x.astype(np.float32)), strict=True):
        assert_bits_equal(ours, expected)


def test_float64_beyond_float32_is_refused(tq: TurboQuant) -> None:
    x = np.ones((2, DIM))
    x[1, 5] = -1e300
    with pytest.raises(ValueError, match=r"x\[1, 5\] = -1e\+300 does not fit float32"):
        tq.encode(x)
    x[1, 5] = 1e-300  # to zero, as rounding to float32 does
    assert_bits_equal(tq.encode(x)[0], tq.encode(np.float32(x))[0])


def test_norms_beyond_float32_overflow(tq: TurboQuant) -> None:
    x = gaussian(3, DIM)
    x[2] = 3e38
    with pytest.raises(OverflowError, match=r"the scale of x\[2\] exceeds .* norm is 2.07846e\+39"):
        tq.encode(x)
    _, norms = tq.encode(x, check_finite=False)
    assert np.isinf(norms).tolist() == [False, False, True]
    assert tq.encode(np.full(DIM, 3e38 / 7, np.float32))[1] == pytest.approx(2.97e38, rel=1e-2)


def test_narrow_outputs_overflow_to_infinity(tq: TurboQuant) -> None:
    packed, norms = tq.encode(np.full(DIM, 1e6, np.float32))
    assert np.isinf(tq.decode(packed, norms, dtype=np.float16)).any()
    assert np.isfinite(tq.decode(packed, norms, dtype="bfloat16").astype(np.float32)).all()


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        *(bool, np.int8, np.uint8, np.int64, np.complex64, np.complex128, np.longdouble),
        *(ml_dtypes.float8_e4m3fn, object, "M8[s]", "S4", [("a", "f4")]),
    ],
)
def test_other_dtypes_are_refused(tq: TurboQuant, dtype: Any) -> None:
    x = np.zeros((2, DIM), dtype)
    message = rf"must be float16, bfloat16, float32, float64, got {re.escape(str(x.dtype))}; conv"
    with pytest.raises(TypeError, match="x " + message):
        tq.encode(x)
    with pytest.raises(TypeError, match="query " + message):
        tq.inner_products(x, *tq.encode(gaussian(2, DIM)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_are_exact(tq: TurboQuant, dtype: str) -> None:
    x = gaussian(30, DIM).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for ours, expected in zip(tq.encode(x), tq.encode(x.astype(np.float32)), strict=True):
        assert_bits_equal(ours, expected)


@pytest.mark.parametrize(
    "dtype",
    [
        *("float16", np.float16, np.dtype("<f2"), "bfloat16", ml_dtypes.bfloat16),
        *(np.float32, float, "float64", "f8", ">f4"),
    ],
)
def test_output_dtypes(tq: TurboQuant, dtype: Any) -> None:
    packed, norms = tq.encode(gaussian(2, DIM))
    decoded = tq.decode(packed, norms, dtype=dtype)
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert decoded.dtype == wanted.newbyteorder("=")
    assert decoded.dtype.isnative
    exact = tq.decode(packed, norms, dtype=np.float32)
    assert_bits_equal(decoded, exact.astype(decoded.dtype))


@pytest.mark.parametrize(
    "dtype", ["int8", int, complex, "float8", np.longdouble, object, "nonsense"]
)
def test_other_output_dtypes_are_refused(tq: TurboQuant, dtype: Any) -> None:
    message = "dtype must be one of float16, bfloat16, float32, float64, got"
    with pytest.raises(TypeError, match=message):
        tq.decode(*tq.encode(gaussian(2, DIM)), dtype=dtype)
    with pytest.raises(TypeError, match=message):
        TurboQuantConfig(dtype=dtype)
    with pytest.raises(TypeError, match=message):
        TurboQuantConfig(dtype=None)


# -- shapes and layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(47,), (2, 49), (48, 2), (48, 1), (5, 0)])
def test_the_last_axis_must_be_head_dim(tq: TurboQuant, shape: tuple[int, ...]) -> None:
    message = rf"Expected last dim 48, got {shape[-1]} \(x has shape {re.escape(str(shape))}\)"
    with pytest.raises(ValueError, match=message):
        tq.encode(np.zeros(shape, np.float32))


def test_zero_dimensional_input_is_refused(tq: TurboQuant) -> None:
    with pytest.raises(ValueError, match="at least one axis of length 48, got 0-d"):
        tq.encode(np.array(1.0))


@given(data=st.data())
def test_any_number_of_leading_axes(tq: TurboQuant, data: st.DataObject) -> None:
    strategy = float_arrays(shapes(DIM, max_leading=5, max_side=3), dtypes=["float32"], finite=True)
    x = data.draw(strategy)
    packed, norms = tq.encode(x, check_finite=False)
    assert packed.shape == (*x.shape[:-1], BYTES)
    assert norms.shape == x.shape[:-1]
    flat_packed, flat_norms = tq.encode(x.reshape(-1, DIM), check_finite=False)
    assert_bits_equal(packed.reshape(-1, BYTES), flat_packed)
    assert_bits_equal(norms.reshape(-1), flat_norms)
    assert tq.decode(packed, norms).shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(DIM,), (7, DIM), (3, 5, DIM)])
def test_layouts_do_not_matter(tq: TurboQuant, layout: str, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    laid_out = lay_out(x, layout)
    packed, norms = tq.encode(x)
    for ours, expected in zip(tq.encode(laid_out), (packed, norms), strict=True):
        assert_bits_equal(ours, expected)
    assert_bits_equal(laid_out.astype("f4"), x)  # input is left alone
    codes = packed if layout == "swapped" else lay_out(packed, layout)
    decoded = tq.decode(codes, lay_out(norms, layout))
    assert_bits_equal(decoded, tq.decode(packed, norms))
    scores = tq.inner_products(laid_out, codes, lay_out(norms, layout))
    assert_bits_equal(scores, tq.inner_products(x, packed, norms))


def test_repeated_rows_by_stride_zero(tq: TurboQuant) -> None:
    x = np.broadcast_to(gaussian(DIM), (4, DIM))
    packed, _ = tq.encode(x)
    assert (packed == packed[0]).all()


# -- what is no array, or no plain one -------------------------------------------------------------


@pytest.mark.parametrize("x", [[1.0] * DIM, (1.0,), 3.0, None, "text", range(48)])
def test_what_is_no_array_is_refused(tq: TurboQuant, x: Any) -> None:
    name = re.escape(f"{type(x).__module__}.{type(x).__qualname__}")
    with pytest.raises(
        TypeError, match=rf"x must be a NumPy or CuPy array .* got {name}; numpy.asa"
    ):
        tq.encode(x)


def test_one_vector_of_many_is_decoded(tq: TurboQuant) -> None:
    packed, norms = tq.encode(gaussian(3, DIM))
    assert isinstance(norms[1], np.float32)  # a scalar, no array
    assert_bits_equal(tq.decode(packed[1], norms[1]), tq.decode(packed, norms)[1])


def test_masked_arrays_are_refused(tq: TurboQuant) -> None:
    with pytest.raises(TypeError, match="x is a masked array, whose mask would be lost"):
        tq.encode(np.ma.masked_invalid(gaussian(2, DIM)))


def test_subclasses_are_plain_arrays_here(tq: TurboQuant) -> None:
    class Odd(np.ndarray):  # as numpy.matrix, whose * is a matrix product
        def __mul__(self, other: Any) -> Any:
            raise AssertionError("the operator of the subclass was used")

    x = gaussian(3, DIM)
    packed, _ = tq.encode(x.view(Odd))
    assert type(packed) is np.ndarray
    assert_bits_equal(packed, tq.encode(x)[0])


# -- packed codes and scales -----------------------------------------------------------------------


def test_packed_codes_are_checked(tq: TurboQuant) -> None:
    packed, norms = tq.encode(gaussian(2, 3, DIM))
    for call in (tq.decode, lambda *encoded: tq.inner_products(gaussian(DIM), *encoded)):
        for dtype in (np.int8, np.int64, np.float32, bool):
            with pytest.raises(TypeError, match=f"packed must be uint8 .*, got {np.dtype(dtype)}"):
                call(packed.astype(dtype), norms)
        with pytest.raises(ValueError, match=r"axis of 18 bytes \(48 codes of 3 bits\), got shape"):
            call(packed[..., :-1], norms)
        with pytest.raises(ValueError, match=r"axis of 18 bytes .*, got shape \(\)"):
            call(np.array(3, np.uint8), norms)
        with pytest.raises(TypeError, match="packed must be a NumPy or CuPy array"):
            call(packed.tolist(), norms)


def test_scales_are_checked(tq: TurboQuant) -> None:
    packed, norms = tq.encode(gaussian(2, 3, DIM))
    for call in (tq.decode, lambda *encoded: tq.inner_products(gaussian(DIM), *encoded)):
        for dtype in (np.float16, np.float64, np.int32):
            with pytest.raises(
                TypeError, match="norms must be float32 as encode returns them, got"
            ):
                call(packed, norms.astype(dtype))
        for wrong in (norms[0], norms[:, :2], norms[..., None], norms.T):
            with pytest.raises(ValueError, match=r"norms must have the shape .* \(2, 3\), got"):
                call(packed, wrong)
        with pytest.raises(TypeError, match="norms must be a NumPy or CuPy array"):
            call(packed, norms.tolist())


# -- out= ------------------------------------------------------------------------------------------


def outputs(tq: TurboQuant) -> tuple[Any, dict[str, Any]]:
    """Calls that take out=, as functions of it, and outputs that fit."""
    x = gaussian(4, DIM)
    packed, norms = tq.encode(x)
    calls = {
        "out[0]": lambda out: tq.encode(x, out=(out, np.empty(4, np.float32))),
        "out[1]": lambda out: tq.encode(x, out=(np.empty((4, BYTES), np.uint8), out)),
        "decode": lambda out: tq.decode(packed, norms, out=out),
        "inner_products": lambda out: tq.inner_products(x, packed, norms, out=out),
    }
    fitting = {
        "out[0]": np.empty((4, BYTES), np.uint8),
        "out[1]": np.empty(4, np.float32),
        "decode": np.empty((4, DIM), np.float16),
        "inner_products": np.empty((4, 4), np.float32),
    }
    return calls, fitting


@pytest.mark.parametrize("which", ["out[0]", "out[1]", "decode", "inner_products"])
def test_outputs_are_checked(tq: TurboQuant, which: str) -> None:
    calls, fitting = outputs(tq)
    call, out = calls[which], fitting[which]
    name = re.escape(which) if which.startswith("out") else "out"
    call(out)
    with pytest.raises(ValueError, match=rf"{name} must have shape .*, got \(3"):
        call(out[:3])
    with pytest.raises(TypeError, match=rf"{name} must be .*, got int32"):
        call(out.astype(np.int32))
    with pytest.raises(TypeError, match=rf"{name} must be a NumPy or CuPy array"):
        call(out.tolist())
    wide = np.empty(tuple(2 * n for n in out.shape), out.dtype)
    with pytest.raises(ValueError, match=f"{name} must be C-contiguous"):
        call(wide[tuple(slice(None, None, 2) for _ in out.shape)])
    with pytest.raises(ValueError, match=f"{name} is read-only"):
        call(lay_out(out, "read-only"))
    if out.dtype != np.uint8:
        for layout in ("swapped", "offset"):
            with pytest.raises(ValueError, match="aligned and in native byte order"):
                call(lay_out(out, layout))


def test_encode_needs_a_pair_of_outputs(tq: TurboQuant) -> None:
    x = gaussian(2, DIM)
    for out in (np.empty((2, BYTES), np.uint8), [1, 2], (1,), (1, 2, 3)):
        with pytest.raises(TypeError, match=r"out must be a tuple \(packed, norms\)"):
            tq.encode(x, out=out)  # type: ignore[arg-type]


def test_scalars_are_no_outputs(tq: TurboQuant) -> None:
    with pytest.raises(TypeError, match=r"out\[1\] must be an array to write into, got a scalar"):
        tq.encode(gaussian(DIM), out=(np.empty(BYTES, np.uint8), np.float32(0)))
    one_vector = np.empty(BYTES, np.uint8), np.empty((), np.float32)
    assert tq.encode(gaussian(DIM), out=one_vector) is one_vector
    assert one_vector[1] == tq.encode(gaussian(DIM))[1]


def test_dtype_and_out_must_not_contradict(tq: TurboQuant) -> None:
    packed, norms = tq.encode(gaussian(2, DIM))
    out = np.empty((2, DIM), np.float32)
    assert tq.decode(packed, norms, dtype="float32", out=out) is out
    with pytest.raises(ValueError, match="dtype is float16 but out has dtype float32; give one"):
        tq.decode(packed, norms, dtype="float16", out=out)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 0}, ValueError, "Supported bit-widths: 1, 2, 3, 4, 5, 6, 7, 8. Got 0"),
        ({"bits": 9}, ValueError, "Got 9"),
        ({"bits": True}, TypeError, "bits must be an integer from 1 to 8, got True"),
        ({"bits": 4.0}, TypeError, "got 4.0"),
        ({"bits": "4"}, TypeError, "got '4'"),
        ({"head_dim": 1}, ValueError, "head_dim must be an integer >= 2, got 1"),
        ({"head_dim": 128.0}, TypeError, "head_dim must be an integer >= 2, got 128.0"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"hadamard_rounds": 0}, ValueError, "hadamard_rounds must be from 1 to 16, got 0"),
        ({"hadamard_rounds": 2.0}, TypeError, "hadamard_rounds must be an integer >= 1, got 2.0"),
        ({"device": "tpu"}, ValueError, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"scale": "max"}, ValueError, "scale must be one of norm, mse, unbiased, got 'max'"),
        ({"rotation": "givens"}, ValueError, "one of hadamard, haar or an orthogonal matrix, got"),
        ({"rotation": "haar", "use_hadamard": True}, ValueError, "use_hadamard=True contradicts"),
        (
            {"head_dim": 2, "rotation": np.eye(2), "use_hadamard": False},
            ValueError,
            "give use_hadamard or a rotation matrix, not both",
        ),
    ],
)
def test_settings_are_checked(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    for make in (TurboQuantConfig, TurboQuant):
        with pytest.raises(error, match=re.escape(message)):
            make(**settings)


def test_unknown_settings_are_listed() -> None:
    message = "unknown settings: bit_width, dim; the known ones are head_dim, bits, seed"
    with pytest.raises(TypeError, match=message):
        TurboQuant(dim=64, bit_width=3)


def test_a_config_excludes_keywords() -> None:
    with pytest.raises(TypeError, match=r"not both \(got bits, seed\); dataclasses.replace"):
        TurboQuant(TurboQuantConfig(), bits=3, seed=1)


@pytest.mark.parametrize("first", [128, {"head_dim": 128}, "hadamard"])
def test_settings_are_not_positional(first: Any) -> None:
    with pytest.raises(TypeError, match=r"for example TurboQuant\(head_dim=128, bits=4\)"):
        TurboQuant(first)


def test_configs_do_not_change() -> None:
    config = TurboQuantConfig(bits=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4  # type: ignore[misc]
    assert TurboQuant(dataclasses.replace(config, bits=5)).bits == 5


def test_integers_of_numpy_are_integers() -> None:
    tq = TurboQuant(head_dim=np.int64(64), bits=np.uint8(3), seed=np.int32(7))
    x = gaussian(2, 64)
    assert_bits_equal(tq.encode(x)[0], TurboQuant(head_dim=64, bits=3, seed=7).encode(x)[0])


@pytest.mark.parametrize("backend", ["gpu", "numpy", "", 3])
def test_unknown_backends_are_refused(backend: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown backend .*; known: auto, reference, cpu, cuda"):
        TurboQuant(head_dim=DIM, backend=backend).encode(gaussian(2, DIM))


def test_a_backend_of_another_device_is_refused() -> None:
    x = gaussian(2, DIM)
    with pytest.raises(ValueError, match=r"works on a GPU .*CuPy.*, the array is in host memory"):
        TurboQuant(head_dim=DIM, backend="cuda").encode(x)
    with pytest.raises(ValueError, match="has device='cuda', got a NumPy array in host memory"):
        TurboQuant(head_dim=DIM, device="cuda").encode(x)
    TurboQuant(head_dim=DIM, device="cpu", backend="reference").encode(x)


# -- devices, shown with arrays that only claim to be on a GPU -------------------------------------


class ClaimedGpuArray:
    def __init__(self, array: Any, device: int) -> None:
        self.array, self.device = array, SimpleNamespace(id=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)


def test_arrays_in_different_memories_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=ClaimedGpuArray))
    tq = TurboQuant(head_dim=DIM, bits=BITS, backend="reference")
    x = gaussian(2, DIM)
    packed, norms = tq.encode(x)
    first, second = (ClaimedGpuArray(norms, device) for device in (0, 1))
    with pytest.raises(ValueError, match="norms and packed must live in the same memory, got cuda"):
        tq.decode(packed, first)
    with pytest.raises(ValueError, match="norms is on CUDA device 1 and packed on device 0"):
        tq.decode(ClaimedGpuArray(packed, 0), second)
    with pytest.raises(ValueError, match="query and packed must live in the same memory, got cuda"):
        tq.inner_products(ClaimedGpuArray(x, 0), packed, norms)
    with pytest.raises(ValueError, match=r"out\[1\] and the input must live in the same memory"):
        tq.encode(x, out=(packed, first))
    with pytest.raises(ValueError, match=r"'reference' works on host memory .*in a GPU \(CuPy\)"):
        tq.encode(ClaimedGpuArray(x, 0))
    with pytest.raises(ValueError, match="has device='cpu', got a CuPy array on a GPU"):
        TurboQuant(head_dim=DIM, device="cpu").encode(ClaimedGpuArray(x, 0))


def test_bfloat16_without_ml_dtypes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    tq = TurboQuant(head_dim=DIM, backend="reference")
    encoded = tq.encode(gaussian(2, DIM))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"pip install 'turboquant-np\[bfloat16\]'"):
        tq.decode(*encoded, dtype="bfloat16")
