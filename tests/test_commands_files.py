"""The commands quantize, restore and inspect, and their progress bar."""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import turboquant_np as tqn
from turboquant_np import QuantizedArray, StorageError, TurboQuant
from turboquant_np.commands import CommandError, files
from turboquant_np.commands.progress import ProgressBar, format_count, format_seconds
from turboquant_np.testing import assert_bits_equal


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder, which holds x.npy."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", normal(10, 16))
    return tmp_path


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal(shape, dtype=np.float32)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    files.add_parsers(parser.add_subparsers(required=True))
    arguments = parser.parse_args(words)
    code: int = arguments.run(arguments)
    return code


def assert_quantized(path: str, x: npt.NDArray[Any], **settings: Any) -> None:
    packed, norms = TurboQuant(head_dim=16, backend="reference", **settings).encode(x)
    q = tqn.load(path)
    assert_bits_equal(q.packed, packed)
    assert_bits_equal(q.norms, norms)
    assert q.dtype.name == x.dtype.name


# -- quantize --------------------------------------------------------------------------------------


def test_quantize_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", "x.npy") == 0
    assert_quantized("x.npz", normal(10, 16))
    out, err = capsys.readouterr()
    assert out == "x.npz: 10 x 16 float32 in 4 bits, 5.3 times smaller\n"
    assert err == ""


def test_quantize_with_every_option() -> None:
    options = "--bits 3 --rotation hadamard --rounds 2 --seed 9 --scale unbiased"
    words = f"quantize x.npy q.safetensors {options} --backend reference"
    assert run(*words.split()) == 0
    assert_quantized(
        "q.safetensors", normal(10, 16), bits=3, hadamard_rounds=2, seed=9, scale="unbiased"
    )


def test_quantize_with_other_rotations() -> None:
    assert run("quantize", "x.npy", "haar.npz", "--rotation", "haar") == 0
    assert_quantized("haar.npz", normal(10, 16), rotation="haar")
    matrix = np.linalg.qr(np.random.default_rng(8).standard_normal((16, 16)))[0]
    np.save("q.npy", matrix)
    assert run("quantize", "x.npy", "matrix.npz", "--rotation", "q.npy") == 0
    assert_quantized("matrix.npz", normal(10, 16), rotation=matrix)


def test_quantize_bfloat16() -> None:
    x = normal(4, 16).astype(ml_dtypes.bfloat16)
    np.save("b.npy", x)
    assert run("quantize", "b.npy", "--dtype", "bfloat16") == 0
    assert_quantized("b.npz", x)


def test_quantize_nan() -> None:
    x = normal(4, 16)
    x[2, 1] = np.nan
    np.save("nan.npy", x)
    with pytest.raises(ValueError, match=r"x\[2, 1\] is nan"):
        run("quantize", "nan.npy")
    assert not Path("nan.npz").exists()
    assert run("quantize", "nan.npy", "--no-check-finite") == 0
    assert np.isnan(tqn.load("nan.npz").norms).tolist() == [False, False, True, False]


@pytest.mark.parametrize("words", [["quantize", "x.npy", "out"], ["restore", "q.npz", "out"]])
def test_existing_files_are_kept_without_force(words: list[str]) -> None:
    run("quantize", "x.npy", "q.npz")
    out = "out.npz" if words[0] == "quantize" else "out.npy"
    words = [*words[:2], out]
    Path(out).write_text("precious")
    with pytest.raises(CommandError, match=f"{out} exists; --force overwrites it"):
        run(*words)
    assert Path(out).read_text() == "precious"
    assert run(*words, "--force") == 0
    assert Path(out).stat().st_size > 100


# -- restore ---------------------------------------------------------------------------------------


def test_restore(capsys: pytest.CaptureFixture[str]) -> None:
    q = QuantizedArray.encode(normal(10, 16), TurboQuant(head_dim=16, bits=5))
    tqn.save("q.npz", q)
    assert run("restore", "q.npz", "y.npy") == 0
    assert capsys.readouterr() == ("y.npy: 10 x 16 float32\n", "")
    assert_bits_equal(np.load("y.npy"), q.decode())
    for rows, selected in {
        "2:5": q[2:5],
        ":3": q[:3],
        "-2:": q[-2:],
        ":": q,
        "7:99": q[7:],
    }.items():
        words = ["--rows", rows] if rows[0] != "-" else [f"--rows={rows}"]
        assert run("restore", "q.npz", "y.npy", "--force", "--dtype", "float16", *words) == 0
        assert_bits_equal(np.load("y.npy"), selected.decode(dtype="float16"))


@pytest.mark.parametrize("rows", ["3", "a:b", "1:2:3", ""])
def test_rows_that_are_no_range(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run("restore", "q.npz", "y.npy", "--rows", rows)
    assert error.value.code == 2
    assert "rows are A:B, A: or :B" in capsys.readouterr().err


def test_a_single_vector_has_no_rows() -> None:
    np.save("v.npy", normal(16))
    assert run("quantize", "v.npy") == 0
    assert run("restore", "v.npz", "y.npy") == 0
    assert np.load("y.npy").shape == (16,)
    with pytest.raises(CommandError, match="single vector"):
        run("restore", "v.npz", "z.npy", "--rows", "0:1")


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    run("quantize", "x.npy", "--bits", "3")
    capsys.readouterr()
    assert run("inspect", "x.npz") == 0
    size = Path("x.npz").stat().st_size
    assert capsys.readouterr().out.splitlines() == [
        "x.npz: 10 x 16 float32 in 3 bits, 6.4 times smaller",
        "  rotation      hadamard, seed 42, 3 rounds",
        "  scale         norm",
        "  bits          3 a coordinate, 5 with the scales",
        "  packed codes  60 bytes",
        "  scales        40 bytes",
        f"  file          {size:,} bytes, format version 1",
        "  checksums     verified",
    ]


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    tq = TurboQuant(head_dim=16, bits=8, scale="mse", rotation=np.eye(16), backend="reference")
    packed, norms = tq.encode(normal(2, 3, 16))
    tqn.save("q.safetensors", QuantizedArray(packed, norms, tq, "bfloat16"))
    assert run("inspect", "q.safetensors", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "file": "q.safetensors",
        "format_version": 1,
        "shape": [2, 3, 16],
        "dtype": "bfloat16",
        "num_vectors": 6,
        "head_dim": 16,
        "bits": 8,
        "rotation": "matrix",
        "seed": None,
        "hadamard_rounds": None,
        "scale": "mse",
        "packed_bytes": 96,
        "scale_bytes": 24,
        "original_bytes": 192,
        "file_bytes": Path("q.safetensors").stat().st_size,
        "bits_with_scale": 10.0,
        "compression": 1.6,
    }


def test_inspect_of_no_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("none.npy", np.zeros((0, 16)))
    run("quantize", "none.npy")
    assert run("inspect", "none.npz") == 0
    assert "none.npz: 0 x 16 float64 in 4 bits, 10.7 times smaller" in capsys.readouterr().out


def test_inspect_verifies_checksums() -> None:
    q = QuantizedArray(
        np.zeros((1000, 8), np.uint8), np.ones(1000, np.float32), TurboQuant(head_dim=16)
    )
    tqn.save("q.npz", q)
    data = bytearray(Path("q.npz").read_bytes())
    data[data.index(q.packed.tobytes()) + 7999] ^= 1
    Path("q.npz").write_bytes(data)
    with pytest.raises(StorageError, match=r"q\.npz: the array 'packed' is damaged"):
        run("inspect", "q.npz")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("quantize missing.npy", OSError, "missing.npy"),
        ("quantize text.npy", ValueError, "text.npy cannot be read as a .npy file"),
        ("quantize scalar.npy", CommandError, "single number"),
        ("quantize integers.npy", TypeError, "got int64; convert it"),
        ("quantize x.npy y.bin", ValueError, "must end in .npz or .safetensors"),
        ("quantize x.npy --bits 9", ValueError, "Got 9"),
        ("quantize x.npy --rotation dct", ValueError, "rotation must be one of"),
        ("quantize x.npy --rotation x.npy", ValueError, "must be square"),
        ("quantize x.npy --rounds 0", ValueError, "hadamard_rounds"),
        ("quantize x.npy --dtype float64", TypeError, "cannot be float64"),
        ("quantize x.npy --backend warp", ValueError, "unknown backend 'warp'"),
        ("restore missing.npz y.npy", OSError, "missing.npz"),
        ("restore x.npy y.npy", ValueError, "must end in .npz"),
        ("restore broken.npz y.npy", StorageError, "broken.npz: not a readable .npz file"),
        ("restore q.npz y.bin", ValueError, "must end in .npy"),
        ("restore q.npz y.npy --dtype int8", TypeError, "dtype must be one of"),
        ("inspect missing.npz", OSError, "missing.npz"),
        ("inspect broken.npz", StorageError, "broken.npz: not a readable .npz file"),
    ],
)
def test_mistakes_are_named(words: str, kind: type[Exception], message: str) -> None:
    run("quantize", "x.npy", "q.npz")
    for name in "text.npy", "broken.npz":
        Path(name).write_text("nothing to see here")
    np.save("scalar.npy", np.float32(1))
    np.save("integers.npy", np.arange(16))
    before = sorted(os.listdir())
    with pytest.raises(kind, match=message):
        run(*words.split())
    assert sorted(os.listdir()) == before


# -- progress --------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal() -> None:
    terminal, now = Terminal(), [0.0]
    with ProgressBar("encode", "vectors", stream=terminal, clock=lambda: now[0]) as progress:
        for now[0], done in (2.0, 500_000), (2.05, 600_000), (8.0, 2_000_000):
            progress(done, 2_000_000)
    first, second = terminal.getvalue().rstrip("\n").split("\r")[1:]
    assert first == "encode [######------------------]  25 %  0:02  250 k vectors/s  0:06 left"
    assert second.rstrip() == "encode [########################] 100 %  0:08  250 k vectors/s"
    assert len(second) == len(first)  # nothing of the longer line stays behind
    assert terminal.getvalue().endswith("\n")


def test_progress_bar_elsewhere_is_silent() -> None:
    file = io.StringIO()
    with ProgressBar("encode", "vectors", stream=file) as progress:
        progress(1, 2)
        progress(2, 2)
    assert file.getvalue() == ""


def test_progress_bar_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    with ProgressBar("encode", "vectors", stream=terminal) as progress:
        progress(1, 1)
    assert terminal.getvalue() == "\rencode [###########\n"


def test_progress_bar_without_anything_to_do() -> None:
    terminal = Terminal()
    with ProgressBar("encode", "vectors", stream=terminal) as progress:
        progress(0, 0)
    assert "100 %" in terminal.getvalue()
    idle = Terminal()
    with ProgressBar("encode", "vectors", stream=idle):
        pass
    assert idle.getvalue() == ""


def test_numbers_for_people() -> None:
    assert [format_seconds(s) for s in (0, 7.4, 59.6, 754, 3599.7, 90_061)] == [
        "0:00",
        "0:07",
        "1:00",
        "12:34",
        "1:00:00",
        "25:01:01",
    ]
    assert [format_count(n) for n in (0.5, 7, 999, 999.6, 12_345, 1e15, 5e18)] == [
        "0.5",
        "7",
        "999",
        "1 k",
        "12.3 k",
        "1 P",
        "5e+03 P",
    ]
