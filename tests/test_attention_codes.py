"""How codes become fragments of products in the attention kernels, run on the host.

The kernels' own functions are compiled by a C++ compiler, with the instructions that only a GPU has
written out, and every lane of a warp is run in turn.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import TurboQuant
from turboquant_np.backends.cuda.attention_constants import make_constants
from turboquant_np.backends.cuda.source import variant_source
from turboquant_np.packing import unpack

COMPILER = shutil.which("c++")
PROGRAM = Path(__file__).with_name("attention_codes.cpp")
HEADS, PAGE, ROWS = 8, 16, 8
Floats = npt.NDArray[np.float32]


def host_program(folder: Path, macros: dict[str, int]) -> Path:
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    source = variant_source("attention_tile.cuh", {})
    kernels = source[source.index("struct Args {") :]
    (folder / "kernels.h").write_text(defines + kernels, "utf-8")
    program = folder / "codes"
    options = ["-std=c++17", "-O1", "-w", f"-I{folder}"]
    command = [str(COMPILER), *options, str(PROGRAM), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return program


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize(
    ("bits", "head_dim", "pairs"),
    [
        ((2, 2), 128, 0),
        ((3, 3), 128, 0),
        ((4, 4), 128, 0),
        ((5, 5), 128, 0),
        ((5, 5), 128, 1),
        ((6, 6), 128, 0),
        ((7, 8), 128, 0),
        ((4, 3), 128, 0),
        ((2, 2), 64, 0),
        ((3, 2), 64, 0),
        ((5, 5), 64, 1),
        ((7, 7), 64, 0),
        ((2, 3), 256, 0),
        ((5, 5), 256, 1),
        ((2, 2), 96, 0),
        ((3, 3), 96, 0),
        ((4, 4), 96, 0),
        ((5, 5), 96, 0),
        ((5, 5), 96, 1),
        ((6, 6), 96, 0),
        ((7, 7), 96, 0),
        ((8, 8), 96, 0),
        ((5, 3), 96, 0),
    ],
)
def test_fragments_are_the_decoded_vectors(
    bits: tuple[int, int],
    head_dim: int,
    pairs: int,
    head_major: bool,
    tmp_path: Path,
) -> None:
    macros = {
        "D": head_dim,
        "KEY_BITS": bits[0],
        "VALUE_BITS": bits[1],
        "BLOCK_SIZE": PAGE,
        "HEADS": HEADS,
        "SHARES": 1,
        "SUB": 1,
        "UNIT": 16,
        "HEAD_MAJOR": int(head_major),
        "ROW_TILES": 1,
        "FUSED": 0,
        "PAIRS": pairs,
    }
    program = host_program(tmp_path, macros)
    rng = np.random.default_rng(head_dim + sum(bits))
    tables, pages, vectors = [], [], []
    for b in bits:
        spec = TurboQuant(head_dim=head_dim, bits=b)._spec
        table = make_constants(spec)["centroids"]
        codes = rng.integers(0, 256, (PAGE, HEADS, spec.packed_dim), np.uint8)
        stored = codes.swapaxes(0, 1) if head_major else codes
        tables.append(table)
        pages.append(stored.tobytes())
        vectors.append(table[unpack(codes, b, head_dim)])
    query = rng.integers(-8, 9, (ROWS, head_dim)).astype(np.float32)
    norms = bytes(2 * 4 * PAGE * HEADS)
    given = b"".join([*(t.tobytes() for t in tables), *pages, norms, query.tobytes()])
    got = subprocess.run([program], input=given, capture_output=True, check=True).stdout
    each: Any = np.frombuffer(got, np.float32).reshape(HEADS, PAGE, ROWS + head_dim)
    flat = each.reshape(HEADS, -1)
    scores = flat[:, : PAGE * ROWS].reshape(HEADS, PAGE, ROWS)
    values = flat[:, PAGE * ROWS :].reshape(HEADS, PAGE, head_dim)
    np.testing.assert_array_equal(values, vectors[1].swapaxes(0, 1))
    want = np.einsum("thd,rd->htr", vectors[0].astype(np.float64), query)
    np.testing.assert_allclose(scores, want, atol=1e-3)
