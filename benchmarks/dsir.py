"""`select text` against the official package data-selection 1.0.3 and against the machine, on one core, in one run.

Rounds alternate, and every figure is a ratio within a round, since machines are noisy:

* a whole selection (fit, weigh, take the top `--count`, write) against the peer's;
* a scoring pass (read, hash, sum) against the yardstick, `pyarrow.compute.utf8_lower` over the same text;
* the scoring pass against its parts by themselves, reading the file and hashing and summing batches in memory:
  ``1 / (1 / kernel + 1 / reader)`` is the rate of a stream that adds nothing to them;
* two workers on all cores against one worker on one core, a scoring pass over the same file under eight names, since
  two workers that share four units of work mostly wait for each other.

Equal work is checked first: log weights within 1e-6 of the peer's, and the same chosen documents. A gate is judged by
the worst of the rounds whose yardstick came within 1.5 times of its best.

Usage: python benchmarks/dsir.py [--megabytes 50] [--rounds 3] [--peer-python PYTHON] [--json FILE]
Without --peer-python an environment of benchmarks/dsir.txt is made in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from salience.data import DSIR, select_text
from salience.io import Corpus, read
from salience.reproductions.worlds.text import pool

HERE = Path(__file__).parent
HASHES = "fast", "sha256"
CORES = sorted(os.sched_getaffinity(0))
TIMES = 8  # names of the one file, for two workers
GATES = {  # least ratio
    "sha256: selection, times the peer": 20,
    "fast: selection, times the peer": 100,
    "sha256: scoring pass, of utf8_lower": 1 / 75,
    "fast: scoring pass, of utf8_lower": 1 / 15,
    "sha256: scoring pass, of reader and kernel": 0.8,
    "fast: scoring pass, of reader and kernel": 0.8,
    "sha256: scoring pass, two workers over one": 1.8,
    "fast: scoring pass, two workers over one": 1.8,
    "sha256: scoring pass, processor time of one worker over two": None,  # 1 if two cost each other nothing
    "fast: scoring pass, processor time of one worker over two": None,
    "sha256: selection, of reader and kernel": None,
    "fast: selection, of reader and kernel": None,
    "sha256: selection, two workers over one": None,
    "sha256: selection, processor time over wall time": None,
}


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


def seconds_of(work: Callable[..., object], *arguments: object) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def select(raw: Path, target: Path, out: Path, count: int, hash: str, workers: int = 1) -> None:
    """One selection, from opening the files to the finished output."""
    model = DSIR(hash=hash, workers=workers)
    select_text(
        Corpus(str(raw)), [Corpus(str(target))], out, count=count, model=model, top_k=True, hold_out=0, overwrite=True
    )


def batches(raw: Path) -> Iterator[pa.Array]:
    """The texts of a corpus as our reader gives them."""
    corpus = Corpus(str(raw))
    for unit in corpus.units:
        for batch in read(corpus, unit):
            yield batch.text


def hash_and_sum(model: DSIR, texts: Iterable[pa.Array]) -> None:
    """What is computed in a scoring pass."""
    featurizer = model.featurizer()
    for text in texts:
        featurizer(text).sums(model.log_diff_)


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


def one_round(raw: Path, target: Path, folder: Path, count: int, models: dict[str, DSIR]) -> dict[str, float]:
    """Seconds of everything but the peer."""
    texts, many = list(batches(raw)), folder / "many"
    seconds = {
        "yardstick": min(seconds_of(deque, map(pc.utf8_lower, texts), 0) for _ in range(5)),
        "reader": seconds_of(deque, batches(raw), 0),
    }
    for hash, model in models.items():
        selection = raw, target, folder / f"{hash}.jsonl", count, hash
        processor = time.process_time()
        seconds[f"{hash} selection"] = seconds_of(select, *selection)
        seconds[f"{hash} selection, processor"] = time.process_time() - processor
        seconds[f"{hash} kernel"] = seconds_of(hash_and_sum, model, texts)
        processor = time.process_time()
        seconds[f"{hash} scoring"] = seconds_of(model.set_params(workers=1).log_weights, str(raw))
        seconds[f"{hash} scoring, processor"] = time.process_time() - processor
        processor = time.process_time()
        seconds[f"{hash} scoring, many"] = seconds_of(model.log_weights, str(many))
        seconds[f"{hash} scoring, many, processor"] = time.process_time() - processor
        os.sched_setaffinity(0, CORES)
        processor = time.process_time()
        seconds[f"{hash} scoring, two"] = seconds_of(model.set_params(workers=2).log_weights, str(many))
        seconds[f"{hash} scoring, two, processor"] = time.process_time() - processor
        seconds[f"{hash} selection, two"] = seconds_of(select, *selection, 2)
        os.sched_setaffinity(0, CORES[:1])
    return seconds


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """The ratios of one round."""
    found = {}
    for hash in HASHES:
        bare = seconds["reader"] + seconds[f"{hash} kernel"]
        selection, scoring = seconds[f"{hash} selection"], seconds[f"{hash} scoring"]
        found |= {
            f"{hash}: selection, times the peer": seconds["peer"] / selection,
            f"{hash}: selection, of reader and kernel": bare / selection,
            f"{hash}: selection, two workers over one": selection / seconds[f"{hash} selection, two"],
            f"{hash}: selection, processor time over wall time": seconds[f"{hash} selection, processor"] / selection,
            f"{hash}: scoring pass, of utf8_lower": seconds["yardstick"] / scoring,
            f"{hash}: scoring pass, of reader and kernel": bare / scoring,
            f"{hash}: scoring pass, two workers over one": seconds[f"{hash} scoring, many"]
            / seconds[f"{hash} scoring, two"],
            f"{hash}: scoring pass, processor time of one worker over two": seconds[f"{hash} scoring, many, processor"]
            / seconds[f"{hash} scoring, two, processor"],
        }
    return found


def main() -> None:
    """Run the rounds, print the ratios against their gates, and exit 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--peer-python")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    os.sched_setaffinity(0, CORES[:1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, target = make_corpus(folder, options.megabytes)
        (folder / "many").mkdir()
        for number in range(TIMES):
            os.link(raw, folder / "many" / f"{number}.jsonl")
        python = options.peer_python or peer_environment(folder)
        models = {hash: DSIR(hash=hash, workers=1).fit(str(raw), str(target)) for hash in HASHES}
        one_round(raw, target, folder, options.count, models)  # compiles and warms the cache; not counted
        rounds = []
        for number in range(options.rounds):
            seconds = one_round(raw, target, folder, options.count, models)
            seconds["peer"] = peer(python, raw, target, folder / f"peer{number}", options.count)
            rounds.append(seconds)
            size = raw.stat().st_size / 1e6
            rates = {
                name: size * (TIMES if "many" in name or "scoring, two" in name else 1) / value
                for name, value in seconds.items()
            }
            print(", ".join(f"{name} {rate:,.1f}" for name, rate in rates.items()), "MB/s", file=sys.stderr)
        difference = check_parity(raw, target, folder / "sha256.jsonl", folder / "peer0")
        figures = {
            "megabytes": size,
            "documents": sum(map(len, batches(raw))),
            "cores": len(CORES),
            "largest log weight difference": difference,
        }
    table = judge(rounds)
    for row in table:
        print("{name:60} median {median:8.3f}  worst {worst:8.3f}  gate {gate}  {verdict}".format(**row))
    if options.json:
        Path(options.json).write_text(json.dumps(figures | {"ratios": table}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["verdict"] == "missed" for row in table))


def judge(rounds: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Median and worst of every ratio, and whether its gate is met."""
    best = min(seconds["yardstick"] for seconds in rounds)
    found = [ratios(seconds) for seconds in rounds if seconds["yardstick"] <= 1.5 * best]
    table = []
    for name, gate in GATES.items():
        if "two workers" in name and len(CORES) < 2:
            continue
        values = [ratio[name] for ratio in found]
        verdict = "" if gate is None else "met" if min(values) >= gate else "missed"
        shown = "-" if gate is None else round(gate, 4)
        table.append(
            {"name": name, "median": float(np.median(values)), "worst": min(values), "gate": shown, "verdict": verdict}
        )
    return table


if __name__ == "__main__":
    main()
