"""Arrays of other libraries: viewed where they lie, and answered in kind."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np._arrays import take_in
from turboquant_np.testing import assert_bits_equal

DIM = 64


@pytest.fixture
def tq(backend: str) -> TurboQuant:
    return TurboQuant(head_dim=DIM, bits=4, backend=backend)


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def jax() -> Any:
    """JAX on the host, also where it has a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own start
        module = pytest.importorskip("jax")
        module.config.update("jax_platforms", "cpu")
        return module


def gaussian(*shape: int) -> Any:
    return np.random.Generator(np.random.PCG64([2, *shape])).standard_normal(shape, np.float32)


# -- torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_tensors_come_back_as_torch_tensors(tq: TurboQuant, torch: Any, dtype: str) -> None:
    x = torch.from_numpy(gaussian(2, 5, DIM)).to(getattr(torch, dtype))
    packed, norms = tq.encode(x)
    assert (packed.dtype, norms.dtype) == (torch.uint8, torch.float32)
    expected = tq.encode(x.to(torch.float64).numpy())
    assert_bits_equal(packed.numpy(), expected[0])
    assert_bits_equal(norms.numpy(), expected[1])
    decoded = tq.decode(packed, norms, dtype=x.dtype)
    assert decoded.dtype == x.dtype
    assert decoded.shape == x.shape
    exact = torch.from_numpy(tq.decode(*expected, dtype="float32"))
    assert torch.equal(decoded, exact.to(x.dtype))
    scores = tq.inner_products(x, packed, norms)
    assert (scores.dtype, scores.shape) == (torch.float32, (2, 5, 2, 5))
    assert tq.decode(packed, norms).dtype == torch.float16  # the default, as for NumPy


def test_torch_input_is_not_copied(torch: Any) -> None:
    x = torch.zeros(4, DIM)
    view, _ = take_in(x, "x")
    assert view.ctypes.data == x.data_ptr()
    view, _ = take_in(x.to(torch.bfloat16)[::2], "x")
    assert view.dtype == ml_dtypes.bfloat16
    assert view.strides == (4 * DIM, 2)


@pytest.mark.parametrize("transform", [lambda t: t[::2], lambda t: t[:, ::2], lambda t: t.mT])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_strides(tq: TurboQuant, torch: Any, transform: Any, dtype: str) -> None:
    base = torch.from_numpy(gaussian(2 * DIM, 2 * DIM)).to(getattr(torch, dtype))
    x = transform(base)[:, :DIM]
    assert torch.equal(tq.encode(x)[0], tq.encode(x.contiguous())[0])


def test_torch_outputs_are_filled(tq: TurboQuant, torch: Any) -> None:
    x = torch.from_numpy(gaussian(3, DIM))
    packed, norms = torch.empty(3, DIM // 2, dtype=torch.uint8), torch.empty(3)
    assert tq.encode(x, out=(packed, norms))[0] is packed
    expected = tq.encode(x)
    assert torch.equal(packed, expected[0])
    assert torch.equal(norms, expected[1])
    out = torch.empty(3, DIM, dtype=torch.bfloat16)
    assert tq.decode(packed, norms, out=out) is out
    assert torch.equal(out, tq.decode(packed, norms, dtype=torch.bfloat16))


def test_torch_tensors_with_gradients_are_refused(tq: TurboQuant, torch: Any) -> None:
    x = torch.zeros(2, DIM, requires_grad=True)
    with pytest.raises(TypeError, match=r"x requires grad.*pass x.detach\(\)"):
        tq.encode(x)
    assert tq.encode(x.detach())[1].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_other_torch_dtypes_are_refused(tq: TurboQuant, torch: Any, dtype: str) -> None:
    with pytest.raises(TypeError, match=r"x must be float16|unsupported ScalarType"):
        tq.encode(torch.zeros(2, DIM).to(getattr(torch, dtype)))


def test_torch_tensors_without_memory_are_refused(tq: TurboQuant, torch: Any) -> None:
    with pytest.raises(ValueError, match="device type meta"):
        tq.encode(torch.zeros(2, DIM, device="meta"))


def test_empty_torch_tensors(tq: TurboQuant, torch: Any) -> None:
    packed, norms = tq.encode(torch.zeros(0, DIM))
    assert (packed.shape, norms.shape) == ((0, DIM // 2), (0,))
    assert tq.decode(packed, norms, dtype=torch.bfloat16).shape == (0, DIM)


# -- JAX -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax_arrays_come_back_as_jax_arrays(tq: TurboQuant, jax: Any, dtype: str) -> None:
    x = jax.numpy.asarray(gaussian(3, DIM), dtype)
    packed, norms = tq.encode(x)
    assert isinstance(packed, jax.Array)
    assert isinstance(norms, jax.Array)
    expected = tq.encode(np.asarray(x))
    assert_bits_equal(np.asarray(packed), expected[0])
    assert_bits_equal(np.asarray(norms), expected[1])
    decoded = tq.decode(packed, norms, dtype=x.dtype)
    assert isinstance(decoded, jax.Array)
    assert decoded.dtype == x.dtype
    assert_bits_equal(np.asarray(decoded), tq.decode(*expected, dtype=dtype))


def test_jax_outputs_are_refused(tq: TurboQuant, jax: Any) -> None:
    packed, norms = tq.encode(gaussian(3, DIM))
    with pytest.raises(ValueError, match="out is read-only"):
        tq.decode(packed, norms, out=jax.numpy.zeros((3, DIM)))


# -- the array API standard ------------------------------------------------------------------------


def test_arrays_of_the_standard_come_back_as_such(tq: TurboQuant) -> None:
    xp = pytest.importorskip("array_api_strict")
    x = xp.asarray(gaussian(3, DIM))
    packed, norms = tq.encode(x)
    assert isinstance(packed, type(x))
    decoded = tq.decode(packed, norms, dtype="float32")
    assert isinstance(decoded, type(x))
    expected = tq.decode(*tq.encode(gaussian(3, DIM)), dtype="float32")
    assert_bits_equal(np.from_dlpack(decoded), expected)


# -- mixtures, and producers of DLPack alone -------------------------------------------------------


class Producer:
    """What offers DLPack and nothing else."""

    def __init__(self, array: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def test_mere_producers_are_answered_with_numpy_arrays(tq: TurboQuant) -> None:
    x = gaussian(3, DIM)
    packed, norms = tq.encode(Producer(x))
    assert type(packed) is np.ndarray
    assert_bits_equal(packed, tq.encode(x)[0])
    assert_bits_equal(norms, tq.encode(x)[1])
    view, _ = take_in(Producer(x), "x")
    assert np.shares_memory(view, x)


def test_other_devices_are_refused(tq: TurboQuant) -> None:
    with pytest.raises(TypeError, match="x lives on DLPack device type 8; move it to a CPU or a C"):
        tq.encode(Producer(gaussian(3, DIM), device=(8, 0)))  # Metal


def test_gpu_memory_without_cupy_names_the_extra(
    tq: TurboQuant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match=r"x is on a GPU; .*'turboquant-np\[cuda12\]'"):
        tq.encode(Producer(gaussian(3, DIM), device=(2, 0)))


def test_the_kind_of_the_codes_decides(tq: TurboQuant, torch: Any) -> None:
    x = gaussian(3, DIM)
    packed, norms = tq.encode(torch.from_numpy(x))
    assert isinstance(tq.inner_products(x, packed, norms), torch.Tensor)
    assert isinstance(tq.decode(packed, norms.numpy()), torch.Tensor)
    assert isinstance(tq.decode(packed.numpy(), norms), np.ndarray)
