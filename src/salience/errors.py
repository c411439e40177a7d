"""The errors a user can act on: what was wrong, where, and what would be right.

Every command turns them into one sentence and an exit code; a traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SalienceError(Exception):
    """Base of all errors that salience raises on purpose; `exit_code` is what a command returns for it."""

    exit_code = 1


class InputError(SalienceError, ValueError):
    """A parameter or an argument is not usable (exit code 2): names it, what came, and what is allowed."""

    exit_code = 2


class DataError(SalienceError, ValueError):
    """The user's data cannot be used as it is (exit code 3): names the file and the record."""

    exit_code = 3


class NothingToDo(SalienceError, ValueError):
    """There is nothing to work on or nothing left (exit code 4): never a silent success."""

    exit_code = 4


class MissingExtra(SalienceError, ImportError):
    """A part of salience needs packages that are not installed (exit code 2): names the extra to install."""

    exit_code = 2


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Say which of `candidates` come closest to a misspelt `name`, as the tail of an error message.

    >>> nearest("txt", ["text", "id"])
    "nearest names: 'text'; there are: 'id', 'text'"
    """
    candidates = sorted(set(candidates))
    close = difflib.get_close_matches(name, candidates, n=count, cutoff=0.5)
    shown = ", ".join(map(repr, candidates[:12])) + (", …" if len(candidates) > 12 else "")
    there = f"there are: {shown}" if candidates else "there are none"
    return f"nearest names: {', '.join(map(repr, close))}; {there}" if close else there
