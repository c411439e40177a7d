"""`salience verify output`: check that what a command wrote is still what it wrote."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from salience.cli._say import say
from salience.cli.verbs import verify
from salience.errors import DataError

if TYPE_CHECKING:
    from salience.io import Verification

_EPILOG = (
    "Examples:\n\n"
    "salience verify output chosen.jsonl\n\n"
    "salience verify output smaller-model/ --json\n\n"
    "Exit codes: 0 as it was written, 2 no such output or no manifest, 3 damaged, missing or unexpected files."
)


@verify.command("output", epilog=_EPILOG)
def output(
    path: Annotated[str, typer.Argument(help="File or folder that a command wrote with -o; a path or a URL.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Check an output against its manifest: nothing damaged, nothing missing, nothing added.

    Reads every file whole and compares its size and xxh3-128 checksum; decodes every page of Parquet files, too. The
    manifest carries a checksum of itself, so that one changed bit anywhere is found.
    """
    result = _verify(path)
    if as_json:
        typer.echo(json.dumps({
            "path": result.path, "ok": result.ok, "files": result.files, "bytes": result.bytes,
            "damaged": dict(result.damaged), "missing": result.missing, "unexpected": result.unexpected,
        }))  # fmt: skip
    for name, reason in result.damaged:
        say(f"damaged: {name}: {reason}", err=as_json)
    for name in result.missing:
        say(f"missing: {name}", err=as_json)
    for name in result.unexpected:
        say(f"unexpected: {name}", err=as_json)
    if not result.ok:
        raise DataError(f"{path} is not what was written")
    if not as_json:
        say(f"{result.files:,} files, {result.bytes:,} bytes: all as they were written")


def _verify(path: str) -> Verification:
    from salience.io import verify_output

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("verify")
        return verify_output(path, progress=lambda done, total: bar.update(task, completed=done, total=total))
