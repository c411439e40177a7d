"""Render blocks into one HTML file that is safe to open whatever the text in it says.

Every expression of the template passes through `visible` and is then escaped (Jinja's autoescape); the page's
policy lets it load nothing and run nothing. The only style sheet is ours and is admitted by its hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jinja2

from salience import __version__
from salience.errors import InputError
from salience.report.blocks import Block

# Characters that a reader cannot see but that change what they see: control characters, marks and overrides
# of the writing direction, invisible operators and tags, Unicode's line breaks; and surrogates and
# noncharacters, which no file should hold.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def page(title: str, blocks: Sequence[Block], path: str | Path | None = None, subtitle: str | None = None) -> str:
    """Render blocks into a self-contained HTML page, light or dark as the reader's system says.

    Parameters
    ----------
    title : str
    blocks : sequence of blocks
        What `verdict`, `facts`, `text`, `table`, `figure`, ... return, in reading order; the verdict first.
    path : str or Path, optional
        Where to write it. The name holds the old file or the whole new one at any moment.
    subtitle : str, optional
        One sentence below the title.

    Returns
    -------
    str
        The HTML.

    Raises
    ------
    InputError
        If a block is something else.
    OSError
        If the file cannot be written.
    """
    for number, block in enumerate(blocks):
        if not isinstance(block, get_args(Block)):
            raise InputError(
                f"block {number} of the page is a {type(block).__name__}; "
                "build it with salience.report's text, table, figure, ..."
            )
    environment = _environment()
    style = environment.get_template("page.css").render()
    html = environment.get_template("page.html.j2").render(
        title=str(title),
        subtitle=str(subtitle or ""),
        blocks=blocks,
        version=__version__,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii"),
    )
    if path is not None:
        _write_atomically(Path(path), html)
    return html


def visible(text: str) -> str:
    """Show what would hide: control characters as pictures (␀, ␛), direction overrides as ⟨U+202E⟩."""
    return _HIDDEN.sub(_picture, text.replace("\r\n", "\n"))


def _picture(match: re.Match[str]) -> str:
    point = ord(match[0])
    if point < 0x20:
        return chr(0x2400 + point)
    return "␡" if point == 0x7F else f"⟨U+{point:04X}⟩"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # A str subclass may claim to be safe HTML (`__html__`); only plain strings reach the escaping.
        finalize=lambda value: visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _write_atomically(path: Path, html: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
