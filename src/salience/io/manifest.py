"""The manifest of an output: what was done, and the size and xxh3-128 of every file; it carries a checksum of itself.

Its last line is the xxh3-128 of all bytes before it, so that no bit of it can change unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import xxhash

from salience import __version__

IN_FOLDER = "manifest.json"  # name of the manifest of a folder; that of a file stands beside it
OWN = "manifest_xxh3_128"
_CHUNK = 1 << 20
_TAIL = re.compile(rf'(?P<body>.*),\n "{OWN}": "(?P<digest>[0-9a-f]{{32}})"\n}}\n'.encode(), re.DOTALL)


def checksum_of(file: BinaryIO) -> str:
    """xxh3-128 of all that a stream holds, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def manifest_text(record: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    """Write a manifest: the record of a run, and what is known of each of its files."""
    body = json.dumps({"salience": __version__, **record, "files": files}, indent=1, ensure_ascii=False, default=str)
    body = body.removesuffix("\n}")
    return f'{body},\n "{OWN}": "{xxhash.xxh3_128_hexdigest(body.encode("utf-8"))}"\n}}\n'


def parse_manifest(data: bytes) -> dict[str, Any]:
    """Read a manifest.

    Raises
    ------
    ValueError
        It is not one of ours, or not a bit of it is as it was written; says which.
    """
    found = _TAIL.fullmatch(data)
    if found is None:
        raise ValueError("is cut short or changed" if OWN.encode() in data else "is no manifest of salience")
    if xxhash.xxh3_128_hexdigest(found["body"]).encode() != found["digest"]:
        raise ValueError("is not as it was written: its own checksum differs")
    manifest = json.loads(data)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise ValueError("is no manifest of salience")
    return manifest


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3_128"), str)


def unlisted(names: Iterable[str], manifest: Mapping[str, Any]) -> list[str]:
    """Those files of a folder that its manifest does not name."""
    return sorted(set(names) - set(manifest["files"]) - {IN_FOLDER})
