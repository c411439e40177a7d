"""Real text that every machine has: the standard library's source and the docstrings of installed packages.

Files are read as text, never imported, in the order of their paths; tests are left out, since some
distributions of Python come without them. The text changes with the versions of Python and of the packages,
and with nothing else.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from salience.errors import InputError

STDLIB = "stdlib"
BASE = ("matplotlib", "numpy", "scipy", "sklearn")  # packages that salience itself needs, so always there
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class Document(NamedTuple):
    """A piece of text, the package it comes from ("stdlib" for source code), and its file below that."""

    text: str
    source: str
    path: str


class TextPool(NamedTuple):
    """A raw pool with part of the target hidden in it, target text, and held-out target text."""

    raw: list[Document]
    target: list[Document]
    held_out: list[Document]


def chunks(text: str, words: int = 128, at_least: int = 100, single_spaces: bool = False) -> list[str]:
    """Cut a text into pieces of `words` words, white space inside a piece as it was.

    A word is a run of characters without white space; with `single_spaces` every single space ends a word, as in DSIR's
    own pipeline, so that indented code has many empty ones. What is left at the end is kept if it has `at_least` words.
    """
    if single_spaces:
        parts = text.split(" ")
        pieces = [parts[start : start + words] for start in range(0, len(parts), words)]
        return [" ".join(piece) for piece in pieces if len(piece) >= min(at_least, words)]
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    cut, start = [], 0
    for first in range(0, len(ends), words):
        last = min(first + words, len(ends))
        if last - first >= min(at_least, words):
            cut.append(text[start : ends[last - 1]].strip())
        start = ends[last - 1]
    return cut


def docstrings(package: str) -> list[Document]:
    """Docstrings of a package's modules, classes and functions, one document each, repeated ones once.

    Parameters
    ----------
    package : str
        Import name, such as "sklearn".

    Raises
    ------
    InputError
        No such package is installed.
    """
    root = _folder(package)
    found: dict[str, Document] = {}
    for path in _python_files(root):
        for text in _docstrings_of(path):
            found.setdefault(text, Document(text, package, path.relative_to(root).as_posix()))
    return list(found.values())


def package_corpus(packages: Sequence[str], words: int = 128, single_spaces: bool = False) -> list[Document]:
    """Docstrings of packages as documents of `words` words: those of one file in a row, cut by `chunks`.

    Raises
    ------
    InputError
        A package is not installed.
    """
    corpus = []
    for package in packages:
        by_file: dict[str, list[str]] = {}
        for document in docstrings(package):
            by_file.setdefault(document.path, []).append(document.text)
        for path, texts in by_file.items():
            corpus += [
                Document(piece, package, path)
                for piece in chunks("\n\n".join(texts), words, single_spaces=single_spaces)
            ]
    return corpus


def source_passages(root: Path | None = None, words: int = 128, single_spaces: bool = False) -> list[Document]:
    """Source code of the Python files below `root` (default: the standard library), cut by `chunks`.

    Files that cannot be decoded are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    passages = []
    for path in _python_files(root):
        try:
            with tokenize.open(path) as file:  # minds the encoding that the file declares
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        where = path.relative_to(root).as_posix()
        passages += [Document(piece, STDLIB, where) for piece in chunks(text, words, single_spaces=single_spaces)]
    return passages


def pool(seed: int, target: str = "scipy", packages: Sequence[str] = BASE, single_spaces: bool = False) -> TextPool:
    """A pool for data selection: can a method find the text of one package among all the rest?

    Parameters
    ----------
    seed : int
        Of the target's split and of the order of the documents.
    target : str
        Package whose docstrings are the target: a quarter of their documents is `target`, a quarter is
        `held_out`, and half is hidden in `raw`; ``document.source == target`` tells which.
    packages : sequence of str
        Packages whose docstrings make up the raw pool, together with the standard library's source.
    single_spaces : bool
        See `chunks`.

    Raises
    ------
    InputError
        A package is not installed.
    """
    rng = np.random.default_rng(seed)
    wanted = _shuffled(rng, package_corpus([target], single_spaces=single_spaces))
    quarter = len(wanted) // 4
    others = package_corpus([name for name in packages if name != target], single_spaces=single_spaces)
    raw = _shuffled(rng, source_passages(single_spaces=single_spaces) + others + wanted[2 * quarter :])
    return TextPool(raw, wanted[:quarter], wanted[quarter : 2 * quarter])


def _shuffled(rng: np.random.Generator, documents: list[Document]) -> list[Document]:
    return [documents[i] for i in rng.permutation(len(documents))]


def _folder(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"package {package!r} is not installed (import name wanted, such as 'sklearn')")
    return Path(next(iter(spec.submodule_search_locations)))


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not _SKIPPED.intersection(path.relative_to(root).parts[:-1]):
            yield path


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings are none of our business
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
