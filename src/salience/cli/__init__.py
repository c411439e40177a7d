"""The command line: ``salience VERB WHAT``. One file per command: parse, call, render."""

from __future__ import annotations

import os
import signal
import sys

import typer

from salience import __version__
from salience._lazy import missing_extra
from salience.cli import (
    compress_channels,
    compress_dataset,
    compress_delta,
    compress_quantize,
    compress_sparsify,
    explain_concepts,
    explain_saliency,
    explain_table,
    merge_delta,
    merge_permute,
    papers,
    rank_table,
    refine_traces,
    reproduce,
    select_rows,
    select_stream,
    select_tasks,
    select_text,
    verbs,
    verify_concepts,
    verify_labels,
    verify_output,
    verify_saliency,
)
from salience.cli._say import say
from salience.errors import SalienceError

app = typer.Typer(
    name="salience",
    help="Find out what matters in your data and your model, act on it, and prove that it helped.",
    epilog="Example: salience select text raw/*.jsonl --target mine.jsonl --count 50000 -o chosen.jsonl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Importing a command's file hangs it on its verb.
_COMMANDS = (
    compress_channels,
    compress_dataset,
    compress_delta,
    compress_quantize,
    compress_sparsify,
    explain_concepts,
    explain_saliency,
    explain_table,
    merge_delta,
    merge_permute,
    rank_table,
    refine_traces,
    select_tasks,
    select_stream,
    select_rows,
    select_text,
    verify_concepts,
    verify_labels,
    verify_output,
    verify_saliency,
)
for _name in ("select", "refine", "rank", "explain", "compress", "merge", "verify"):
    if (_verb := getattr(verbs, _name)).registered_commands:
        app.add_typer(_verb, name=_name)
app.add_typer(papers.app, name="papers")
app.command("reproduce")(reproduce.reproduce)


_INTERRUPTED = "interrupted; no unfinished output was left"


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"salience {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    pass


def _terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt  # SIGTERM unwinds like Ctrl-C, so that temporaries are removed


def main() -> None:
    """Run the command line and turn errors into one sentence and an exit code.

    0 done, 1 a bar was missed or the run failed, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted.
    """
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="salience", standalone_mode=True)
    except KeyboardInterrupt:
        _stop(_INTERRUPTED, 130)
    except SystemExit as stopped:
        if stopped.code == 130:  # typer has caught the interrupt
            _stop(_INTERRUPTED, 130)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except SalienceError as error:
        if debug:
            raise
        _stop(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        extra = missing_extra(error, "this command")
        if debug or extra is None:
            raise
        _stop(str(extra), extra.exit_code)
    except OSError as error:
        if debug:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _stop(f"{error.strerror or error}{where}", 1)


def _stop(message: str, exit_code: int) -> None:
    say(f"salience: {message}", err=True)
    sys.exit(exit_code)
