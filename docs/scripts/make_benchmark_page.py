"""Make docs/benchmarks/cpu.md and cpu.svg from a benchmark's JSON file.

On a machine with nothing else to do::

    turboquant-np bench --full --peers --json cpu.json
    python docs/scripts/make_benchmark_page.py cpu.json

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from turboquant_np.bench import report
from turboquant_np.bench.plot import draw

TARGET = Path(__file__).resolve().parents[1] / "benchmarks"


def block(section: str) -> str:
    """A section of the report without its title, as a block of text."""
    return f"```text\n{section.partition(chr(10) * 2)[2].rstrip()}\n```"


def page(document: dict[str, Any], remark: str) -> str:
    """The Markdown page."""
    about, startup = document["about"], document["startup"]
    codec = document["codec"]
    cpu = about["backend"]
    packages = ("turboquant_np", "python", "numpy", "numba", "scipy")
    versions = ", ".join(f"{package} {about['versions'][package]}" for package in packages)
    full = "--full " if about["options"]["full"] else ""
    return f"""\
# Speed on a CPU

Measured on {about["date"]}: {about["machine"]} ({cpu["cpu"]}, {cpu["simd"]}),
{about["cores"]} cores; {versions}.
{remark}

```console
$ turboquant-np bench {full}--peers
```

![Speed of the codec by bit width, and of other libraries](cpu.svg)

Figures are medians of calls that take turns, each with the roofline or the library it is compared
with, so that whatever slows the machine slows both. One thread is a process that may run on one
core only.

## Encode and decode

Million vectors per second. In brackets: bytes read and written per second, over the rate at which
the machine reads (encode) or copies (decode) an array of the same size.

{block(report.codec(row for row in codec if row["rounds"]))}

## Haar rotation

In brackets: operations per second over those of NumPy's float64 matrix product of the same shape.
The product is exact, so every machine gets the same bits.

{block(report.haar(row for row in codec if not row["rounds"]))}

## Other libraries

Encoding of the same float32 vectors. The TurboQuant codes of faiss (`QT_4bit_tqmse`) store no norm;
without its random rotation they lose the error bound, and the line shows what rounding and packing
alone cost. turbovec's index has no decoder. turbo-quant-lite leaves its codes unpacked.

{block(report.peers(document["peers"]))}

## Start

Import {startup["import_seconds"]:.2f} s, NumPy included; first encode of a process
{startup["first_encode_seconds"]:.2f} s when the compiled kernels are cached.

## Goals

{block(report.goals(document["goals"]))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the page about speed on a CPU.")
    parser.add_argument("json", type=Path, help="written by turboquant-np bench --peers --json")
    parser.add_argument("--remark", default="", help="about the machine's state, for the page")
    arguments = parser.parse_args()
    document = json.loads(arguments.json.read_text())
    TARGET.mkdir(exist_ok=True)
    (TARGET / "cpu.md").write_text(page(document, arguments.remark).replace("\n\n\n", "\n\n"))
    draw(document, str(TARGET / "cpu.svg"))


if __name__ == "__main__":
    main()
