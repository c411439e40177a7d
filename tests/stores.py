"""Remote stores for tests: one in memory, and a local server that speaks S3."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

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
