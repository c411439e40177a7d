"""Configuration of the documentation: ``make docs``, or ``sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]

import generate  # noqa: E402

import salience  # noqa: E402

project = "salience"
copyright = "the salience authors"
version = release = salience.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
# The parts of _generated that other pages include are no pages of their own.
exclude_patterns = ["_build", "_generated/index.md", "_generated/commands.md"]
default_role = "literal"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
maximum_signature_line_length = 88
add_module_names = False
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "pydata_sphinx_theme"
html_title = f"salience {version}"
html_static_path = ["_static"]
html_css_files = ["salience.css"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {page: [] for page in ("index", "install", "cli", "evidence", "contributing")}


def skip(app: Any, what: str, name: str, thing: object, skipped: bool, options: object) -> bool | None:
    """Leave out what scikit-learn adds to every estimator to route metadata."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def set_off_equations(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Show the indented lines above a docstring's first section, where equations stand, as they are typed."""
    sections = (row - 1 for row, line in enumerate(lines) if row and re.fullmatch(r"-{3,}", line.strip()))
    for row in range(next(sections, len(lines)) - 1, 1, -1):
        above = next((line for line in reversed(lines[:row]) if line.strip()), "")
        indented = lines[row].startswith("    ") and not above.startswith((" ", "..", "- ", "* "))
        if indented and not lines[row - 1].strip() and not above.endswith("::"):
            lines[row:row] = ["::", ""]


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx looks for sources."""
    app.connect("builder-inited", lambda _: generate.write())
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", set_off_equations, priority=100)  # before numpydoc


# A built-in type such as `bytes` also names a property of two classes; Sphinx cannot tell which is meant.
suppress_warnings = ["ref.python"]
