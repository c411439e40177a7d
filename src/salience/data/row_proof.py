"""Did a selection of rows help? Measured on rows that were held out before anything was chosen.

With a label: accuracy of the same simple learners (1-nearest-neighbour, logistic regression), trained on each
selection. Without one: how far held-out rows lie from the nearest chosen row. Every baseline has as many rows as the
choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from salience.data.kmq.clustering import nearest_distances
from salience.data.proof import Comparison
from salience.measure import difference_over_draws

MEASURED_ROWS = 5000  # held-out rows that are measured on, at most
FEWEST = 5  # and at least: fewer have no interval worth the name
ACCURACY, DISTANCE = "accuracy", "distance to the nearest chosen row"


@dataclass(frozen=True)
class RowProof:
    """A choice of rows measured on held-out rows.

    Attributes
    ----------
    rows : int
        Held-out rows measured on.
    comparisons : list of Comparison
        The first is the verdict: accuracy (or distance) against random of equal size.
    full : float or None
        Accuracy of the learners trained on the whole pool, where there is a label.
    """

    method: str
    rows: int
    chosen: int
    comparisons: list[Comparison]
    full: float | None

    @property
    def better(self) -> bool:
        """Whether the choice beats random, the whole interval."""
        return self.comparisons[0].better is True

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        first = self.comparisons[0]
        if first.measure == ACCURACY:
            figures = (
                f"accuracy {100 * first.chosen:.1f} % against {100 * first.other:.1f} % for random of equal size "
                f"(difference {100 * first.difference:+.1f} points, 95 % interval {100 * first.low:+.1f} to "
                f"{100 * first.high:+.1f})"
            )
        else:
            figures = (
                f"held-out rows lie {first.chosen:.3f} from the nearest chosen row, {first.other:.3f} for random of "
                f"equal size (nearer by {first.difference:+.3f}, 95 % interval {first.low:+.3f} to {first.high:+.3f})"
            )
        label = {True: "better than random", False: "worse than random here", None: "no better than random here"}
        return f"{label[first.better]}: {figures}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, verdict included."""
        return {**asdict(self), "better": self.better, "verdict": self.verdict}


def prove_rows(
    method: str, rows: Float[np.ndarray, "n d"], chosen: Int[np.ndarray, " b"],
    others: Mapping[str, Sequence[Int[np.ndarray, " b"]]], held: Float[np.ndarray, "m d"], *,
    labels: np.ndarray | None = None, held_labels: np.ndarray | None = None, seed: int = 0,
) -> RowProof:  # fmt: skip
    """Measure a choice and its baselines on held-out rows.

    Parameters
    ----------
    method : str
    rows : (n, d) float
        The pool.
    chosen : (b,) int
    others : mapping of str to sequence of (b,) int
        Baselines, "random" first; several draws of one are averaged, and their spread widens the interval.
    held : (m, d) float
    labels, held_labels : (n,) and (m,), optional
        Accuracy is measured where they are given.
    seed : int
        Of the intervals and of which held-out rows are measured on, above 5,000.
    """
    if len(held) > MEASURED_ROWS:
        part = np.sort(np.random.default_rng(seed).choice(len(held), MEASURED_ROWS, replace=False))
        held = held[part]
        held_labels = None if held_labels is None else held_labels[part]
    comparisons, full = [], None
    if labels is not None and held_labels is not None:
        right = {
            name: [_right(rows, labels, draw, held, held_labels) for draw in draws]
            for name, draws in {"": [chosen], **others}.items()
        }
        for learner in (None, *_LEARNERS):
            for name in others:
                comparisons.append(_compared(right[""][0], right[name], learner, name, seed))
        full = float(np.mean(list(_right(rows, labels, np.arange(len(rows)), held, held_labels).values())))
    # Distances of few rows are in the way of nobody, and tell what the learners' figures do not: what is not covered.
    own = nearest_distances(held, rows[chosen])
    for name, draws in others.items():
        far = [nearest_distances(held, rows[draw]) for draw in draws]
        gain = difference_over_draws(-own, [-each for each in far], random_state=seed)
        comparisons.append(
            Comparison(DISTANCE, name, float(own.mean()), float(np.mean(far)), gain.mean, gain.low, gain.high)
        )
    return RowProof(method, len(held), len(chosen), comparisons, full)


_LEARNERS = ("1-nearest-neighbour", "logistic regression")


def _right(
    rows: np.ndarray, labels: np.ndarray, chosen: np.ndarray, held: np.ndarray, held_labels: np.ndarray
) -> dict[str, Float[np.ndarray, " m"]]:
    """Where each learner trained on the chosen rows is right."""
    train, targets = rows[chosen], labels[chosen]
    if len(np.unique(targets)) == 1:
        constant = DummyClassifier().fit(train, targets).predict(held) == held_labels
        return {name: constant.astype(np.float64) for name in _LEARNERS}
    found = {}
    for name, model in zip(_LEARNERS, (KNeighborsClassifier(1), LogisticRegression(max_iter=1000))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged: the same for all
            found[name] = (model.fit(train, targets).predict(held) == held_labels).astype(np.float64)
    return found


def _compared(own: dict, draws: list[dict], learner: str | None, name: str, seed: int) -> Comparison:
    def values(found: dict) -> Float[np.ndarray, " m"]:
        return np.mean(list(found.values()), axis=0) if learner is None else found[learner]

    others = [values(draw) for draw in draws]
    gain = difference_over_draws(values(own), others, random_state=seed)
    measure = ACCURACY if learner is None else f"{ACCURACY}, {learner}"
    return Comparison(measure, name, float(values(own).mean()), float(np.mean(others)), gain.mean, gain.low, gain.high)
