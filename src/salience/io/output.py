"""Where results go: temporary names, checksums, a manifest; the final name is absent, old or complete.

A file                                          A folder
out.jsonl                   the result          out/...            everything the command writes
out.jsonl.manifest.json     its manifest        out/manifest.json  its manifest
out.jsonl.quarantine.jsonl  records that could not be read, if any
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from salience.io import remote
from salience.io.corpus import MANIFEST
from salience.io.final import Inputs, LocalFinal, RemoteFinal
from salience.io.manifest import IN_FOLDER, checksum_of, manifest_text, parse_manifest
from salience.io.place import LocalPlace


class Output:
    """Everything that one command writes; nothing stands under a final name before `commit`.

    Use as a context manager: leaving it without `commit` (an error, Ctrl-C) removes the temporaries.

    Parameters
    ----------
    path : path or URL
        Final name of the main file, or of the folder. What has a remote name is written to a local temporary folder
        (`TMPDIR` says where) and uploaded by `commit`.
    overwrite : bool
        Replace an existing one.
    inputs : sequence of Corpus, path or URL
        What is read meanwhile, and must not be replaced.
    folder : bool
        Write a folder instead of a file: all that `file` names, or that is put into the attribute `folder`. An
        existing folder is only ever replaced if an earlier run wrote all that it holds.

    Attributes
    ----------
    path : Path or str
        The final name; a str for a URL.
    folder : Path
        Temporary folder with all files, for functions that fill a folder (`save_pretrained`).

    Raises
    ------
    InputError
        The name exists or is that of an input, its parent folder does not exist or cannot be written to, or the
        folder to replace is not an earlier output.
    DataError
        A remote store cannot be reached, or access to it was denied.
    """

    def __init__(
        self, path: str | os.PathLike[str], overwrite: bool = False, inputs: Inputs = (), folder: bool = False
    ) -> None:
        url = remote.url_of(path)
        self._final = LocalFinal(path, folder) if url is None else RemoteFinal(url, folder)
        self._final.check(overwrite, inputs)
        self.path = self._final.path
        self._folder = Path(tempfile.mkdtemp(".partial", f".{self._final.name}.", self._final.beside))
        self.folder = self._folder / "files"  # the one above is for its owner alone
        self.folder.mkdir()

    def file(self, name: str = "") -> Path:
        """Temporary path of one more file: of a file, to become ``<path><name>``; of a folder, ``<path>/<name>``."""
        path = self.folder / (name if self._final.is_folder else self._final.name + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Move all files to their final names and write the manifest.

        Parameters
        ----------
        record : mapping
            What to tell in the manifest: parameters, inputs, counts. Plain data.

        Returns
        -------
        dict
            The manifest.

        Raises
        ------
        DataError
            A remote store did not take the files; they are kept in a local folder that the message names.
        """
        main = self._final.name
        names = sorted(LocalPlace(self.folder).names(), key=lambda name: name == main)
        files = {name: {"bytes": (self.folder / name).stat().st_size, "xxh3_128": checksum(self.folder / name)}
                 for name in names}  # fmt: skip
        written = self.folder / (IN_FOLDER if self._final.is_folder else main + MANIFEST)
        written.write_text(manifest_text(record, files), encoding="utf-8")
        manifest = parse_manifest(written.read_bytes())
        self._final.put(self.folder, [*names, written.name])
        self.discard()
        return manifest

    def sweep(self) -> None:
        """Remove what killed runs have left; only for one that makes sure that no other run writes this output."""
        for path in self._folder.parent.glob(f".{glob.escape(self._final.name)}.*.partial"):
            if path != self._folder:
                shutil.rmtree(path, ignore_errors=True)

    def discard(self) -> None:
        """Remove the temporaries."""
        self._final.give_back(self.folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def checksum(path: Path) -> str:
    """xxh3-128 of a file, as 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return checksum_of(file)
