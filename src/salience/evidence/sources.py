"""The fingerprint of a method's sources, by which an outcome is known to be stale."""

from __future__ import annotations

import ast
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import salience
from salience.errors import DataError, InputError, nearest
from salience.papers import Paper

_ROOT = Path(salience.__file__).parent
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SAME_PROGRAM = {
    "ctx",
    "kind",
    "type_comment",
    "type_ignores",
    "type_params",
}  # depend on the parser's version


def source_hash(paper: Paper) -> str:
    """SHA-256 over the programs of a method and of its reproduction.

    Comments, docstrings and layout do not count. The method's files are the modules that define its entries,
    or the whole folder of a method that has its own (``salience/data/dsir/``).

    Raises
    ------
    InputError
        If an entry of the catalogue names nothing.
    DataError
        If a source is missing or is not Python.
    """
    files = {file for entry in paper.entry for file in _files(entry)}
    script = script_of(paper.slug)
    if script.exists():
        files.add(script)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(_ROOT).as_posix()}\n{_program(file)}\n".encode())
    return digest.hexdigest()


def script_of(slug: str) -> Path:
    """Where the reproduction of a paper stands, whether or not it exists yet."""
    return _ROOT / "reproductions" / f"{slug.replace('-', '_')}.py"


def _files(entry: str) -> Iterator[Path]:
    module, _, name = entry.partition(":")
    parts = module.split(".")
    if len(parts) == 2:  # a room: its table of lazy exports says which module defines the name, without importing it
        where = getattr(importlib.import_module(module), "_WHERE", {})
        if name not in where:
            raise InputError(f"papers.toml has the entry {entry!r}, which the room lacks; {nearest(name, where)}")
        parts += where[name].split(".")
    place = _ROOT.joinpath(*parts[1:3])
    if place.is_dir():
        yield from place.rglob("*.py")
    elif place.with_suffix(".py").exists():
        yield place.with_suffix(".py")
    else:
        raise DataError(f"papers.toml has the entry {entry!r}, but there is neither {place} nor {place}.py")


def _program(file: Path) -> str:
    try:
        return _canonical(ast.parse(file.read_bytes()))
    except SyntaxError as error:
        raise DataError(f"{file}, line {error.lineno}: not Python ({error.msg})") from None


def _canonical(node: object) -> str:
    """The tree as text; `ast.dump` writes the same tree differently in other Python versions."""
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _SAME_PROGRAM}
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    return f"{type(node).__name__}({','.join(f'{name}={_canonical(value)}' for name, value in fields.items())})"
