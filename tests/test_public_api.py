"""What is public is what `__all__` says, exists, and is documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import fields
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from typing import Any

import pytest

import turboquant_np
from turboquant_np import TurboQuantConfig
from turboquant_np._backend import BUILT_IN, Backend, load

# Modules of ours that need a package which only an extra installs.
OPTIONAL = {
    "turboquant_np.bench.plot": "matplotlib",
    "turboquant_np.commands.demo_plot": "matplotlib",
    "turboquant_np.dask": "dask",
    "turboquant_np.numcodecs": "numcodecs",
    "turboquant_np.safetensors": "safetensors",
    "turboquant_np.zarr": "zarr",
    "turboquant_np.zarr_pipeline": "zarr",
}


def public_modules() -> list[str]:
    """Every importable module of the core that has no leading underscore."""
    found = ["turboquant_np"]
    for module in pkgutil.walk_packages(turboquant_np.__path__, "turboquant_np."):
        parts = module.name.split(".")
        needs = OPTIONAL.get(module.name, "numpy")
        if not any(part.startswith("_") for part in parts) and find_spec(needs) is not None:
            found.append(module.name)
    return [name for name in found if not name.startswith("turboquant_np.backends")]


def test_the_names_of_the_package() -> None:
    assert {"FORMAT_VERSION", "TurboQuant", "TurboQuantConfig"} <= set(turboquant_np.__all__)
    assert turboquant_np.__version__ == version("turboquant-np")


@pytest.mark.parametrize("name", public_modules())
def test_all_is_true(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ or name == "turboquant_np.data"
    exported: list[str] = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for member in exported:
        value = getattr(module, member)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{member} has no docstring"


def test_every_setting_is_documented() -> None:
    text = inspect.getdoc(TurboQuantConfig) or ""
    for field in fields(TurboQuantConfig):
        assert f"\n{field.name} : " in text


@pytest.mark.parametrize("name", BUILT_IN)
def test_backends_have_every_member_of_the_contract(name: str) -> None:
    backend = load(name)
    assert load(name) is backend
    for member, contract in inspect.getmembers(Backend, inspect.isfunction):
        if member.startswith("_"):
            continue
        ours: Any = getattr(backend, member)
        expected = list(inspect.signature(contract).parameters)[1:]  # without self
        assert list(inspect.signature(ours).parameters) == expected, member
    assert set(Backend.__annotations__) <= set(dir(backend))


def test_the_dispatch_knows_the_built_in_backends() -> None:
    assert set(BUILT_IN) == {"reference", "cpu", "cuda"}


def test_entry_points() -> None:
    (plugin,) = entry_points(group="pytest11", name="turboquant_np")
    assert plugin.value == "turboquant_np.testing.pytest_plugin"
    for script in entry_points(group="console_scripts", name="turboquant-np"):
        assert callable(script.load())
