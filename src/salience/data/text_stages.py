"""What `select_text` does with one unit: pure functions, on any machine, whose results merge in any order.

`CountTarget` and `CountRaw` count n-grams, `Weigh` gives every document its values, `Draw` takes the best keys of a
weighed unit for every selection, `Copy` reads the chosen records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from salience.data.baselines import HeuristicClassifier
from salience.data.dsir.features import Buckets, HashedNgrams, ngram_keys
from salience.data.dsir.resample import TopK
from salience.data.dsir.weights import add_counts
from salience.data.proof import Sample, Texts, text_hashes
from salience.errors import InputError
from salience.io import Batch, Corpus, Source, Tally, Unit, gumbel, read, records_of, uniform

SAMPLE = 2000  # documents kept of each side: for the classifier, the figures, and the byte model
KINDS = (Sample, Tally, Texts)  # what a ledger keeps


class Hashed(NamedTuple):
    """A batch reduced to what weighing needs."""

    source: Source
    rows: Int[np.ndarray, " documents"]
    buckets: Buckets


@dataclass(frozen=True)
class CountTarget:
    """Count one unit of a target, a keyed share of its documents held out."""

    corpus: Corpus
    featurizer: HashedNgrams
    limit: int | None
    max_bad: float
    hold_out: float
    seed: int

    def __call__(self, unit: Unit) -> dict[str, Any]:
        counts, tally = np.zeros((2, self.featurizer.num_buckets), np.int64), Tally()
        held_out, fitted = Sample(SAMPLE), Sample(SAMPLE)
        for batch in read(self.corpus, unit):
            tally.add(batch, self.max_bad)
            held = _uniform(self.seed, "hold-out", batch) < self.hold_out
            for row, (mask, texts) in enumerate(((~held, fitted), (held, held_out))):
                part = batch.text.filter(pa.array(mask))
                add_counts(counts[row], self.featurizer(part), self.limit)
                texts.offer(part, _uniform(self.seed, "target sample", batch)[mask])
        return {"counts": counts, "held": held_out, "fitted": fitted, "tally": tally}


@dataclass(frozen=True)
class CountRaw:
    """Count one unit of the raw corpus, and look for a word that the target has, too."""

    corpus: Corpus
    featurizer: HashedNgrams
    limit: int | None
    max_bad: float
    seed: int
    target_words: Int[np.ndarray, " words"]
    keep_features: bool = True

    def __call__(self, unit: Unit) -> dict[str, Any]:
        counts, tally, sample = np.zeros(self.featurizer.num_buckets, np.int64), Tally(), Sample(SAMPLE)
        hashed: list[Hashed] | None = [] if self.keep_features else None
        shared = False
        for batch in read(self.corpus, unit):
            tally.add(batch, self.max_bad)
            shared = shared or self._shares(batch.text.slice(0, 64)) or self._shares(batch.text)
            sample.offer(batch.text, _uniform(self.seed, "raw sample", batch))
            if self.limit is not None and counts.sum() > self.limit:
                hashed = None  # enough to fit on: the unit is hashed when it is weighed
                continue
            buckets = self.featurizer(batch.text)
            add_counts(counts, buckets, self.limit)
            if hashed is not None:
                hashed.append(Hashed(batch.source, batch.rows, buckets.compact(self.featurizer.num_buckets)))
        return {"counts": counts, "sample": sample, "tally": tally, "shared": shared, "hashed": hashed or []}

    def _shares(self, texts: pa.Array) -> bool:
        return bool(np.isin(ngram_keys(texts), self.target_words).any())


@dataclass(frozen=True)
class Draw:
    """Offer the documents of a weighed unit to every selection.

    Attributes
    ----------
    method : str
        Whose values choose: "dsir", "heuristic", "random", or "scores" for `given`.
    names : tuple of str
        The selections to draw: "chosen", "most", "least", and those that the choice is compared with.
    count, shown : int
        Size of a selection, and of "most" and "least".
    targets : int
        Number of columns that are log weights; the classifier's comes behind them.
    """

    method: str
    names: tuple[str, ...]
    count: int
    shown: int
    targets: int
    top_k: bool
    min_tokens: int
    ngrams: int
    seed: int
    documents: int
    heuristic: HeuristicClassifier | None
    given: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def heaps(self) -> dict[str, list[TopK]]:
        """Empty heaps for all selections; one per target for the weights of dsir."""
        columns = self.targets if self.method == "dsir" else 1
        sizes = {"most": self.shown, "least": self.shown}
        return {
            name: [TopK(sizes.get(name, self.count)) for _ in range(columns if name == "chosen" else 1)]
            for name in self.names
        }

    def __call__(self, unit: Unit, weighed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        long = np.flatnonzero(weighed["tokens"] >= self.min_tokens)
        rows, sums, tokens = weighed["rows"][long], weighed["sums"][long], weighed["tokens"][long]
        lengths = sum(np.maximum(tokens - size, 0) for size in range(self.ngrams))  # n-grams of each document
        values, keys = self._values_and_keys(unit.source, rows, sums, np.asarray(lengths))
        heaps = self.heaps()
        for name, found in heaps.items():
            for column, heap in enumerate(found):
                key = keys[name][:, column] if keys[name].ndim > 1 else keys[name]
                value = values[name][:, column] if values[name].ndim > 1 else values[name]
                heap.offer(key, value, unit.number, rows)
        shown = uniform(self.seed, "raw sample", unit.source.file_id, rows) < SAMPLE / self.documents
        return {"heaps": heaps, "eligible": len(long), "sampled": values["most"][shown]}

    def _values_and_keys(
        self, source: Source, rows: np.ndarray, sums: np.ndarray, lengths: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """For every selection: the score of each document, and the key whose largest are taken."""
        seed, file_id = self.seed, source.file_id
        values: dict[str, np.ndarray] = {"dsir": sums[:, : self.targets]}
        noise = np.stack([gumbel(seed, f"dsir target {t}", file_id, rows) for t in range(self.targets)], axis=1)
        keys = {"dsir": values["dsir"] if self.top_k else values["dsir"] + noise}
        if self.heuristic is not None:
            values["heuristic"] = self.heuristic.probability(sums[:, -1], lengths)
            first, second = (uniform(seed, f"pareto {what}", file_id, rows) for what in ("round", "order"))
            keys["heuristic"] = (
                values["heuristic"] if self.top_k else self.heuristic.keys(values["heuristic"], first, second)
            )
        for name in self.names:
            if name.startswith("random "):
                values[name] = keys[name] = uniform(seed, name, file_id, rows)
        if self.method == "random":
            values["chosen"] = keys["chosen"] = uniform(seed, "random", file_id, rows)
        elif self.method == "scores":
            values["chosen"] = _look_up(self.given, source.name, rows)
            keys["chosen"] = values["chosen"] if self.top_k else values["chosen"] + noise[:, 0]
        else:
            values["chosen"], keys["chosen"] = values[self.method], keys[self.method]
        values["most"] = values["least"] = keys["most"] = best_of(values["chosen"])
        keys["least"] = -keys["most"]
        return values, keys


@dataclass(frozen=True)
class Weigh:
    """Give every document of a unit its sums over `tables`, and draw from them at once.

    Attributes
    ----------
    tables : (columns, num_buckets) float64
        Values per bucket: log ratios of every target, then the classifier's weights.
    kept : mapping of int to list of Hashed
        Features that counting has left in memory, by number of the unit.
    """

    corpus: Corpus
    featurizer: HashedNgrams
    tables: Float[np.ndarray, "columns num_buckets"]
    draw: Draw | None
    kept: Mapping[int, list[Hashed]] = field(default_factory=dict)

    def __call__(self, unit: Unit) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
        rows: list[np.ndarray] = [np.empty(0, np.int64)]
        tokens: list[np.ndarray] = [np.empty(0, np.int32)]
        sums: list[np.ndarray] = [np.empty((0, len(self.tables)))]
        for batch in self._hashed(unit):
            rows.append(batch.rows)
            tokens.append(batch.buckets.tokens.astype(np.int32))
            sums.append(batch.buckets.sums(self.tables))
        weighed = {"rows": np.concatenate(rows), "tokens": np.concatenate(tokens), "sums": np.concatenate(sums)}
        return weighed, self.draw(unit, weighed) if self.draw else None

    def _hashed(self, unit: Unit) -> Iterable[Hashed]:
        """The features of a unit: kept from counting, or made again."""
        if unit.number in self.kept:
            return self.kept[unit.number]
        return (Hashed(batch.source, batch.rows, self.featurizer(batch.text)) for batch in read(self.corpus, unit))


@dataclass(frozen=True)
class Copy:
    """Read the records of a unit that were chosen, and what the others chose for the comparison.

    Attributes
    ----------
    format : str
        Of the output: see `salience.io.records_of`.
    picks : mapping of str to (units, rows)
        What every selection has drawn.
    held_out : (n,) uint64
        Hashes of the held-out target documents: a copy of one proves nothing. None when nothing is compared.
    """

    corpus: Corpus
    featurizer: HashedNgrams
    format: str
    picks: Mapping[str, tuple[np.ndarray, np.ndarray]]
    held_out: Int[np.ndarray, " n"] | None
    seed: int

    def __call__(self, unit: Unit) -> dict[str, Any]:
        records, parts = [], {name: Texts(self.featurizer.num_buckets) for name in self.picks}
        rows = {name: drawn[units == unit.number] for name, (units, drawn) in self.picks.items()}
        wanted = np.unique(np.concatenate(list(rows.values())))
        for batch in read(self.corpus, unit, whole=True, rows=wanted):
            for name, part in parts.items():
                mask = np.isin(batch.rows, rows[name])
                if name == "chosen":
                    records.append(records_of(batch, mask, self.format))
                if not mask.any():
                    continue
                texts = batch.text.filter(pa.array(mask))
                if name in ("most", "least"):
                    part.add(texts, [(batch.source.name, row) for row in batch.rows[mask].tolist()])
                elif self.held_out is not None:
                    fresh = ~np.isin(text_hashes(texts.to_pylist()), self.held_out)
                    part.count(self.featurizer(texts.filter(pa.array(fresh))))
                    share = SAMPLE / len(self.picks[name][1])
                    keep = fresh & (_uniform(self.seed, "byte model", batch)[mask] < share)
                    part.add(texts.filter(pa.array(keep)))
        return {"records": records, "texts": parts}


def best_of(values: np.ndarray) -> np.ndarray:
    """One score per document: the best over separate targets."""
    return values.max(axis=1) if values.ndim > 1 else values


def _uniform(seed: int, purpose: str, batch: Batch) -> np.ndarray:
    return uniform(seed, purpose, batch.source.file_id, batch.rows)


def _look_up(
    given: Mapping[str, tuple[np.ndarray, np.ndarray]], file: str, wanted: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    rows, values = given.get(file, (np.array([-1]), np.array([np.nan])))
    where = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    missing = np.flatnonzero(rows[where] != wanted)
    if len(missing):
        raise InputError(f"document {file}:{wanted[missing[0]]} has no score")
    return values[where]
