"""Names that a command is about to write: none is an input's, none replaces a file unasked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from salience.errors import InputError


def check_written(
    written: Mapping[str, str | os.PathLike[str]], read: Iterable[str | os.PathLike[str]], overwrite: bool
) -> None:
    """Refuse to replace an input, or an existing file without `overwrite`.

    Parameters
    ----------
    written : dict of str to path
        Local files by what they are, such as "output".
    read : paths
        Inputs; names that are no files do no harm.
    overwrite : bool
    """
    inputs = {os.path.realpath(path): path for path in read}
    for what, path in written.items():
        if os.path.realpath(path) in inputs:
            raise InputError(f"{what} {path} is the input {inputs[os.path.realpath(path)]}: give --out another name")
        if Path(path).exists() and not overwrite:
            raise InputError(f"{what} {path} exists; pass --overwrite to replace it")
