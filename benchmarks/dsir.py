"""`select text` against the official package data-selection 1.0.3, end to end on one core, in one run.

Both fit, weigh every document, take the top `--count`, and write them. Rounds alternate (ours exact, ours fast, peer,
yardstick); the yardstick is `pyarrow.compute.utf8_lower` over the same text. Equal work is checked first: log weights
within 1e-6, and the same chosen documents. Figures are ratios: machines are noisy.

Usage: python benchmarks/dsir.py [--megabytes 50] [--rounds 3] [--peer-python PYTHON]
Without --peer-python an environment of benchmarks/dsir.txt is made in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from salience.data import DSIR, select_text
from salience.io import Corpus, read
from salience.reproductions.worlds.text import pool

HERE = Path(__file__).parent


def make_corpus(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """English, code and transliterated (Cyrillic, Chinese) documents of ragged lengths."""
    world, rng = pool(0, single_spaces=True), random.Random(0)
    raw, target, written = folder / "raw.jsonl", folder / "target.jsonl", 0
    with open(raw, "w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            for document in world.raw:
                text, draw = document.text, rng.random()
                if draw < 0.05:
                    text = "".join(chr(0x430 + ord(c) - 97) if "a" <= c <= "z" else c for c in text)
                elif draw < 0.07:
                    text = "".join(chr(0x4E00 + 7 * ord(c)) if "a" <= c <= "z" else c for c in text)
                elif draw < 0.5:
                    words = text.split(" ")
                    text = " ".join(words[rng.randrange(max(1, len(words) // 2)) :])
                written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    with open(target, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document.text}) + "\n" for document in world.target)
    return raw, target


def peer_environment(folder: Path) -> str:
    """Python of a fresh environment with the pinned peer."""
    venv.create(folder / "peer", with_pip=True)
    python = str(folder / "peer" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", str(HERE / "dsir.txt")], check=True)
    return python


def ours(raw: Path, target: Path, out: Path, count: int, hash: str) -> float:
    """Seconds that one selection takes, from opening the files to the finished output."""
    began = time.perf_counter()
    model = DSIR(hash=hash, workers=1)
    select_text(
        Corpus(str(raw)), [Corpus(str(target))], out, count=count, model=model, top_k=True, hold_out=0, overwrite=True
    )
    return time.perf_counter() - began


def peer(python: str, raw: Path, target: Path, folder: Path, count: int) -> float:
    """Seconds that the official package takes for the same."""
    folder.mkdir()
    command = [python, str(HERE / "peer_dsir.py"), str(raw), str(target), str(folder), str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["total"]


def check_parity(raw: Path, target: Path, out: Path, folder: Path) -> float:
    """Largest difference of a log weight; the chosen documents must be the same."""
    weights = DSIR(workers=1).fit(str(raw), str(target)).log_weights(str(raw))[:, 0]
    difference = float(np.abs(weights - np.load(folder / "log_weights.npy")).max())
    if difference > 1e-6:
        raise SystemExit(f"log weights differ by {difference}")
    theirs = sorted(line for path in (folder / "out").rglob("*.jsonl") for line in path.read_bytes().splitlines())
    if sorted(out.read_bytes().splitlines()) != theirs:
        raise SystemExit("other documents were chosen")
    return difference


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--peer-python")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, target = make_corpus(folder, options.megabytes)
        python = options.peer_python or peer_environment(folder)
        size = raw.stat().st_size / 1e6
        texts = [batch.text for unit in Corpus(str(raw)).units for batch in read(Corpus(str(raw)), unit)]
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds + 1):  # the first one compiles and warms the cache; it is not counted
            seconds = {
                hash: ours(raw, target, folder / f"{hash}.jsonl", options.count, hash) for hash in ("fast", "sha256")
            }
            seconds["peer"] = peer(python, raw, target, folder / f"peer{number}", options.count)
            began = time.perf_counter()
            for text in texts:
                pc.utf8_lower(text)
            seconds["yardstick"] = time.perf_counter() - began
            if number:
                rounds.append(seconds)
                print(", ".join(f"{name} {size / value:,.2f} MB/s" for name, value in seconds.items()), file=sys.stderr)
        difference = check_parity(raw, target, folder / "sha256.jsonl", folder / "peer0")
        figures = {"megabytes": size, "documents": sum(map(len, texts)), "largest log weight difference": difference}
        for hash in ("sha256", "fast"):
            ratios = [seconds["peer"] / seconds[hash] for seconds in rounds]
            figures[f"{hash}: times the peer, median"] = float(np.median(ratios))
            figures[f"{hash}: times the peer, worst"] = float(min(ratios))
            slower = [seconds[hash] / seconds["yardstick"] for seconds in rounds]
            figures[f"{hash}: times the seconds of utf8_lower, median"] = float(np.median(slower))
        figures["peak memory of this process, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(figures, indent=1))
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
