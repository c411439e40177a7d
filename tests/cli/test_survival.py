"""Kills, interrupts, full disks and closed pipes of the real command: the final name is absent, old or complete."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import salience
from salience.io import checksum

FINAL, MANIFEST = "out.jsonl", "out.jsonl.manifest.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that takes a second or so to choose from, once everything is loaded."""
    folder = tmp_path_factory.mktemp("survival")
    words = [f"{start}{end}" for start in "bdfglmnprst" for end in ("at", "on", "ir", "um", "esk")]
    for name, count in (("raw", 12_000), ("target", 400)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for number in range(count):
                text = " ".join(random.Random(number).choices(words, k=60))
                file.write(json.dumps({"text": text}) + "\n")
    return folder


def start(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "salience", "select", "text", "raw.jsonl", "--target", "target.jsonl", "--count", "4000",
        "--out", FINAL, "--min-tokens", "5", "--workers", "1", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(salience.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in background jobs
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def clean(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("raw.jsonl", "target.jsonl"):
            subprocess.run(["rm", "-r", str(path)], check=True)


def state(folder: Path) -> str:
    """What stands under the final name; fails on anything torn."""
    if not (folder / FINAL).exists():
        assert not (folder / MANIFEST).exists()
        return "absent"
    if (folder / MANIFEST).exists():
        files = json.loads((folder / MANIFEST).read_text())["files"]
        assert {name: checksum(folder / name) for name in files} == {n: e["xxh3_128"] for n, e in files.items()}
    lines = (folder / FINAL).read_text().splitlines()
    assert all(json.loads(line)["text"] for line in lines)
    return f"{len(lines)} lines"


def wait_for_partial(folder: Path, process: subprocess.Popen) -> Path:
    """Wait until the run has begun to write."""
    while process.poll() is None:
        if found := list(folder.glob(".*.partial")):
            return found[0]
        time.sleep(0.002)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def duration(folder: Path) -> float:
    """Seconds from the first temporary to the final name in an undisturbed run."""
    clean(folder)
    process = start(folder)
    wait_for_partial(folder, process)
    began = time.monotonic()
    while process.poll() is None and not (folder / FINAL).exists():
        time.sleep(0.002)
    seconds = time.monotonic() - began
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and state(folder) == "4000 lines", err
    return seconds


def kill_at(folder: Path, delay: float, signum: int) -> tuple[int, str]:
    process = start(folder)
    wait_for_partial(folder, process)
    time.sleep(delay)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def kill_often(folder: Path, duration: float, times: int) -> None:
    seen = set()
    for number in range(times):
        clean(folder)
        code, _ = kill_at(folder, 1.1 * duration * (number + random.Random(number).random()) / times, signal.SIGKILL)
        assert code in (0, -signal.SIGKILL)
        seen.add(state(folder))
    assert seen <= {"absent", "4000 lines"} and "absent" in seen
    clean(folder)
    process = start(folder)  # what a kill left behind is not in the way
    process.communicate(timeout=60)
    assert process.returncode == 0 and state(folder) == "4000 lines"


def test_sigkill_leaves_no_torn_result(folder: Path, duration: float) -> None:
    kill_often(folder, duration, 5)


@pytest.mark.slow
def test_sigkill_at_fifty_moments(folder: Path, duration: float) -> None:
    kill_often(folder, duration, 50)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupts_exit_130_and_leave_nothing(folder: Path, duration: float, signum: int) -> None:
    clean(folder)
    code, err = kill_at(folder, duration / 3, signum)
    assert (code, err) == (130, "salience: interrupted; no unfinished output was left\n")
    assert sorted(os.listdir(folder)) == ["raw.jsonl", "target.jsonl"]


def test_an_interrupted_overwrite_keeps_the_old_output(folder: Path, duration: float) -> None:
    clean(folder)
    (folder / FINAL).write_text('{"text": "old"}\n')
    process = start(folder, "--overwrite")
    wait_for_partial(folder, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130 and (folder / FINAL).read_text() == '{"text": "old"}\n'
    assert sorted(os.listdir(folder)) == [FINAL, "raw.jsonl", "target.jsonl"]


def test_a_disk_that_takes_no_more_exits_1(folder: Path) -> None:
    """A limit on the size of files stands for a full disk: every write beyond it fails."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    clean(folder)
    process = start(folder, "--hold-out", "0", preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith("salience: ") and "File too large" in err
    assert "Traceback" not in err and sorted(os.listdir(folder)) == ["raw.jsonl", "target.jsonl"]


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    clean(folder)
    process = start(folder, "--json")
    process.stdout.close()
    process.wait(timeout=60)
    assert "Traceback" not in process.stderr.read() and state(folder) == "4000 lines"
    process.stderr.close()
    clean(folder)
