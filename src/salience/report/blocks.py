"""The blocks of a report page: small frozen records of plain text, built by the functions of the same name.

Nothing here escapes anything: the page does that for every piece of text at once (`salience.report.render`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from salience.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Verdict:
    kind: ClassVar[str] = "verdict"
    label: str
    detail: str
    tone: str  # good, bad or open


@dataclass(frozen=True)
class Facts:
    kind: ClassVar[str] = "facts"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Picture:
    """A drawn figure as data URIs; a ready figure has only `light`, which is shown on a light card."""

    kind: ClassVar[str] = "picture"
    caption: str
    alt: str
    light: str
    dark: str = ""
    narrow: str = ""
    narrow_dark: str = ""


@dataclass(frozen=True)
class Documents:
    kind: ClassVar[str] = "documents"
    items: tuple[tuple[str, str], ...]
    caption: str


@dataclass(frozen=True)
class Edits:
    """Texts in parts: each with its title, and of each part the text, a note and whether it is struck out."""

    kind: ClassVar[str] = "edits"
    items: tuple[tuple[str, tuple[tuple[str, str, bool], ...]], ...]
    caption: str


Block = Heading | Text | Code | Verdict | Facts | Table | Picture | Documents | Edits


def heading(text: str) -> Heading:
    """A section's heading."""
    return Heading(str(text))


def text(text: str) -> Text:
    """A paragraph; its line breaks are kept."""
    return Text(str(text))


def code(text: str) -> Code:
    """A command or a listing, in a fixed-width font with its white space kept."""
    return Code(str(text))


def verdict(label: str, detail: str, good: bool | None) -> Verdict:
    """The banner with what came out; give it first.

    Parameters
    ----------
    label : str
        The verdict in a few words, such as ``"better than random"``.
    detail : str
        One sentence with the figures behind it.
    good : bool or None
        True: it helped; False: it did not; None: not decided.
    """
    return Verdict(str(label), str(detail), "open" if good is None else "good" if good else "bad")


def facts(mapping: Mapping[str, object]) -> Facts:
    """Cards with a name and a value each, for the few figures that a reader wants at a glance.

    Parameters
    ----------
    mapping : mapping of str to object
        Numbers are shown with four significant digits, whole numbers in full; None and NaN as a dash.
    """
    return Facts(tuple((str(name), _shown(value)) for name, value in mapping.items()))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    caption: str | None = None,
    align: Sequence[str] | None = None,
) -> Table:
    """A table; on a narrow screen it scrolls inside its own box.

    Parameters
    ----------
    columns : sequence of str, length C
    rows : iterable of sequences of length C
        Cells are shown as in `facts`.
    caption : str, optional
    align : sequence of {"left", "right"}, length C, optional
        Default: columns of numbers to the right, others to the left.

    Raises
    ------
    InputError
        If a row or `align` has another length than `columns`, or `align` another word.
    """
    cells = [tuple(row) for row in rows]
    for number, row in enumerate(cells):
        if len(row) != len(columns):
            raise InputError(f"row {number} of the table has {len(row)} cells; there are {len(columns)} columns")
    if align is None:
        numeric = [all(_is_number(row[i]) or row[i] is None for row in cells) for i in range(len(columns))]
        align = ["right" if cells and right else "left" for right in numeric]
    if len(align) != len(columns) or not set(align) <= {"left", "right"}:
        raise InputError(f"align is {list(align)!r}; give 'left' or 'right' for each of the {len(columns)} columns")
    shown = tuple(tuple(map(_shown, row)) for row in cells)
    return Table(tuple(map(str, columns)), shown, tuple(align), str(caption or ""))


def documents(items: Iterable[tuple[str, str]], caption: str) -> Documents:
    """Texts that open on a click, with their white space kept.

    Parameters
    ----------
    items : iterable of (title, text)
    caption : str
        What these texts are.
    """
    return Documents(tuple((str(title), str(body)) for title, body in items), str(caption))


def edits(items: Iterable[tuple[str, Iterable[tuple[str, str, bool]]]], caption: str) -> Edits:
    """Texts whose parts carry notes and may be struck out; they open on a click, the first is open.

    Parameters
    ----------
    items : iterable of (title, parts)
        A part is (text, note, struck): what it says, a few words on it ("" for none), whether it was taken out.
    caption : str
        What these texts are.
    """
    return Edits(
        tuple(
            (str(title), tuple((str(text), str(note), bool(struck)) for text, note, struck in parts))
            for title, parts in items
        ),
        str(caption),
    )


def figure(
    draw: Figure | Callable[[Axes], object], caption: str, alt: str | None = None, height: float = 3.2
) -> Picture:
    """A figure, embedded as an image.

    Parameters
    ----------
    draw : callable or matplotlib Figure
        A callable that draws on the axes it is given. It is called four times, light and dark, wide and
        narrow, and the page shows what fits the reader's colour scheme and screen. A ready figure is shown as
        it is, on a light card.
    caption : str
        What the reader should see in it.
    alt : str, optional
        Text for readers who cannot see the image; the caption by default.
    height : float
        Height in inches when `draw` is a callable; the width is the page's.

    Raises
    ------
    InputError
        If `draw` is neither, or `height` is not a positive number.
    """
    from matplotlib.figure import Figure

    from salience.report.images import ready, variants

    words = str(caption), str(caption if alt is None else alt)
    if isinstance(draw, Figure):
        return Picture(*words, light=ready(draw))
    if not callable(draw):
        raise InputError(f"draw is a {type(draw).__name__}; give a matplotlib Figure or a function of the axes")
    if not 0 < height < math.inf:
        raise InputError(f"height is {height!r}; give a positive number of inches")
    return Picture(*words, **variants(draw, height))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return _grouped(int(value))
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return "–"
    if not isinstance(value, Real):
        return str(value)
    real = float(value)
    if math.isinf(real):
        return "∞" if real > 0 else "\u2212∞"
    if abs(real) >= 10_000 or real.is_integer():
        return _grouped(round(real))
    return f"{real:.4g}".replace("-", "\u2212")


def _grouped(number: int) -> str:
    # Groups of three only from five digits on, so that years and seeds stay as they are.
    written = f"{number:,}".replace(",", "\u202f") if abs(number) >= 10_000 else str(number)
    return written.replace("-", "\u2212")
