"""Kernel sources: files of ``kernels/`` with their headers and a variant's macros written in.

NVRTC then needs no include path.  Nothing here needs CuPy or a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@cache
def _headers_and_body(name: str) -> tuple[str, str]:
    """Kernel file `name`: the headers it needs, each once and in order, and what follows them."""
    headers: dict[str, str] = {}

    def body_of(file: str) -> str:
        text = (files(__package__) / "kernels" / file).read_text("utf-8")
        for header in _INCLUDE.findall(text):
            if header not in headers:
                body = body_of(header)  # first what the header itself includes
                headers[header] = body
        return _INCLUDE.sub("", text).replace("#pragma once\n", "")

    body = body_of(name)
    return "".join(headers.values()), body


def variant_source(name: str, macros: Mapping[str, str | int]) -> str:
    """The source of one variant of a kernel; headers do not see its macros."""
    headers, body = _headers_and_body(name)
    defines = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    return headers + defines + body
