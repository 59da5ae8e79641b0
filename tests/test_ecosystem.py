"""Other people's containers: xarray, scikit-learn, arrays of torch and JAX; and absent packages."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import QuantizedArray, TurboQuant
from turboquant_np.fused_attention import TQPagedAttention
from turboquant_np.testing import assert_bits_equal

EXTRAS = {
    "turboquant_np.zarr": ("zarr", "zarr"),
    "turboquant_np.zarr_pipeline": ("zarr", "zarr"),
    "turboquant_np.numcodecs": ("numcodecs", "zarr"),
    "turboquant_np.dask": ("dask", "dask"),
    "turboquant_np.safetensors": ("safetensors", "io"),
}


@pytest.fixture
def tq() -> TurboQuant:
    return TurboQuant(head_dim=64, bits=4, dtype="float32")


def run(code: str, cwd: Path) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True).stdout


# -- imported only when used -----------------------------------------------------------------------


def test_the_package_imports_no_integration(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, turboquant_np as t\n"
        "t.TurboQuant(backend='reference').encode(np.ones(128))\n"
        "t.save('x.npz', t.QuantizedArray.encode(np.ones((2, 128)), t.TurboQuant()))\n"
        "print(*sys.modules)"
    )
    loaded = set(run(code, tmp_path).split())
    assert "turboquant_np" in loaded
    assert not loaded & {"zarr", "numcodecs", "dask", "distributed", "xarray", "safetensors"}


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(module: str, tmp_path: Path) -> None:
    package, extra = EXTRAS[module]
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try: import {module}\n"
        "except ImportError as error: print(error)"
    )
    said = run(code, tmp_path)
    assert said.startswith(f"{module} needs {package}")
    assert said.endswith(f": pip install 'turboquant-np[{extra}]'\n")


def test_modules_named_like_packages_do_not_hide_them(tmp_path: Path) -> None:
    for module, (package, _) in EXTRAS.items():
        pytest.importorskip(package)
        code = f"import {module}, {package}; print({package}.__name__, {module}.__name__)"
        assert run(code, tmp_path).split() == [package, module]


# -- xarray ----------------------------------------------------------------------------------------


@pytest.fixture
def labelled() -> Any:
    xr = pytest.importorskip("xarray", reason="needs xarray")
    values = np.random.default_rng(7).standard_normal((10, 6, 64)).astype("f4")
    return xr.DataArray(
        values, dims=("time", "station", "feature"), coords={"time": np.arange(10)}, name="x"
    )


def encode(tq: TurboQuant, x: Any, **settings: Any) -> Any:
    import xarray as xr

    return xr.apply_ufunc(
        tq.encode,
        x,
        input_core_dims=[["feature"]],
        output_core_dims=[["byte"], []],
        output_dtypes=[np.uint8, np.float32],
        dask_gufunc_kwargs={"output_sizes": {"byte": tq.packed_dim}},
        **settings,
    )


def test_apply_ufunc_finds_the_axis_by_its_name(labelled: Any, tq: TurboQuant) -> None:
    packed, norms = encode(tq, labelled.transpose("feature", "station", "time"))
    assert (packed.dims, norms.dims) == (("station", "time", "byte"), ("station", "time"))
    direct = tq.encode(labelled.values)
    assert_bits_equal(packed.transpose("time", "station", "byte").values, direct[0])
    assert_bits_equal(norms.transpose("time", "station").values, direct[1])
    assert norms.time.equals(labelled.time)


def test_apply_ufunc_on_dask_chunks(labelled: Any, tq: TurboQuant) -> None:
    dask = pytest.importorskip("dask", reason="needs the dask extra")
    packed, norms = encode(tq, labelled.chunk(time=3), dask="parallelized")
    assert (packed.chunks[0], packed.dtype, norms.dtype) == ((3, 3, 3, 1), "u1", "f4")
    direct = tq.encode(labelled.values)
    for lazy, right in zip(dask.compute(packed, norms), direct, strict=True):
        assert_bits_equal(lazy.values, right)


def test_an_xarray_dataset_in_quantised_zarr(labelled: Any, tq: TurboQuant, tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="needs the zarr extra")
    import xarray as xr

    from turboquant_np.zarr import TurboQuantCodec

    stored = {"serializer": TurboQuantCodec(bits=4), "compressors": None, "fill_value": 0.0}
    labelled.to_dataset().to_zarr(
        tmp_path / "z", zarr_format=3, consolidated=False, encoding={"x": stored}
    )
    with xr.open_zarr(tmp_path / "z", consolidated=False) as restored:
        assert restored.x.dims == labelled.dims
        assert_bits_equal(restored.x.values, tq.decode(*tq.encode(labelled.values)))
        assert restored.time.values.tolist() == list(range(10))


# -- scikit-learn ----------------------------------------------------------------------------------


def test_a_scikit_learn_pipeline(tq: TurboQuant) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from sklearn.base import clone
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    x, y = load_digits(return_X_y=True)
    assert x.shape == (1797, 64)
    quantise = FunctionTransformer(lossy, kw_args={"quantizer": tq})
    assert_bits_equal(quantise.fit_transform(x), tq.decode(*tq.encode(x)))

    model = clone(make_pipeline(quantise, KNeighborsClassifier(3))).fit(x[:1000], y[:1000])
    plain = KNeighborsClassifier(3).fit(x[:1000], y[:1000])
    assert plain.score(x[1000:], y[1000:]) - model.score(x[1000:], y[1000:]) < 0.01
    again = pickle.loads(pickle.dumps(model))
    assert again.predict(x[1000:]).tolist() == model.predict(x[1000:]).tolist()


def lossy(x: Any, quantizer: TurboQuant) -> Any:
    return quantizer.decode(*quantizer.encode(x))


# -- arrays of other libraries ---------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_arrays_of_other_libraries_give_the_same_bits(library: str, tq: TurboQuant) -> None:
    xp: Any = pytest.importorskip(library)
    x = np.random.default_rng(7).standard_normal((5, 64)).astype("f4")
    theirs = xp.asarray(x.copy())
    packed, norms = tq.encode(theirs)
    restored, scores = tq.decode(packed, norms), tq.inner_products(theirs, packed, norms)
    assert {type(a) for a in (packed, norms, restored, scores)} == {type(theirs)}
    direct = tq.encode(x)
    assert_bits_equal(np.from_dlpack(packed), direct[0])
    assert_bits_equal(np.from_dlpack(norms), direct[1])
    assert_bits_equal(np.from_dlpack(restored), tq.decode(*direct))
    np.testing.assert_allclose(
        np.from_dlpack(scores), tq.inner_products(x, *direct), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_quantised_arrays_of_other_libraries(library: str, tq: TurboQuant) -> None:
    xp: Any = pytest.importorskip(library)
    x = np.random.default_rng(7).standard_normal((5, 64)).astype("f4")
    theirs, ours = QuantizedArray.encode(xp.asarray(x), tq), QuantizedArray.encode(x, tq)
    assert_bits_equal(np.asarray(theirs.packed), ours.packed)
    assert_bits_equal(np.asarray(theirs.decode()), ours.decode())


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_attention_on_arrays_of_other_libraries(library: str, tq: TurboQuant) -> None:
    xp: Any = pytest.importorskip(library)
    rng = np.random.default_rng(7)
    query = rng.standard_normal((1, 4, 64)).astype("f4")
    keys, values = rng.standard_normal((2, 2, 16, 2, 64)).astype("f4")
    table, lengths = np.array([[1, 0]], "i4"), np.array([27], "i4")
    arrays = [query, *tq.encode(keys), *tq.encode(values), table, lengths]
    attention = TQPagedAttention(tq, num_query_heads=4)
    ours = attention(*arrays)
    theirs = attention(*(xp.asarray(a.copy()) for a in arrays))
    assert type(theirs) is type(xp.asarray(query.copy()))
    np.testing.assert_allclose(np.from_dlpack(theirs), ours, rtol=1e-6)
