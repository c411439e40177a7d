"""Figures and self-contained HTML pages from plain data.

``page(title, [verdict(...), facts(...), figure(...)], path="report.html")`` writes a file that loads nothing
and runs no script. `salience.report.figures` draws histograms, bars and curves in the page's style.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.report.blocks import code, documents, edits, facts, figure, heading, table, text, verdict
    from salience.report.render import page

_WHERE = {
    "page": "render",
    **dict.fromkeys(("code", "documents", "edits", "facts", "figure", "heading", "table", "text", "verdict"), "blocks"),
}
__all__ = ["code", "documents", "edits", "facts", "figure", "heading", "page", "table", "text", "verdict"]
__getattr__, __dir__ = exports(__name__, _WHERE)
