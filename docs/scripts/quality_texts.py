"""Texts and needles for `measure_quality`, as token ids; see there.

Everything comes with Python or with Debian, so nothing is fetched:

========= =====================================================================================
python-1  prose of `pydoc_data.topics` (PSF licence), tokens 0 to 8191
python-2  the same, tokens 8192 to 16383
gpl       GNU GPL 3 followed by CC0 1.0, from /usr/share/common-licenses
mpl       MPL 1.1 followed by GFDL 1.3, from /usr/share/common-licenses
code      source of the standard library's `statistics` (PSF licence)
========= =====================================================================================

A needle is a sentence with a five-digit number, hidden in the prose of python-1 and on; behind the
text the sentence is begun again, and the model has to go on with the number.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2.tokenizer import ChatTokenizer

Ids = npt.NDArray[np.int64]

LICENCES = Path("/usr/share/common-licenses")
CITIES = (
    *("Rotterdam", "Valencia", "Nairobi", "Toronto", "Kyoto", "Lisbon", "Denver", "Helsinki"),
    *("Bogota", "Prague", "Manila"),
)
HAYSTACK_TOKENS = (1024, 2048, 4096, 8192)
DEPTHS = len(CITIES)  # from the very beginning to the very end
FACT = " The magic number of {city} is {number}.\n"
QUESTION = "\n The magic number of {city} is"


def topics_prose() -> str:
    """Flowing paragraphs of Python's documentation, each once."""
    from pydoc_data.topics import topics

    from make_kv_sample import prose

    paragraphs = "\n".join(prose(topics[topic]) for topic in sorted(topics)).split("\n")
    return "\n".join(dict.fromkeys(paragraphs))


def texts(tokenizer: Any, tokens: int) -> Iterator[tuple[str, Ids]]:
    """(name, ids) of the texts above, `tokens` long each."""

    def licences(*names: str) -> str:
        return "\n".join((LICENCES / name).read_text("utf-8") for name in names)

    def ids(text: str) -> Ids:
        return np.array(tokenizer.encode(text), np.int64)

    python = ids(topics_prose())
    found = {
        "python-1": python,
        "gpl": ids(licences("GPL-3", "CC0-1.0")),
        "code": ids(Path(statistics.__file__).read_text("utf-8")),
        "mpl": ids(licences("MPL-1.1", "GFDL-1.3")),
        "python-2": python[tokens:],
    }
    for name, all_ids in found.items():
        if len(all_ids) < tokens:
            raise SystemExit(f"text {name} has {len(all_ids)} tokens, fewer than {tokens}")
        yield name, all_ids[:tokens]


@dataclass(frozen=True)
class Haystack:
    """A text with one needle at each depth, and a question after it for each needle.

    Attributes
    ----------
    tokens, seed : what it was made from
    trunk : ids of the text with its needles
    branches : ids of each question and its answer, whose last `answer` tokens are the number
    answer : tokens of a number
    """

    tokens: int
    seed: int
    trunk: Ids
    branches: list[Ids]
    answer: int = 5


def haystack(tokenizer: Any, tokens: int, seed: int) -> Haystack:
    """Needle i lies at depth i / (DEPTHS - 1) of about `tokens` tokens, questions included."""
    rng = np.random.Generator(np.random.PCG64([77, seed]))
    numbers = rng.integers(10_000, 100_000, DEPTHS)
    cities = rng.permutation(CITIES)
    needles = [
        tokenizer.encode(FACT.format(city=city, number=number))
        for city, number in zip(cities, numbers, strict=True)
    ]
    branches = [
        np.array(tokenizer.encode(QUESTION.format(city=city) + f" {number}"), np.int64)
        for city, number in zip(cities, numbers, strict=True)
    ]
    room = tokens - sum(map(len, needles)) - max(map(len, branches))
    hay = tokenizer.encode(topics_prose())
    start = int(rng.integers(0, len(hay) - room))
    cuts = start + np.linspace(0, room, DEPTHS).astype(int)
    trunk = list(needles[0])
    for needle, begin, end in zip(needles[1:], cuts, cuts[1:], strict=False):
        trunk += hay[begin:end] + needle
    return Haystack(tokens, seed, np.array(trunk, np.int64), branches)


def load(path: Path) -> tuple[dict[str, Ids], list[Haystack]]:
    """What `main` has written."""
    texts, haystacks = {}, []
    with np.load(path) as arrays:
        for name, ids in arrays.items():
            kind, *rest = name.split(" ")
            if kind == "text":
                texts[rest[0]] = ids.astype(np.int64)
            else:
                cuts = arrays[f"cuts {rest[0]} {rest[1]}"] if kind == "needles" else None
                if cuts is not None:
                    trunk, *branches = np.split(ids.astype(np.int64), cuts)
                    haystacks.append(Haystack(int(rest[0]), int(rest[1]), trunk, branches))
    return texts, haystacks


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the texts for measure_quality.py.")
    parser.add_argument("output", type=Path, help=".npz")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text (8192)")
    parser.add_argument("--haystacks", type=int, default=8, help="of each length (8)")
    arguments = parser.parse_args()
    tokenizer = ChatTokenizer()
    arrays = {f"text {name}": ids for name, ids in texts(tokenizer, arguments.tokens)}
    for seed in range(arguments.haystacks):
        for tokens in HAYSTACK_TOKENS:
            hay = haystack(tokenizer, tokens, seed)
            lengths = [len(hay.trunk), *map(len, hay.branches)]
            arrays[f"needles {tokens} {seed}"] = np.concatenate([hay.trunk, *hay.branches])
            arrays[f"cuts {tokens} {seed}"] = np.cumsum(lengths)[:-1]
    small: dict[str, Any] = {name: ids.astype(np.uint16) for name, ids in arrays.items()}
    np.savez_compressed(arguments.output, **small)


if __name__ == "__main__":
    main()
