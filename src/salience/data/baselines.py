"""What DSIR is measured against: heuristic classification, and two lexical scores that a shortcut would use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numba
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, diags
from scipy.special import expit
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from salience.data.dsir.features import Buckets, HashedNgrams, tokenize
from salience.data.dsir.resample import check_count
from salience.errors import InputError

_DIM, _EPOCHS, _RATE = 300, 5, 0.1  # the official script's dimension; fastText's defaults


class HeuristicClassifier(BaseEstimator):
    r"""Heuristic classification: a target-or-raw classifier on n-grams, kept if a Pareto draw passes.

        p(target | x) = sigmoid(a . z(x) / |z(x)|_1 + b),   keep x if  Pareto(9) > 1 - p(target | x)

    The rule of GPT-3's data (Brown et al. 2020, appendix A), as used for comparison by Xie et al. 2023 (section 4): the
    draw is repeated in rounds until `count` documents have passed; a classifier of as many target as raw documents. Of
    the last round a uniform share is kept, and earlier rounds whole (the official script drops from all rounds alike).

    Parameters
    ----------
    ngrams, num_buckets, hash
        As in `HashedNgrams`.
    classifier : {"logistic", "fasttext"}
        "fasttext" is the paper's recipe: mean of 300-dimensional n-gram embeddings, 5 epochs of stochastic gradient at
        rate 0.1 falling to 0 (Joulin et al. 2017), on our buckets. "logistic" fits the same linear form to convergence,
        which makes it the stronger baseline.
    shape : float
        Shape of the Pareto distribution.
    random_state : int

    Attributes
    ----------
    table_ : (1, num_buckets) float64
        Weight of every bucket, so that ``sums(table_) / n-grams + intercept_`` is the logit.
    intercept_ : float
    """

    def __init__(
        self, *, ngrams: int = 2, num_buckets: int = 10_000, hash: str = "sha256",
        classifier: str = "logistic", shape: float = 9.0, random_state: int = 0,
    ) -> None:  # fmt: skip
        self.ngrams = ngrams
        self.num_buckets = num_buckets
        self.hash = hash
        self.classifier = classifier
        self.shape = shape
        self.random_state = random_state

    def fit(self, raw: Sequence[str], targets: Sequence[str]) -> HeuristicClassifier:
        """Fit on texts of both kinds; the larger side is cut to the size of the smaller.

        Parameters
        ----------
        raw, targets : sequence of str
        """
        size = min(len(raw), len(targets))
        if not size:
            raise InputError("both raw and target texts are needed")
        if self.classifier not in ("logistic", "fasttext"):
            raise InputError(f"classifier must be 'logistic' or 'fasttext', not {self.classifier!r}")
        both = [text for pair in zip(targets[:size], raw[:size]) for text in pair]
        buckets = HashedNgrams(self.ngrams, self.num_buckets, self.hash)(both)
        labels = np.tile([1, 0], size)
        if self.classifier == "fasttext":
            embeddings = np.random.default_rng(self.random_state).uniform(-1, 1, (self.num_buckets, _DIM)) / _DIM
            direction = _fasttext(buckets.ids, buckets.offsets, labels, embeddings, _EPOCHS, _RATE)
            self.table_, self.intercept_ = (embeddings @ direction)[None], 0.0
        else:
            self.table_, self.intercept_ = _logistic(_frequencies(buckets, self.num_buckets), labels)
        return self

    def probability(self, sums: Float[np.ndarray, " n"], ngrams: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """p(target | x) from each document's sum of `table_` and its number of n-grams."""
        check_is_fitted(self)
        return expit(sums / np.maximum(ngrams, 1) + self.intercept_)

    def keys(
        self, probability: Float[np.ndarray, " n"], first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Sort keys whose k largest are what k repeated Pareto rounds keep.

        A round passes with probability ``(2 - p)^-shape``, so the first round that passes is geometric.

        Parameters
        ----------
        probability : (n,) float
        first, second : (n,) float
            Independent uniform draws in (0, 1): for the round, and for the order within it.
        """
        passing = (2.0 - probability) ** -self.shape
        with np.errstate(divide="ignore"):
            rounds = np.ceil(np.log(first) / np.log1p(-passing))
        return second - np.maximum(rounds, 1.0)

    def select(self, raw: Sequence[str], count: int, *, top_k: bool = False) -> Int[np.ndarray, " count"]:
        """Indices, ascending, of `count` of the raw texts (with `top_k`, of the largest probabilities)."""
        check_is_fitted(self)
        check_count(count, len(raw))
        buckets = HashedNgrams(self.ngrams, self.num_buckets, self.hash)(raw)
        keys = self.probability(buckets.sums(self.table_)[:, 0], np.diff(buckets.offsets))
        if not top_k:
            generator = np.random.default_rng(self.random_state)
            keys = self.keys(keys, generator.random(len(keys)), generator.random(len(keys)))
        return np.sort(np.argsort(-keys, kind="stable")[:count])


def _logistic(features: csr_matrix, labels: np.ndarray) -> tuple[np.ndarray, float]:
    used = np.diff(features.tocsc().indptr) > 0
    # Unit second moment per bucket: frequencies are near 1e-4, and the penalty would flatten their weights otherwise.
    scale = np.where(used, 1.0 / np.sqrt(np.asarray(features.multiply(features).mean(0)).ravel() + 1e-12), 0.0)
    model = LogisticRegression(C=0.1, max_iter=200).fit(features @ diags(scale), labels)
    return model.coef_ * scale, float(model.intercept_[0])


@numba.njit(cache=True)
def _fasttext(ids, offsets, labels, embeddings, epochs, rate):
    """Train `embeddings` in place; gives the difference of the two output vectors."""
    outputs = np.zeros((2, embeddings.shape[1]))
    texts = len(labels)
    for step in range(epochs * texts):
        text = step % texts
        rows = ids[offsets[text] : offsets[text + 1]]
        if len(rows) == 0:
            continue
        hidden = np.zeros(embeddings.shape[1])
        for row in rows:
            hidden += embeddings[row]
        hidden /= len(rows)
        logit = np.dot(outputs[1] - outputs[0], hidden)
        error = (labels[text] - 1.0 / (1.0 + np.exp(-logit))) * rate * (1.0 - step / (epochs * texts))
        gradient = error * (outputs[1] - outputs[0]) / len(rows)
        outputs[1] += error * hidden
        outputs[0] -= error * hidden
        for row in rows:
            embeddings[row] += gradient
    return outputs[1] - outputs[0]


def _frequencies(buckets: Buckets, num_buckets: int) -> csr_matrix:
    """Share of each bucket in each document, (documents, num_buckets)."""
    lengths = np.diff(buckets.offsets)
    values = np.repeat(1.0 / np.maximum(lengths, 1), lengths)
    matrix = csr_matrix((values, buckets.ids, buckets.offsets), shape=(len(lengths), num_buckets))
    matrix.sum_duplicates()
    return matrix


def lexical_overlap(texts: Sequence[str], targets: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Share of each text's tokens that occur anywhere in the targets."""
    vocabulary = {token for target in targets for token in tokenize(target)}
    return np.array([_mean([token in vocabulary for token in tokenize(text)]) for text in texts])


def mean_log_count(texts: Sequence[str], targets: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Mean over each text's tokens of ``log(1 + count in the targets)``."""
    counts = Counter(token for target in targets for token in tokenize(target))
    return np.array([_mean([np.log1p(counts[token]) for token in tokenize(text)]) for text in texts])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
