"""What a user names as input, as sources, and the units of work that they are read in.

A source is one file or one in-memory table; a unit is a byte range of a JSONL, CSV or text file, a row group of a
Parquet file, or a slice of a table. Units are cut by size alone, so that workers and engine do not change them.
"""

from __future__ import annotations

import glob as globbing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import pyarrow as pa

from salience.errors import DataError, InputError, NothingToDo
from salience.io import lines, remote
from salience.io.keys import key_of

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet",
    ".txt": "txt",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MANIFEST, QUARANTINE = ".manifest.json", ".quarantine.jsonl"  # behind an output file; in a folder, without the dot
UNIT_BYTES = 16 << 20
TABLE_ROWS = 1 << 16


@dataclass(frozen=True)
class Source:
    """One input file, or one table in memory.

    Attributes
    ----------
    name : str
        Path relative to the inputs' common root, with forward slashes; its hash is the identity in every random draw,
        so that the same tree gives the same draws wherever it lies. Where inputs of several stores are read together,
        that of a remote file is its URL.
    path : str
        Where the file lies, a path or a URL; "" for a table.
    format : str
        "jsonl", "csv", "txt", "parquet" or "table".
    compression : str or None
        "gzip" or "zstd".
    version : str
        Of a remote file, what changes with its content (entity tag, checksum or time of change); "" otherwise.
    """

    name: str
    path: str
    format: str
    compression: str | None = None
    size: int = 0
    table: pa.Table | None = field(default=None, compare=False, repr=False)
    version: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether `path` is a URL."""
        return remote.is_url(self.path)

    @property
    def file_id(self) -> int:
        """64-bit identity of the file in random draws."""
        return key_of(self.name)


@dataclass(frozen=True)
class Unit:
    """A piece of a source: bytes ``[start, stop)`` of a line format, row group `start`, or rows of a table.

    `first_row` is the number of the first row (row formats), `bytes` its share of the source's size for progress, and
    `number` its place in ``corpus.units``.
    """

    source: Source
    start: int
    stop: int
    first_row: int = 0
    bytes: int = 0
    number: int = 0


class Corpus:
    """Everything that a user passed as one input, cut into units.

    Parameters
    ----------
    inputs : str, path, table or a list of them
        Paths or URLs (s3://…, through fsspec): files, globs and directories of .jsonl, .csv, .txt (these also .gz
        and .zst) and .parquet; any object with the Arrow stream protocol (pandas, polars, `datasets.Dataset`,
        pyarrow). A str is a path.
    text : str
        Name of the text column (ignored for .txt, where a line is a document).

    Raises
    ------
    InputError
        A path that does not exist or has an unknown ending.
    MissingExtra
        A URL whose store needs a package that is not installed.
    NothingToDo
        No file, or only empty ones.
    DataError
        A file that cannot be read, or one without the text column; a store that cannot be reached.
    """

    def __init__(self, inputs: Any, text: str = "text") -> None:
        self.text = text
        self.sources = find_sources(inputs)
        units = [unit for source in self.sources for unit in _cut(source, text)]
        self.units = [replace(unit, number=number) for number, unit in enumerate(units)]
        if not self.units:
            raise NothingToDo(f"nothing to read: {_names(self.sources)} {_are(self.sources)} empty")

    @property
    def bytes(self) -> int:
        """Size of all sources on disk (or in memory, for tables)."""
        return sum(source.size for source in self.sources)

    @classmethod
    def of_texts(cls, texts: Sequence[str], text: str = "text") -> Corpus:
        """A corpus of strings in memory.

        Raises
        ------
        DataError
            One of them is not a string, or not Unicode.
        """
        try:
            return cls(pa.table({text: pa.array(texts, pa.large_string())}), text)
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise DataError(f"the texts cannot be read: {error}") from error

    @classmethod
    def joined(cls, corpora: Sequence[Corpus]) -> Corpus:
        """Several corpora read as one; every source keeps its identity."""
        if len(corpora) == 1:
            return corpora[0]
        whole = cls.__new__(cls)
        whole.text = corpora[0].text
        whole.sources = [source for corpus in corpora for source in corpus.sources]
        units = [unit for corpus in corpora for unit in corpus.units]
        whole.units = [replace(unit, number=number) for number, unit in enumerate(units)]
        return whole


def find_sources(inputs: Any) -> list[Source]:
    """The files and tables that `inputs` stand for: files sorted by path, then tables in their order."""
    items = inputs if isinstance(inputs, list | tuple) else [inputs]
    if not items:
        raise InputError("no input was named")
    paths: list[Path] = []
    found: list[remote.Found] = []
    tables: list[pa.Table] = []
    for item in items:
        if not isinstance(item, str | os.PathLike):
            tables.append(_table(item))
        elif url := remote.url_of(item):
            found += _expand_url(url)
        else:
            paths += _expand(os.fspath(item))
    paths = sorted(set(paths))
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    sources = [_file(path.relative_to(root).as_posix(), path) for path in paths]
    sources += _remote_files(found, alone=not paths)
    for number, table in enumerate(tables):
        sources.append(Source(f"table {number}", "", "table", size=table.nbytes, table=table))
    return sources


def _remote_files(found: Sequence[remote.Found], alone: bool) -> list[Source]:
    """Sources in the order and with the names that the same tree has locally."""
    parts = sorted({tuple(file.url.split("/")): file for file in found}.items())
    steps = zip(*(folders for (*folders, _), _ in parts))
    root = sum(1 for _ in takewhile(lambda step: len(set(step)) == 1, steps)) if alone else 0
    sources = []
    for part, file in parts:
        kind, compression = _known_format(file.url)
        sources.append(Source("/".join(part[root:]), file.url, kind, compression, file.size, version=file.version))
    return sources


def _expand(path: str) -> list[Path]:
    """Files that a path, a directory or a glob stands for; absolute, symbolic links left as they are."""
    here = Path(os.path.abspath(path))
    if here.is_dir():
        found = sorted(file for file in here.rglob("*") if _is_data(file.relative_to(here)) and file.is_file())
        if not found:
            raise NothingToDo(f"directory {path} holds no file that ends in {_endings()}")
        return found
    if here.exists():
        return [here]
    matches = sorted(Path(os.path.abspath(match)) for match in globbing.glob(path, recursive=True))
    found = [file for file in matches if file.is_file()]
    if not found:
        kind = "matches no file" if globbing.has_magic(path) else "does not exist"
        raise InputError(f"input {path} {kind}")
    return found


def _expand_url(url: str) -> list[remote.Found]:
    """Files of a store that a URL stands for, as `_expand` finds them on a disk."""
    there = remote.look_up(url)
    if there is not None and not there.is_folder:
        return [there]
    if there is not None:
        found = [file for file in remote.below(url) if _is_data(PurePosixPath(file.url.removeprefix(f"{url}/")))]
        if not found:
            raise NothingToDo(f"directory {url} holds no file that ends in {_endings()}")
        return found
    remote.check_bucket(url)
    found = remote.matching(url) if globbing.has_magic(url) else []
    if not found:
        raise InputError(f"input {url} {'matches no file' if globbing.has_magic(url) else 'does not exist'}")
    return found


def _is_data(path: PurePath) -> bool:
    """Whether a file of a directory is read: not what is hidden, or what our writer puts beside its output."""
    ours = path.name.endswith((MANIFEST, QUARANTINE)) or path.name in (MANIFEST[1:], QUARANTINE[1:])
    if ours or any(part.startswith(".") for part in path.parts):
        return False
    return _format(path)[0] is not None


def _format(path: PurePath) -> tuple[str | None, str | None]:
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = Path(path.stem).suffix if compression else path.suffix
    kind = FORMATS.get(suffix.lower())
    return (None, None) if compression and kind == "parquet" else (kind, compression)


def _endings() -> str:
    return ", ".join(FORMATS) + " (all but Parquet also with .gz or .zst)"


def _file(name: str, path: Path) -> Source:
    kind, compression = _known_format(path)
    try:
        return Source(name, str(path), kind, compression, path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _known_format(path: Path | str) -> tuple[str, str | None]:
    kind, compression = _format(PurePosixPath(path))
    if kind is None:
        raise InputError(f"input {path} has an unknown ending; known: {_endings()}")
    check_name("input", path)
    return kind, compression


def check_name(what: str, path: Path | str) -> None:
    """Refuse a path that is no Unicode: Arrow cannot open it, and no manifest can hold it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} {path} has a name that is not UTF-8; rename it") from None


def _table(item: Any) -> pa.Table:
    if hasattr(item, "__arrow_c_stream__"):
        try:
            return pa.table(item)
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"input of type {type(item).__name__} cannot be read as a table: {error}") from error
    if hasattr(item, "with_format") and hasattr(item, "column_names"):  # datasets.Dataset before it spoke Arrow
        return item.with_format("arrow")[:]
    if isinstance(item, Iterable):
        raise InputError(
            f"input of type {type(item).__name__} is neither a path nor a table; texts in memory go through "
            "Corpus.of_texts, tables need the Arrow stream protocol (pandas, polars, pyarrow, datasets)"
        )
    raise InputError(f"input of type {type(item).__name__} is neither a path nor a table")


def _cut(source: Source, text: str) -> list[Unit]:
    try:
        return _units(source, text)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{source.path} cannot be read: {error}") from error


def _units(source: Source, text: str) -> list[Unit]:
    if source.table is not None:
        _check_column(source, source.table.schema, text)
        rows = source.table.num_rows
        ends = [(start, min(start + TABLE_ROWS, rows)) for start in range(0, rows, TABLE_ROWS)]
        return [Unit(source, start, stop, start, source.size * (stop - start) // rows) for start, stop in ends]
    if source.size == 0:
        return []
    if source.format == "parquet":
        return _row_groups(source, text)
    if source.format == "csv":
        return [Unit(source, *piece) for piece in lines.csv_pieces(source, text, UNIT_BYTES)]
    if source.compression:
        return [Unit(source, 0, source.size, 0, source.size)]
    return [
        Unit(source, start, min(start + UNIT_BYTES, source.size), 0, min(UNIT_BYTES, source.size - start))
        for start in range(0, source.size, UNIT_BYTES)
    ]


def _row_groups(source: Source, text: str) -> list[Unit]:
    try:
        with lines.open_parquet(source) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.path} is not a readable Parquet file: {error}") from error
    _check_column(source, schema, text)
    units, first_row = [], 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if rows:
            share = source.size // metadata.num_row_groups
            units.append(Unit(source, group, group + 1, first_row, share))
        first_row += rows
    return units


def _check_column(source: Source, schema: pa.Schema, text: str) -> None:
    lines.check_column(source.path or source.name, schema.names, text)
    kind = schema.field(text).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)):
        raise DataError(f"column {text!r} of {source.path or source.name} holds {kind}, not text")


def _names(sources: Sequence[Source]) -> str:
    shown = ", ".join(source.path or source.name for source in sources[:3])
    return shown + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")


def _are(sources: Sequence[Source]) -> str:
    return "is" if len(sources) == 1 else "are"
