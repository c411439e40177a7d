"""Kills, interrupts, full disks and closed pipes of the real command.

The final name is absent, old or complete, and a resumed run gives the bytes of an undisturbed one.
"""

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

FINAL, MANIFEST, LEDGER = "out.jsonl", "out.jsonl.manifest.json", ".out.jsonl.ledger"


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


KEPT = "finished units are kept: the same command with --resume goes on from there\n"


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


def wait_for_partial(folder: Path, process: subprocess.Popen, name: str = "run.json") -> None:
    """Wait until the run has begun to write, or a stage of it is on the disk."""
    path = folder / LEDGER / name
    while process.poll() is None:
        if path.exists() and path.stat().st_size:
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def duration(folder: Path) -> float:
    """Seconds from the first temporary to the final name in an undisturbed run."""
    clean(folder)
    start(folder).communicate(timeout=300)  # compiles
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


def kill_at(folder: Path, delay: float, signum: int, *arguments: str) -> tuple[int, str]:
    process = start(folder, *arguments)
    wait_for_partial(folder, process)
    time.sleep(delay)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.fixture(scope="module")
def expected(folder: Path, duration: float) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    clean(folder)
    process = start(folder)
    process.communicate(timeout=120)
    return {name: (folder / name).read_bytes() for name in (FINAL, MANIFEST)}


def kill_and_resume(folder: Path, duration: float, expected: dict[str, bytes], times: int) -> None:
    """Kill, now and then the resumed run, too; then let one finish."""
    seen = set()
    for number in range(times):
        clean(folder)
        code, _ = kill_at(folder, 1.1 * duration * (number + random.Random(number).random()) / times, signal.SIGKILL)
        assert code in (0, -signal.SIGKILL)
        seen.add(state(folder))
        if number % 3 == 0 and not (folder / FINAL).exists():
            kill_at(folder, duration / 3, signal.SIGKILL, "--resume")
        process = start(folder, "--resume")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert {name: (folder / name).read_bytes() for name in expected} == expected
        assert {path.name for path in folder.iterdir()} <= {
            *expected,
            "out.jsonl.report.html",
            "raw.jsonl",
            "target.jsonl",
        }
    assert seen <= {"absent", "4000 lines"} and "absent" in seen


def test_a_killed_run_is_resumed_to_the_same_bytes(folder: Path, duration: float, expected: dict[str, bytes]) -> None:
    kill_and_resume(folder, duration, expected, 5)


@pytest.mark.slow
def test_fifty_kills(folder: Path, duration: float, expected: dict[str, bytes]) -> None:
    kill_and_resume(folder, duration, expected, 50)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupts_exit_130_and_can_be_resumed(
    folder: Path, duration: float, expected: dict[str, bytes], signum: int
) -> None:
    clean(folder)
    process = start(folder)
    wait_for_partial(folder, process, "targets-0.log")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, f"{KEPT}salience: interrupted; no unfinished output was left\n")
    assert sorted(os.listdir(folder)) == [LEDGER, "raw.jsonl", "target.jsonl"]
    process = start(folder)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "pass --resume to finish it, or --overwrite to start again" in err
    process = start(folder, "--resume")
    process.communicate(timeout=60)
    assert process.returncode == 0 and (folder / FINAL).read_bytes() == expected[FINAL]


def test_a_resumed_run_must_be_the_same(folder: Path, duration: float, expected: dict[str, bytes]) -> None:
    """Other parameters and other bytes are told; the ledger stays for the run that it belongs to."""
    clean(folder)
    process = start(folder)
    wait_for_partial(folder, process, "count.log")
    process.kill()
    process.communicate()
    for arguments, said in (
        (["--count", "4001"], "choice count was 4000 and is 4001"),
        (["--seed", "1"], "scoring parameters random_state was 0 and is 1"),
        (["--smoothing", "1"], "scoring parameters smoothing was 0.0 and is 1.0"),
        (["--target", "raw.jsonl"], "scoring target 0 files raw.jsonl was absent"),
    ):
        process = start(folder, "--resume", *arguments)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and said in err and "cannot be gone on with" in err
    data = (folder / "raw.jsonl").read_bytes()
    try:
        (folder / "raw.jsonl").write_bytes(data[:12] + bytes([data[12] ^ 1]) + data[13:])
        process = start(folder, "--resume")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and "raw.jsonl has changed (between bytes 0 and" in err
    finally:
        (folder / "raw.jsonl").write_bytes(data)
    process = start(folder, "--resume")
    process.communicate(timeout=60)
    assert process.returncode == 0 and (folder / FINAL).read_bytes() == expected[FINAL]


def test_two_runs_do_not_write_one_output(folder: Path) -> None:
    clean(folder)
    first = start(folder)
    wait_for_partial(folder, first)
    first.send_signal(signal.SIGSTOP)
    second = start(folder, "--resume")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2 and "another run is at work in" in err
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode == 0 and state(folder) == "4000 lines"


def test_an_interrupted_overwrite_keeps_the_old_output(folder: Path, duration: float) -> None:
    clean(folder)
    (folder / FINAL).write_text('{"text": "old"}\n')
    process = start(folder, "--overwrite")
    wait_for_partial(folder, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130 and (folder / FINAL).read_text() == '{"text": "old"}\n'
    assert sorted(os.listdir(folder)) == [LEDGER, FINAL, "raw.jsonl", "target.jsonl"]


def test_a_disk_that_takes_no_more_exits_1(folder: Path) -> None:
    """A limit on the size of files stands for a full disk: every write beyond it fails."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    clean(folder)
    process = start(folder, "--hold-out", "0", preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith(f"{KEPT}salience: ") and "File too large" in err
    assert "Traceback" not in err and sorted(os.listdir(folder)) == [LEDGER, "raw.jsonl", "target.jsonl"]
    process = start(folder, "--hold-out", "0", "--resume")  # there is room again
    process.communicate(timeout=60)
    assert process.returncode == 0 and state(folder) == "4000 lines"


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    clean(folder)
    process = start(folder, "--json")
    process.stdout.close()
    process.wait(timeout=60)
    assert "Traceback" not in process.stderr.read() and state(folder) == "4000 lines"
    process.stderr.close()
    clean(folder)
