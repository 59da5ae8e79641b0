"""pyproject.toml lists by hand what is packaged; here that list meets the folders."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Import name and folder of everything that has an __init__.py."""
    found = {}
    for name, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            found[".".join((name, *below))] = init.parent
    return found


def test_every_package_is_listed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_folders())


def test_every_module_lies_in_a_package() -> None:
    folders = set(package_folders().values())
    for folder in SETUPTOOLS["package-dir"].values():
        assert {module.parent for module in (ROOT / folder).rglob("*.py")} <= folders


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_other_file_is_package_data(package: str) -> None:
    patterns = SETUPTOOLS["package-data"].get(package, [])
    for file in package_folders()[package].iterdir():
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            assert any(file.match(pattern) for pattern in patterns), f"{file} is not packaged"


def test_what_is_read_at_run_time_is_there() -> None:
    assert (files("turboquant_np") / "py.typed").is_file()
    assert (files("turboquant_np.data") / "codebooks.csv").is_file()


def test_optional_dependencies_are_named_in_errors() -> None:
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    asked_for = {"testing", "bfloat16", "cuda12", "cuda13"}
    assert asked_for <= extras
    for source in [*(ROOT / "turboquant_np").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]:
        for part in source.read_text("utf-8").split("turboquant-np[")[1:]:
            named = part.partition("]")[0]
            assert "{" in named or set(named.split(",")) <= extras, f"{source}: {named}"


def test_the_core_needs_three_packages() -> None:
    names = [d.partition(">")[0] for d in PYPROJECT["project"]["dependencies"]]
    assert sorted(names) == ["numba", "numpy", "scipy"]
