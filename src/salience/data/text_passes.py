"""The passes of `select_text`: count the targets, count the raw corpus, weigh and draw, copy what was drawn.

Every pass maps a stage (`salience.data.text_stages`) over units and merges the results; a ledger keeps what finished
units gave. The features of the first `KEPT_BYTES` are kept between counting and weighing, so that a corpus of about
that size is read and hashed once.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salience import __version__
from salience.data.baselines import HeuristicClassifier
from salience.data.dsir.features import ngram_keys
from salience.data.dsir.resample import check_count, quotas, take
from salience.data.dsir.weights import DSIR
from salience.data.proof import Sample, Texts
from salience.data.text_stages import SAMPLE, Copy, CountRaw, CountTarget, Draw, Hashed, Weigh
from salience.errors import DataError, InputError
from salience.io import Corpus, Ledger, RecordWriter, Tally, Unit, key_of, peek
from salience.io.place import home
from salience.io.remote import url_of
from salience.scores import Scores

METHODS = ("dsir", "heuristic", "random")
RANDOM_DRAWS = 3, 10  # fewest and most: the smaller a selection is, the more its random likes differ
RANDOM_DOCUMENTS = 4000  # in all random draws together, if that is no fewer than the fewest of them
KEPT_BYTES = 128 << 20  # features kept from counting
SHOWN = 10
Progress = Callable[[str, int, int], object]
_CHOICE = ("min_tokens", "target_proportions")  # parameters of DSIR that do not touch the weights


class TextPasses:
    """The state that the passes hand on.

    Parameters
    ----------
    raw, targets, model
        As in `select_text`.
    hold_out : float
        Share of the target documents that are not fitted on.
    compare : bool
        Whether the classifier is needed, to choose by or to compare with.
    engine : str
        Where units are worked at: see `salience.io.map_units`.
    progress : callable, optional
    """

    def __init__(
        self, raw: Corpus, targets: Sequence[Corpus], model: DSIR, *, hold_out: float, compare: bool, engine: str,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        if not 0 <= hold_out <= 0.5:
            raise InputError(f"hold_out must lie in 0..0.5, not {hold_out}")
        if not targets:
            raise InputError("a target is needed")
        self.raw, self.model, self.hold_out, self.engine = raw, model, hold_out, engine
        self.targets = list(targets) if model.separate_targets else [Corpus.joined(targets)]
        model.check(len(self.targets))
        if model.tokenizer is not None and (compare or hold_out):
            raise InputError("heuristic classification works with the built-in tokenizer only; use hold_out=0")
        self.progress = progress or (lambda stage, done, total: None)
        self.featurizer, self.seed = model.featurizer(), model.random_state
        self.compare = compare
        self.heuristic: HeuristicClassifier | None = None
        self.warnings: list[str] = []
        self.scoring: Ledger  # set before the first pass
        self.choosing: Ledger

    def scoring_facts(self) -> dict[str, Any]:
        """What weights depend on, as plain data."""
        parameters = {name: value for name, value in self.model.described().items() if name not in _CHOICE}
        parameters["tokenizer"] = getattr(self.model.tokenizer, "__qualname__", None)
        return {
            "salience": __version__,
            "Unicode": unicodedata.unidata_version,  # of lower-casing
            "parameters": {**parameters, "hold_out": self.hold_out, "classifier": self.compare or self.hold_out > 0},
            "raw": described(self.raw),
            "target": {str(number): described(target) for number, target in enumerate(self.targets)},
        }

    def _map(self, ledger: Ledger, stage: str, fn: Any, corpus: Corpus, units: Sequence[Unit] | None = None,
             slim: Callable[[Any], Any] | None = None) -> Iterator[tuple[Unit, Any]]:  # fmt: skip
        units = corpus.units if units is None else units
        total, done = sum(unit.bytes for unit in units), 0
        mapped = ledger.map(stage, fn, units, workers=self.model.workers, engine=self.engine, slim=slim)
        for unit, result in mapped:
            yield unit, result
            done += unit.bytes
            self.progress(stage.split("-")[0], done, total)

    # --- the targets ---

    def read_targets(self) -> None:
        """Count every target, a keyed share of its documents held out."""
        self.target_tally = Tally()
        self.held, self.fitted = Sample(SAMPLE), Sample(SAMPLE)
        counts, held_counts = [], []
        for number, target in enumerate(self.targets):
            peek(target)
            total, tally = np.zeros((2, self.model.num_buckets), np.int64), Tally()
            target_held, target_fitted = Sample(SAMPLE), Sample(SAMPLE)
            limit = self.model.ngram_limit(target) if self.model.separate_targets else None
            stage = CountTarget(target, self.featurizer, limit, self.model.max_bad, self.hold_out, self.seed)
            for _, part in self._map(self.scoring, f"targets-{number}", stage, target):
                total += part["counts"]
                target_held.extend(part["held"])
                target_fitted.extend(part["fitted"])
                tally.merge(part["tally"])
            tally.check(self.model.max_bad, "target")
            if not total[0].sum():  # all the words of a small target were held out
                total, target_held, target_fitted = total[::-1], target_fitted, target_held
            self.held.extend(target_held)
            self.fitted.extend(target_fitted)
            self.target_tally.merge(tally)
            counts.append(total[0])
            held_counts.append(total[1])
        self.target_counts = np.stack(counts)
        if self.hold_out and (len(self.held) < 2 or len(self.fitted) < 2 or not np.sum(held_counts)):
            self.warnings.append("the target is too small to hold a part of it out: the choice was not measured")
            self.target_counts = self.target_counts + np.stack(held_counts)
            self.fitted.extend(self.held)
            self.held = Sample(SAMPLE)
        if not self.target_counts.sum():
            raise DataError("the target is empty: its documents hold no word")
        size = int(self.target_counts.sum())
        if size < 10 * self.model.num_buckets and not self.model.smoothing:
            self.warnings.append(
                f"the target has only {size:,} n-grams for {self.model.num_buckets:,} buckets: those it never shows "
                "weigh heavily against a document; consider --smoothing 1 or fewer --buckets"
            )

    # --- the raw corpus ---

    def survey(self) -> None:
        """Count the raw corpus, and make sure that it has something in common with the target."""
        peek(self.raw)
        self.raw_counts, self.tally = np.zeros(self.model.num_buckets, np.int64), Tally()
        self.raw_sample = Sample(SAMPLE)
        self.kept: dict[int, list[Hashed]] = {}
        shared, room = False, KEPT_BYTES
        stage = CountRaw(
            self.raw, self.featurizer, self.model.ngram_limit(self.raw), self.model.max_bad, self.seed,
            np.unique(ngram_keys(self.fitted.array())), keep_features=self.engine == "threads",
        )  # fmt: skip

        def slim(part: dict[str, Any]) -> dict[str, Any]:
            """Without what weighing makes again, and what cannot come into the sample any more."""
            return {**part, "sample": part["sample"].below(self.raw_sample.bound), "hashed": []}

        for unit, part in self._map(self.scoring, "count", stage, self.raw, slim=slim):
            self.raw_counts += part["counts"]
            self.tally.merge(part["tally"])
            self.raw_sample.extend(part["sample"])
            shared = shared or part["shared"]
            room -= sum(batch.buckets.nbytes for batch in part["hashed"])
            if part["hashed"] and room > 0:
                self.kept[unit.number] = part["hashed"]
        self.tally.check(self.model.max_bad, "raw corpus")
        if not shared:
            raise DataError("no raw document shares a single word with the target: nothing can be weighed")

    def fit(self) -> None:
        """Estimate the weights, and train the classifier to compare with."""
        self.model.fit_counts(self.raw_counts, self.target_counts)
        self.tables = self.model.log_diff_
        if self.compare or len(self.held):
            self.heuristic = HeuristicClassifier(
                ngrams=self.model.ngrams, num_buckets=self.model.num_buckets, hash=self.model.hash,
                random_state=self.seed,
            )  # fmt: skip
            self.heuristic.fit(self.raw_sample.strings(), self.fitted.strings())
            self.tables = np.concatenate([self.tables, self.heuristic.table_])

    def weighed(self) -> Iterator[tuple[Unit, dict[str, np.ndarray]]]:
        """Every unit with the weights of its documents."""
        weigh = Weigh(self.raw, self.featurizer, self.tables, None, self.kept)
        for unit, (weighed, _) in self._map(self.scoring, "weigh", weigh, self.raw):
            yield unit, weighed

    # --- the choice ---

    def draw(self, method: str, count: int, top_k: bool, given: Scores | None) -> None:
        """Weigh every raw document once; draw the selection and everything it is compared with."""
        self.method = method
        draw = Draw(
            method, self._selections(method, count), count, SHOWN, len(self.model.log_diff_), top_k,
            self.model.min_tokens, self.model.ngrams, self.seed, self.tally.documents, self.heuristic,
            _by_source(given, self.raw) if given is not None else {},
        )  # fmt: skip
        heaps, self.raw_weights = draw.heaps(), []
        self.eligible: dict[str, int] = {}
        weigh = Weigh(self.raw, self.featurizer, self.tables, draw, self.kept)
        mapped = self._map(self.scoring, "weigh", weigh, self.raw, slim=lambda result: [result[0], None])
        for unit, (weighed, drawn) in mapped:
            drawn = drawn or draw(unit, weighed)  # of a unit from the ledger, which keeps the weights alone
            for name, found in drawn["heaps"].items():
                for heap, part in zip(heaps[name], found):
                    heap.merge(part)
            self.eligible[unit.source.name] = self.eligible.get(unit.source.name, 0) + drawn["eligible"]
            self.raw_weights.append(drawn["sampled"])
        total = sum(self.eligible.values())
        check_count(count, total, f" (of at least {self.model.min_tokens} tokens, of {self.tally.documents} in all)")
        shares = quotas(count, self.model.target_proportions_.tolist()) if method == "dsir" else [count]
        self.picks = {name: take(found, shares if name == "chosen" else [found[0].k]) for name, found in heaps.items()}

    def _selections(self, method: str, count: int) -> tuple[str, ...]:
        names = ["chosen", "most", "least"]
        if len(self.held):
            names += [f"random {draw}" for draw in range(_random_draws(count))]
            names += [
                other for other in ("heuristic", "dsir") if other != method and (method, other) != ("scores", "dsir")
            ]
        return tuple(names)

    def copy(self, writer: RecordWriter) -> None:
        """Copy the chosen records, and read what the others chose for the comparison."""
        self.selections = {name: Texts(self.model.num_buckets) for name in self.picks}
        wanted = np.unique(np.concatenate([pick.units for pick in self.picks.values()]))
        picks = {name: (pick.units, pick.rows) for name, pick in self.picks.items()}
        held_out = self.held.hashes() if len(self.held) else None
        stage = Copy(self.raw, self.featurizer, writer.format, picks, held_out, self.seed)
        units = [self.raw.units[number] for number in wanted]
        for _, part in self._map(self.choosing, "copy", stage, self.raw, units):
            for records in part["records"]:
                writer.write(records)
            for name, texts in part["texts"].items():
                self.selections[name].extend(texts)
        writer.close()

    def digests(self) -> dict[str, str]:
        """xxh3-128 of the bytes that were read of the raw corpus and of every target."""
        stages = ["count", *(f"targets-{number}" for number in range(len(self.targets)))]
        return {name: self.scoring.digest(stage) for name, stage in zip(self.corpora(), stages)}

    def corpora(self) -> dict[str, Corpus]:
        """All that is read, by name."""
        return {"raw": self.raw} | {f"target {number}": target for number, target in enumerate(self.targets)}


def described(corpus: Corpus) -> dict[str, Any]:
    """The files of a corpus and what is read of them, as plain data."""
    files = {source.name: f"{source.size:,} bytes {source.version}".strip() for source in corpus.sources}
    return {"text_column": corpus.text, "files": files}


def kept_beside(out: str | os.PathLike[str]) -> Path:
    """Folder of the ledger of a run that writes `out`: beside it, or, for a URL, in the user's folder."""
    url = url_of(out)
    if url is not None:
        return home() / "runs" / f"{key_of(url):016x}.ledger"
    path = Path(out)
    return path.with_name(f".{path.name}.ledger")


def _by_source(scores: Scores, raw: Corpus) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores by file: sorted rows and their values."""
    parts: dict[str, list[tuple[int, float]]] = {}
    for name, value in zip(scores.ids, scores.values.tolist()):
        file, _, row = name.rpartition(":")
        if not row.isdecimal():
            raise InputError(f"scores must have ids of the form file:row, not {name!r}")
        parts.setdefault(file, []).append((int(row), value))
    if not any(source.name in parts for source in raw.sources):
        raise InputError(
            f"the scores have no id for the documents of {raw.sources[0].name!r}; they are of {sorted(parts)[:3]}"
        )
    return {
        file: (np.array([row for row, _ in sorted(pairs)]), np.array([value for _, value in sorted(pairs)]))
        for file, pairs in parts.items()
    }


def _random_draws(count: int) -> int:
    fewest, most = RANDOM_DRAWS
    return min(most, max(fewest, RANDOM_DOCUMENTS // count))
