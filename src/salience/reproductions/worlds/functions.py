"""Functions of the standard library as a table: a label that is known exactly, and a cheap guess at it.

Does the body raise an exception? The syntax tree knows; "the word Error stands in the source" is a guess that is right
nine times in ten, and wrong more often in long functions: a surrogate label whose errors are no noise.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from salience.reproductions.worlds.text import _python_files


@dataclass(frozen=True)
class Functions:
    """One row per function.

    Attributes
    ----------
    raises, says_error : (n,) float
        The label and the guess, 0 or 1.
    regressors : (n, 3) float
        Logarithm of the length (standardised), whether it is a method, whether it has a docstring.
    others : (n, 2) float
        Number of arguments, whether the name is private.
    """

    raises: Float[np.ndarray, " n"]
    says_error: Float[np.ndarray, " n"]
    regressors: Float[np.ndarray, "n 3"]
    others: Float[np.ndarray, "n 2"]

    REGRESSORS = ("log length", "is method", "has docstring")


def functions(count: int, seed: int, files: int | None = None) -> Functions:
    """Draw `count` functions of the standard library at random (of its first `files` files, for a quick try)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows = [row for path in list(_python_files(root))[:files] for row in _functions_of(path)]
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    table = np.array(rows, dtype=np.float64)[chosen]
    length = np.log(table[:, 2])
    return Functions(
        table[:, 0],
        table[:, 1],
        np.column_stack([(length - length.mean()) / length.std(), table[:, 3], table[:, 4]]),
        table[:, 5:],
    )


def _functions_of(path: Path) -> Iterator[tuple[float, ...]]:
    """raises, says Error, length, is method, has docstring, arguments, is private."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    lines = source.splitlines()
    methods = {id(child) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        arguments = node.args
        yield (
            any(isinstance(inner, ast.Raise) for part in node.body for inner in ast.walk(part)),
            "Error" in text,
            max(len(text), 1),
            id(node) in methods,
            ast.get_docstring(node) is not None,
            len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs),
            node.name.startswith("_") and not node.name.startswith("__"),
        )
