"""compute="int8": against the definition within its stated error, and what it adds to the error."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import TurboQuant, _backend
from turboquant_np.fused_attention import TQPagedAttention
from turboquant_np.testing import assert_bits_equal

Floats = npt.NDArray[Any]
PAGE = 16

backend: Any = _backend.load("cpu")
attention_int8 = importlib.import_module("turboquant_np.backends.cpu.attention_int8")
layout = importlib.import_module("turboquant_np.backends.cpu.int8_layout")
needs_int8 = pytest.mark.skipif(
    not attention_int8.has_byte_products(), reason="needs AVX-512 VNNI and VBMI"
)


class Case:
    """Keys and values in shuffled pages, queries, and quantisers."""

    def __init__(
        self,
        keys: Floats,
        values: Floats,
        query: Floats,
        *,
        bits: tuple[int, int] = (4, 4),
        seed: int = 1,
        lens: tuple[int, ...] | None = None,
        **options: Any,
    ) -> None:
        """keys, values : [sequences, n, heads, d]"""
        seqs, n, heads, dim = keys.shape
        pages = -(-n // PAGE)
        order = np.random.Generator(np.random.PCG64([71, seed])).permutation(seqs * pages)
        self.settings: list[dict[str, Any]] = [
            dict(head_dim=dim, bits=b, seed=seed + 10 * i) for i, b in enumerate(bits)
        ]
        self.query, self.options, self.vectors = query, options, (keys, values)
        self.tables = order.reshape(seqs, pages)
        self.lens = np.array([n] * seqs if lens is None else lens)
        self.encoded: list[Any] = []
        for settings, x in zip(self.settings, self.vectors, strict=True):
            padded = np.zeros((seqs, pages * PAGE, heads, dim), np.float32)
            padded[:, :n] = x
            paged = np.empty((seqs * pages, PAGE, heads, dim), np.float32)
            paged[self.tables.reshape(-1)] = padded.reshape(-1, PAGE, heads, dim)
            self.encoded += TurboQuant(**settings).encode(paged)

    def run(self, compute: str, backend: str = "auto", **changes: Any) -> Any:
        key, value = (TurboQuant(**settings, backend=backend) for settings in self.settings)
        settings: Any = dict(value_quantizer=value, compute=compute)
        attention: Any = TQPagedAttention(key, self.query.shape[-2], **settings)
        options = {"return_lse": True, **self.options, **changes}
        return attention(self.query, *self.encoded, self.tables, self.lens, **options)

    def on_unquantised(self) -> Floats:
        """Attention of one query token a sequence on the keys and values as they were."""
        keys, values = (x.astype(np.float64) for x in self.vectors)
        group = self.query.shape[1] // keys.shape[2]
        query = self.query.reshape(len(keys), keys.shape[2], group, -1).astype(np.float64)
        scores = np.einsum("skgd,snkd->skgn", query, keys) / keys.shape[-1] ** 0.5
        scores = np.where(np.arange(keys.shape[1]) < self.lens[:, None, None, None], scores, -1e9)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out: Floats = np.einsum("skgn,snkd->skgd", weights, values)
        return out.reshape(self.query.shape)


def random_case(
    dim: int = 128,
    group: int = 4,
    heads: int = 2,
    n: int = 300,
    seqs: int = 1,
    strength: float = 1.5,
    **settings: Any,
) -> Case:
    seed = settings.get("seed", 1)
    rng = np.random.Generator(np.random.PCG64([72, seed, dim, group]))
    keys, values = rng.standard_normal((2, seqs, n, heads, dim))
    keys *= rng.uniform(0.5, 2.0, (*keys.shape[:-1], 1))
    query = settings.pop("query", None)
    if query is None:
        query = strength * rng.standard_normal((seqs, heads * group, dim))
    return Case(keys, values, query.astype(np.float32), **settings)


def real_cases(bits: int) -> list[Case]:
    """Each layer of the shipped sample: its last query tokens as sequences, causal."""
    data = np.load(str(files("turboquant_np.data") / "smollm2_kv.npz"))
    cases = []
    for layer in range(len(data["layers"])):
        keys, values = (data[name][layer].transpose(1, 0, 2) for name in ("keys", "values"))
        query = data["queries"][layer].transpose(1, 0, 2).astype(np.float32)
        tokens = len(query)
        k, v = (np.broadcast_to(x, (tokens, *x.shape)) for x in (keys, values))
        lens = tuple(range(keys.shape[0] - tokens + 1, keys.shape[0] + 1))
        cases += [Case(k, v, query, bits=(bits, bits), lens=lens, seed=i) for i in range(8)]
    return cases


def relative(difference: Floats, of: Floats) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(of))


def check(case: Case, tolerance: float = 0.03) -> None:
    (out, lse), (want, want_lse) = case.run("int8"), case.run("float32", "reference")
    assert relative(out - want, want) <= tolerance
    assert_bits_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    assert (np.abs(lse[seen] - want_lse[seen]) <= tolerance * (1 + np.abs(want_lse[seen]))).all()


# (head_dim, key bits, value bits, query heads to a kv head)
SHAPES = [
    (128, 4, 4, 4), (128, 3, 3, 4), (128, 2, 2, 4), (128, 1, 1, 4), (64, 4, 3, 3), (80, 3, 4, 7),
    (33, 2, 1, 9), (96, 4, 2, 1), (256, 4, 4, 2), (100, 1, 3, 20), (72, 4, 4, 5), (16, 3, 2, 6),
]  # fmt: skip


@needs_int8
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_near_the_reference(shape: tuple[int, int, int, int]) -> None:
    dim, key_bits, value_bits, group = shape
    check(random_case(dim, group, bits=(key_bits, value_bits)))


OPTIONS: list[dict[str, Any]] = [
    dict(logits_soft_cap=2.0, scale=0.2),
    dict(sliding_window=70),
    dict(sliding_window=1),
    dict(seqs=3, lens=(0, 5, 300)),
    dict(seqs=2, lens=(64, 65), sinks=True, key_offset=True),
    dict(tokens=5, sliding_window=90, key_offset=True, seqs=2, lens=(300, 77)),
    dict(tokens=3, seqs=2, query_positions=np.array([-2, 130]), sinks=True),
    dict(seqs=3, ragged=(0, 7, 25), lens=(20, 7, 300), logits_soft_cap=5.0),
]


@needs_int8
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: ",".join(x))
def test_options(options: dict[str, Any]) -> None:
    options = dict(options)
    rng = np.random.Generator(np.random.PCG64(73))
    seqs, heads, group, dim = options.get("seqs", 1), 2, 4, 64
    tokens, ragged = options.pop("tokens", None), options.pop("ragged", None)
    shape: tuple[int, ...] = (seqs, heads * group, dim)
    if tokens:
        shape = (seqs, tokens, *shape[1:])
    if ragged:
        shape = (sum(ragged), *shape[1:])
        options["query_start_loc"] = np.cumsum([0, *ragged])
    if options.pop("sinks", False):
        options["sinks"] = rng.standard_normal(heads * group).astype(np.float32)
    if options.pop("key_offset", False):
        options["key_offset"] = rng.standard_normal((seqs, heads, dim)).astype(np.float32)
    query = rng.standard_normal(shape)
    check(random_case(dim, group, heads, query=query, **options))


def rise(cases: list[Case]) -> float:
    """By which part the error against unquantised attention grows, over all cases together."""
    errors = {"float32": 0.0, "int8": 0.0}
    for case in cases:
        want = case.on_unquantised()
        for compute in errors:
            out, _ = case.run(compute)
            errors[compute] += float(((out - want) ** 2).sum()) / float((want**2).sum())
    return float(np.sqrt(errors["int8"] / errors["float32"])) - 1.0


@needs_int8
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("strength", [0.3, 1.5, 4.0])
def test_adds_little_to_the_error_on_random_vectors(bits: int, strength: float) -> None:
    """From even weights to a few large ones."""
    cases = [
        random_case(n=1000, heads=4, strength=strength, bits=(bits, bits), seed=seed)
        for seed in range(8)
    ]
    assert rise(cases) <= 0.005


@needs_int8
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_adds_little_to_the_error_on_real_vectors(bits: int) -> None:
    assert rise(real_cases(bits)) <= 0.005


@needs_int8
@pytest.mark.parametrize("step", [0.05, 1.0, 30.0])
def test_scores_that_rise_all_the_time(step: float) -> None:
    case = random_case(64, n=700)
    packed, norms = case.encoded[:2]
    packed[...] = packed[:1, :1]  # one key, ever longer
    tokens = np.arange(700)
    norms[case.tables[0, tokens // PAGE], tokens % PAGE] = (step * tokens / 64)[:, None]
    check(case)


@needs_int8
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(n=3000)
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", threads)
        results.append(case.run("int8"))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_bits_equal(one, other)


@needs_int8
@pytest.mark.parametrize(("which", "value"), [(1, np.nan), (3, np.nan), (3, -1.0)])
def test_what_has_no_result_is_nan(which: int, value: float) -> None:
    """NaN in a scale of keys or values, and scales below 0 of values, which no encoder writes."""
    case = random_case()
    case.encoded[which][case.tables[0, 3], 5, 1] = value
    out, _ = case.run("int8")
    assert np.isnan(out[:, 4:]).all()
    assert np.isfinite(out[:, :4]).all()


@needs_int8
def test_nan_in_a_query_is_nan() -> None:
    case = random_case()
    case.query[0, 2, 7] = np.nan
    out, _ = case.run("int8")
    assert np.isnan(out[0, 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=1)).all()


@needs_int8
@pytest.mark.parametrize("bits", [(5, 4), (4, 8)])
def test_many_bits_are_refused(bits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"1 to 4 bits.*use compute='float32'"):
        random_case(bits=bits).run("int8")


def test_other_backends_refuse() -> None:
    with pytest.raises(ValueError, match="backend 'reference' has no compute='int8'"):
        random_case().run("int8", "reference")


def test_unknown_arithmetic() -> None:
    wrong: Any = "int4"
    with pytest.raises(ValueError, match="compute must be one of float32, int8, got 'int4'"):
        TQPagedAttention(TurboQuant(), 8, compute=wrong)


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86 names")
@pytest.mark.parametrize("name", ["haswell", "cascadelake"])
def test_other_processors_are_refused(name: str) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"which {name} (" in result.stdout
    assert "use compute='float32'" in result.stdout


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [16, 33, 80, 128, 250])
def test_every_coordinate_has_one_place(dim: int, bits: int) -> None:
    for order in (layout.key_order(dim, bits), layout.value_order(dim, bits)):
        inside = [i for i in order if i < dim]
        assert sorted(inside) == list(range(dim))
        assert len(order) <= layout.padded_dim(dim, bits, bits)


if __name__ == "__main__":
    try:
        random_case().run("int8")
    except ValueError as error:
        print(error)
