"""Check that an output is still what was written: manifest, sizes, checksums, and every page of Parquet."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from salience.errors import InputError
from salience.io.corpus import MANIFEST, QUARANTINE
from salience.io.manifest import IN_FOLDER, checksum_of, parse_manifest, unlisted
from salience.io.place import Place, place_of

_READABLE = (".parquet", ".pq")


@dataclass
class Verification:
    """What became of an output.

    Attributes
    ----------
    path : str
    manifest : dict
        What the run recorded; empty when the manifest is itself damaged.
    files, bytes : int
        How many files were read whole, and their size.
    damaged : list of (file, what is wrong)
    missing : list of str
        Files that the manifest names and that are not there.
    unexpected : list of str
        Files that stand where a reader would take them for part of the output, and that the manifest does not name.
    """

    path: str
    manifest: dict[str, Any] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the output is exactly what was written."""
        return not (self.damaged or self.missing or self.unexpected)


def verify_output(
    path: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None
) -> Verification:  # fmt: skip
    """Check an output file, or an output folder, against its manifest.

    The manifest carries a checksum of itself; every file that it names is read whole and its size and xxh3-128 are
    compared, and every page of a Parquet file is decoded against its own checksum. One changed bit anywhere is found.
    The checksums guard against accidents, not against someone who rewrites the manifest as well.

    Parameters
    ----------
    path : path or URL
        As it was given to the command that wrote it.
    progress : callable, optional
        Called with (bytes done, bytes in all).

    Raises
    ------
    InputError
        There is no such output, or it has no manifest.
    DataError
        A remote store cannot be reached.
    """
    place, name, is_folder = place_of(path)
    own = IN_FOLDER if is_folder else name + MANIFEST
    result = Verification(os.fspath(path))
    if place.size(own) is None:
        if is_folder or place.size(name) is not None:
            raise InputError(f"{path} has no manifest ({place.where(own)}): it is unfinished, or no output of salience")
        raise InputError(f"{path} does not exist")
    with place.open(own) as file:
        data = file.read()
    try:
        result.manifest = parse_manifest(data)
    except ValueError as error:
        result.damaged.append((own, str(error)))
        return result
    listed: dict[str, Any] = result.manifest["files"]
    total, done = sum(entry["bytes"] for entry in listed.values()), 0
    for listed_name, entry in listed.items():
        _check_file(place, listed_name, entry, result)
        done += entry["bytes"]
        if progress is not None:
            progress(done, total)
    if is_folder:
        others = unlisted(place.names(), result.manifest)
        result.unexpected = [other for other in others if not any(part.startswith(".") for part in other.split("/"))]
    elif name + QUARANTINE not in listed and place.size(name + QUARANTINE) is not None:
        result.unexpected = [name + QUARANTINE]
    return result


def _check_file(place: Place, name: str, entry: dict[str, Any], result: Verification) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        result.damaged.append((name, "lies outside of the output"))
        return
    size = place.size(name)
    if size is None:
        result.missing.append(name)
        return
    result.files, result.bytes = result.files + 1, result.bytes + size
    if size != entry["bytes"]:
        result.damaged.append((name, f"holds {size:,} bytes, not {entry['bytes']:,}"))
        return
    with place.open(name) as file:
        same = checksum_of(file) == entry["xxh3_128"]
    where = _broken_page(place, name) if name.endswith(_READABLE) else ""
    if not same or where:
        reason = "its checksum differs" if not same else "it was damaged before its checksum was taken"
        result.damaged.append((name, f"{reason} ({where})" if where else reason))


def _broken_page(place: Place, name: str) -> str:
    """Where a Parquet file cannot be read; "" if every page of it decodes and has the checksum that stands in it."""
    where = "its footer"
    try:
        with place.open(name) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                where = f"row group {group}"
                for _ in parquet.iter_batches(row_groups=[group], use_threads=False):
                    pass
    except (pa.ArrowException, OSError, ValueError, UnicodeError) as error:
        return f"{where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""
