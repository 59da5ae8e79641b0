"""Fill the tables and draw the plots of a page in docs/benchmarks from the benchmark's JSON files.

On a machine with nothing else to do::

    turboquant-np bench --section codec startup --peers --json cpu.json
    python docs/scripts/make_benchmark_page.py docs/benchmarks/cpu.md cpu.json

Text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced, NAME being one of those
that ``--help`` lists; everything else in a page is written by hand.  A picture ``PAGE-NAME.svg``
that the page shows is drawn again.  Several files are taken as one run, for a benchmark that was
measured in parts; the first says when and where.  Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turboquant_np.bench import report, report_peers
from turboquant_np.bench.cells import section_of
from turboquant_np.bench.plot import PLOTS, draw

Document = dict[str, Any]
MARKED = re.compile(r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
SECTIONS: dict[str, Callable[[Document], str]] = {
    "rooflines": lambda d: report.rooflines(d["lines"]),
    "codec": lambda d: report.codec(d["lines"]),
    "attention": lambda d: report.attention(d["lines"]),
    "launches": lambda d: report.launches(d["launches"]),
    "append": lambda d: report.append(d["lines"]),
    "growth": lambda d: report.growth(d["growth"]),
    "growth-rooflines": lambda d: report.rooflines(section_of(d["lines"], "growth")),
    "codec-peers": lambda d: report_peers.codec(d["peers"]),
    "attention-peers": lambda d: report_peers.attention(d["peers"]),
    "missing": lambda d: report_peers.missing(d["missing"]),
    "validation": lambda d: report.validation(d["validation"]),
    "goals": lambda d: report.goals(d["goals"]),
}


def merge(documents: list[Document]) -> Document:
    """One document with the rows of all of them; of goals those that were measured."""
    merged = dict(documents[0])
    for document in documents[1:]:
        for name, rows in document.items():
            if isinstance(rows, list):
                merged[name] = merged[name] + [row for row in rows if row not in merged[name]]
            elif isinstance(rows, dict) and not merged[name]:
                merged[name] = rows
    return merged


def about(document: Document) -> str:
    """The sentence on when and where."""
    found = document["about"]
    backend, versions = found["backend"], found["versions"]
    what = [backend[name] for name in ("cpu", "simd", "driver") if name in backend]
    on_gpu = found["options"]["device"] == "cuda"
    packages = ("turboquant_np", "python", "numpy", "cupy" if on_gpu else "numba")
    listed = ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)
    cores = "" if on_gpu else f", {found['cores']} cores"
    where = f"{found['machine']} ({', '.join(what)})" if what else found["machine"]
    return f"Measured on {found['date']}: {where}{cores}; {listed}.\n"


def startup(document: Document) -> str:
    """Seconds of the first import and of the first encode."""
    return report.startup(document["startup"]).removeprefix("Start: ").capitalize() + ".\n"


def section(document: Document, name: str) -> str:
    """Its table without the title, as a block of text."""
    if name == "about":
        return about(document)
    if name == "startup":
        return startup(document)
    text = SECTIONS[name](document)
    if not text:
        raise SystemExit(f"the JSON files have nothing for <!-- begin {name} -->")
    _, _, table = text.partition("\n\n")
    return f"```text\n{table.rstrip()}\n```\n"


def fill(page: str, document: Document) -> str:
    """The page with what stands between markers replaced."""
    known = {*SECTIONS, "about", "startup"}
    for _, name, _ in MARKED.findall(page):
        if name not in known:
            raise SystemExit(f"unknown marker {name!r}; known: {', '.join(sorted(known))}")
    return MARKED.sub(lambda found: found[1] + section(document, found[2]) + found[3], page)


def draw_plots(page: Path, document: Document) -> None:
    """Draw the pictures that the page shows."""
    shown = set(re.findall(rf"\({page.stem}-(\w+)\.svg\)", page.read_text())) & PLOTS.keys()
    with tempfile.TemporaryDirectory() as folder:
        for path in draw(document, f"{folder}/{page.stem}.svg"):
            if path.stem.removeprefix(f"{page.stem}-") in shown:
                (page.parent / path.name).write_bytes(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"names: about, startup, {', '.join(SECTIONS)}; pictures: {', '.join(PLOTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", type=Path, help="docs/benchmarks/....md")
    parser.add_argument("json", type=Path, nargs="+", help="written by turboquant-np bench --json")
    arguments = parser.parse_args()
    document = merge([json.loads(path.read_text()) for path in arguments.json])
    arguments.page.write_text(fill(arguments.page.read_text(), document))
    draw_plots(arguments.page, document)


if __name__ == "__main__":
    main()
