"""What `measure_quality` has written, summed up: perplexity, KL, equal top-1 tokens, bytes."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quality_cache import HEAD_DIM, KV_HEADS, LAYERS, Setting, cache_bytes, layer_caches

BLOCK = 1024  # tokens of a block in the records
CONTEXTS = (2048, 4096, 8192)
TESTS = ("python-1", "gpl", "code")  # the texts that every change was measured on
FLOAT16_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2  # of a token

Record = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """A setting against the float cache on the same tokens.

    Attributes
    ----------
    loss : float
        By how much perplexity is higher, relative: 0.01 is 1 %.
    loss_error : float
        Its standard error, from the spread between blocks of tokens.
    kl : float
        Mean KL(float || setting) of the next-token distribution, in nats.
    same : float
        Share of tokens whose likeliest successor is the same.
    tokens : int
    """

    loss: float
    loss_error: float
    kl: float
    same: float
    tokens: int


class Results:
    """Records of one or more runs, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.runs: list[Record] = []
        self.floats: dict[tuple[int, str], Record] = {}
        self.needles: list[Record] = []
        self.generations: list[Record] = []
        self._texts: dict[str, list[Record]] = defaultdict(list)
        for line in path.read_text("ascii").splitlines():
            record = json.loads(line)
            if record["kind"] == "about":
                self.runs.append(record)
            elif record["kind"] == "needles":
                self.needles.append(record)
            elif record["kind"] == "generation":
                self.generations.append(record)
            elif record["setting"] is None:
                self.floats[len(self.runs), record["text"]] = record
            else:
                self._texts[record["experiment"]].append({**record, "run": len(self.runs)})

    def settings(self, experiment: str) -> list[Setting]:
        """All settings of an experiment, each once, in the order of measurement."""
        found: list[Setting] = []
        for record in self._texts[experiment]:
            if record["setting"] not in found:
                found.append(record["setting"])
        return found

    def records(self, experiment: str, setting: Setting, texts: Iterable[str] = ()) -> list[Record]:
        """Of some texts, or of all."""
        wanted = set(texts)
        return [
            record
            for record in self._texts[experiment]
            if record["setting"] == setting and (not wanted or record["text"] in wanted)
        ]

    def summary(self, records: list[Record], start: int, stop: int) -> Summary:
        """Tokens `start` to `stop` of all these records together, in whole blocks."""
        losses, counts, kl, same = [], [], 0.0, 0
        for record in records:
            exact = self.floats[record["run"], record["text"]]
            for block in range(start // BLOCK, min(stop // BLOCK, len(record["nll"]))):
                count = record["count"][block]
                if count == exact["count"][block]:  # a text that ends earlier ends in a part
                    losses.append(record["nll"][block] - exact["nll"][block])
                    counts.append(count)
                    kl += record["kl"][block]
                    same += record["same"][block]
        tokens = sum(counts)
        if not tokens:
            raise ValueError(f"nothing measured in tokens {start} to {stop}")
        mean = sum(losses) / tokens
        spread = np.array(losses) - mean * np.array(counts)
        error = math.sqrt((spread**2).sum() * len(counts) / max(1, len(counts) - 1)) / tokens
        return Summary(math.expm1(mean), error * math.exp(mean), kl / tokens, same / tokens, tokens)

    def at_context(
        self, experiment: str, setting: Setting, context: int, texts: Iterable[str] = ()
    ) -> Summary:
        """The second half of a context: tokens that look back on `context` / 2 and more."""
        return self.summary(self.records(experiment, setting, texts), context // 2, context)

    def found(self, tokens: int, setting: Setting | None) -> Any:
        """[depths] share of needles found."""
        rows = [
            record["found"]
            for record in self.needles
            if record["tokens"] == tokens and record["setting"] == setting
        ]
        return np.array(rows, float).mean(axis=0)


def bytes_per_token(setting: Setting, context: int) -> float:
    """Of a cache that holds `context` tokens: codes, scales, windows and key offsets."""
    total = cache_bytes(layer_caches(setting), context)
    if renew := setting.get("renew"):
        total += (-(-context // renew) - 1) * LAYERS * KV_HEADS * HEAD_DIM * 4
    if setting.get("value_offset_tokens"):
        total += LAYERS * KV_HEADS * HEAD_DIM * 4
    return total / context
