"""Directives for what is better read off the code than written twice."""

from __future__ import annotations

import argparse
import ast
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes  # type: ignore[import-untyped]
from docutils.parsers.rst import Directive  # type: ignore[import-untyped]
from docutils.statemachine import StringList  # type: ignore[import-untyped]

from turboquant_np._backend import BUILT_IN
from turboquant_np.cli import make_parser
from turboquant_np.memory import MODELS, kv_bytes_per_token

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HELP_COLUMNS = "84"


class MarkdownTable(Directive):  # type: ignore[misc]
    """A directive whose `rows` are a table, the first row being its head."""

    def rows(self) -> list[list[str]]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        head, *body = self.rows()
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["-"] * len(head), *body)]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, "generated"), 0, container)
        return list(container.children)


class ModelTable(MarkdownTable):
    """``{model-table}``: the models that `turboquant_np.memory` knows."""

    def rows(self) -> list[list[str]]:
        head = ["model", "layers", "KV heads", "head_dim", "bytes for a token, float16", "4 bits"]
        return [head] + [
            [
                m.name,
                f"{m.num_layers}",
                f"{m.num_kv_heads}",
                f"{m.head_dim}",
                f"{kv_bytes_per_token(m, None):,}",
                f"{kv_bytes_per_token(m, 4):,}",
            ]
            for m in MODELS
        ]


class BackendTable(MarkdownTable):
    """``{backend-table}``: the built-in backends, by the first lines of their docstrings."""

    def rows(self) -> list[list[str]]:
        return [["name", "what it is"]] + [[f"`{n}`", _summary(n)] for n in BUILT_IN]


class CommandHelp(Directive):  # type: ignore[misc]
    """``{command-help}``: what ``turboquant-np --help`` prints; with all commands behind it."""

    def run(self) -> list[nodes.Node]:
        parser = make_parser()
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        sections = [_section(name, command) for name, command in commands.choices.items()]
        return [_literal(parser.format_help()), *sections]


def _section(name: str, parser: argparse.ArgumentParser) -> nodes.Node:
    section = nodes.section(ids=[nodes.make_id(name)], names=[name])
    section += nodes.title(name, name)
    section += _literal(parser.format_help())
    return section


def _literal(text: str) -> nodes.Node:
    return nodes.literal_block(text.rstrip(), text.rstrip(), language="text")


def _summary(backend: str) -> str:
    """First line of a backend's docstring, read without importing it (it may need a GPU)."""
    spec = find_spec(f"turboquant_np.backends.{backend}")
    assert spec is not None
    assert spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
    return docstring.partition("\n")[0]


def no_emphasis(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    """Shapes like [*n, d] would start emphasis; a star of the same width keeps tables whole."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(?<=[\[ ])\*(?=\w)", "\N{ASTERISK OPERATOR}", line)


def setup(app: Sphinx) -> dict[str, Any]:
    os.environ["COLUMNS"] = HELP_COLUMNS  # what argparse wraps its help at
    app.connect("autodoc-process-docstring", no_emphasis)
    app.add_directive("model-table", ModelTable)
    app.add_directive("backend-table", BackendTable)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
