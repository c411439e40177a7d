"""Remote stores for tests: one in memory, and local servers that speak S3 and like the Hugging Face hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import fsspec
import pytest


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a server of this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and settings that belong to nobody, and none of this machine's."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture
def other_s3(s3_environment: None) -> Iterator[None]:
    """For tests that change the environment: no connection of another test is used, and none is left."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(s3_server: str, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    bucket = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> str:
    """URL of an empty place in a store."""
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else request.getfixturevalue("s3")


def put(url: str, data: bytes) -> str:
    """Write a file into a store; gives its URL."""
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    filesystem.pipe_file(path, data)
    return url


def put_tree(folder: Path, url: str) -> str:
    """Copy a folder into a store; gives its URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def tree(url: str) -> dict[str, bytes]:
    """All files below a URL."""
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.removeprefix(path).lstrip("/"): filesystem.cat_file(name) for name in filesystem.find(path)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of the dataset ``someone/texts`` on a local stand-in for the Hugging Face hub, to be filled."""
    files: dict[str, bytes] = {}
    api = "/api/datasets/someone/texts"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = unquote(self.path).partition("?")
            tree = f"{api}/tree/main"
            if path in (api, f"{api}/revision/main"):
                self.answer(json.dumps({"id": "someone/texts", "sha": "0" * 40}).encode())
            elif path.startswith(tree) and (found := self.entries(path.removeprefix(tree), "recursive=true" in query)):
                self.answer(json.dumps(found).encode())
            elif (name := path.removeprefix("/datasets/someone/texts/resolve/main/")) in files:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                self.answer(files[name][int(first) : int(last) + 1], 206)
            else:
                self.answer(b"{}", 404, "EntryNotFound" if path.startswith(api) else "RepoNotFound")

        def entries(self, folder: str, recursive: bool) -> list[dict]:
            root = folder.strip("/") + "/" if folder.strip("/") else ""
            found: dict[str, dict] = {}
            for name, data in files.items():
                if name.startswith(root):
                    steps = name.removeprefix(root).split("/")
                    for depth in range(1, len(steps)):
                        path = root + "/".join(steps[:depth])
                        found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                    oid = hashlib.sha1(data).hexdigest()
                    found[name] = {"type": "file", "path": name, "oid": oid, "size": len(data)}
            if not recursive:
                found = {path: entry for path, entry in found.items() if "/" not in path.removeprefix(root)}
            return list(found.values())

        def answer(self, body: bytes, status: int = 200, code: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with serving(Hub) as address:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
        yield files


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on a thread; gives the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
