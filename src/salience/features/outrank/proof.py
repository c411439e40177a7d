"""Do the columns that were ranked first train a better model? Measured on rows that no score has seen.

A logistic regression on one-hot columns is trained on a sample of the scored rows, with the k best columns by the
ranking, the k best by plain mutual information, k random ones (several draws), the first k of 3MR where all pairs were
scored, and all. Every held-out row gives one
log loss and one hit or miss for each, so that differences are paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from salience.errors import NothingToDo
from salience.features.outrank.columns import Bins, encode
from salience.features.outrank.report import RankReport
from salience.measure import difference_over_draws

DRAWS = 10
_BINS = 16
_RARE = 10  # categories with fewer rows to train on share one indicator
_CLASSES = 50
_LEAST_HELD = 30


@dataclass(frozen=True)
class Comparison:
    """The best columns against a baseline, in one measure; `difference` > 0 is in favour of the ranking."""

    measure: str
    baseline: str
    chosen: float
    other: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class RankProof:
    """What a simple learner makes of the columns that were ranked first.

    Attributes
    ----------
    k : int
        Columns each learner was given ("all columns" got all).
    columns : dict of str to list of str
        Which: "outrank", "plain MI", "random 0", ….
    rows : (int, int)
        Rows to train and to measure on.
    accuracy, log_loss : dict of str to float
        By selection ("random" is the mean of its draws); "majority" is the class frequencies alone.
    comparisons : list of Comparison
    """

    k: int
    columns: dict[str, list[str]]
    rows: tuple[int, int]
    accuracy: dict[str, float]
    log_loss: dict[str, float]
    comparisons: list[Comparison]

    def against(self, baseline: str, measure: str = "log loss") -> Comparison:
        """One of the comparisons."""
        return next(item for item in self.comparisons if (item.baseline, item.measure) == (baseline, measure))

    @property
    def better(self) -> bool | None:
        """Whether the log loss is below that of random columns: True or False if the interval says so, else None."""
        item = self.against("random")
        return True if item.low > 0 else False if item.high < 0 else None

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        words = {True: "better than", None: "no better than", False: "worse than"}
        losses, hits = (self.against("random", measure) for measure in ("log loss", "accuracy"))
        plain = self.against("plain MI")
        same = set(self.columns["outrank"]) == set(self.columns["plain MI"])
        beside = "plain mutual information picks the same columns" if same else (
            f"against plain mutual information's {self.k}: log loss {plain.difference:+.4f} in favour "
            f"({plain.low:+.4f} to {plain.high:+.4f})"
        )  # fmt: skip
        return (
            f"the {self.k} best columns are {words[self.better]} {self.k} random ones here: log loss "
            f"{losses.chosen:.4f} against {losses.other:.4f} (difference {losses.difference:+.4f}, 95 % interval "
            f"{losses.low:+.4f} to {losses.high:+.4f}), accuracy {hits.chosen:.1%} against {hits.other:.1%}; {beside}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, verdict included."""
        return {**asdict(self), "better": self.better, "verdict": self.verdict}


def prove(report: RankReport, k: int | None = None) -> RankProof:
    """Measure a ranking on the rows that it held out.

    Parameters
    ----------
    report : RankReport
        Made with ``hold_out > 0``.
    k : int, optional
        Number of columns; by default 10, or half of them where there are fewer than 20.

    Raises
    ------
    NothingToDo
        Too few held-out rows, a label of too many values, or a single column.
    """
    if report.held is None or report.held.num_rows < _LEAST_HELD:
        raise NothingToDo(f"fewer than {_LEAST_HELD} rows were held out: nothing to measure on")
    if len(report.features) < 2:
        raise NothingToDo("there is one column only: nothing to compare with")
    k = min(10, len(report.features) // 2) if k is None else min(k, len(report.features))
    table = pa.concat_tables([report.sample, report.held], promote_options="permissive")
    train = np.arange(table.num_rows) < report.sample.num_rows
    y = _classes(report, table)
    known = np.isin(y, np.unique(y[train]))
    if len(np.unique(y[train])) < 2:
        raise NothingToDo("the sample of rows to learn from holds one value of the label only: nothing to learn")
    if len(np.unique(y[train])) > _CLASSES:
        raise NothingToDo(f"the label has more than {_CLASSES} values: a simple learner says nothing of it")
    missing = tuple(report.settings["missing"])
    blocks = {name: _indicators(name, table[name], train, missing) for name in report.features}
    seed = report.settings["seed"]
    selections = _selections(report, k, seed)
    test = ~train & known
    losses, hits = {}, {}
    for name, columns in selections.items():
        design = sp.hstack([blocks[column] for column in columns], "csr")
        losses[name], hits[name] = _losses(design, y, train, test)
    randoms = [name for name in selections if name.startswith("random ")]
    comparisons = []
    others = [name for name in ("plain MI", "3MR", "all columns") if name in selections]
    baselines: dict[str, list[str]] = {"random": randoms} | {name: [name] for name in others}
    for baseline, names in baselines.items():
        for measure, sign, found in (("log loss", -1, losses), ("accuracy", 1, hits)):
            other = [sign * found[name] for name in names]
            gain = difference_over_draws(sign * found["outrank"], other, random_state=seed)
            comparisons.append(Comparison(measure, baseline, float(found["outrank"].mean()),
                                          float(sign * np.mean(other)), gain.mean, gain.low, gain.high))  # fmt: skip
    shares = np.bincount(y[train]) / train.sum()
    accuracy, log_loss = (
        {name: float(found[name].mean()) for name in ("outrank", *others)}
        | {"random": float(np.mean([found[name].mean() for name in randoms]))}
        for found in (hits, losses)
    )
    accuracy["majority"] = float((y[test] == shares.argmax()).mean())
    log_loss["majority"] = float(-np.log(shares[y[test]]).mean())
    return RankProof(k, selections, (int(train.sum()), int(test.sum())), accuracy, log_loss, comparisons)


def _selections(report: RankReport, k: int, seed: int) -> dict[str, list[str]]:
    columns = [row for row in report.singles.to_pylist() if row["kind"] == "column"]
    plain = sorted(columns, key=lambda row: -row["plain"])
    rng = np.random.default_rng(seed)
    return {
        "outrank": [row["feature"] for row in columns[:k]],
        "plain MI": [row["feature"] for row in plain[:k]],
        **({"3MR": report.three_mr()[:k]} if report.pairs.num_rows else {}),
        **{f"random {draw}": sorted(rng.choice(report.features, k, replace=False).tolist()) for draw in range(DRAWS)},
        "all columns": list(report.features),
    }


def _classes(report: RankReport, table: pa.Table) -> Int[np.ndarray, " n"]:
    coded = encode(report.label, table[report.label])
    if len(coded.values) > _CLASSES:  # a label of numbers, as it was scored
        coded = Bins(coded, report.settings["bins"] or _BINS, tuple(report.settings["missing"]))(coded)
    return np.unique(coded.codes, return_inverse=True)[1]


def _indicators(name: str, column: pa.ChunkedArray, train: np.ndarray, missing: Sequence[str]) -> sp.csr_matrix:
    """One indicator per value (or quantile bin of a numeric column); values that are rare in training share one."""
    coded = encode(name, column)
    first = encode(name, column.filter(pa.array(train)))
    codes = Bins(first, _BINS, tuple(missing))(coded).codes.astype(np.int64)
    counts = np.bincount(codes[train], minlength=codes.max() + 1)
    kept = counts >= _RARE
    place = np.where(kept, np.cumsum(kept), 0)
    return sp.csr_matrix((np.ones(len(codes), np.float32), (np.arange(len(codes)), place[codes])),
                         shape=(len(codes), int(kept.sum()) + 1))  # fmt: skip


def _losses(
    design: sp.csr_matrix, y: np.ndarray, train: np.ndarray, test: np.ndarray
) -> tuple[Float[np.ndarray, " test"], Float[np.ndarray, " test"]]:
    """Log loss and accuracy of each row to measure on."""
    model = LogisticRegression(C=0.1, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a simple learner, not the best one
        model.fit(design[train], y[train])
    found = model.predict_proba(design[test])
    place = np.searchsorted(model.classes_, y[test])
    chances = np.clip(found[np.arange(len(place)), place], 1e-12, 1)
    return -np.log(chances), (model.classes_[found.argmax(axis=1)] == y[test]).astype(float)
