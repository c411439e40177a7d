"""Kill an upload at any moment: what has a manifest is complete, old or new."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import salience
from salience.io import verify_output
from stores import tree

UPLOAD = """
import sys
from salience.io import Output, remote
url, text = sys.argv[1:]
upload = remote.upload
def told(path, url):
    print(url, flush=True)
    upload(path, url)
remote.upload = told
with Output(url, overwrite=True, folder=True) as output:
    for number in range(20):
        output.file(f"{number}.txt").write_text(text * 1000)
    output.commit({"text": text})
"""


def start(url: str, text: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(salience.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", UPLOAD, url, text], env=environment, stdout=subprocess.PIPE)


def kill_after(url: str, uploads: int) -> str:
    """Replace an output, killed once so many uploads have begun; gives what then stands there."""
    process = start(url, "old")
    process.communicate(timeout=60)
    assert process.returncode == 0
    process = start(url, "new")
    for _ in range(uploads):
        process.stdout.readline()
    time.sleep(random.Random(uploads).random() / 100)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    found = tree(url)
    if "manifest.json" not in found:
        return "unfinished"
    assert verify_output(url).ok
    return json.loads(found["manifest.json"])["text"]


def test_a_killed_upload_leaves_no_manifest(s3: str) -> None:
    assert kill_after(f"{s3}/out", 0) == "old"
    assert kill_after(f"{s3}/other", 10) == "unfinished"


@pytest.mark.slow
def test_uploads_killed_at_every_file(s3: str) -> None:
    seen = {kill_after(f"{s3}/{uploads}", uploads) for uploads in range(22)}
    assert seen >= {"old", "unfinished"}
