"""`select text --resume` of a run whose units are all done, against the run itself: at most 2 % of it, plus a start-up.

Resuming makes sure that all bytes are still those that were read, so it reads the corpus once more, and hashes it. The
corpus is one file under ten names, which are ten files to us. A start-up is the same command, resumed with a corpus of
ten documents.

Usage: python benchmarks/resume.py [--megabytes 4000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from dsir import make_corpus

GATE = 0.02
TIMES = 10


def seconds(*arguments: str) -> float:
    """Wall time of one command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "salience", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Run cold, then resume, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=4000)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, target = make_corpus(folder, options.megabytes // TIMES)
        (folder / "many").mkdir()
        for number in range(TIMES):
            os.link(raw, folder / "many" / f"{number}.jsonl")
        with open(raw, "rb") as whole:
            (folder / "few.jsonl").write_bytes(b"".join(islice(whole, 10)))

        def command(corpus: str, count: int) -> list[str]:
            output = str(folder / f"chosen-{Path(corpus).stem}.jsonl")
            where = ["--target", str(target), "-o", output, "--min-tokens", "0", "--resume"]
            return ["select", "text", str(folder / corpus), "--count", str(count), *where]

        seconds(*command("few.jsonl", 5))
        start = min(seconds(*command("few.jsonl", 5)) for _ in range(3))
        cold = seconds(*command("many", 20_000))
        warm = min(seconds(*command("many", 20_000)) for _ in range(3))
        size = TIMES * raw.stat().st_size / 1e6
    share = max(0.0, warm - start) / cold
    figures = {
        "megabytes": size, "cold run, seconds": cold, "start-up, seconds": start, "resume, seconds": warm,
        "resume without start-up, share of the cold run": share, "gate": GATE,
        "verdict": "met" if share <= GATE else "missed",
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
