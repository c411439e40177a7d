"""What is written in help texts is what a terminal shows: nothing in brackets is taken for a style and lost."""

from __future__ import annotations

from collections.abc import Iterator

import typer
from rich.text import Text

from salience.cli import app


def written() -> Iterator[tuple[str, str]]:
    """Every help text of every command, with where it stands."""

    def below(command: typer.core.TyperCommand | typer.core.TyperGroup, name: str) -> Iterator[tuple[str, str]]:
        yield name, command.help or ""
        yield f"{name}, epilog", command.epilog or ""
        for parameter in command.params:
            yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
        for key, sub in getattr(command, "commands", {}).items():
            yield from below(sub, f"{name} {key}")

    yield from below(typer.main.get_command(app), "salience")


def test_nothing_in_brackets_is_lost() -> None:
    texts = dict(written())
    assert sum(map(bool, texts.values())) > 300
    assert not [where for where, text in texts.items() if Text.from_markup(text).plain != text]
