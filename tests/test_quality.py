"""The scripts that measure the quality of compressed caches measure what `PagedKVCache` does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quality_beyond import MoreOffsets
from quality_cache import (
    FEW_BITS,
    KV_HEADS,
    FloatCache,
    Layout,
    SimulatedCache,
    cache_bytes,
    layer_caches,
    make_cache,
)
from quality_page import page
from quality_results import Results, bytes_per_token
from smollm2.layer_bits import allocate_bits
from smollm2.loader import find_weights, load_weights
from smollm2.model import Model
from smollm2.tokenizer import ChatTokenizer

from turboquant_np import PagedKVCache

BENCHMARKS = Path(__file__).parent.parent / "docs" / "benchmarks"
HEADS = 9


def attention_inputs(tokens: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Queries, keys with a mean, and values that float16 holds exactly."""
    rng = np.random.Generator(np.random.PCG64([41, seed]))
    q = 3 * rng.standard_normal((tokens, HEADS, 64), np.float32)
    k = 2 * rng.standard_normal((tokens, KV_HEADS, 64), np.float32) + 1
    v = rng.standard_normal((tokens, KV_HEADS, 64), np.float32)
    q, k, v = (x.astype(np.float16).astype(np.float32) for x in (q, k, v))
    return q, k, v


def cache_with_pages(tokens: int, **setting: Any) -> Any:
    return make_cache(num_blocks=tokens, **{**setting, "num_full_blocks": tokens})


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"key_bits": 2, "value_bits": 3, "recent_tokens": 20, "sink_tokens": 20},
    {"sink_tokens": 0, "recent_tokens": 1, "key_offset_tokens": 0, "rotation": "haar"},
    {"recent_tokens": 0, "key_offset_tokens": 8, "key_scale": "norm", "seed": 7},
)


@pytest.mark.parametrize("step", [1, 50])
@pytest.mark.parametrize("setting", SETTINGS)
def test_all_tokens_at_once_equal_the_cache_step_by_step(
    setting: dict[str, Any], step: int
) -> None:
    q, k, v = attention_inputs(150)
    simulated = SimulatedCache([make_cache(**setting)], Layout.make(150, step=step), np, rows=64)
    cache = cache_with_pages(20, **setting)
    sequence = cache.allocate()
    outputs = []
    for start in range(0, 150, step):
        part = slice(start, start + step)
        one = cache.begin_step([sequence], [step], pack_first=True)
        one.append(0, k[part], v[part])
        outputs.append(one.attend(0, q[part]))
    exact = FloatCache(Layout.make(150), np)(0, q, k, v)
    result = simulated(0, q, k, v)
    np.testing.assert_allclose(result, np.concatenate(outputs), atol=1e-4)
    assert np.abs(result - exact).max() > 0.1  # it is not the float cache


def test_bits_by_layer_equal_the_cache_step_by_step() -> None:
    """What is measured as bits by layer is what a cache with such bits does by default."""
    bits = [(4, 3), (2, 2), (4, 3)]
    inputs = [attention_inputs(150, seed) for seed in range(3)]
    caches = [make_cache(key_bits=k, value_bits=v, value_scale=FEW_BITS) for k, v in bits]
    simulated = SimulatedCache(caches, Layout.make(150), np)
    key_bits, value_bits = zip(*bits, strict=True)
    cache = PagedKVCache(
        3, KV_HEADS, 64, num_blocks=20, max_sequences=1, key_bits=key_bits, value_bits=value_bits
    )
    sequence = cache.allocate()
    outputs: list[list[Any]] = [[], [], []]
    for i in range(150):
        step = cache.begin_step([sequence], [1])
        for layer, (q, k, v) in enumerate(inputs):
            step.append(layer, k[i : i + 1], v[i : i + 1])
            outputs[layer].append(step.attend(layer, q[i : i + 1])[0])
    for layer in range(3):
        expected = simulated(layer, *inputs[layer])
        np.testing.assert_allclose(outputs[layer], expected, atol=1e-4)
    assert cache_bytes(caches, 150) == cache.stats()["used_bytes"]


@pytest.mark.parametrize("by_layer", [False, True], ids=["uniform", "by layer"])
def test_with_the_real_model(by_layer: bool) -> None:
    """Hidden states of a text, token by token through the cache: the same, layer upon layer."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    try:
        find_weights()
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    model = Model(load_weights())
    licence = Path(__file__).parent.parent / "LICENSE"
    ids = np.array(ChatTokenizer().encode(licence.read_text("utf-8"))[:80], np.int64)
    setting: dict[str, Any] = {"recent_tokens": 16}
    bits: dict[str, Any] = {"key_bits": 3, "value_bits": 3}
    simulated_bits = bits
    if by_layer:
        bits = {"key_bits": [3, 4, 2] * 10, "value_bits": [3, 4, 2] * 10}
        simulated_bits = {"layer_bits": [(3, 3), (4, 4), (2, 2)] * 10}
    layout = Layout.make(len(ids))
    simulated, exact = (
        model.forward(ids, layout.positions, attend)
        for attend in (
            SimulatedCache(layer_caches({**setting, **simulated_bits}), layout, np),
            FloatCache(layout, np),
        )
    )
    cache = cache_with_pages(10, num_layers=30, **setting, **bits)
    sequence = cache.allocate()
    states = []
    for i, token in enumerate(ids):
        step = cache.begin_step([sequence], [1])

        def attend(layer: int, q: Any, k: Any, v: Any, step: Any = step) -> Any:
            step.append(layer, k, v)
            return step.attend(layer, q)

        states.append(model.forward(token[None], np.array([i]), attend)[0])
    error, loss = (
        float(((x - y) ** 2).sum() / (y**2).sum())
        for x, y in ((simulated, np.array(states)), (simulated, exact))
    )
    # Not more equal than that: float32 sums differ in the last bit, and now and then a code does.
    assert error < 0.02 * loss


def test_branches_equal_forks() -> None:
    q, k, v = attention_inputs(130)
    layout = Layout.make(110, [12, 8])
    result = SimulatedCache([make_cache(key_bits=3, recent_tokens=16)], layout, np, rows=50)(
        0, q, k, v
    )
    cache = cache_with_pages(30, key_bits=3, recent_tokens=16)
    trunk = cache.allocate()
    for start in range(110):
        cache.append(trunk, k[start : start + 1], v[start : start + 1])
    for branch in (range(110, 122), range(122, 130)):
        fork = cache.fork(trunk)
        for i in branch:
            step = cache.begin_step([fork], [1])
            step.append(0, k[i : i + 1], v[i : i + 1])
            np.testing.assert_allclose(step.attend(0, q[i : i + 1])[0], result[i], atol=1e-4)


def test_float_cache_is_causal_attention() -> None:
    q, k, v = attention_inputs(70)
    result = FloatCache(Layout.make(70), np, rows=32)(0, q, k, v)
    for i, head in ((0, 0), (40, 4), (69, 8)):
        scores = k[: i + 1, head // 3].astype(np.float64) @ q[i, head] / 8
        weights = np.exp(scores - scores.max())
        expected = weights @ v[: i + 1, head // 3] / weights.sum()
        np.testing.assert_allclose(result[i, head], expected, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tokens", [1, 95, 96, 200])
def test_bytes_are_those_that_the_cache_reports(setting: dict[str, Any], tokens: int) -> None:
    cache = cache_with_pages(20, **setting)
    _, k, v = attention_inputs(tokens)
    cache.append(cache.allocate(), k, v)
    assert cache_bytes([make_cache(**setting)], tokens) == cache.stats()["used_bytes"]


def test_bytes_by_layer_add_up() -> None:
    bits = [(2, 3)] * 10 + [(8, 5)] * 20
    one, other = ({"key_bits": k, "value_bits": v} for k, v in ((2, 3), (8, 5)))
    expected = bytes_per_token(one, 512) / 3 + bytes_per_token(other, 512) * 2 / 3
    assert bytes_per_token({"layer_bits": bits}, 512) == pytest.approx(expected)
    assert len(layer_caches({"layer_bits": bits})) == 30


def test_renewed_offsets_take_keys_with_a_drift() -> None:
    """Keys whose mean moves: one offset leaves most of it, renewed ones remove it."""
    _, k, v = attention_inputs(600)
    k = k + np.linspace(0, 40, 600, dtype=np.float32)[:, None, None]
    k = np.swapaxes(k, 0, 1)
    v = np.swapaxes(v, 0, 1)
    caches, layout = [make_cache(key_bits=3)], Layout.make(600)
    errors = [
        float((cache.stored(0, k, v)[2] ** 2).mean())
        for cache in (
            SimulatedCache(caches, layout, np),
            MoreOffsets(caches, layout, np, renew=128),
        )
    ]
    assert errors[0] > 4 * errors[1]


def test_allocated_bits_are_the_best_ones() -> None:
    rng = np.random.default_rng(8)
    sensitivity = 10 ** rng.uniform(-4, 0, 5)

    def loss(bits: Any) -> float:
        return float((sensitivity * 4.0 ** (2 - np.array(bits))).sum())

    bits = allocate_bits(sensitivity, mean_bits=3, most=5)
    assert bits.sum() == 15
    every = itertools.product(range(1, 6), repeat=5)
    assert loss(bits) == pytest.approx(min(loss(b) for b in every if sum(b) == 15))


# -- the page --------------------------------------------------------------------------------------


def test_summary_of_known_losses(tmp_path: Path) -> None:
    """A loss of 1 % in one block and of 3 % in the next."""
    lines = [
        {"kind": "about"},
        {"kind": "text", "experiment": "float", "text": "t", "setting": None,
         "count": [1024, 1024, 100], "nll": [2000.0, 1000.0, 7.0]},
        {"kind": "text", "experiment": "bits", "text": "t", "setting": {"key_bits": 4},
         "count": [1024, 1024, 99], "nll": [2000 + 10.24, 1000 + 30.72, 999.0],
         "kl": [10.24, 20.48, 5.0], "same": [1024, 512, 0]},
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    results = Results(path)
    summary = results.summary(results.records("bits", {"key_bits": 4}), 0, 4096)
    assert summary.loss == pytest.approx(np.expm1(0.02))
    assert summary.loss_error == pytest.approx(0.01 * np.exp(0.02))  # two values, 0.01 around 0.02
    assert summary.kl == pytest.approx(0.015)
    assert summary.same == 0.75
    assert summary.tokens == 2048  # the block that ends earlier is left out


def test_the_page_shows_what_was_measured() -> None:
    template = BENCHMARKS.parent / "scripts" / "quality_page.md.in"
    made = page(Results(BENCHMARKS / "quality.jsonl"), template.read_text("utf-8"))
    assert made == (BENCHMARKS / "quality.md").read_text("utf-8")
