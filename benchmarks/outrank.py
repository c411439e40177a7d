"""`rank_table` against the command of outrank 0.97.5, on one CSV file of 100,000 rows and 100 columns, in one run.

Both read all rows in batches of 16,384 in the order of the file, score every column against the label, and report the
quality of the data. Rounds alternate (ours, peer, yardsticks); the yardsticks are `pyarrow.csv.read_csv` of the same
bytes and `pyarrow.parquet.read_table` of the same table, on one thread. Equal work is checked first: every score within
1e-6. Also: all pairs, one column against `numpy.bincount` with logarithms, and peak memory at 0.1 and 1 million rows.
Figures are ratios: machines are noisy. A round counts if its yardstick is within 1.5 of the best.

Usage: python benchmarks/outrank.py [--rounds 3] [--peer-python PYTHON] [--json FILE]
Without --peer-python an environment of benchmarks/outrank.txt is made in a temporary folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from salience.features import rank_table
from salience.features.outrank.mutual_info import class_sums, count_terms, target_of

HERE = Path(__file__).parent
COLUMNS, BATCH = 99, 1 << 14


def make_table(rows: int) -> pa.Table:
    """Columns of 2 to 10,000 values, one of which decides the label but for a tenth of the rows."""
    rng = np.random.default_rng(0)
    sizes = np.rint(np.geomspace(2, 10_000, COLUMNS)).astype(int)
    columns = {f"f{at}": rng.integers(0, size, rows) for at, size in enumerate(sizes)}
    return pa.table({**columns, "label": columns["f30"] % 2 ^ (rng.random(rows) < 0.1)})


def write_csv(rows: int, path: Path) -> None:
    """With bare column names: of quoted ones the peer finds no label, and says nothing."""
    with open(path, "wb") as file:
        for at in range(max(1, rows // 100_000)):
            table = make_table(rows if rows < 100_000 else 100_000)
            if not at:
                file.write((",".join(table.column_names) + "\n").encode())
            pa_csv.write_csv(table, file, pa_csv.WriteOptions(include_header=False))


def timed(fn: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call, children included."""
    began, used = time.perf_counter(), _processor_seconds()
    fn()
    return time.perf_counter() - began, _processor_seconds() - used


def _processor_seconds() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)


def peer_environment(folder: Path) -> Path:
    """Python of a fresh environment with the pinned peer."""
    venv.create(folder / "peer", with_pip=True)
    python = folder / "peer" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", str(HERE / "outrank.txt")], check=True)
    return python


def peer(python: Path, data: Path, out: Path) -> None:
    """Run the peer's command."""
    options = {
        "task": "ranking", "data_path": str(data.parent), "data_source": "csv-raw", "heuristic": "MI-numba-randomized",
        "target_ranking_only": "True", "subsampling": "1", "num_threads": "2", "label_column": "label",
        "include_cardinality_in_feature_names": "False", "disable_tqdm": "True", "output_folder": str(out),
    }  # fmt: skip
    command = [
        str(python.parent / "outrank"),
        *(part for name, value in options.items() for part in (f"--{name}", value)),
    ]
    subprocess.run(command, check=True, cwd=out.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ours(data: Path):
    """The same work, with the whole report of quality."""
    return rank_table(data, "label", shuffle="none", batch_rows=BATCH, workers=1)


def check_parity(data: Path, out: Path) -> float:
    """Largest difference of a score."""
    with open(out / "pairwise_ranks.tsv", encoding="utf-8") as file:
        theirs = {row["FeatureA"]: float(row["Score"]) for row in csv.DictReader(file, delimiter="\t")
                  if row["FeatureB"] == "label" != row["FeatureA"]}  # fmt: skip
    mine = {row["feature"]: row["score"] for row in ours(data).singles.to_pylist()}
    if set(mine) != set(theirs):
        raise SystemExit(f"{len(mine)} columns were scored here, {len(theirs)} by the peer")
    difference = max(abs(mine[name] - theirs[name]) for name in mine)
    if difference > 1e-6:
        raise SystemExit(f"scores differ by {difference}")
    return difference


def kernel() -> dict[str, float]:
    """Row-pairs a second of all pairs, and one column against two joint bincounts with logarithms."""
    table, terms = make_table(BATCH), count_terms(BATCH)
    codes = np.stack([np.unique(column.to_numpy(), return_inverse=True)[1].astype(np.uint32)
                      for column in table.columns[:COLUMNS]])  # fmt: skip
    below = codes.max(axis=1).astype(np.int64) + 1

    def all_pairs() -> None:
        for b in range(1, COLUMNS):
            class_sums(codes, np.arange(b), below, target_of(codes[b], int(below[b])), terms)

    all_pairs()
    seconds = min(timed(all_pairs)[1] for _ in range(5))  # of the processor: "a core"
    y = table["label"].to_numpy().astype(np.int64)
    target, worst = target_of(y.astype(np.uint32), 2), 0.0
    for at in range(0, COLUMNS, 14):
        f = codes[at].astype(np.int64)

        def counted(f: np.ndarray = f) -> None:
            for values in (f, np.roll(f, BATCH // 2)):
                cells = np.bincount(y * (f.max() + 1) + values)
                cells = cells[cells > 0]
                cells @ np.log(cells)

        def scored(which: np.ndarray = np.full(50, at)) -> None:  # noqa: B008
            class_sums(codes, which, below, target, terms)

        mine = min(timed(scored)[1] for _ in range(5)) / 50
        worst = max(worst, mine / (min(timed(lambda: [counted() for _ in range(50)])[1] for _ in range(5)) / 50))
    return {"all pairs: million row-pairs a second": COLUMNS * (COLUMNS - 1) / 2 * BATCH / seconds / 1e6,
            "one column: times two bincounts with logarithms, worst": worst}  # fmt: skip


def peak_memory(path: Path) -> float:
    """MB that a process at its peak holds when it ranks a file."""
    # VmHWM is the process's own; `ru_maxrss` starts from its parent's.
    code = (
        "import sys; from salience.features import rank_table; rank_table(sys.argv[1], 'label', workers=1); "
        "print(next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    return float(
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True).stdout
    )


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small").mkdir()
        data, columns = folder / "small" / "data.csv", folder / "small.parquet"
        write_csv(options.rows, data)
        pq.write_table(make_table(options.rows), columns)
        python = options.peer_python or peer_environment(folder)
        one_thread = pa_csv.ReadOptions(use_threads=False)
        work: dict[str, Callable[[], object]] = {
            "ours": lambda: ours(data),
            "ours, Parquet": lambda: ours(columns),
            "peer": lambda: peer(python, data, folder / "out"),
            "read_csv": lambda: pa_csv.read_csv(data, read_options=one_thread),
            "read_table": lambda: pq.read_table(columns, use_threads=False),
        }
        ours(data)  # compiles
        rounds: list[dict[str, tuple[float, float]]] = []
        for _ in range(options.rounds):
            short = [{each: timed(fn) for each, fn in work.items() if each != "peer"} for _ in range(5)]
            found = {each: tuple(np.min([run[each] for run in short], axis=0)) for each in short[0]}
            found["peer"] = timed(work["peer"])
            rounds.append(found)
            print(", ".join(f"{each} {wall:.2f} s" for each, (wall, _) in found.items()), file=sys.stderr)
        figures: dict[str, float] = {
            "rows": options.rows,
            "columns": COLUMNS + 1,
            "file, MB": data.stat().st_size / 1e6,
        }
        figures["largest difference of a score"] = check_parity(data, folder / "out")
        for label, top, below, part in (
            ("times the peer, wall", "peer", "ours", 0),
            ("times the peer, processor", "peer", "ours", 1),
            ("times read_csv, wall", "ours", "read_csv", 0),
            ("times read_csv, processor", "ours", "read_csv", 1),
            ("times read_table of Parquet, wall", "ours, Parquet", "read_table", 0),
            ("times read_table of Parquet, processor", "ours, Parquet", "read_table", 1),
        ):
            ratios = [found[top][part] / found[below][part] for found in rounds]
            figures[f"{label}, median"] = float(np.median(ratios))
            figures[f"{label}, worst"] = float(min(ratios) if top == "peer" else max(ratios))
        best = min(found["read_csv"][0] for found in rounds)
        figures["slowest yardstick over the fastest"] = max(found["read_csv"][0] for found in rounds) / best
        figures["processor over wall seconds"] = float(
            np.median([found["ours"][1] / found["ours"][0] for found in rounds])
        )
        figures |= kernel()
        write_csv(10 * options.rows, folder / "large.csv")
        small, large = peak_memory(data), peak_memory(folder / "large.csv")
        figures |= {
            "peak memory, MB": small,
            "peak memory with ten times the rows": large,
            "memory ratio": large / small,
        }
        print(json.dumps(figures, indent=1))
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
