"""The final name of an output: a local one is taken by renaming, a remote one by uploading, the manifest last."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from salience.errors import DataError, InputError
from salience.io import remote
from salience.io.corpus import MANIFEST, QUARANTINE, Corpus, check_name
from salience.io.manifest import IN_FOLDER, parse_manifest, unlisted
from salience.io.place import LocalPlace, Place, RemotePlace

Inputs = Sequence[Corpus | str | os.PathLike[str]]
_ASIDE = "replaced"  # where an old folder waits, in the temporary one, until the new one stands


class LocalFinal:
    """A file or folder of this machine.

    Attributes
    ----------
    path : Path
    name : str
    beside : Path
        Where temporaries are made: in the same folder, so that a rename moves them.
    """

    def __init__(self, path: str | os.PathLike[str], is_folder: bool) -> None:
        self.path = Path(os.path.abspath(path)) if is_folder else Path(path)
        self.name, self.beside, self.is_folder = self.path.name, self.path.parent, is_folder
        check_name("output", self.path)

    def check(self, overwrite: bool, inputs: Inputs) -> None:
        """Refuse a name that cannot or must not be taken."""
        path = self.path
        if self.is_folder and path.exists() and not path.is_dir():
            raise InputError(f"output {path} is a file; name a folder")
        if not self.is_folder and path.is_dir():
            raise InputError(f"output {path} is a directory; name a file")
        if path.exists() and not overwrite:
            raise InputError(f"output {path} exists; pass --overwrite to replace it")
        out = os.path.realpath(path)
        for name in _named(inputs):
            _check_apart(out, os.path.realpath(name), f"output {path}", name, self.is_folder, os.path.isdir(name))
        if self.is_folder and path.exists():
            _check_ours(LocalPlace(path), f"output folder {path}")
        if not path.parent.is_dir():
            raise InputError(f"output folder {path.parent} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"output folder {path.parent} cannot be written to")

    def put(self, files: Path, names: Sequence[str]) -> None:
        """Move the files to their final names; the last name is that of the manifest, before it the main file's."""
        for name in names:
            _sync(files / name)
        if self.is_folder:
            if self.path.exists():
                os.rename(self.path, files.parent / _ASIDE)
            os.rename(files, self.path)
            return
        for beside in (MANIFEST, QUARANTINE):  # a manifest never describes files other than those beside it
            self.path.with_name(self.name + beside).unlink(missing_ok=True)
        for name in names:
            os.replace(files / name, self.path.parent / name)

    def give_back(self, files: Path) -> None:
        """Give an old folder its name again if it was moved aside for nothing."""
        if (files.parent / _ASIDE).exists() and not self.path.exists():
            os.rename(files.parent / _ASIDE, self.path)


class RemoteFinal:
    """A file or folder of a remote store: written to a local temporary folder, and uploaded when it is complete.

    A store has no rename. The manifest is removed before anything else changes and uploaded after everything else, so
    that an output with a manifest is whole, and one without is unfinished.
    """

    beside = None  # temporaries are made where the system keeps them

    def __init__(self, url: str, is_folder: bool) -> None:
        self.path, self.is_folder = url, is_folder
        self._parent, _, self.name = url.rpartition("/")
        if self._parent.endswith((":", ":/")) or not self.name:
            raise InputError(f"output {url} names no {'folder' if is_folder else 'file'} within a store")
        check_name("output", url)

    def check(self, overwrite: bool, inputs: Inputs) -> None:
        """Refuse a name that cannot or must not be taken."""
        for name in _named(inputs):
            _check_apart(self.path, name, f"output {self.path}", name, self.is_folder, True)
        there = remote.look_up(self.path)
        if there is None:
            remote.check_bucket(self.path)
            return
        if self.is_folder and not there.is_folder:
            raise InputError(f"output {self.path} is a file; name a folder")
        if not self.is_folder and there.is_folder:
            raise InputError(f"output {self.path} is a directory; name a file")
        if not overwrite:
            raise InputError(f"output {self.path} exists; pass --overwrite to replace it")
        if self.is_folder:
            _check_ours(RemotePlace(self.path), f"output folder {self.path}")

    def put(self, files: Path, names: Sequence[str]) -> None:
        """Upload the files; the last name is that of the manifest, before it the main file's."""
        root = self.path if self.is_folder else self._parent
        manifest, sent = f"{root}/{names[-1]}", []
        try:
            remote.remove(manifest)
            for old in RemotePlace(root).names() if self.is_folder else [self.name + QUARANTINE]:
                if old not in names:
                    remote.remove(f"{root}/{old}")
            for name in names:
                remote.upload(files / name, f"{root}/{name}")
                sent.append(f"{root}/{name}")
        except BaseException as error:
            for url in sent:
                _try_to_remove(url)
            if not isinstance(error, DataError):
                raise
            kept = Path(tempfile.mkdtemp(prefix=f"{self.name}.", suffix=".unsent"))
            os.rename(files, kept / "files")
            raise DataError(f"{error}; the finished output is kept in {kept / 'files'}") from error

    def give_back(self, files: Path) -> None:
        """Nothing was moved aside."""


def _named(inputs: Inputs) -> list[str]:
    """Paths and URLs of all inputs."""
    names: list[str] = []
    for item in inputs:
        if isinstance(item, Corpus):
            names += [source.path for source in item.sources if source.path]
        else:
            names.append(remote.url_of(item) or os.fspath(item))
    return names


def _check_apart(out: str, real: str, output: str, name: str, is_folder: bool, holds: bool) -> None:
    """Refuse an output that is an input, holds one, or lies inside one (that `holds` files)."""
    if real == out:
        raise InputError(f"{output} is one of the inputs")
    if is_folder and real.startswith(out + "/"):
        raise InputError(f"{output} holds the input {name}")
    if holds and out.startswith(real + "/"):
        raise InputError(f"{output} lies inside the input {name}")


def _check_ours(place: Place, output: str) -> None:
    """Refuse to replace a folder unless all that it holds was written by us."""
    names = place.names()
    if not names:
        return
    if IN_FOLDER not in names:
        raise InputError(
            f"{output} holds no {IN_FOLDER} of an earlier output, so it is not replaced; remove it or name another"
        )
    try:
        with place.open(IN_FOLDER) as file:
            manifest = parse_manifest(file.read())
    except ValueError as error:
        raise InputError(f"{output} is not replaced: its {IN_FOLDER} {error}; remove it or name another") from None
    if others := unlisted(names, manifest):
        raise InputError(
            f"{output} holds {others[0]}, which the earlier output did not write, so it is not replaced; move that "
            "away or name another"
        )


def _try_to_remove(url: str) -> None:
    try:
        remote.remove(url)
    except DataError:
        return  # the store is gone: what is left there has no manifest


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
