"""The verbs of the command line. Each command is a file VERB_WHAT.py that hangs itself on its verb."""

from __future__ import annotations

import typer


def _verb(what: str) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, help=what)


select = _verb("Choose what to train on.")
refine = _verb("Shorten what you train on without losing what matters.")
rank = _verb("Put columns in the order of how much they matter.")
explain = _verb("Show what a prediction or a model rests on.")
compress = _verb("Make a model or a data set smaller, and measure what that costs.")
merge = _verb("Put several models into one.")
verify = _verb("Check a claim: labels, explanations, a written output.")
