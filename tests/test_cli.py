"""The command line: outputs, exit codes, errors."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant, __version__, cli
from turboquant_np._backend import load
from turboquant_np.cli import main
from turboquant_np.commands import demo, doctor, validate

COMMANDS = "demo", "quantize", "restore", "inspect", "validate", "memory", "doctor", "bench"
CAPTURED = pytest.CaptureFixture[str]


def run_python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **settings
    )


def printed_json(capsys: CAPTURED) -> Any:
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


# -- the program itself --------------------------------------------------------------------------


def test_help_of_the_module() -> None:
    done = run_python("-m", "turboquant_np", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout
    assert "start here:\n  turboquant-np demo " in done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from turboquant_np.cli import make_parser; make_parser().format_help();"
        "print(sorted({'numba', 'scipy', 'cupy', 'matplotlib'} & sys.modules.keys()))"
    )
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_it_does(command: str, capsys: CAPTURED) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: turboquant-np {command} " in capsys.readouterr().out


def test_version(capsys: CAPTURED) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"turboquant-np {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["memory", "--context", "many"]])
def test_arguments_that_cannot_be_parsed(arguments: list[str], capsys: CAPTURED) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: turboquant-np")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--bits", "9", "--no-plot"], "Supported bit-widths: 1, 2, 3, 4, 5, 6, 7, 8."),
        (["demo", "--bits", "4", "--no-plot", "--backend", "mine"], "unknown backend 'mine'"),
        (["validate", "--head-dim", "1"], "head_dim must be an integer >= 2, got 1"),
        (["validate", "--num-vectors", "1"], "num_vectors must be at least 2, got 1"),
        (["memory", "--model", "no-such"], "no model called 'no-such'; known: Llama-3.1-8B, "),
        (["memory", "--layers", "3"], "needs --layers, --kv-heads and --head-dim"),
        (["memory", "--model", "Phi-4", "--layers", "3"], "not both"),
        (["memory", "--context", "0"], "--context must be at least 1, got 0"),
        (["memory", "--gpu-memory", "-1"], "gpu_memory_gb must be positive, got -1.0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: CAPTURED) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("turboquant-np: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "memory"], ["memory", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="utilisation"):
        main([*arguments, "--utilisation", "2"])


def replace_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let every call fail with `error`."""

    def fail(arguments: argparse.Namespace) -> int:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=fail, debug=False)
    monkeypatch.setattr(cli, "make_parser", lambda: parser)


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED) -> None:
    replace_command(monkeypatch, KeyboardInterrupt())
    assert main([]) == 130
    assert capsys.readouterr() == ("", "")


def test_an_error_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED
) -> None:
    replace_command(monkeypatch, OSError("first\nsecond"))
    assert main([]) == 2
    assert capsys.readouterr().err == "turboquant-np: error: first second\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_command(monkeypatch, AssertionError("impossible"))
    with pytest.raises(AssertionError, match="impossible"):
        main([])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed_pipe:
        done = subprocess.run(
            [sys.executable, "-m", "turboquant_np", "memory"],
            stdout=closed_pipe,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 141
    assert done.stderr == b""


def test_an_error_of_the_system_names_the_file(tmp_path: Path, capsys: CAPTURED) -> None:
    missing = tmp_path / "no-such-folder" / "v.npz"
    assert main(["inspect", str(missing)]) == 2
    assert (
        capsys.readouterr().err == f"turboquant-np: error: {missing}: No such file or directory\n"
    )


# -- files ---------------------------------------------------------------------------------------


def test_vectors_through_files(tmp_path: Path, capsys: CAPTURED) -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    x = rng.standard_normal((50, 4, 48)).astype(np.float32)
    source, packed, restored = (tmp_path / name for name in ("x.npy", "x.npz", "y.npy"))
    np.save(source, x)
    assert main(["quantize", str(source), "--bits", "3", "--seed", "7"]) == 0
    assert main(["restore", str(packed), str(restored)]) == 0
    tq = TurboQuant(head_dim=48, bits=3, seed=7)
    np.testing.assert_array_equal(np.load(restored), tq.decode(*tq.encode(x), dtype=np.float32))
    capsys.readouterr()
    assert main(["inspect", str(packed), "--json"]) == 0
    assert printed_json(capsys)["bits"] == 3
    assert main(["quantize", str(source)]) == 2, "an existing file is not overwritten"
    assert str(packed) in capsys.readouterr().err


# -- demo ----------------------------------------------------------------------------------------


def test_demo_follows_theory_on_real_data(capsys: CAPTURED) -> None:
    assert main(["demo", "--json", "--backend", "reference"]) == 0
    rows = {row["bits"]: row for row in printed_json(capsys)}
    assert list(rows) == [1, 2, 3, 4, 5, 6, 8]
    assert rows[4]["bytes_per_vector"] == 64 * 4 // 8 + 4
    assert rows[4]["ratio_to_float16"] == pytest.approx(128 / 36)
    for row in rows.values():
        for measured in (row["key_error"], row["value_error"]):
            assert measured == pytest.approx(row["expected_error"], rel=0.03)
            assert row["lower_bound"] < measured < row["upper_bound"]
        assert row["kl_with_key_offset"] < row["kl"]
    for name in ("score_rms_error", "output_error", "kl", "kl_with_key_offset"):
        column = [row[name] for row in rows.values()]
        assert column == sorted(column, reverse=True)
    # One bit more halves the error of a score; the others are squares and fall to a quarter.
    assert rows[4]["score_rms_error"] / rows[6]["score_rms_error"] == pytest.approx(4, rel=0.1)
    assert rows[4]["kl"] / rows[6]["kl"] == pytest.approx(16, rel=0.2)


def test_demo_attention_is_causal_grouped_softmax() -> None:
    sample = demo.load_sample()
    scores, log_weights, outputs = demo.attend(sample.queries, sample.keys, sample.values)
    layer, head, query = 1, 7, 5
    sees = 240 + query + 1
    keys, values = sample.keys[layer, head // 3], sample.values[layer, head // 3]
    exact = np.array([sample.queries[layer, head, query] @ k / 8 for k in keys[:sees]])
    weights = np.exp(exact) / np.exp(exact).sum()
    np.testing.assert_allclose(scores[layer, head, query, :sees], exact)
    assert np.isneginf(scores[layer, head, query, sees:]).all()
    np.testing.assert_allclose(np.exp(log_weights[layer, head, query, :sees]), weights)
    np.testing.assert_allclose(outputs[layer, head, query], weights @ values[:sees])


def test_demo_measures_no_error_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tq = TurboQuant(head_dim=64, bits=8, backend="reference")
    monkeypatch.setattr(tq, "encode", lambda x: (x, None))
    monkeypatch.setattr(tq, "decode", lambda x, _, dtype: x)
    row = demo.measure(demo.load_sample(), tq)
    assert (
        row.key_error == row.value_error == row.score_rms_error == row.output_error == row.kl == 0
    )
    assert row.kl_with_key_offset < 1e-12  # the offset is added in another order


def test_demo_prints_a_table_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--bits", "4", "2", "4", "--backend", "reference"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    table = [line.split() for line in lines if line[:1].isdigit()]
    assert [line[:3] for line in table] == [["2", "20", "6.4"], ["4", "36", "3.6"]]
    assert f"Plot: {tmp_path / 'turboquant_demo.png'}" in lines
    assert (tmp_path / "turboquant_demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_draws_where_told(tmp_path: Path, capsys: CAPTURED) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "errors.svg"
    arguments = ["demo", "--bits", "3", "--backend", "reference", "--plot"]
    assert main([*arguments, str(target)]) == 0
    assert "<svg" in target.read_text()
    assert main([*arguments, str(tmp_path / "errors.doc")]) == 2
    assert "--plot writes " in capsys.readouterr().err


def test_demo_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "--bits", "2", "--backend", "reference"]) == 0
    assert "pip install 'turboquant-np[plot]'" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["demo", "--bits", "2", "--plot", "errors.png"]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


# -- validate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["norm", "mse", "unbiased"])
def test_validate_passes(scale: str, capsys: CAPTURED) -> None:
    arguments = ["--num-vectors", "3000", "--backend", "reference", "--head-dim", "80"]
    assert main(["validate", *arguments, "--scale", scale, "--bits", "1", "4", "--json"]) == 0
    one, four = printed_json(capsys)
    assert one["passed"]
    assert four["passed"]
    assert (one["bits"], four["bits"]) == (1, 4)
    assert one["mse_theory_lower"] == 0.25
    assert four["mse_theory_upper"] == pytest.approx(np.sqrt(3) * np.pi / 2 / 256)
    assert four["backend"] == "reference"


def test_validate_prints_a_verdict_for_each_bit_width(capsys: CAPTURED) -> None:
    arguments = ["--num-vectors", "3000", "--backend", "reference", "--bits", "3", "2"]
    assert main(["validate", *arguments, "--rotation", "haar"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = [(line[0], line[-1]) for line in lines if line and line[0].isdigit()]
    assert verdicts[-2:] == [("2", "PASS"), ("3", "PASS")]


def test_validate_fails_if_theory_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED
) -> None:
    monkeypatch.setattr(TurboQuant, "mse_total", 0.0100)  # 0.0093 is right
    arguments = ["--num-vectors", "3000", "--backend", "reference", "--bits", "4"]
    assert main(["validate", *arguments]) == 1
    assert "FAIL: -" in capsys.readouterr().out
    assert main(["validate", *arguments, "--json"]) == 1
    (verdict,) = printed_json(capsys)
    assert not verdict["passed"]
    assert verdict["deviation"] < -6


MEASURED = {
    "bits": 4,
    "mse": 0.0093,
    "mse_standard_error": 0.0001,
    "mse_expected": 0.0093,
    "mse_theory_lower": 0.0039,
    "mse_theory_upper": 0.0106,
    "ip_slope": 0.991,
    "backend": "reference",
}


@pytest.mark.parametrize(
    ("scale", "change", "why"),
    [
        ("norm", {"mse": 0.0107}, "above the bound of the theorem"),
        ("norm", {"mse": float("nan")}, "above the bound of the theorem"),
        ("norm", {"mse": 0.0100}, "+7.0 standard errors off"),
        ("norm", {"mse": 0.0086}, "-7.0 standard errors off"),
        ("mse", {"mse": 0.0100}, "+7.0 standard errors above"),
        ("unbiased", {}, "inner products are biased, <decoded, x> is 0.99100"),
        ("norm", {"mse": 0.0098}, ""),
        ("mse", {"mse": 0.0050}, ""),
        ("unbiased", {"ip_slope": 1.00001}, ""),
    ],
)
def test_verdicts(scale: str, change: dict[str, float], why: str) -> None:
    verdict = validate.judge(MEASURED | change, scale)
    assert verdict.passed is (why == "")
    assert verdict.why.startswith(why)


# -- memory --------------------------------------------------------------------------------------


def test_memory_of_a_model_of_ones_own(capsys: CAPTURED) -> None:
    shape = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128", "--weights-gb", "4.5"]
    settings = ["--gpu-memory", "32", "--context", "1000", "--bits", "4", "3"]
    assert main(["memory", *shape, *settings, "--json"]) == 0
    found = printed_json(capsys)
    (model,) = found["models"]
    assert found["context"] == 1000
    assert model["bytes_per_token"] == {
        "float16": 512 * 256,
        "4 bits": 512 * 68,
        "3 bits": 512 * 52,
    }
    assert model["cache_bytes"]["4 bits"] == 1000 * 512 * 68
    assert model["longest_context"]["4 bits"] == 697_954  # (0.9 * 32e9 - 4.5e9) / 34816


def test_memory_tables(capsys: CAPTURED) -> None:
    assert main(["memory", "--model", "llama-3.1", "phi", "--bits", "4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Llama-3.1-8B", "32", "8", "128", "16.00", "4.25"] in lines
    assert ["Phi-4", "40", "10", "128", "25.00", "6.64"] in lines
    assert ["Llama-3.1-70B", "39.7", "-", "-"] in lines  # the weights do not fit 24 GB


# -- doctor --------------------------------------------------------------------------------------


def test_doctor_on_this_machine(capsys: CAPTURED) -> None:
    assert main(["doctor", "--json"]) == 0
    found = printed_json(capsys)
    assert found["ok"]
    assert found["turboquant_np"] == __version__
    assert found["packages"]["numpy"] == np.__version__
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert backends["reference"]["works"]
    assert backends["cpu"]["works"]
    assert backends["cpu"]["default"]
    assert backends["cuda"]["works"] or backends["cuda"]["problem"]


def test_doctor_notices_wrong_bits(monkeypatch: pytest.MonkeyPatch, capsys: CAPTURED) -> None:
    reference: Any = load("reference")

    class OneBitOff:
        name, device = "cpu", "cpu"
        why_unavailable = staticmethod(lambda: None)
        describe = staticmethod(lambda: {"simd": "none"})
        empty = staticmethod(reference.empty)
        first_non_finite = staticmethod(reference.first_non_finite)

        @staticmethod
        def encode(spec: Any, vectors: Any, packed: Any, scales: Any) -> None:
            reference.encode(spec, vectors, packed, scales)
            packed[-1, -1] ^= 1

        decode = staticmethod(reference.decode)

    monkeypatch.setattr(
        "turboquant_np._backend.load", lambda name: reference if name == "reference" else OneBitOff
    )
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "codes differ from the reference backend's with head_dim=128, bits=4" in out
    assert "simd: none" in out
    assert out.endswith("The default backend does not work: see above.\n")


def test_doctor_survives_a_backend_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("libsomething.so.1: cannot open shared object file")

    monkeypatch.setattr("turboquant_np._backend.load", fail)
    state = doctor.examine("cpu")
    assert not state["works"]
    assert state["problem"].startswith("ImportError: libsomething.so.1")


def test_doctor_tells_why_a_backend_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        name, device = "cuda", "cuda"
        why_unavailable = staticmethod(lambda: "no GPU")

    monkeypatch.setattr("turboquant_np._backend.load", lambda name: Absent)
    state = doctor.examine("cuda")
    assert not state["works"]
    assert state["problem"] == "no GPU"
    assert state["device"] == "cuda"


def test_doctor_report_names_the_remedy() -> None:
    report = doctor.report(
        {
            "turboquant_np": "1",
            "format_version": 1,
            "machine": {},
            "packages": {"numpy": "2.4", "cupy": None},
            "backends": [],
            "ok": True,
        }
    )
    assert "  numpy        2.4\n" in report
    assert "  cupy         not installed; for the cuda backend: pip install " in report
