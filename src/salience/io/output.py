"""Where results go: temporary names, checksums, a manifest; the final name is absent, old or complete.

A file                                          A folder
out.jsonl                   the result          out/...            everything the command writes
out.jsonl.manifest.json     its manifest        out/manifest.json  its manifest
out.jsonl.quarantine.jsonl  records that could not be read, if any
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from salience.errors import InputError
from salience.io.corpus import MANIFEST, QUARANTINE, Corpus, check_name
from salience.io.manifest import IN_FOLDER, checksum_of, manifest_text, parse_manifest, unlisted

_ASIDE = "replaced"  # where an old folder waits, in the temporary one, until the new one stands


class Output:
    """Everything that one command writes; nothing stands under a final name before `commit`.

    Use as a context manager: leaving it without `commit` (an error, Ctrl-C) removes the temporaries.

    Parameters
    ----------
    path : path
        Final name of the main file, or of the folder.
    overwrite : bool
        Replace an existing one.
    inputs : sequence of Corpus or path
        What is read meanwhile, and must not be replaced.
    folder : bool
        Write a folder instead of a file: all that `file` names, or that is put into `folder`. An existing folder is
        only ever replaced if an earlier run wrote all that it holds.

    Attributes
    ----------
    folder : Path
        Temporary folder with all files, for functions that fill a folder (`save_pretrained`).

    Raises
    ------
    InputError
        The name exists or is that of an input, its parent folder does not exist or cannot be written to, or the
        folder to replace is not an earlier output.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        inputs: Sequence[Corpus | str | os.PathLike[str]] = (),
        folder: bool = False,
    ) -> None:
        self.path = Path(os.path.abspath(path)) if folder else Path(path)
        self._is_folder = folder
        check_name("output", self.path)
        _check_kind(self.path, folder)
        if self.path.exists() and not overwrite:
            raise InputError(f"output {path} exists; pass --overwrite to replace it")
        _check_inputs(self.path, inputs, folder)
        if folder and self.path.exists():
            _check_ours(self.path)
        if not self.path.parent.is_dir():
            raise InputError(f"output folder {self.path.parent} does not exist")
        if not os.access(self.path.parent, os.W_OK):
            raise InputError(f"output folder {self.path.parent} cannot be written to")
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent))
        self.folder = self._folder / "files"  # mkdtemp's own is for its owner alone
        self.folder.mkdir()

    def file(self, name: str = "") -> Path:
        """Temporary path of one more file: of a file, to become ``<path><name>``; of a folder, ``<path>/<name>``."""
        path = self.folder / (name if self._is_folder else self.path.name + name)
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
        """
        files = {name: {"bytes": (self.folder / name).stat().st_size, "xxh3_128": checksum(self.folder / name)}
                 for name in files_of(self.folder)}  # fmt: skip
        written = self.folder / (IN_FOLDER if self._is_folder else self.path.name + MANIFEST)
        written.write_text(manifest_text(record, files), encoding="utf-8")
        manifest = parse_manifest(written.read_bytes())
        for name in [*files, written.name]:
            _sync(self.folder / name)
        if self._is_folder:
            self._put_folder()
        else:
            self._put_files(list(files), written)
        self.discard()
        return manifest

    def _put_files(self, names: list[str], written: Path) -> None:
        """Move a file and what stands beside it, the file last but for its manifest."""
        final = self.path.with_name(written.name)
        final.unlink(missing_ok=True)  # a manifest never describes files other than those beside it
        self.path.with_name(self.path.name + QUARANTINE).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == self.path.name):
            os.replace(self.folder / name, self.path.parent / name)
        os.replace(written, final)

    def _put_folder(self) -> None:
        """Give the folder its name; an old one is moved aside, and comes back if that fails."""
        if self.path.exists():
            os.rename(self.path, self._folder / _ASIDE)
        os.rename(self.folder, self.path)

    def discard(self) -> None:
        """Remove the temporaries; an old folder that was moved aside for nothing gets its name back."""
        if (self._folder / _ASIDE).exists() and not self.path.exists():
            os.rename(self._folder / _ASIDE, self.path)
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


def files_of(folder: Path) -> list[str]:
    """All files below a folder, as paths relative to it with forward slashes, sorted."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _check_kind(path: Path, folder: bool) -> None:
    if folder and path.exists() and not path.is_dir():
        raise InputError(f"output {path} is a file; name a folder")
    if not folder and path.is_dir():
        raise InputError(f"output {path} is a directory; name a file")


def _check_inputs(path: Path, inputs: Sequence[Corpus | str | os.PathLike[str]], folder: bool) -> None:
    out = os.path.realpath(path)
    for item in inputs:
        names = [s.path for s in item.sources if s.path] if isinstance(item, Corpus) else [os.fspath(item)]
        for name in names:
            real = os.path.realpath(name)
            if real == out:
                raise InputError(f"output {path} is one of the inputs")
            if folder and real.startswith(out + os.sep):
                raise InputError(f"output {path} holds the input {name}")
            if out.startswith(real + os.sep) and os.path.isdir(real):
                raise InputError(f"output {path} lies inside the input {name}")


def _check_ours(folder: Path) -> None:
    """Refuse to replace a folder unless all that it holds was written by us."""
    names = files_of(folder)
    if not names:
        return
    try:
        manifest = parse_manifest((folder / IN_FOLDER).read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"output folder {folder} holds no {IN_FOLDER} of an earlier output, so it is not replaced; name another"
        ) from None
    except ValueError as error:
        raise InputError(f"output folder {folder} is not replaced: its {IN_FOLDER} {error}; name another") from None
    if others := unlisted(names, manifest):
        raise InputError(
            f"output folder {folder} holds {others[0]}, which the earlier output did not write, so it is not "
            "replaced; name another"
        )


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
