"""Draw matplotlib figures into data URIs, in a light and a dark style.

Figures are built without pyplot, so no window system is asked for and nothing stays open.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDE, NARROW = 7.2, 3.7  # inches: the page's column on a desk and on a phone
# Past this size a vector image costs more than it gives; a bitmap is then smaller and opens faster.
LARGEST_SVG = 300_000  # bytes

# Palettes that readers with any of the common colour deficiencies can tell apart (after Okabe and Ito 2008).
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5588f", "#8a6d00")
_DARK = ("#56b4e9", "#f08a4b", "#35c79e", "#e29ac6", "#e6c84f")
_BASE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.edgecolor": "none",
    "savefig.bbox": None,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    # Labels are the user's text: never markup, and least of all TeX, which can run programs.
    "text.usetex": False,
    "text.parse_math": False,
}
_SAVE: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "salience", "svg.image_inline": True}


def style(dark: bool) -> dict[str, Any]:
    """The matplotlib settings of a report figure."""
    ink, soft, grid = ("#e6e8eb", "#a3abb5", "#363d47") if dark else ("#1f2328", "#59626d", "#dfe3e8")
    colours = _DARK if dark else _LIGHT
    return {
        **_BASE,
        "text.color": ink,
        "axes.labelcolor": soft,
        "axes.titlecolor": ink,
        "axes.edgecolor": grid,
        "grid.color": grid,
        "xtick.color": soft,
        "ytick.color": soft,
        "ytick.labelcolor": ink,
        "axes.prop_cycle": cycler(color=colours),
        "image.cmap": "cividis",
    }


def variants(draw: Callable[[Axes], object], height: float) -> dict[str, str]:
    """Data URIs of what `draw` puts on its axes: ``light``, ``dark``, ``narrow`` and ``narrow_dark``."""
    uris = {}
    for name in ("light", "dark", "narrow", "narrow_dark"):
        with mpl.style.context(["default", style(dark="dark" in name)]):
            figure = Figure(figsize=(NARROW if "narrow" in name else WIDE, height), layout="constrained")
            draw(figure.add_subplot())
            uris[name] = _data_uri(figure, "none")
    return uris


def ready(figure: Figure) -> str:
    """Data URI of a ready figure, on white."""
    return _data_uri(figure, "white")


def _data_uri(figure: Figure, background: str) -> str:
    with warnings.catch_warnings(), mpl.rc_context(_SAVE):
        # A label in a script that the font lacks is drawn as boxes; that is no reason to alarm the user.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        image, kind = _saved(figure, format="svg", metadata={"Date": None}, facecolor=background), "svg+xml"
        if len(image) > LARGEST_SVG:
            image, kind = _saved(figure, format="png", dpi=180, facecolor=background), "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()
