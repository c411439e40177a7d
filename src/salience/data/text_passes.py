"""The passes of `select_text`: count the targets, count the raw corpus, weigh and draw, copy what was drawn.

Every pass is a pure function of a unit whose results merge in any order. The features of the first `KEPT_BYTES` are
kept between counting and weighing, so that a corpus of about that size is read and hashed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from salience.data.baselines import HeuristicClassifier
from salience.data.dsir.features import Buckets, ngram_keys
from salience.data.dsir.resample import TopK, check_count, quotas, take
from salience.data.dsir.weights import add_counts
from salience.data.proof import Sample, Texts, text_hashes
from salience.errors import DataError, InputError
from salience.io import (
    Batch,
    Corpus,
    RecordWriter,
    Source,
    Tally,
    Unit,
    gumbel,
    map_units,
    peek,
    read,
    uniform,
)  # fmt: skip
from salience.scores import Scores

METHODS = ("dsir", "heuristic", "random")
RANDOM_DRAWS = 3, 10  # fewest and most: the smaller a selection is, the more its random likes differ
RANDOM_DOCUMENTS = 4000  # in all random draws together, if that is no fewer than the fewest of them
KEPT_BYTES = 128 << 20  # features kept from counting
SAMPLE = 2000  # documents kept of each side: for the classifier, the figures, and the byte model
SHOWN = 10
Progress = Callable[[str, int, int], object]


class Hashed(NamedTuple):
    """A batch reduced to what weighing needs."""

    source: Source
    rows: Int[np.ndarray, " documents"]
    buckets: Buckets


class TextPasses:
    """The state that the passes hand on; every method is one pass."""

    def __init__(self, raw, targets, model, method, scores, top_k, hold_out, progress) -> None:
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        if not 0 <= hold_out <= 0.5:
            raise InputError(f"hold_out must lie in 0..0.5, not {hold_out}")
        if not targets:
            raise InputError("a target is needed")
        self.raw, self.model, self.top_k, self.hold_out = raw, model, top_k, hold_out
        self.method = "scores" if scores is not None else method
        self.targets = list(targets) if model.separate_targets else [Corpus.joined(targets)]
        model.check(len(self.targets))
        if model.separate_targets and self.method != "dsir":
            raise InputError(f"separate_targets belongs to the method dsir, not to {self.method}")
        if model.tokenizer is not None and (self.method == "heuristic" or hold_out):
            raise InputError("heuristic classification works with the built-in tokenizer only; use hold_out=0")
        self.given = _by_source(scores, raw) if scores is not None else {}
        self.progress = progress or (lambda stage, done, total: None)
        self.featurizer, self.seed = model.featurizer(), model.random_state
        self.warnings: list[str] = []

    def _map(self, stage: str, fn: Callable[[Unit], Any], corpus: Corpus, units: Sequence[Unit] | None = None):
        units = corpus.units if units is None else units
        total, done = sum(unit.bytes for unit in units), 0
        for unit, result in map_units(fn, units, workers=self.model.workers):
            yield unit, result
            done += unit.bytes
            self.progress(stage, done, total)

    def _uniform(self, purpose: str, batch: Batch | Hashed) -> np.ndarray:
        return uniform(self.seed, purpose, batch.source.file_id, batch.rows)

    # --- the targets ---

    def read_targets(self) -> None:
        """Count every target, a keyed share of its documents held out."""
        self.target_tally = Tally()
        self.held, self.fitted = Sample(SAMPLE), Sample(SAMPLE)
        counts, held_counts = [], []
        for target in self.targets:
            peek(target)
            total, tally = np.zeros((2, self.model.num_buckets), np.int64), Tally()
            target_held, target_fitted = Sample(SAMPLE), Sample(SAMPLE)
            limit = self.model.ngram_limit(target) if self.model.separate_targets else None

            def fold(unit: Unit, target: Corpus = target, limit: int | None = limit) -> Any:
                return self._target_unit(target, unit, limit)

            for _, (part, held, fitted, part_tally) in self._map("targets", fold, target):
                total += part
                target_held.extend(held)
                target_fitted.extend(fitted)
                tally.merge(part_tally)
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

    def _target_unit(self, target: Corpus, unit: Unit, limit: int | None):
        counts, tally = np.zeros((2, self.model.num_buckets), np.int64), Tally()
        held_out, fitted = Sample(SAMPLE), Sample(SAMPLE)
        for batch in read(target, unit):
            tally.add(batch, self.model.max_bad)
            held = self._uniform("hold-out", batch) < self.hold_out
            for row, (mask, texts) in enumerate(((~held, fitted), (held, held_out))):
                part = batch.text.filter(pa.array(mask))
                add_counts(counts[row], self.featurizer(part), limit)
                texts.offer(part, self._uniform("target sample", batch)[mask])
        return counts, held_out, fitted, tally

    # --- the raw corpus ---

    def survey(self) -> None:
        """Count the raw corpus, and make sure that it has something in common with the target."""
        peek(self.raw)
        self.raw_counts, self.tally, self.raw_sample = (
            np.zeros(self.model.num_buckets, np.int64),
            Tally(),
            Sample(SAMPLE),
        )
        self._shared, self.kept, room = False, {}, KEPT_BYTES
        self._target_keys = np.unique(ngram_keys(self.fitted.array()))
        limit = self.model.ngram_limit(self.raw)
        for unit, (counts, tally, sample, weighed) in self._map(
            "count", lambda unit: self._survey_unit(unit, limit), self.raw
        ):
            self.raw_counts += counts
            self.tally.merge(tally)
            self.raw_sample.extend(sample)
            room -= sum(part.buckets.nbytes for part in weighed)
            if len(weighed) and room > 0:
                self.kept[unit.number] = weighed
        self.tally.check(self.model.max_bad, "raw corpus")
        if not self._shared:
            raise DataError("no raw document shares a single word with the target: nothing can be weighed")

    def _survey_unit(self, unit: Unit, limit: int | None):
        counts, tally, sample = np.zeros(self.model.num_buckets, np.int64), Tally(), Sample(SAMPLE)
        hashed: list[Hashed] | None = []
        for batch in read(self.raw, unit):
            tally.add(batch, self.model.max_bad)
            self._shared = self._shared or self._shares(batch.text.slice(0, 64)) or self._shares(batch.text)
            sample.offer(batch.text, self._uniform("raw sample", batch))
            if limit is not None and counts.sum() > limit:
                hashed = None  # enough to fit on: the unit is hashed when it is weighed
                continue
            buckets = self.featurizer(batch.text)
            add_counts(counts, buckets, limit)
            if hashed is not None:
                hashed.append(Hashed(batch.source, batch.rows, buckets.compact(self.model.num_buckets)))
        return counts, tally, sample, hashed or []

    def _shares(self, texts: pa.Array) -> bool:
        return bool(np.isin(ngram_keys(texts), self._target_keys).any())

    def _hashed(self, unit: Unit) -> Iterable[Hashed]:
        """The features of a unit: kept from counting, or made again."""
        if unit.number in self.kept:
            return self.kept[unit.number]
        return (Hashed(batch.source, batch.rows, self.featurizer(batch.text)) for batch in read(self.raw, unit))

    def fit(self) -> None:
        """Estimate the weights, and train the classifier to compare with."""
        self.model.fit_counts(self.raw_counts, self.target_counts)
        self.heuristic = HeuristicClassifier(
            ngrams=self.model.ngrams, num_buckets=self.model.num_buckets, hash=self.model.hash, random_state=self.seed
        )
        self._tables = self.model.log_diff_
        if self.method == "heuristic" or len(self.held):
            self.heuristic.fit(self.raw_sample.strings(), self.fitted.strings())
            self._tables = np.concatenate([self.model.log_diff_, self.heuristic.table_])

    def draw(self, count: int) -> None:
        """Weigh every raw document once; draw the selection and everything it is compared with."""
        self.heaps, self.raw_weights = self._heaps(count), []
        self.eligible: dict[str, int] = {}
        for unit, (heaps, eligible, weights) in self._map("weigh", lambda unit: self._draw_unit(unit, count), self.raw):
            for name, found in heaps.items():
                for heap, part in zip(self.heaps[name], found):
                    heap.merge(part)
            self.eligible[unit.source.name] = self.eligible.get(unit.source.name, 0) + eligible
            self.raw_weights.append(weights)
        total = sum(self.eligible.values())
        check_count(count, total, f" (of at least {self.model.min_tokens} tokens, of {self.tally.documents} in all)")
        shares = quotas(count, self.model.target_proportions_.tolist()) if self.method == "dsir" else [count]
        self.picks = {
            name: take(heaps, shares if name == "chosen" else [heaps[0].k]) for name, heaps in self.heaps.items()
        }

    def _heaps(self, count: int) -> dict[str, list[TopK]]:
        columns = len(self.model.log_diff_) if self.method == "dsir" else 1
        heaps = {"chosen": [TopK(count) for _ in range(columns)], "most": [TopK(SHOWN)], "least": [TopK(SHOWN)]}
        if len(self.held):
            heaps |= {f"random {draw}": [TopK(count)] for draw in range(_random_draws(count))}
            if self.method != "heuristic":
                heaps["heuristic"] = [TopK(count)]
            if self.method not in ("dsir", "scores"):
                heaps["dsir"] = [TopK(count)]
        return heaps

    def _draw_unit(self, unit: Unit, count: int):
        heaps, eligible, sampled = self._heaps(count), 0, []
        for batch in self._hashed(unit):
            long = np.flatnonzero(batch.buckets.tokens >= self.model.min_tokens)
            eligible += len(long)
            values, keys = self._values_and_keys(batch)
            rows = batch.rows[long]
            for name, found in heaps.items():
                for column, heap in enumerate(found):
                    key = keys[name][:, column] if keys[name].ndim > 1 else keys[name]
                    value = values[name][:, column] if values[name].ndim > 1 else values[name]
                    heap.offer(key[long], value[long], unit.number, rows)
            shown = self._uniform("raw sample", batch)[long] < SAMPLE / self.tally.documents
            sampled.append(best_of(values["chosen"])[long][shown])
        return heaps, eligible, np.concatenate(sampled or [np.empty(0)])

    def _values_and_keys(self, batch: Hashed) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """For every drawing: the score of each document, and the key whose largest are taken."""
        sums = batch.buckets.sums(self._tables)
        file_id, rows = batch.source.file_id, batch.rows
        values: dict[str, np.ndarray] = {"dsir": sums[:, : len(self.model.log_diff_)]}
        noise = np.stack(
            [gumbel(self.seed, f"dsir target {t}", file_id, rows) for t in range(len(self.model.log_diff_))], axis=1
        )
        keys = {"dsir": values["dsir"] if self.top_k else values["dsir"] + noise}
        if len(self._tables) > len(self.model.log_diff_):
            lengths = np.diff(batch.buckets.offsets)
            values["heuristic"] = self.heuristic.probability(sums[:, -1], lengths)
            first, second = self._uniform("pareto round", batch), self._uniform("pareto order", batch)
            keys["heuristic"] = (
                values["heuristic"] if self.top_k else self.heuristic.keys(values["heuristic"], first, second)
            )
        for name in self.heaps:
            if name.startswith("random "):
                values[name] = keys[name] = self._uniform(name, batch)
        if self.method == "random":
            values["chosen"] = keys["chosen"] = self._uniform("random", batch)
        elif self.method == "scores":
            values["chosen"] = _look_up(self.given, batch)
            keys["chosen"] = values["chosen"] if self.top_k else values["chosen"] + noise[:, 0]
        else:
            values["chosen"], keys["chosen"] = values[self.method], keys[self.method]
        values["most"] = values["least"] = keys["most"] = best_of(values["chosen"])
        keys["least"] = -keys["most"]
        return values, keys

    # --- the chosen records ---

    def copy(self, writer: RecordWriter) -> None:
        """Copy the chosen records, and read what the others chose for the comparison."""
        self.selections = {name: Texts(self.model.num_buckets) for name in self.picks}
        wanted = [np.unique(pick.units) for pick in self.picks.values()]
        units = [self.raw.units[number] for number in np.unique(np.concatenate(wanted))]
        held_out = self.held.hashes()
        for _, (records, parts) in self._map(
            "copy", lambda unit: self._copy_unit(unit, writer, held_out), self.raw, units
        ):
            for record in records:
                writer.write(record)
            for name, part in parts.items():
                self.selections[name].extend(part)
        writer.close()

    def _copy_unit(self, unit: Unit, writer: RecordWriter, held_out: Int[np.ndarray, " n"]):
        records, parts = [], {name: Texts(self.model.num_buckets) for name in self.picks}
        rows = {name: pick.rows[pick.units == unit.number] for name, pick in self.picks.items()}
        wanted = np.unique(np.concatenate(list(rows.values())))
        for batch in read(self.raw, unit, whole=True, rows=wanted):
            for name, part in parts.items():
                mask = np.isin(batch.rows, rows[name])
                if name == "chosen":
                    records.append(writer.chosen(batch, mask))
                if not mask.any():
                    continue
                texts = batch.text.filter(pa.array(mask))
                if name in ("most", "least"):
                    part.add(texts, [(batch.source.name, row) for row in batch.rows[mask].tolist()])
                elif len(self.held):
                    fresh = ~np.isin(
                        text_hashes(texts.to_pylist()), held_out
                    )  # a copy of a held-out document proves nothing
                    part.count(self.featurizer(texts.filter(pa.array(fresh))))
                    share = SAMPLE / len(self.picks[name].rows)
                    keep = fresh & (self._uniform("byte model", batch)[mask] < share)
                    part.add(texts.filter(pa.array(keep)))
        return records, parts


def best_of(values: np.ndarray) -> np.ndarray:
    """One score per document: the best over separate targets."""
    return values.max(axis=1) if values.ndim > 1 else values


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


def _look_up(given: dict[str, tuple[np.ndarray, np.ndarray]], batch: Hashed) -> Float[np.ndarray, " n"]:
    rows, values = given.get(batch.source.name, (np.array([-1]), np.array([np.nan])))
    where = np.minimum(np.searchsorted(rows, batch.rows), len(rows) - 1)
    missing = np.flatnonzero(rows[where] != batch.rows)
    if len(missing):
        raise InputError(f"document {batch.source.name}:{batch.rows[missing[0]]} has no score")
    return values[where]
