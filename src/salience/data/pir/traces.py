"""Refine files of reasoning traces, and measure what that did to the answers: the work behind `salience refine traces`.

Records are read and written one by one; nothing but the scores, a few numbers of each trace and some examples is kept.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from salience.data.pir.pruning import budget, check_ratio, comparator, pattern_stats
from salience.data.pir.refiner import PIR
from salience.data.pir.scoring import Chain
from salience.data.pir.steps import FUNCTIONAL, PATTERNS, Step, classify_steps, segment_reasoning
from salience.errors import DataError, InputError, NothingToDo
from salience.io import Bad, Batch, Corpus, Output, RecordWriter, Tally, key_of, read, write_quarantine
from salience.measure.paired import PairedDifference, paired_difference
from salience.scores import Scores

DRAWS, EXAMPLES, _FEWEST = 5, 8, 5
_STEP = {"text": pa.large_string(), "pattern": pa.string(), "relates_to": pa.int32(), "marker": pa.string(),
         "tokens": pa.int32(), "pir": pa.float64(), "removed": pa.bool_(), "reason": pa.string()}  # fmt: skip
_PIR = pa.struct({"tokens_before": pa.int64(), "skipped": pa.string(), "tokens_after": pa.int64(),
                  "steps": pa.list_(pa.struct(_STEP))})  # fmt: skip
MEASURE = "negative log-likelihood of the answer, nats per token"


class Example(NamedTuple):
    """A trace to show: its name, its question, and its steps with what became of them."""

    name: str
    question: str
    steps: list[Step]


@dataclass
class TraceRefinement:
    """What `refine_traces` did.

    Attributes
    ----------
    out : str
    read, refined, unchanged, skipped, blank, quarantined : int
        Records; `unchanged` ones have nothing to remove, `skipped` ones are too long for the model.
    stats : dict
        Steps, tokens, share and kept tokens by pattern (`pattern_stats`).
    removed : dict of str to int
        Steps removed, by pattern.
    scores : dict of str to (n,) float
        PIR of the scored steps, by pattern.
    nll : dict of str to (m,) float
        Answer NLL of the refined records: "full chain", "PIR", "longest steps".
    draws : list of (m,) float
        The same after removing as many functional steps at random.
    tied : int
        Traces in which steps on both sides of the cut had equal scores.
    examples : list of Example
    notes : list of str
    settings : dict
    """

    out: str = ""
    read: int = 0
    refined: int = 0
    unchanged: int = 0
    skipped: int = 0
    blank: int = 0
    quarantined: int = 0
    stats: dict[str, dict[str, float]] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    scores: dict[str, Float[np.ndarray, " n"]] = field(default_factory=dict)
    nll: dict[str, Float[np.ndarray, " m"]] = field(default_factory=dict)
    draws: list[Float[np.ndarray, " m"]] = field(default_factory=list)
    tied: int = 0
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def equation(self) -> str:
        """What became of every record."""
        return (
            f"{self.read:,} records read = {self.refined:,} refined + {self.unchanged:,} unchanged + {self.skipped:,} "
            f"skipped + {self.blank:,} blank + {self.quarantined:,} quarantined"
        )

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all steps before and after."""
        kept = sum(row["kept_tokens"] for row in self.stats.values())
        return int(sum(row["tokens"] for row in self.stats.values())), int(kept)

    def gain(self, other: str) -> PairedDifference:
        """How much lower the NLL is after PIR than with "random", "full chain" or "longest steps", trace by trace.

        Every trace has random removals of its own, so that the interval over traces also covers their draw.
        """
        theirs = np.mean(self.draws, axis=0) if other == "random" else self.nll[other]
        return paired_difference(theirs, self.nll["PIR"], random_state=int(self.settings["seed"]))

    def mean(self, name: str) -> float:
        """Mean NLL of the answer after one kind of removal, in nats per token."""
        return float(np.mean(self.draws if name == "random" else self.nll[name]))

    @property
    def better(self) -> bool | None:
        """Whether PIR beats random removal; None where too few traces were refined to say."""
        if self.refined < _FEWEST:
            return None
        return self.gain("random").low > 0

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        gain, ours, random = self.gain("random"), self.mean("PIR"), self.mean("random")
        words = {True: "better", False: "no better", None: "not measurably better"}[self.better]
        if self.better is False and gain.high < 0:
            words = "worse"
        span = f", 95 % interval {gain.low:+.4f} … {gain.high:+.4f}" if self.refined >= _FEWEST else " (too few traces)"
        return (
            f"refined traces predict the answer {words} than traces that lost as many functional steps at random: "
            f"perplexity {np.exp(ours):.4g} against {np.exp(random):.4g}, {gain.mean:+.4f} nats per token in their "
            f"favour{span}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without scores and examples."""
        names = ("read", "refined", "unchanged", "skipped", "blank", "quarantined", "tied")
        gains = {name: self.gain(name)._asdict() for name in ("random", "longest steps", "full chain")}
        return {
            "out": self.out, "verdict": self.verdict, "better": self.better, "measure": MEASURE,
            "nll": {name: self.mean(name) for name in ("PIR", "random", "longest steps", "full chain")},
            "gains": {name: {key: value if np.isfinite(value) else None for key, value in gain.items()}
                      for name, gain in gains.items()},
            "counts": {name: getattr(self, name) for name in names}, "patterns": self.stats,
            "removed": self.removed, "tokens_before": self.tokens[0], "tokens_after": self.tokens[1],
            "notes": self.notes, "settings": self.settings,
        }  # fmt: skip


def refine_traces(
    traces: Any, out: str | os.PathLike[str], pir: PIR, *, max_bad: float = 0.01, seed: int = 0,
    overwrite: bool = False, settings: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TraceRefinement:  # fmt: skip
    """Shorten every trace, write why, and measure the answer's perplexity against random removal.

    Parameters
    ----------
    traces : Corpus, path, table or a list of them
        .jsonl, .csv (also .gz, .zst), .parquet with the columns of `pir`.
    out : path
        Ends in .jsonl, or .parquet for Parquet inputs: the records with their reasoning shortened. Beside it
        ``OUT.steps.jsonl`` (every step of every trace: pattern, PIR, removed, reason), ``OUT.scores.parquet`` (`Scores`
        of the scored steps, ids "file:row:step"), and a quarantine of records that cannot be used.
    pir : PIR
    max_bad : float
        Largest share of unusable records to put up with; 0 stops at the first.
    seed : int
        Of the random removals that PIR is compared with.
    overwrite, settings, progress
        `settings` are kept in the manifest; `progress` is called with bytes done and in all.

    Raises
    ------
    InputError, DataError
        With nothing left under the output's name.
    NothingToDo
        No step is functional, or none is removed at this ratio.
    """
    corpus = traces if isinstance(traces, Corpus) else Corpus(traces, pir.columns[0])
    if seed < 0 or not 0 <= max_bad <= 1:
        raise InputError(f"seed must be 0 or larger and max_bad in 0..1; got {seed} and {max_bad}")
    with Output(out, overwrite, [corpus]) as output:
        writer = RecordWriter(output.file(), os.path.basename(os.fspath(out)), corpus)
        if writer.format not in ("jsonl", "parquet"):
            raise InputError(f"output {os.fspath(out)} must end in .jsonl or .parquet: a record gets a nested field")
        job = _Job(corpus, pir, max_bad, seed)
        with open(output.file(".steps.jsonl"), "w", encoding="utf-8") as steps:
            done = 0
            for unit in corpus.units:
                for batch in read(corpus, unit, whole=True):
                    writer.write(_written(list(job.refined(batch, steps)), batch, writer.format))
                done += unit.bytes
                if progress is not None:
                    progress(done, corpus.bytes)
        writer.close()
        found = job.finish(os.fspath(out), {"ratio": pir.ratio, "patterns": list(pir.patterns), "seed": seed,
                                            "columns": list(pir.columns), **(settings or {})})  # fmt: skip
        Scores(
            np.array(job.values), job.ids, "step", {"method": "pir", **found.settings}
        ).save(output.file(".scores.parquet"))  # fmt: skip
        if job.tally.bad:
            write_quarantine(output.file(".quarantine.jsonl"), job.tally.bad)
        output.commit({"command": "refine traces", **{k: v for k, v in found.as_dict().items() if k != "out"}})
    return found


def plan(corpus: Corpus, columns: tuple[str, str, str], ratio: float) -> dict[str, Any]:
    """What there is to prune by markers alone, and how many passes that takes: for ``--dry-run``."""
    check_ratio(ratio)
    steps, remove, traces, passes = dict.fromkeys(PATTERNS, 0), dict.fromkeys(PATTERNS, 0), 0, 0
    for unit in corpus.units:
        for batch in read(corpus, unit, whole=True):
            for record in _records(batch, corpus):
                reasoning = record.get(columns[1])
                if not isinstance(reasoning, str | list):
                    continue
                texts = segment_reasoning(reasoning) if isinstance(reasoning, str) else list(map(str, reasoning))
                counts = Counter(step.pattern for step in classify_steps(texts))
                traces += 1
                for pattern, count in counts.items():
                    steps[pattern] += count
                    remove[pattern] += budget(ratio, count) if pattern in FUNCTIONAL else 0
                functional = sum(counts[pattern] for pattern in FUNCTIONAL)
                passes += 1 + functional if functional else 0
    if not traces:
        raise DataError(f"no record has a reasoning in the field {columns[1]!r}")
    return {"traces": traces, "bytes": corpus.bytes, "steps": steps, "remove": remove, "passes": passes}


class _Job:
    """What is gathered while the records go by."""

    def __init__(self, corpus: Corpus, pir: PIR, max_bad: float, seed: int) -> None:
        self.corpus, self.pir, self.max_bad, self.seed = corpus, pir, max_bad, seed
        self.tally, self.found = Tally(), TraceRefinement()
        self.ids: list[str] = []
        self.values: list[float] = []
        self.patterns: list[str] = []
        self.nll: list[list[float]] = []
        self.totals = {pattern: dict.fromkeys(("steps", "tokens", "kept_tokens"), 0) for pattern in PATTERNS}
        self.removed = dict.fromkeys(PATTERNS, 0)

    def refined(self, batch: Batch, log: Any) -> Iterator[dict[str, Any]]:
        """The records of a batch, shortened."""
        self.tally.add(batch, self.max_bad)
        where = batch.source.path or batch.source.name
        for row, record in zip(batch.rows.tolist(), _records(batch, self.corpus), strict=True):
            try:
                self.pir.parts_of(record)
            except DataError as error:
                if not self.max_bad:
                    raise DataError(f"bad record in {where} at {row}: {error}") from error
                raw = json.dumps(record, ensure_ascii=False, default=str).encode()
                self.tally.bad.append((where, Bad(row, str(error), raw)))
                self.tally.documents -= 1
                continue
            try:
                result = self.pir.refine(record)
                self._take(f"{batch.source.name}:{row}", result, record, row, batch.source.file_id, log)
            except DataError as error:
                raise DataError(f"{where} at {row}: {error}") from error
            yield result

    def _take(self, name: str, result: dict[str, Any], record: dict, row: int, file_id: int, log: Any) -> None:
        steps = [Step(**step) for step in result["pir"]["steps"]]
        gone = [number for number, step in enumerate(steps) if step.removed]
        for number, step in enumerate(steps):
            log.write(json.dumps({"record": name, "step": number, **vars(step)}, ensure_ascii=False) + "\n")
            if step.pir is not None:
                self.ids.append(f"{name}:{number}")
                self.values.append(step.pir)
                self.patterns.append(step.pattern)
        for pattern, row_ in pattern_stats([steps]).items():
            for what in self.totals[pattern]:
                self.totals[pattern][what] += int(row_[what])
            self.removed[pattern] += sum(steps[number].pattern == pattern for number in gone)
        if result["pir"]["skipped"] is not None:
            self.found.skipped += 1
        elif not gone:
            self.found.unchanged += 1
        else:
            self.found.refined += 1
            self.found.tied += any("tied at the cut" in step.reason for step in steps)
            self._measure(record, steps, gone, [self.seed, file_id & (2**63 - 1), row])
            self._show(Example(name, self.pir.parts_of(record)[0], steps))

    def _measure(self, record: dict, steps: list[Step], gone: list[int], key: list[int]) -> None:
        """Answer NLL of the full chain, and after removing as many steps by PIR, by length and at random."""
        question, _, answer = self.pir.parts_of(record)
        chain: Chain = self.pir.scorer.encode(question, [step.text for step in steps], answer)
        rng = np.random.default_rng(key)
        choices = [[], gone, comparator(steps, len(gone), "longest"),
                   *(comparator(steps, len(gone), "rule", rng) for _ in range(DRAWS))]  # fmt: skip
        kept = [[number for number in range(len(steps)) if number not in out] for out in choices]
        self.nll.append(self.pir.scorer.nll(chain, kept).tolist())

    def _show(self, example: Example) -> None:
        """Keep the examples whose draw is lowest, so that their choice does not hang on the order of files."""
        self.found.examples.append(example)
        if len(self.found.examples) > EXAMPLES:
            self.found.examples.sort(key=lambda one: key_of(f"{self.seed} {one.name}"))
            self.found.examples.pop()

    def finish(self, out: str, settings: dict[str, Any]) -> TraceRefinement:
        """The result, once all records have gone by."""
        self.tally.check(self.max_bad, "traces")
        found, ratio = self.found, self.pir.ratio
        if not self.values and not found.skipped:
            raise NothingToDo(
                "no step of any trace is functional: none carries a marker such as 'Wait' or 'Alternatively'. A judge "
                "(--judge) can classify steps without markers"
            )
        if not found.refined:
            skipped = f"; {found.skipped:,} traces are too long for the model" if found.skipped else ""
            raise NothingToDo(
                f"nothing is removed at ratio {ratio}: no trace has {_least(ratio)} steps of one "
                f"functional pattern{skipped}"
            )
        found.out, found.settings = out, settings
        found.read, found.blank, found.quarantined = self.tally.read, self.tally.blank, len(self.tally.bad)
        total = max(sum(row["tokens"] for row in self.totals.values()), 1)
        found.stats = {name: {**row, "share": row["tokens"] / total} for name, row in self.totals.items()}
        found.removed = self.removed
        values, patterns = np.array(self.values), np.array(self.patterns)
        found.scores = {name: values[patterns == name] for name in PATTERNS if (patterns == name).any()}
        columns = np.array(self.nll).T
        found.nll = dict(zip(("full chain", "PIR", "longest steps"), columns))
        found.draws = list(columns[3:])
        if found.tied:
            found.notes.append(
                f"in {found.tied:,} traces steps on both sides of the cut had equal scores; the longer went first, "
                "then the later ones. Answers that the last step states make all scores 0: keep the answer out of it"
            )
        if found.skipped:
            found.notes.append(f"{found.skipped:,} traces are longer than the model reads and stayed as they are")
        if found.refined < _FEWEST:
            found.notes.append(f"{found.refined} refined traces are too few to compare on")
        found.notes.append(
            "the model that scores the steps also measures here: another model, or one trained on the result, has the "
            "last word"
        )
        return found


def _least(ratio: float) -> str:
    return "any" if ratio <= 0 else str(int(np.ceil(1 / ratio - 1e-9)))


def _records(batch: Batch, corpus: Corpus) -> list[dict[str, Any]]:
    """The records of a batch as plain data."""
    if batch.source.format == "jsonl" and batch.lines is not None:
        block, starts, stops = batch.lines
        return [json.loads(block[start:stop]) for start, stop in zip(starts.tolist(), stops.tolist())]
    if batch.table is None:
        raise InputError(
            f"{batch.source.path}: text files have no question and no answer; give .jsonl, .csv or .parquet"
        )
    return batch.table.to_pylist()


def _written(records: Sequence[dict[str, Any]], batch: Batch, format: str) -> list[bytes] | pa.Table:
    if format == "parquet" and batch.table is not None:
        return pa.Table.from_pylist(list(records), batch.table.schema.append(pa.field("pir", _PIR)))
    return [json.dumps(record, ensure_ascii=False, default=str).encode() for record in records]
