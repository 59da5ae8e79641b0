"""What the documentation prints is what the library does: code blocks, docstrings, format.md."""

from __future__ import annotations

import doctest
import importlib
import io
import json
import pkgutil
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import turboquant_np
from turboquant_np import TurboQuant
from turboquant_np.codebook import unit_variance_centroids
from turboquant_np.rotation import haar_rotation, random_signs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts and page.exists()]

# -- code blocks of the pages ----------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"# needs (.+)")


@dataclass(frozen=True)
class Block:
    """A ```python block; `expected` is the ```text block right behind it, if there is one."""

    line: int
    code: str
    expected: str | None

    @property
    def unmet(self) -> list[str]:
        """What the first line, "# needs torch, a GPU", asks for and this machine lacks."""
        asked = NEEDS.match(self.code)
        return [need for need in asked[1].split(", ") if not is_met(need)] if asked else []


def is_met(need: str) -> bool:
    if need != "a GPU":
        return find_spec(need) is not None
    if find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


def python_blocks(text: str) -> list[Block]:
    fences = list(FENCE.finditer(text))
    blocks = []
    for fence, following in zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        expected = None
        if (
            following
            and following[1] == "text"
            and not text[fence.end() : following.start()].strip()
        ):
            expected = following[2]
        blocks.append(Block(text.count("\n", 0, fence.start(2)), fence[2], expected))
    return blocks


def run_block(block: Block, path: Path, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    code = compile("\n" * block.line + block.code, str(path), "exec")
    with redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder, printing what the page says."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    left_out = []
    for block in python_blocks(page.read_text("utf-8")):
        if block.unmet:
            left_out.append(f"line {block.line} needs {', '.join(block.unmet)}")
            continue
        printed = run_block(block, page, namespace)
        if block.expected is not None:
            assert printed == block.expected
    if left_out:
        pytest.skip("the other blocks ran; " + "; ".join(left_out))


def test_the_runner_notices_wrong_output() -> None:
    (block,) = python_blocks("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    assert block.expected == "2\n"
    assert run_block(block, Path("page.md"), {}) == "1\n"


# -- docstrings ------------------------------------------------------------------------------------


def module_names() -> list[str]:
    found = pkgutil.walk_packages(turboquant_np.__path__, "turboquant_np.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    return sorted({"turboquant_np", "turboquant_np.backends.reference", *names})


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} needs {error.name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


# -- docs/format.md --------------------------------------------------------------------------------

FORMAT = DOCS / "format.md"
VECTORS = json.loads((DOCS / "test_vectors.json").read_text("ascii"))


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The definitions of docs/format.md."""
    namespace: dict[str, Any] = {"__name__": "format"}
    for block in python_blocks(FORMAT.read_text("utf-8")):
        run_block(block, FORMAT, namespace)
    return namespace


def from_bits(words: list[str]) -> Any:
    values = [0x7FC00000 if word == "nan" else int(word, 16) for word in words]
    return np.array(values, np.uint32).view(np.float32)


def assert_same_floats(actual: Any, expected: Any) -> None:
    """Equal bits, any NaN being equal to any other."""
    a, b = np.atleast_1d(np.asarray(actual)), np.atleast_1d(np.asarray(expected))
    assert a.dtype == b.dtype == np.float32
    both_nan = np.isnan(a) & np.isnan(b)
    np.testing.assert_array_equal(
        np.where(both_nan, 0, a.view(np.uint32)), np.where(both_nan, 0, b.view(np.uint32))
    )


def page_encodes_and_decodes(
    page: dict[str, Any], tq: TurboQuant, x: Any
) -> tuple[bytes, Any, Any]:
    """(packed, stored, decoded) by the code of the page alone."""
    config, d, bits = tq.config, tq.head_dim, tq.bits
    positive = unit_variance_centroids(d, bits)[2 ** (bits - 1) :].tolist()
    rotation = (
        page["Hadamard"](d, config.seed, config.hadamard_rounds)
        if config.rotation_kind == "hadamard"
        else page["Dense"](page["haar_matrix"](d, config.seed))
    )
    with np.errstate(all="ignore"):
        packed, stored = page["encode"](list(x), bits, positive, rotation, config.scale)
        decoded = page["decode"](packed, stored, d, bits, positive, rotation)
    return packed, stored, np.array(decoded)


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_test_vectors(page: dict[str, Any], vector: dict[str, Any], backend: str) -> None:
    """The library and the code of the page both give the printed bits."""
    settings = {k: v for k, v in vector.items() if k in TurboQuant().config.__dict__}
    x = from_bits(vector["x"])
    tq = TurboQuant(head_dim=len(x), backend=backend, **settings)
    packed, stored = tq.encode(x, check_finite=False)
    decoded = tq.decode(packed, stored, dtype=np.float32)
    by_page = page_encodes_and_decodes(page, tq, x)
    for codes, scale, values in ((packed.tobytes(), stored, decoded), by_page):
        assert codes.hex() == vector["packed"]
        assert_same_floats(scale, from_bits([vector["stored"]])[0])
        assert_same_floats(values, from_bits(vector["decoded"]))


def test_rotations_of_the_page(page: dict[str, Any]) -> None:
    for entry in VECTORS["signs"]:
        assert random_signs(8, entry["seed"]).tolist() == entry["signs"]
        assert page["signs"](8, entry["seed"], 0) == entry["signs"]
    for entry in VECTORS["haar"]:
        assert haar_rotation(entry["d"], entry["seed"]).fixed.tolist() == entry["matrix"]
        assert page["haar_matrix"](entry["d"], entry["seed"]) == entry["matrix"]


def test_mt19937_of_the_page(page: dict[str, Any]) -> None:
    """Beyond one refill of the state, against NumPy."""
    numpy_stream = np.random.RandomState(99).randint(0, 2**32, 2000, np.uint32)
    assert page["mt19937"](99, 2000) == numpy_stream.tolist()


@given(
    bits=st.integers(1, 8),
    rotation=st.sampled_from(["hadamard", "haar"]),
    scale=st.sampled_from(["norm", "mse", "unbiased"]),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    numbers=st.one_of(
        st.lists(st.floats(width=32), min_size=2, max_size=20),
        st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=20),
    ),
)
def test_the_page_and_the_library_agree(
    page: dict[str, Any],
    bits: int,
    rotation: str,
    scale: str,
    rounds: int,
    seed: int,
    numbers: list[float],
) -> None:
    """NaN, infinities, subnormal numbers and mixed magnitudes included."""
    x = np.array(numbers, np.float32)
    tq = TurboQuant(
        head_dim=len(x),
        bits=bits,
        rotation=rotation,
        scale=scale,
        hadamard_rounds=rounds,
        seed=seed,
        backend="reference",
    )
    packed, stored = tq.encode(x, check_finite=False)
    by_page = page_encodes_and_decodes(page, tq, x)
    assert packed.tobytes() == by_page[0]
    assert_same_floats(stored, by_page[1])
    assert_same_floats(tq.decode(packed, stored, dtype=np.float32), by_page[2])


def test_limit_on_rounds() -> None:
    """d**rounds = 2**192 works at the largest norm of an unscaled row; more is refused."""
    d = 4096
    tq = TurboQuant(head_dim=d, bits=4, hadamard_rounds=16, backend="reference")
    x = np.zeros(d, np.float32)
    x[0] = 2.0**30
    error = tq.decode(*tq.encode(x), dtype=np.float32) - x
    assert np.linalg.norm(error) < 0.2 * 2.0**30
    with pytest.raises(ValueError, match="use fewer rounds"):
        TurboQuant(head_dim=2 * d, hadamard_rounds=16)


def test_codebook_tables_of_the_page() -> None:
    """The printed centroids are those of the shipped table, the hexadecimal ones are rounded."""
    text = FORMAT.read_text("utf-8")
    rows = re.findall(r"^\| ([1-4]) \| ([^|]*) \|(?: ([^|]*) \|)?$", text, re.MULTILINE)
    decimal = {int(b): first.split() for b, first, second in rows if not second}
    in_hex = {int(b): (first, second) for b, first, second in rows if second}
    assert sorted(decimal) == sorted(in_hex) == [1, 2, 3, 4]
    for bits, numbers in decimal.items():
        tq = TurboQuant(head_dim=64, bits=bits)
        positive = [float(number) for number in numbers]
        assert positive == unit_variance_centroids(64, bits)[2 ** (bits - 1) :].tolist()
        centroids, thresholds = (
            [float.fromhex(number) for number in re.findall(r"`(0x[^`]*)`", cell)]
            for cell in in_hex[bits]
        )
        assert centroids == tq._spec.centroids[2 ** (bits - 1) :].tolist()
        assert thresholds == tq._spec.thresholds[2 ** (bits - 1) :].tolist()
