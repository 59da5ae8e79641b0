"""Make docs/benchmarks/quality.md and its figures from the measurements.

::

    python docs/scripts/quality_page.py docs/benchmarks/quality.jsonl

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from quality_cache import FEW_BITS, Setting
from quality_results import BLOCK, CONTEXTS, FLOAT16_BYTES, TESTS, Results, bytes_per_token

TARGET = Path(__file__).resolve().parents[1] / "benchmarks"
BITS = (2, 3, 4, 5, 6, 8)
GOALS = {(8, 8): 0.001, (5, 4): 0.005, (4, 4): 0.007, (3, 3): 0.025, (2, 2): 0.10}
LONGEST = CONTEXTS[-1]
PAIRS = ((4, 4), (3, 3), (2, 2))
CODEC_TOKENS = 3072  # whole blocks that every record of the experiment has
SHORT = 2048


def percent(x: float) -> str:
    """0.0123 -> "1.2 %"."""
    digits = 2 if abs(x) < 0.00995 else 1
    return f"{100 * x:.{digits}f} %".replace("-0.00", "0.00")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bits(pair: tuple[int, int], **changes: Any) -> Setting:
    return {"key_bits": pair[0], "value_bits": pair[1], **changes}


def where(results: Results) -> str:
    """Machines, one sentence for each."""
    seen = []
    for run in results.runs:
        sentence = (
            f"{run['date']}, {run['machine']}, {run['array library']}, Python {run['python']}"
        )
        if sentence not in seen:
            seen.append(sentence)
    return "Measured on " + "; and ".join(seen) + "."


def texts(results: Results) -> str:
    rows = []
    for name in dict.fromkeys(name for _, name in results.floats):
        records = [r for (_, n), r in results.floats.items() if n == name]
        record = max(records, key=lambda r: r["tokens"])
        row = [name]
        for context in CONTEXTS:
            half = slice(context // 2 // BLOCK, context // BLOCK)
            row.append(f"{math.exp(sum(record['nll'][half]) / sum(record['count'][half])):.2f}")
        rows.append(row)
    return table(["text", *(f"at {c // 1024}k" for c in CONTEXTS)], rows)


def goals(results: Results) -> str:
    rows = []
    for pair, goal in GOALS.items():
        row = [f"{pair[0]}/{pair[1]}", percent(goal)]
        for context in CONTEXTS:
            s = results.at_context("bits", bits(pair), context)
            size = bytes_per_token(bits(pair), context)
            mark = "**" if s.loss > goal else ""
            row.append(f"{mark}{percent(s.loss)}{mark} ± {100 * s.loss_error:.2f} ({size:,.0f} B)")
        s = results.at_context("bits", bits(pair), LONGEST)
        size = bytes_per_token(bits(pair), LONGEST)
        rows.append([*row, f"{s.kl:.5f}", f"{100 * s.same:.1f} %", f"{FLOAT16_BYTES / size:.1f}x"])
    head = ["keys/values", "goal", *(f"loss at {c // 1024}k (bytes)" for c in CONTEXTS)]
    return table([*head, "KL at 8k", "same", "smaller than float16"], rows)


def bit_tables(results: Results) -> str:
    """Loss, KL and agreement for all pairs of bit widths."""
    parts: list[str] = []
    for title in ("Loss, and bytes for a token", "KL", "Same likeliest token"):
        rows = []
        for key_bits in BITS:
            row = [f"**{key_bits}**"]
            for value_bits in BITS:
                setting = bits((key_bits, value_bits))
                s = results.at_context("bits", setting, LONGEST)
                size = bytes_per_token(setting, LONGEST)
                cells = (
                    f"{percent(s.loss)} ({size:,.0f})",
                    f"{s.kl:.5f}" if s.kl < 0.001 else f"{s.kl:.4f}",
                    f"{100 * s.same:.1f} %",
                )
                row.append(cells[len(parts)])
            rows.append(row)
        head = ["keys \\ values", *(f"{b} bits" for b in BITS)]
        parts.append(f"### {title}, at 8k\n\n{table(head, rows)}")
    return "\n\n".join(parts)


NAMES = {
    "key_offset_tokens": "`key_offset_tokens={}`",
    "sink_tokens": "`sink_tokens={}`",
    "recent_tokens": "`recent_tokens={}`",
    "key_scale": 'keys with scale "{}"',
    "value_scale": 'values with scale "{}"',
    "rotation": "rotation {}",
    "seed": "rotation of seed {}",
    "exact": "{} left as they are",
    "step": "text read {} tokens at a time",
    "renew": "key offset renewed every {} tokens",
    "value_offset_tokens": "mean of {} values removed too",
}


def name_of(change: Setting) -> str:
    """A change in words."""
    if not change:
        return "the defaults"
    windows = ("sink_tokens", "recent_tokens", "key_offset_tokens")
    if all(name in change for name in windows):
        kept = [NAMES[name].format(change[name]) for name in windows if change[name]]
        return (
            "no windows, no key offset" if not kept else "no windows, no key offset, but " + kept[0]
        )
    return ", ".join(NAMES[name].format(value) for name, value in change.items())


def changes(
    results: Results,
    experiment: str,
    start: int,
    stop: int,
    texts: tuple[str, ...],
    pairs: tuple[tuple[int, int], ...] = PAIRS,
) -> str:
    """Loss, KL and bytes of every change from the defaults that was measured on all these texts."""
    found: list[Setting] = [{}]
    for setting in results.settings(experiment):
        change = {k: v for k, v in setting.items() if k not in ("key_bits", "value_bits")}
        if change not in found:
            found.append(change)
    order = list(NAMES)
    found.sort(key=lambda change: (len(change), *(order.index(name) for name in [*change][:1])))
    rows = []
    for change in found:
        cells: list[str] = []
        for pair in pairs:
            setting = bits(pair, **change)
            records = results.records(experiment, setting, texts)
            if not change and not records:
                records = results.records("bits", setting, texts)
            if {record["text"] for record in records} == set(texts):
                s = results.summary(records, start, stop)
                cells += [percent(s.loss), f"{s.kl:.4f}", f"{bytes_per_token(setting, stop):,.0f}"]
        if len(cells) == 3 * len(pairs):
            rows.append([name_of(change), *cells])
    head = [f"{k}/{v}: {what}" for k, v in pairs for what in ("loss", "KL", "bytes")]
    return table(["", *head], rows)


def codec_table(results: Results) -> str:
    """KL of all pairs of bits by scale and rotation, on the tokens that all of them saw."""
    kinds = []
    for setting in results.settings("codec"):
        kind = {k: v for k, v in setting.items() if k not in ("key_bits", "value_bits")}
        if kind not in kinds:
            kinds.append(kind)
    rows = []
    for key_bits in BITS:
        for value_bits in BITS:
            pair = bits((key_bits, value_bits))
            cells = []
            for experiment, kind in (("bits", {}), *(("codec", kind) for kind in kinds)):
                records = results.records(experiment, {**pair, **kind}, TESTS[:1])
                if not records:
                    break
                s = results.summary(records, 0, CODEC_TOKENS)
                cells.append(f"{s.kl:.5f} ({100 * s.same:.1f} %)")
            else:
                rows.append([f"{key_bits}/{value_bits}", *cells])
    heads = [f'"{kind["key_scale"]}", {kind["rotation"]}' for kind in kinds]
    return table(["keys/values", "the defaults", *heads], rows)


def by_layer(results: Results) -> str:
    """Bits by layer beside the same bits everywhere."""
    rows = []
    for mean in (4, 3, 2):
        experiment = f"by layer, {mean} on average"
        (setting,) = results.settings(experiment)
        for name, of, which in (
            (f"{mean}/{mean} everywhere", "bits", bits((mean, mean))),
            (f"{mean} on average, by layer", experiment, setting),
        ):
            row = [name]
            for context in CONTEXTS:
                s = results.at_context(of, which, context, TESTS)
                row.append(f"{percent(s.loss)} ± {100 * s.loss_error:.2f} (KL {s.kl:.4f})")
            rows.append([*row, f"{bytes_per_token(which, LONGEST):,.0f}"])
    return table(["", *(f"loss at {c // 1024}k" for c in CONTEXTS), "bytes at 8k"], rows)


def few_bits(results: Results) -> str:
    """Values of 1 and 2 bits with either scale, bits by layer among them."""
    kinds: list[tuple[str, str, Setting]] = [
        (f"{k}/2", "value scale, 4k", bits((k, 2))) for k in (4, 2)
    ]
    for mean in (3, 2):
        (setting,) = results.settings(f"by layer, {mean} on average")
        kinds.append((f"{mean} on average, by layer", "value scale, 4k", setting))
    experiment = "bits by the example"
    (setting,) = results.settings(experiment)
    kinds.append(("3 on average, by 512 tokens", experiment, setting))
    rows = []
    for name, experiment, setting in kinds:
        row = [name]
        for context in CONTEXTS[:2]:
            for scale in ("mse", FEW_BITS):
                found = {**setting, "value_scale": scale}
                if results.records(experiment, found):
                    s = results.at_context(experiment, found, context, TESTS)
                    row.append(f"{percent(s.loss)} ± {100 * s.loss_error:.2f} (KL {s.kl:.4f})")
                else:
                    row.append("")
        rows.append([*row, *(f"{bytes_per_token(setting, c):,.0f}" for c in CONTEXTS[::2])])
    head = [f'"{scale}", at {c}' for c in ("2k", "4k") for scale in ("mse", "unbiased")]
    return table(["", *head, "bytes at 2k", "bytes at 8k"], rows)


def three_bits(results: Results) -> str:
    """Values of 3 bits with either scale, on the tokens that both experiments have."""
    rows = []
    for key_bits in (3, 4, 5):
        pair = bits((key_bits, 3))
        row = [f"{key_bits}/3"]
        for experiment, setting in (
            ("bits", pair),
            ("value scale, 4k", {**pair, "value_scale": "unbiased"}),
        ):
            s = results.summary(results.records(experiment, setting, TESTS), 0, CODEC_TOKENS)
            row.append(f"{percent(s.loss)} ± {100 * s.loss_error:.2f} (KL {s.kl:.5f})")
        rows.append([*row, *(f"{bytes_per_token(pair, c):,.0f}" for c in CONTEXTS[::2])])
    return table(["", '"mse"', '"unbiased"', "bytes at 2k", "bytes at 8k"], rows)


def needles(results: Results) -> str:
    """Share of numbers found, all depths together."""
    lengths = sorted({record["tokens"] for record in results.needles})
    settings: list[Setting | None] = []
    for record in results.needles:
        if record["setting"] not in settings:
            settings.append(record["setting"])
    rows = []
    for setting in settings:
        name = "float" if setting is None else f"{setting['key_bits']}/{setting['value_bits']}"
        shares = [results.found(tokens, setting).mean() for tokens in lengths]
        rows.append([name, *(f"{100 * share:.0f} %" for share in shares)])
    return table(["keys/values", *(f"{tokens // 1024}k" for tokens in lengths)], rows)


def generations(results: Results) -> str:
    """Answers side by side, a table for each text."""
    parts = []
    for text in dict.fromkeys(record["text"] for record in results.generations):
        records = [record for record in results.generations if record["text"] == text]
        question, tokens = records[0]["question"], records[0]["prompt_tokens"]
        rows = [
            [
                "/".join(map(str, record["bits"])) if record["bits"] else "float",
                " ".join(record["answer"].split()).replace("|", "\\|"),
            ]
            for record in records
        ]
        head = f"*{question}* ({text}, {tokens:,} tokens of prompt)"
        parts.append(f"{head}\n\n{table(['keys/values', 'answer'], rows)}")
    return "\n\n".join(parts)


def page(results: Results, template: str) -> str:
    """Put the tables where the template names them: a line ``{{name}}``."""
    parts = {
        "where": where(results),
        "texts": texts(results),
        "float16": f"{FLOAT16_BYTES:,}",
        "goals": goals(results),
        "bits": bit_tables(results),
        "windows": changes(results, "ablation", LONGEST // 2, LONGEST, TESTS),
        "codec changes": changes(results, "codec changes", 0, SHORT, TESTS[:1], PAIRS[::2]),
        "value scale": changes(
            results, "value scale", 0, SHORT, TESTS[1:], ((3, 3), (4, 2), (2, 2))
        ),
        "few bits": few_bits(results),
        "three bits": three_bits(results),
        "codec table": codec_table(results),
        "layers": by_layer(results),
        "more offsets": changes(results, "more offsets", LONGEST // 2, LONGEST, TESTS),
        "balanced": balanced(results),
        "needles": needles(results),
        "generations": generations(results),
    }
    for name, part in parts.items():
        template = template.replace("{{" + name + "}}", part)
    if "{{" in template:
        raise ValueError(f"unknown part in the template: {template.partition('{{')[2][:40]!r}")
    return template


def balanced(results: Results) -> str:
    """Gains folded into the weights."""
    rows = []
    for pair in PAIRS:
        setting = bits(pair)
        row = [f"{pair[0]}/{pair[1]}"]
        for experiment in ("bits", "balanced channels"):
            s = results.at_context(experiment, setting, LONGEST, TESTS)
            row.append(f"{percent(s.loss)} (KL {s.kl:.4f})")
        rows.append(row)
    return table(["keys/values", "weights as they are", "balanced channels"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the page about quality.")
    parser.add_argument("results", type=Path, help="written by measure_quality.py")
    arguments = parser.parse_args()
    import matplotlib.pyplot as plt
    from make_plots import STYLE
    from quality_plots import draw_bytes, draw_layers, draw_needles

    results = Results(arguments.results)
    template = (Path(__file__).parent / "quality_page.md.in").read_text("utf-8")
    (TARGET / "quality.md").write_text(page(results, template), "utf-8")
    with plt.rc_context(STYLE):
        for name, draw in (
            ("bytes", draw_bytes),
            ("needles", draw_needles),
            ("layers", draw_layers),
        ):
            figure = draw(results)
            figure.savefig(TARGET / f"quality_{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
