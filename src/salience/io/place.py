"""Where files lie: below a local folder, or below a URL. What an output and its check need to know of either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, Protocol

from salience.io import remote


class Place(Protocol):
    """Files by their names relative to one root, with forward slashes."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where no file has this name."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""

    def names(self) -> list[str]:
        """All files below the root, sorted."""

    def where(self, name: str) -> str:
        """Full path or URL of a file."""


class LocalPlace:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def size(self, name: str) -> int | None:
        path = self._root / name
        return path.stat().st_size if path.is_file() else None

    def open(self, name: str) -> BinaryIO:
        return open(self._root / name, "rb")

    def names(self) -> list[str]:
        found = (path for path in self._root.rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(self._root).as_posix() for path in found)

    def where(self, name: str) -> str:
        return str(self._root / name)


class RemotePlace:
    """Files below a URL."""

    def __init__(self, root: str) -> None:
        self._root = root

    def size(self, name: str) -> int | None:
        found = remote.look_up(self.where(name))
        return None if found is None or found.is_folder else found.size

    def open(self, name: str) -> BinaryIO:
        return remote.open_url(self.where(name))

    def names(self) -> list[str]:
        return sorted(found.url.removeprefix(f"{self._root}/") for found in remote.below(self._root))

    def where(self, name: str) -> str:
        return f"{self._root}/{name}"


def place_of(path: str | os.PathLike[str]) -> tuple[Place, str, bool]:
    """Where a path lies (below the folder that holds it, or the folder itself), its name there, whether a folder.

    The name of a folder is "".
    """
    url = remote.url_of(path)
    if url is not None:
        there = remote.look_up(url)
        if there is not None and there.is_folder:
            return RemotePlace(url), "", True
        parent, _, name = url.rpartition("/")
        return RemotePlace(parent), name, False
    local = Path(os.path.abspath(path))
    return (LocalPlace(local), "", True) if local.is_dir() else (LocalPlace(local.parent), local.name, False)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something stands under a path or URL."""
    url = remote.url_of(path)
    return os.path.exists(path) if url is None else remote.look_up(url) is not None


def home() -> Path:
    """The user's folder: ``$SALIENCE_HOME``, or ``salience`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("SALIENCE_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "salience"
