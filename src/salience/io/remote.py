"""Files in remote stores (s3://, gs://, hf://, memory://, …), through fsspec; local paths never come here.

Nothing is contacted unless the user names a URL. Credentials, endpoints and regions are the store's own business: the
environment variables and profiles that its fsspec package reads.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from salience.errors import DataError, InputError, MissingExtra, SalienceError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)")  # two letters at least: C:/ is a drive
_INSTALL = {"s3": "'salience[remote]'", "s3a": "'salience[remote]'", "gs": "gcsfs", "gcs": "gcsfs",
            "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp"}  # fmt: skip
_BUCKETS = ("s3", "s3a", "gs", "gcs")  # the first part of a path is a bucket, which must exist before its files
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "checksum", "mtime", "LastModified", "created")
_BUFFER = 1 << 20


class Found(NamedTuple):
    """A file of a store, or a folder.

    `version` changes whenever the content does: the store's entity tag or checksum, else the time of its last change;
    "" where the store tells none.
    """

    url: str
    size: int
    version: str
    is_folder: bool = False


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL; a `Path` has swallowed one slash of it."""
    found = _URL.match(os.fspath(path))
    return found is not None and (bool(found[2]) or isinstance(path, os.PathLike))


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL that a path is, as its store spells it (without a slash at its end), or None for a local path.

    Raises
    ------
    InputError
        A chain of URLs, a local file, or a kind of store that is not known.
    MissingExtra
        The package for this store is not installed.
    """
    if not is_url(path):
        return None
    scheme, _, rest = os.fspath(path).partition(":/")
    url = f"{scheme.lower()}://{rest.removeprefix('/')}"
    if "::" in url:
        raise InputError(f"{url} is a chain of URLs; name one file, folder or glob of one store")
    if scheme.lower() in ("file", "local"):
        raise InputError(f"{url} is a local file; name its path, without {scheme}://")
    with _asking(url):
        store, path = _store(url)
        return store.unstrip_protocol(path)


def look_up(url: str) -> Found | None:
    """What stands under a URL, or None."""
    with _asking(url):
        store, path = _store(url)
        try:
            return _found(store, store.info(path))
        except FileNotFoundError:
            return None


def below(url: str) -> list[Found]:
    """All files below a folder, in no order."""
    with _asking(url):
        store, path = _store(url)
        return [_found(store, info) for info in store.find(path, detail=True).values() if info["type"] == "file"]


def matching(url: str) -> list[Found]:
    """The files that a glob matches; as in a shell, a star stands for no leading dot."""
    with _asking(url):
        store, path = _store(url)
        infos = [info for info in store.glob(path, detail=True).values() if info["type"] == "file"]
        if "/." not in path:
            infos = [info for info in infos if "/." not in info["name"]]
        return [_found(store, info) for info in infos]


def check_bucket(url: str) -> None:
    """Refuse a URL whose bucket does not exist, in stores that have buckets."""
    scheme, _, rest = url.partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if scheme in _BUCKETS and look_up(bucket) is None:
        raise InputError(f"there is no bucket {bucket}")


def open_url(url: str, version: str = "") -> BinaryIO:
    """Open a remote file for reading; every reader has a position of its own.

    Raises
    ------
    DataError
        It vanished, or is no longer of the version given.
    """
    found = look_up(url)
    if found is None or found.is_folder:
        raise DataError(f"{url} does not exist")
    if version and found.version != version:
        raise DataError(f"{url} has changed since it was listed")
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(url, found.size), _BUFFER))


def upload(path: Path, url: str) -> None:
    """Copy a local file into a store."""
    with _asking(url):
        store, target = _store(url)
        store.put_file(os.fspath(path), target)
    found, size = look_up(url), path.stat().st_size
    if found is None or found.size != size:
        raise DataError(f"{url} holds {found.size if found else 0} bytes where {size} were written")


def remove(url: str) -> None:
    """Remove a file from a store, if it is there."""
    with _asking(url):
        store, path = _store(url)
        try:
            store.rm_file(path)
        except FileNotFoundError:
            return


class _RemoteFile(io.RawIOBase):
    """One file of a store, read by requests for ranges.

    fsspec's own handles are not used: an in-memory store gives every reader the same one, and threads would move each
    other's position.
    """

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0
        with _asking(url):
            self._store, self._path = _store(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        if not wanted:
            return 0
        with _asking(self._url):
            data = self._store.cat_file(self._path, start=self._at, end=self._at + wanted)
        if len(data) != wanted:
            raise DataError(f"{self._url} gave {len(data)} bytes at {self._at} where {wanted} were asked for")
        buffer[:wanted] = data
        self._at += wanted
        return wanted


def _store(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL (fsspec keeps one per thread) and the path in it; without its cache of listings."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        scheme = url.partition("://")[0]
        what = f"pip install {_INSTALL[scheme]}" if scheme in _INSTALL else str(error)
        raise MissingExtra(f"{url} needs a package that is not installed: {what}") from error
    except ValueError as error:
        raise InputError(f"{url} cannot be opened: {error}") from error


def _found(store: AbstractFileSystem, info: dict) -> Found:
    url = store.unstrip_protocol(info["name"])
    if info["type"] == "directory":
        return Found(url, 0, "", is_folder=True)
    if info.get("size") is None:
        raise DataError(f"{url} cannot be read in parts: its store does not tell its size")
    key = next((key for key in _VERSIONS if info.get(key)), "")
    value = info.get(key, "")
    if isinstance(value, datetime):  # as a store tells a file, where its listings tell a number of seconds
        value = value.timestamp()
    return Found(url, info["size"], f"{key} {value}".strip())


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Say in one sentence what a store would not do; each of them has a family of errors of its own."""
    try:
        yield
    except SalienceError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist") from error
    except PermissionError as error:
        raise DataError(f"access to {url} was denied ({_first_line(error)}); check the store's credentials") from error
    except Exception as error:
        if "Credentials" in type(error).__name__:
            raise DataError(f"there are no credentials for {url} ({_first_line(error)})") from error
        raise DataError(f"{url} cannot be reached ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
