"""A folder as output: written beside its final name, and moved there when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from salience import __version__
from salience.errors import InputError
from salience.io.corpus import check_name
from salience.io.writer import checksum

MANIFEST_FILE = "manifest.json"


class OutputFolder:
    """A folder that stands under its final name only when everything is in it.

    Use as a context manager: leaving it without `commit` (an error, Ctrl-C) removes what was written.

    Parameters
    ----------
    path : path
        Final name.
    overwrite : bool
        Replace a folder that a command of salience wrote (it holds our manifest), or an empty one. Other folders
        are never replaced.

    Raises
    ------
    InputError
        The name exists, or its parent does not, or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        check_name("output", self.path)
        if os.path.lexists(self.path):
            if not self.path.is_dir() or self.path.is_symlink():
                raise InputError(f"output {path} is no folder; name a folder that is not there yet")
            if any(self.path.iterdir()):
                if not overwrite:
                    raise InputError(f"output {path} exists; pass --overwrite to replace it")
                if not _is_ours(self.path):
                    raise InputError(f"output {path} holds files that salience did not write; name another folder")
        if not self.path.parent.is_dir():
            raise InputError(f"output folder {self.path.parent} does not exist")
        if not os.access(self.path.parent, os.W_OK):
            raise InputError(f"output folder {self.path.parent} cannot be written to")
        self._partial = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent))

    def file(self, name: str) -> Path:
        """Temporary path of ``<path>/<name>``; its folder is made."""
        file = self._partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def commit(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, with size and xxh3-128 of every file, and move the folder to its final name.

        Parameters
        ----------
        record : mapping
            What to tell in the manifest: parameters, inputs, counts. Plain data.

        Returns
        -------
        dict
            The manifest.
        """
        files = {
            file.relative_to(self._partial).as_posix(): {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
            for file in sorted(self._partial.rglob("*")) if file.is_file()
        }  # fmt: skip
        manifest = {"salience": __version__, **record, "files": files}
        text = json.dumps(manifest, indent=1, ensure_ascii=False, default=str) + "\n"
        (self._partial / MANIFEST_FILE).write_text(text, encoding="utf-8")
        os.chmod(self._partial, 0o777 & ~_umask())  # mkdtemp lets nobody else in
        old = self._partial.with_suffix(".old")
        if self.path.exists():
            os.replace(self.path, old)
        try:
            os.replace(self._partial, self.path)
        except BaseException:
            if old.exists():
                os.replace(old, self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return manifest

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _is_ours(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "salience" in manifest and "files" in manifest


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
