"""The loop of docs/examples/smollm2, on a tiny random model that needs no other package."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from smollm2.caches import Cache, make_cache
from smollm2.command import bits as parse_bits
from smollm2.command import common_prefix
from smollm2.generate import Batch, Request
from smollm2.layer_bits import allocate_bits, log_probabilities, sensitivity
from smollm2.loader import Config, find_weights, random_weights
from smollm2.model import Model
from smollm2.sampling import Sampling, choose

CONFIG = Config(
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    width=48,
    context=512,
    rope_base=1e4,
    norm_eps=1e-5,
)
PROMPTS = [[5, 80, 3, 3, 17], list(range(40, 75)), [61, 2] * 50, [9]]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(random_weights(CONFIG, vocabulary=90, hidden=80, seed=11))


def new_cache(kind: str = "float", **bits: Any) -> Cache:
    return make_cache(CONFIG, kind, max_sequences=5, max_tokens=300, **bits)


def new_batch(model: Model, **settings: Any) -> Batch:
    return Batch(model, new_cache(), **settings)


def finish(batch: Batch) -> None:
    for _ in batch.run():
        pass


def alone(model: Model, prompt: list[int], count: int, sampling: Sampling | None = None) -> Any:
    """What a prompt gives without others, read in one piece."""
    batch = new_batch(model, prefill_chunk=1000)
    request = batch.submit(prompt, max_new_tokens=count, sampling=sampling)
    finish(batch)
    return request.generated


def attend_to_itself(layer: int, q: Any, k: Any, v: Any) -> Any:
    """Causal attention of one sequence, without a cache, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) / np.sqrt(q.shape[2])
    scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).astype(np.float32)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_cache_equals_recomputing_everything(model: Model, prompt: list[int]) -> None:
    tokens = list(prompt)
    for _ in range(20):
        hidden = model.forward(tokens, np.arange(len(tokens)), attend_to_itself)
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
    assert alone(model, prompt, 20) == tokens[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_reading_in_chunks_equals_reading_at_once(model: Model, chunk: int) -> None:
    prompt = PROMPTS[2]
    batch, want = new_batch(model), model.forward(prompt, np.arange(len(prompt)), attend_to_itself)
    sequence = batch.cache.allocate()
    parts = [
        batch._forward([sequence], [prompt[i : i + chunk]]) for i in range(0, len(prompt), chunk)
    ]
    np.testing.assert_allclose(np.concatenate(parts), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("chunk", [3, 40, 1000])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_joining_and_leaving_change_nothing(model: Model, chunk: int, temperature: float) -> None:
    counts = [25, 4, 13, 30]
    samplings = [Sampling(temperature, 0.95, seed) for seed in range(4)]
    batch, requests = new_batch(model, prefill_chunk=chunk), []
    for prompt, count, sampling in zip(PROMPTS, counts, samplings, strict=True):
        requests.append(batch.submit(prompt, max_new_tokens=count, sampling=sampling))
        for _ in range(3):
            batch.step()
    running = len(batch.running)
    finish(batch)
    assert running >= 2
    for request, prompt, count, sampling in zip(requests, PROMPTS, counts, samplings, strict=True):
        assert request.finished
        assert request.generated == alone(model, prompt, count, sampling)


def test_a_request_taken_away_leaves_the_others_alone(model: Model) -> None:
    batch = new_batch(model, prefill_chunk=10)
    first, second = (batch.submit(p, max_new_tokens=20) for p in PROMPTS[:2])
    for _ in range(6):
        batch.step()
    batch.leave(first)
    third = batch.submit(PROMPTS[3], max_new_tokens=20)
    assert third.sequence == first.sequence  # its room is used again
    finish(batch)
    assert second.generated == alone(model, PROMPTS[1], 20)
    assert third.generated == alone(model, PROMPTS[3], 20)


@pytest.mark.parametrize("kind", ["float", "turboquant"])
def test_forks_of_a_prefix_equal_prompts_of_their_own(model: Model, kind: str) -> None:
    prefix, endings = PROMPTS[2] + PROMPTS[1], [[7], [30, 31, 32], PROMPTS[1]]
    batch = Batch(model, new_cache(kind))
    shared = batch.prefill(prefix)
    requests = [
        batch.submit(ending, sequence=batch.cache.fork(shared), max_new_tokens=40)
        for ending in endings
    ]
    held = batch.cache.stats()["used_bytes"]
    batch.cache.free(shared)
    if kind == "turboquant":
        assert batch.cache.stats()["used_bytes"] == held  # the forks share all of it
    finish(batch)
    assert batch.cache.stats()["stored_tokens"] == 0
    for request, ending in zip(requests, endings, strict=True):
        single = Batch(model, new_cache(kind))
        own = single.submit(ending, sequence=single.prefill(prefix), max_new_tokens=40)
        finish(single)
        assert request.generated == own.generated
        if kind == "float":
            assert request.generated == alone(model, prefix + ending, 40)


def test_compressed_cache_is_near_the_float_cache(model: Model) -> None:
    """More bits, smaller error; 8 bits next to none."""
    tokens, errors = (PROMPTS[1] + PROMPTS[2]) * 2, []
    want = model.forward(tokens, np.arange(len(tokens)), attend_to_itself)
    for bits in (2, 4, 8):
        batch = Batch(model, new_cache("turboquant", key_bits=bits, value_bits=bits))
        sequence = batch.cache.allocate()
        got = [batch._forward([sequence], [tokens[i : i + 16]]) for i in range(0, len(tokens), 16)]
        errors.append(np.linalg.norm(np.concatenate(got) - want) / np.linalg.norm(want))
    assert errors[2] < 0.03
    assert errors[2] < errors[1] / 4
    assert errors[1] < errors[0] / 2


def test_stop_ends_an_answer_and_is_left_out(model: Model) -> None:
    free = alone(model, PROMPTS[0], 20)
    stop = free[7]
    batch = new_batch(model, stop=stop)
    request = batch.submit(PROMPTS[0], max_new_tokens=20)
    assert [token for _, token in batch.run()] == free[: free.index(stop)] == request.generated
    assert request.finished
    assert not batch.running


def test_sampling_follows_its_seed(model: Model) -> None:
    runs = [alone(model, PROMPTS[1], 30, Sampling(1.5, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert alone(model, PROMPTS[1], 30, Sampling(1.5, top_p=1e-9)) == alone(model, PROMPTS[1], 30)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Frequencies within 6 sigma of softmax(logits / temperature), cut off at top_p."""
    rows, temperature = 40_000, 0.7
    logits = np.array([0.3, -1.0, 2.0, 1.9, 0.0], np.float32)
    uniforms = np.random.Generator(np.random.PCG64(3)).random(rows).tolist()
    likely = np.exp(logits.astype(np.float64) / temperature)
    likely /= likely.sum()
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.5, [2, 3]), (0.93, [0, 2, 3])):
        assert likely[kept].sum() >= top_p > likely[kept].sum() - likely[kept].min() or top_p == 1
        sampling = Sampling(temperature, top_p)
        drawn = choose(np, np.tile(logits, (rows, 1)), [sampling] * rows, uniforms)
        want = np.zeros(5)
        want[kept] = likely[kept] / likely[kept].sum()
        counts = np.bincount(drawn, minlength=5)
        assert np.all(np.abs(counts - rows * want) <= 6 * np.sqrt(rows * want * (1 - want)))


def test_greedy_and_drawn_rows_mix() -> None:
    logits = np.random.Generator(np.random.PCG64(4)).standard_normal((3, 50)).astype(np.float32)
    samplings = [Sampling(), Sampling(1.0), Sampling()]
    tokens = choose(np, logits, samplings, [0.99, 1 - 1e-16, 0.5])
    assert tokens.tolist() == [logits[0].argmax(), logits[1].argmin(), logits[2].argmax()]


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 9, 9]]) == [1, 2]
    assert common_prefix([[1], [2]]) == []


def test_bad_input(model: Model) -> None:
    batch = new_batch(model)
    with pytest.raises(ValueError, match="1 to 512 tokens, answer included, are possible, got 600"):
        batch.submit([1] * 500, max_new_tokens=100)
    with pytest.raises(ValueError, match="got 128"):
        batch.submit([])
    with pytest.raises(ValueError, match="the model has 512 positions, got 512"):
        model.forward([1], np.array([512]), attend_to_itself)
    with pytest.raises(ValueError, match="room for 300 tokens, not 301"):
        batch.cache.begin_step([batch.cache.allocate()], [301])
    for _ in range(4):
        batch.cache.allocate()
    with pytest.raises(ValueError, match="all 5 sequences are in use"):
        batch.cache.allocate()
    with pytest.raises(ValueError, match="'float' or 'turboquant', got 'int8'"):
        new_cache("int8")
    with pytest.raises(ValueError, match="top_p must be in"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        Sampling(temperature=-1)
    with pytest.raises(FileNotFoundError, match=r"no weights at nowhere\.gguf"):
        find_weights("nowhere.gguf")


def test_a_failing_layer_cancels_the_step(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in the middle of a step, the cache is as before it."""
    cache = new_cache("turboquant")
    batch = Batch(model, cache)
    request: Request = batch.submit(PROMPTS[1], max_new_tokens=5)
    batch.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "weights", None)
        with pytest.raises(AttributeError):
            batch.step()
    finish(batch)
    assert request.generated == alone(model, PROMPTS[1], 5)


# -- bits by layer ---------------------------------------------------------------------------------


def test_the_layer_that_matters_most_gets_most_bits(model: Model) -> None:
    """One layer's keys are made to matter: its attention is sharp, that of the others flat."""
    layers = []
    for number, layer in enumerate(model.weights.layers):
        qkv = layer.qkv.copy()
        qkv[:, : CONFIG.heads * CONFIG.head_dim] *= 10.0 if number == 1 else 0.01
        layers.append(replace(layer, qkv=qkv))
    sharp = Model(replace(model.weights, layers=layers))
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 90, 200)]
    lines: list[str] = []
    found = sensitivity(partial(log_probabilities, sharp, ids), CONFIG.layers, lines.append)
    assert found.shape == (2, CONFIG.layers)
    assert found[0].argmax() == 1
    assert found[0, 1] > 10 * found[0, [0, 2]].max()
    assert len(lines) == found.size
    bits = allocate_bits(found, mean_bits=3)
    assert bits.sum() == 3 * found.size
    assert bits[0, 1] == bits[0].max()


def test_log_probabilities_are_those_of_the_next_tokens(model: Model) -> None:
    ids = list(range(90))
    logs = log_probabilities(model, ids, [8] * 3, [8] * 3)
    hidden = model.forward(np.array(ids), np.arange(90), attend_to_itself)
    logits = model.logits(hidden).astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logs, want, atol=0.03)


def test_bits_on_the_command_line() -> None:
    assert parse_bits("4") == 4
    assert parse_bits("4,3,5") == [4, 3, 5]
    cache: Any = new_cache("turboquant", key_bits=parse_bits("4,3,5"))
    assert [q.bits for q in cache.key_quantizers] == [4, 3, 5]
    with pytest.raises(ValueError, match="one for each of the 3, got 2"):
        new_cache("turboquant", value_bits=parse_bits("4,3"))
