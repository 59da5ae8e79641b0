"""Let SmolLM2 answer questions about long texts, greedily, on the float cache and on packed ones.

For the page about quality; answers are added to the lines of JSON that `measure_quality` writes::

    python docs/scripts/quality_generations.py texts.npz docs/benchmarks/quality.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from quality_texts import load

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2.caches import make_cache
from smollm2.generate import Batch
from smollm2.loader import load_weights
from smollm2.model import Model
from smollm2.tokenizer import ChatTokenizer

QUESTIONS = {
    "gpl": "What does this text want to protect, and how? Answer in two sentences.",
    "python-1": "What is this text about? Answer in two sentences.",
}
BITS = (None, (8, 8), (5, 4), (4, 4), (3, 3), (2, 2))
CHUNK = 16  # of a prompt; longer ones would see packed neighbours


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers on compressed caches, side by side.")
    parser.add_argument("texts", type=Path, help="written by quality_texts.py")
    parser.add_argument("output", type=Path, help="lines of JSON; appended to")
    parser.add_argument("--tokens", type=int, default=640, help="of each text (640)")
    parser.add_argument("--answer", type=int, default=48, help="tokens at most (48)")
    arguments = parser.parse_args()
    model, tokenizer = Model(load_weights(), np), ChatTokenizer()
    texts, _ = load(arguments.texts)
    for name, question in QUESTIONS.items():
        text = tokenizer.decode(texts[name][: arguments.tokens].tolist())
        prompt = tokenizer.chat(f"{text}\n\n{question}")
        for bits in BITS:
            kind = "float" if bits is None else "turboquant"
            key_bits, value_bits = bits or (8, 8)
            cache = make_cache(
                model.config, kind, max_sequences=1, max_tokens=len(prompt) + arguments.answer,
                key_bits=key_bits, value_bits=value_bits,
            )  # fmt: skip
            batch = Batch(model, cache, stop=tokenizer.end, prefill_chunk=CHUNK)
            request = batch.submit(prompt, max_new_tokens=arguments.answer)
            for _ in batch.run():
                pass
            answer = tokenizer.decode(request.generated)
            print(f"{name} {bits}: {answer}", flush=True)
            record = {
                "kind": "generation", "text": name, "question": question, "bits": bits,
                "prompt_tokens": len(prompt), "answer": answer,
            }  # fmt: skip
            with arguments.output.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
