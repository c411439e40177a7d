r"""Data selection by importance resampling (DSIR).

With `gamma_p`, `gamma_q` the bucket distributions of target and raw text and `z(x)` the hashed n-gram counts of x,

    log w(x) = z(x) . (log(gamma_p + 1e-8) - log(gamma_q + 1e-8))
    gamma_q = c_q / sum(c_q),   gamma_p = (c_p + alpha) / sum(c_p + alpha)

a log-likelihood ratio of two bags of n-grams: a sum over n-grams, not a mean. Documents of at least `min_tokens` tokens
are then drawn without replacement with probability proportional to w (`salience.data.dsir.resample`).

Source: Xie, Santurkar, Ma, Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023
(arXiv 2302.03169), sections 3 and 4; every step follows the official package `data-selection` 1.0.3. The formula of
`kl_reduction` is not in that package: it is a reconstruction from the paper's description.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from salience.data.dsir.features import HashedNgrams
from salience.data.dsir.kernels import count_ids
from salience.data.dsir.resample import Chosen, TopK, check_count, quotas, take
from salience.errors import DataError, InputError
from salience.io import Corpus, Tally, Unit, gumbel, map_units, read

EPSILON = 1e-8


class DSIR(BaseEstimator):
    """Choose the raw documents whose hashed n-grams are distributed like a target's.

    Parameters
    ----------
    ngrams : int
        Longest n-gram; all of 1..ngrams are counted.
    num_buckets : int
        B, size of the hash table.
    hash : {"sha256", "fast"}
        "sha256" gives the published bucket numbers.
    tokenizer : callable, optional
        ``str -> list of str`` instead of the built-in split into words and punctuation.
    min_tokens : int
        Shorter documents are weighed but never chosen.
    smoothing : float
        alpha, a pseudo-count per bucket added to the target's counts.
    separate_targets : bool
        Choose for every target by itself, with a quota each, instead of pooling them.
    target_proportions : sequence of float, optional
        Quotas of separate targets; by default proportional to their numbers of n-grams.
    max_ngrams : int, "auto" or "all"
        Fit on at most so many n-grams of the raw corpus, spread evenly over its units; "auto" is 100,000 x B.
    max_bad : float
        Largest share of unreadable records that is put up with; 0 stops at the first.
    workers : int, optional
        Threads; all available cores by default. Does not change results.
    random_state : int
        Seed of the draws.

    Attributes
    ----------
    raw_counts_ : (num_buckets,) int64
    target_counts_ : (targets, num_buckets) int64
    log_diff_ : (targets, num_buckets) float64
    target_proportions_ : (targets,) float64

    Examples
    --------
    >>> from salience.data import DSIR
    >>> raw = ["the cat sat on the mat"] * 20 + ["def add(a, b): return a + b"] * 20
    >>> chosen = DSIR(min_tokens=1).fit(raw, ["def sub(a, b): return a - b"]).select(raw, 5)
    >>> bool((chosen >= 20).all())
    True
    """

    def __init__(
        self,
        *,
        ngrams: int = 2,
        num_buckets: int = 10_000,
        hash: str = "sha256",
        tokenizer: Callable[[str], list[str]] | None = None,
        min_tokens: int = 100,
        smoothing: float = 0.0,
        separate_targets: bool = False,
        target_proportions: Sequence[float] | None = None,
        max_ngrams: int | str = "auto",
        max_bad: float = 0.01,
        workers: int | None = None,
        random_state: int = 0,
    ) -> None:
        self.ngrams = ngrams
        self.num_buckets = num_buckets
        self.hash = hash
        self.tokenizer = tokenizer
        self.min_tokens = min_tokens
        self.smoothing = smoothing
        self.separate_targets = separate_targets
        self.target_proportions = target_proportions
        self.max_ngrams = max_ngrams
        self.max_bad = max_bad
        self.workers = workers
        self.random_state = random_state

    def fit(self, raw: Any, targets: Any) -> DSIR:
        """Estimate both bucket distributions.

        Parameters
        ----------
        raw, targets : Corpus, path, table, or list of str
            A list of str holds documents; paths are `str` or `Path` by themselves, or a `Corpus`. With
            `separate_targets` a list of such inputs.

        Raises
        ------
        InputError
            A parameter out of range.
        DataError
            Too many bad records, or no n-gram at all in raw or target.
        """
        raw = as_corpus(raw)
        pooled = not (self.separate_targets and isinstance(targets, list | tuple))
        corpora = [as_corpus(target) for target in ([targets] if pooled else targets)]
        self.check(len(corpora))
        raw_counts = count_ngrams(
            raw, self.featurizer(), self.ngram_limit(raw), self.max_bad, self.workers, "raw corpus"
        )
        target_counts = [
            count_ngrams(
                target, self.featurizer(), self.ngram_limit(target) if self.separate_targets else None, self.max_bad,
                self.workers, "target",
            )
            for target in corpora
        ]  # fmt: skip
        return self.fit_counts(raw_counts, np.stack(target_counts))

    def fit_counts(
        self,
        raw_counts: Int[np.ndarray, " num_buckets"],
        target_counts: Int[np.ndarray, "targets num_buckets"],
    ) -> DSIR:
        """Estimate from n-gram counts per bucket, as `fit` does after counting."""
        self.check(len(target_counts))
        if not raw_counts.sum():
            raise DataError("the raw corpus holds no n-gram")
        for number, counts in enumerate(target_counts):
            if not counts.sum():
                raise DataError(f"target {number} holds no n-gram" if len(target_counts) > 1 else "the target is empty")
        self.raw_counts_, self.target_counts_ = raw_counts, target_counts
        self.log_diff_ = np.stack(
            [log_ratio(counts + self.smoothing, raw_counts) for counts in target_counts.astype(np.float64)]
        )
        given = self.target_proportions
        shares = np.asarray(target_counts.sum(1) if given is None else given, dtype=np.float64)
        self.target_proportions_ = shares / shares.sum()
        return self

    def log_weights(self, raw: Any) -> Float[np.ndarray, "documents targets"]:
        """Log importance weight of every document, in reading order.

        Parameters
        ----------
        raw : Corpus, path, table, or list of str
        """
        check_is_fitted(self)
        corpus = as_corpus(raw)
        parts = map_units(lambda unit: self._weigh(corpus, unit)[0], corpus.units, workers=self.workers)
        return np.concatenate([part for _, part in parts])

    def choose(self, raw: Any, count: int, *, top_k: bool = False) -> Chosen:
        """Choose `count` documents; see `select` for the plain form.

        Parameters
        ----------
        raw : Corpus, path, table, or list of str
        count : int
        top_k : bool
            Take the largest weights without noise (not the paper's method).

        Raises
        ------
        InputError
            `count` is below 1, or above the number of documents of at least `min_tokens` tokens.
        """
        check_is_fitted(self)
        corpus = as_corpus(raw)
        targets = len(self.log_diff_)

        def draw(unit: Unit) -> tuple[list[TopK], int]:
            weights, rows, tokens = self._weigh(corpus, unit)
            long = tokens >= self.min_tokens
            heaps = [TopK(count) for _ in range(targets)]
            for target, heap in enumerate(heaps):
                values = weights[long, target]
                keys = values if top_k else values + self.noise(target, unit, rows[long])
                heap.offer(keys, values, unit.number, rows[long])
            return heaps, int(long.sum())

        heaps, eligible = [TopK(count) for _ in range(targets)], 0
        for _, (found, long) in map_units(draw, corpus.units, workers=self.workers):
            for heap, other in zip(heaps, found):
                heap.merge(other)
            eligible += long
        check_count(count, eligible, f" (of at least {self.min_tokens} tokens)")
        return take(heaps, quotas(count, self.target_proportions_.tolist()))

    def select(self, raw: Any, count: int, *, top_k: bool = False) -> Int[np.ndarray, " count"]:
        """Indices, in ascending order, of `count` documents drawn from `raw` by importance.

        Parameters and errors as in `choose`. Documents are numbered in reading order, bad records left out. To write a
        selection of files into a file, use `salience.data.select_text`.
        """
        corpus = as_corpus(raw)
        chosen = self.choose(corpus, count, top_k=top_k)
        indices, first = [], 0
        for unit in corpus.units:
            rows = np.concatenate([batch.rows for batch in read(corpus, unit)] or [np.empty(0, np.int64)])
            indices.append(first + np.flatnonzero(np.isin(rows, chosen.rows[chosen.units == unit.number])))
            first += len(rows)
        return np.concatenate(indices)

    def featurizer(self) -> HashedNgrams:
        """The hashed n-gram features of these parameters."""
        return HashedNgrams(self.ngrams, self.num_buckets, self.hash, self.tokenizer)

    def noise(self, target: int, unit: Unit, rows: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """The Gumbel noise of these documents for one target."""
        return gumbel(self.random_state, f"dsir target {target}", unit.source.file_id, rows)

    def ngram_limit(self, corpus: Corpus) -> int | None:
        """Largest number of n-grams that a unit of `corpus` contributes to the fit; None for all."""
        if self.max_ngrams == "all":
            return None
        limit = 100_000 * self.num_buckets if self.max_ngrams == "auto" else int(self.max_ngrams)
        return limit // len(corpus.units)

    def _weigh(self, corpus: Corpus, unit: Unit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        featurizer = self.featurizer()
        weights, rows, tokens = [np.empty((0, len(self.log_diff_)))], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for batch in read(corpus, unit):
            buckets = featurizer(batch.text)
            weights.append(buckets.sums(self.log_diff_))
            rows.append(batch.rows)
            tokens.append(buckets.tokens)
        return np.concatenate(weights), np.concatenate(rows), np.concatenate(tokens)

    def check(self, targets: int) -> None:
        """Refuse parameters that are out of range, or do not fit the number of targets (`fit` does this first)."""
        self.featurizer()
        if self.smoothing < 0 or not np.isfinite(self.smoothing):
            raise InputError(f"smoothing must be a finite number of at least 0, not {self.smoothing}")
        if self.min_tokens < 0:
            raise InputError(f"min_tokens must be at least 0, not {self.min_tokens}")
        if not 0 <= self.max_bad <= 1:
            raise InputError(f"max_bad must lie in 0..1, not {self.max_bad}")
        if self.max_ngrams not in ("auto", "all") and not (isinstance(self.max_ngrams, int) and self.max_ngrams > 0):
            raise InputError(f"max_ngrams must be 'auto', 'all' or a positive whole number, not {self.max_ngrams!r}")
        if not isinstance(self.random_state, int | np.integer):
            raise InputError(f"random_state must be a whole number, not {self.random_state!r}")
        if self.target_proportions is not None:
            if not self.separate_targets:
                raise InputError("target_proportions needs separate_targets=True")
            if len(self.target_proportions) != targets:
                raise InputError(f"target_proportions has {len(self.target_proportions)} entries for {targets} targets")
            quotas(1, self.target_proportions)

    def described(self) -> dict[str, Any]:
        """The parameters that results depend on, as plain data (all but `workers`, and `tokenizer`, which is code)."""
        parameters = {name: value for name, value in self.get_params().items() if name not in ("tokenizer", "workers")}
        return json.loads(json.dumps(parameters, default=lambda value: np.asarray(value).tolist()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save parameters and counts as safetensors (no pickle)."""
        check_is_fitted(self)
        if self.tokenizer is not None:
            raise InputError("a DSIR with a tokenizer of your own cannot be saved; its code would have to be, too")
        temporary = Path(f"{path}.partial")
        save_file(
            {"raw_counts": self.raw_counts_, "target_counts": self.target_counts_},
            temporary,
            metadata={"salience.DSIR": json.dumps(self.described())},
        )
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DSIR:
        """Load what `save` wrote.

        Raises
        ------
        DataError
            The file is not one.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                parameters = json.loads((file.metadata() or {})["salience.DSIR"])
                raw, target = file.get_tensor("raw_counts"), file.get_tensor("target_counts")
            return cls(**parameters).fit_counts(raw, target)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a saved DSIR: {error}") from error


def as_corpus(data: Any) -> Corpus:
    """A `Corpus` of whatever the API takes; a list of str holds documents, not paths."""
    if isinstance(data, Corpus):
        return data
    if isinstance(data, list | tuple | np.ndarray) and len(data) and all(isinstance(item, str) for item in data):
        return Corpus.of_texts(list(data))
    return Corpus(data)


def count_ngrams(
    corpus: Corpus, featurizer: HashedNgrams, limit: int | None, max_bad: float, workers: int | None, what: str
) -> Int[np.ndarray, " num_buckets"]:
    """Count the hashed n-grams of a corpus; a unit stops after the document that brings it above `limit`."""

    def fold(unit: Unit) -> tuple[np.ndarray, Tally]:
        counts, tally = np.zeros(featurizer.num_buckets, np.int64), Tally()
        for batch in read(corpus, unit):
            tally.add(batch, max_bad)
            if limit is None or counts.sum() <= limit:  # hash no more than is counted
                add_counts(counts, featurizer(batch.text), limit)
        return counts, tally

    total, tally = np.zeros(featurizer.num_buckets, np.int64), Tally()
    for _, (counts, part) in map_units(fold, corpus.units, workers=workers):
        total += counts
        tally.merge(part)
    tally.check(max_bad, what)
    return total


def add_counts(counts: Int[np.ndarray, " num_buckets"], buckets: Any, limit: int | None) -> None:
    """Add a batch to a unit's counts in place, up to and including the document that passes `limit`."""
    held = int(counts.sum()) if limit is not None else 0
    if limit is not None and held > limit:
        return
    last = len(buckets.tokens)
    if limit is not None:
        last = min(last, int(np.searchsorted(held + buckets.offsets[1:], limit, side="right")) + 1)
    count_ids(buckets.ids[: buckets.offsets[last]], counts)


def log_ratio(
    target_counts: Float[np.ndarray, " num_buckets"], raw_counts: Int[np.ndarray, " num_buckets"]
) -> Float[np.ndarray, " num_buckets"]:
    """``log(gamma_p + 1e-8) - log(gamma_q + 1e-8)`` from counts."""
    return np.log(target_counts / target_counts.sum() + EPSILON) - np.log(raw_counts / raw_counts.sum() + EPSILON)


def kl_reduction(
    targets: Int[np.ndarray, "targets num_buckets"],
    raw: Int[np.ndarray, " num_buckets"],
    selected: Int[np.ndarray, " num_buckets"],
) -> float:
    r"""How much closer than the raw corpus a selection is to the targets (mean over targets, nats per n-gram).

        KLred = 1/|T| sum_p [ KL(gamma_p || gamma_q) - KL(gamma_p || gamma_s) ]
              = 1/|T| sum_p sum_j gamma_pj [ log(gamma_sj + 1e-8) - log(gamma_qj + 1e-8) ]

    Larger is better; a random selection is near 0, and below it when it is small, so compare with a random one of equal
    size. Reconstruction [R] of the paper's data metric (section 5), with the 1e-8 of the importance weights.

    Parameters
    ----------
    targets, raw, selected : (num_buckets,) or (targets, num_buckets) int
        Hashed n-gram counts.

    Raises
    ------
    InputError
        One of them is all zero.
    """
    rows = np.atleast_2d(targets).astype(np.float64)
    for name, counts in (("targets", rows.sum(1).min()), ("raw", raw.sum()), ("selected", selected.sum())):
        if counts <= 0:
            raise InputError(f"{name} holds no n-gram")
    gain = log_ratio(np.asarray(selected, np.float64), np.asarray(raw))
    return float((rows / rows.sum(1, keepdims=True) @ gain).mean())
