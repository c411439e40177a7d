"""Peak memory of DSIR at one and at ten times the corpus: flat within 5 % in fit and in score; resampling O(k).

Every figure is the peak resident memory of a process of its own. The larger corpus is the smaller one under ten names,
which are ten files to us: nothing is kept from one to the next but what is chosen.

Usage: python benchmarks/dsir_memory.py [--megabytes 400] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dsir import make_corpus

GATE = 1.05
TIMES = 10


def child(job: str, raw: str, folder: str, count: int) -> None:
    """Do one job, and print the peak memory in MB."""
    from salience.data import DSIR

    model = Path(folder) / "model.safetensors"
    if job == "fit":
        DSIR(workers=1, max_ngrams="all").fit(raw, f"{folder}/target.jsonl").save(model)
    else:
        DSIR.load(model).set_params(workers=1).choose(raw, count)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory before exec
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def peak(job: str, raw: Path, folder: Path, count: int = 10_000) -> float:
    """Peak memory of a job in MB."""
    command = [sys.executable, __file__, "--child", job, str(raw), str(folder), str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print against the gates, and exit 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child[:3], int(options.child[3]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, _ = make_corpus(folder, options.megabytes)
        small, large = folder / "small", folder / "large"
        for place, times in ((small, 1), (large, TIMES)):
            place.mkdir()
            for number in range(times):
                (place / f"{number}.jsonl").symlink_to(raw)
        peak("fit", small, folder)  # compiles; not counted
        peaks = {job: (peak(job, small, folder), peak(job, large, folder)) for job in ("fit", "score")}
        many = 200_000
        per_document = (peak("score", small, folder, many) - peaks["score"][0]) * 1e6 / (many - 10_000)
        megabytes = raw.stat().st_size / 1e6
    figures = {"megabytes": [megabytes, TIMES * megabytes], "bytes per document drawn": per_document}
    for job, (one, ten) in peaks.items():
        verdict = "met" if ten <= GATE * one else "missed"
        figures[job] = {"peak MB": [one, ten], "ratio": ten / one, "gate": GATE, "verdict": verdict}
        print(f"{job}: {one:.1f} MB, of {TIMES} times the corpus {ten:.1f} MB: {ten / one:.3f}, gate {GATE} {verdict}")
    print(f"resampling: {per_document:.0f} bytes per document drawn")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(figures[job]["verdict"] == "missed" for job in peaks))


if __name__ == "__main__":
    main()
