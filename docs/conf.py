"""Sphinx settings.  Build: python -m sphinx -W --keep-going -b html docs docs/_build/html

Nothing is fetched, at build time or by the pages: formulas are plain text, no MathJax, no
intersphinx, fonts and icons are those of the theme.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import turboquant_np

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "turboquant_np"
author = "The turboquant_np developers"
copyright = f"2026, {author}"
version = release = turboquant_np.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "from_code"]
root_doc = "index"
exclude_patterns = ["_build", "_ext", "scripts"]

myst_enable_extensions = ["attrs_block", "deflist"]
myst_heading_anchors = 3

default_role = "code"
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Packages of extras: where one is missing, the docstrings of the module that needs it are enough.
autodoc_mock_imports = [
    name for name in ("dask", "numcodecs", "safetensors", "zarr") if find_spec(name) is None
]
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "pydata_sphinx_theme"
html_title = "turboquant_np"
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_extra_path = ["test_vectors.json"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "turboquant_np"},
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "show_toc_level": 2,
}
html_sidebars: dict[str, list[str]] = {
    "tutorial/*": [],
    "format": [],
    "differences": [],
    "changelog": [],
}
