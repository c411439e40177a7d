"""Print what may hold text of the user's files: names and records come without control characters."""

from __future__ import annotations

import typer


def printable(text: str) -> str:
    """The text with escape sequences, control characters and broken Unicode written out, line breaks kept."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str, err: bool = False) -> None:
    """Print a line to the output, or to the error output."""
    typer.echo(printable(text), err=err)
