"""The script that fills tables into pages of benchmarks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_bench import document, grown, line

SCRIPT = Path(__file__).parent.parent / "docs" / "scripts" / "make_benchmark_page.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the documentation is not here")

PAGE = """\
# By hand
<!-- begin codec -->
old figures
<!-- end codec -->
still by hand
"""


def make(page: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(page), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_stands_between_markers_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, first, second = (tmp_path / name for name in ("page.md", "a.json", "b.json"))
    first.write_text(json.dumps(document(lines=[line("encode", items_per_second=7e6)])))
    second.write_text(json.dumps(document(lines=[line("decode", items_per_second=9e6)])))
    page.write_text(PAGE)
    assert make(page, first, second).returncode == 0
    text = page.read_text()
    assert text.startswith("# By hand\n<!-- begin codec -->\n```text\n")
    assert text.endswith("```\n<!-- end codec -->\nstill by hand\n")
    assert "old figures" not in text
    assert re.search(r"^encode .* 7\.00 \(", text, re.MULTILINE)
    assert re.search(r"^decode .* 9\.00 \(", text, re.MULTILINE), "files are taken as one run"
    assert make(page, first, second).returncode == 0
    assert page.read_text() == text, "again gives the same"


def test_only_pictures_that_the_page_shows_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, file = tmp_path / "page.md", tmp_path / "a.json"
    lines = [line("encode", bits=bits, operations=1) for bits in (2, 4)]
    file.write_text(json.dumps(document(lines=lines)))
    page.write_text("![](page-codec.svg)")
    assert make(page, file).returncode == 0
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["page-codec.svg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("growth", "the JSON files have nothing for"), ("codecs", "unknown marker 'codecs'; known: ")],
)
def test_nothing_is_written_if_something_is_missing(
    name: str, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    page, file = tmp_path / "page.md", tmp_path / "a.json"
    file.write_text(json.dumps(document(lines=grown([1], [1]))))
    page.write_text(PAGE.replace("codec", name))
    done = make(page, file)
    assert done.returncode == 1
    assert message in done.stderr
    assert "old figures" in page.read_text()
