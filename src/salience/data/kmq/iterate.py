"""Iterative kMQ: rounds of selection whose budget moves to the clusters that the model still gains from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted

from salience.data.kmq.selector import KMQSelector
from salience.errors import InputError, NothingToDo

UPDATES = ("exp", "paper", "code")


class IterativeSelector:
    r"""Rounds of kMQ with feedback from the model in training (Algorithm 1 of the paper).

    Round 1 is plain kMQ with a budget of B / N. After each round the gaps S_i of chosen rows, how much better the given
    answer is than the model's own, move the weights of the clusters:

        s_j = mean of S_i over the scored rows of cluster j,      w_j <- w_j exp(s_j / tau) / normaliser

    over the clusters with scored rows, whose share in all stays; the others keep their weight. The next rounds share
    their budget out by w, never choose a row twice, and keep the clusters of round 1.

    Parameters
    ----------
    base : KMQSelector
        Fitted.
    budget : int
        B, rows of all rounds together.
    rounds : int
        N.
    update : {"exp", "paper", "code"}
        "exp" as above (reconstructed: the printed rule breaks for negative gaps). "paper": ``w_j s_j``, gaps below 0
        taken as 0; where all are, the weights stay. "code": softmax of s_j, forgetting earlier weights, as in the
        authors' code.
    tau : float
        The larger, the less a gap moves.

    Attributes
    ----------
    weights : (k,) float
        Of the clusters; sum 1, equal before the first feedback.
    history : list of (k,) float
        The weights at the beginning and after every feedback.
    issued : (m,) int
        All rows chosen so far.

    Raises
    ------
    InputError
        A parameter is not usable.
    """

    def __init__(
        self, base: KMQSelector, budget: int, *, rounds: int = 3, update: str = "exp", tau: float = 1.0
    ) -> None:
        check_is_fitted(base)
        for name, value, least in (("rounds", rounds, 1), ("budget", budget, 1)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if rounds > budget:
            raise InputError(f"rounds is {rounds}, more than the budget of {budget}")
        if update not in UPDATES:
            raise InputError(f"update must be one of {', '.join(UPDATES)}, not {update!r}")
        if not 0 < tau < np.inf:
            raise InputError(f"tau must be positive and finite, not {tau!r}")
        self.base, self.budget, self.rounds, self.update, self.tau = base, budget, rounds, update, tau
        k = len(base.cluster_centers_)
        self.weights: Float[np.ndarray, " k"] = np.full(k, 1 / k)
        self.history = [self.weights]
        self._batches: list[Int[np.ndarray, " b"]] = []

    @property
    def issued(self) -> Int[np.ndarray, " m"]:
        """All rows chosen so far, ascending."""
        return np.sort(np.concatenate(self._batches)) if self._batches else np.empty(0, np.int64)

    def next_batch(self, quality: ArrayLike | None = None) -> Int[np.ndarray, " b"]:
        """Choose the rows of the next round, B / N of them (the last ones of the pool, where fewer are left).

        Raises
        ------
        NothingToDo
            All rounds are done, or no row is left.
        """
        done = len(self._batches)
        if done == self.rounds:
            raise NothingToDo(f"all {self.rounds} rounds are done")
        count = self.budget * (done + 1) // self.rounds - self.budget * done // self.rounds
        issued = self.issued
        if len(issued) == len(self.base.labels_):
            raise NothingToDo("every row of the pool is chosen already")
        weights = self.weights if done else self.base.cluster_weights()
        batch = self.base.select(count, quality, weights, issued)
        self._batches.append(batch)
        return batch

    def feedback(self, indices: ArrayLike, gap: ArrayLike) -> Float[np.ndarray, " k"]:
        """Move the weights by the gaps of chosen rows: positive where there is something left to learn.

        Parameters
        ----------
        indices : (m,) int
            Rows of any round so far.
        gap : (m,) float
            Score of the given answer minus score of the model's own, such as `score_gap` gives.

        Returns
        -------
        (k,) float
            The new weights.

        Raises
        ------
        InputError
            A row that was never chosen, a gap that is not finite, or unequal lengths.
        """
        rows, gaps = np.asarray(indices), np.asarray(gap, dtype=np.float64)
        if rows.ndim != 1 or gaps.shape != rows.shape or not len(rows) or rows.dtype.kind not in "iu":
            raise InputError(f"indices and gap must be equally many, at least one; got {rows.shape} and {gaps.shape}")
        strange = rows[~np.isin(rows, self.issued)]
        if len(strange):
            raise InputError(f"row {int(strange[0])} was never chosen; feedback is of chosen rows")
        if not np.isfinite(gaps).all():
            raise InputError(f"gap of row {int(rows[np.argmax(~np.isfinite(gaps))])} is not finite")
        labels, k = self.base.labels_[rows], len(self.weights)
        counts = np.bincount(labels, minlength=k)
        scored = counts > 0
        means = np.bincount(labels, gaps, minlength=k)[scored] / counts[scored]
        fresh = self._moved(self.weights[scored], means)
        if fresh.sum() > 0:
            weights = self.weights.copy()
            weights[scored] = fresh * (self.weights[scored].sum() / fresh.sum())
            self.weights = weights / weights.sum()
        else:
            warnings.warn("no gap is above 0: the weights stay as they were", stacklevel=2)
        self.history.append(self.weights)
        return self.weights

    def _moved(self, old: Float[np.ndarray, " scored"], means: Float[np.ndarray, " scored"]) -> np.ndarray:
        if self.update == "paper":
            return old * np.maximum(means, 0)
        raised = np.exp((means - means.max()) / (self.tau if self.update == "exp" else 1.0))
        return old * raised if self.update == "exp" else raised


@dataclass(frozen=True)
class Refinement:
    """What `refine` did: the rows of each round, the cluster weights before and after each, the last model."""

    batches: list[Int[np.ndarray, " b"]]
    weights: list[Float[np.ndarray, " k"]]
    model: Any

    @property
    def chosen(self) -> Int[np.ndarray, " budget"]:
        """All rows, ascending."""
        return np.sort(np.concatenate(self.batches))


def refine(
    selector: IterativeSelector, train: Callable[[Any, Int[np.ndarray, " m"]], Any],
    gap: Callable[[Any, Int[np.ndarray, " m"]], ArrayLike], *, quality: ArrayLike | None = None,
) -> Refinement:  # fmt: skip
    """Run all rounds of iterative kMQ with a trainer and a scorer of your own.

    Parameters
    ----------
    selector : IterativeSelector
    train : callable
        ``train(model, rows) -> model``: go on training (one epoch, in the paper) on all rows chosen so far; `model` is
        None in round 1.
    gap : callable
        ``gap(model, rows) -> (m,)``: score of the given answers minus score of the answers that the current model
        writes itself; for a language model, `score_gap`.
    quality : (n,) float, optional

    Returns
    -------
    Refinement
        Of fewer rounds, with a warning, where the pool runs out.

    Raises
    ------
    NothingToDo
        There is no round left to begin with.
    """
    model, batches = None, []
    for number in range(selector.rounds):
        try:
            batches.append(selector.next_batch(quality))
        except NothingToDo as error:
            if not batches:
                raise
            warnings.warn(f"refinement ends after {number} of {selector.rounds} rounds: {error}", stacklevel=2)
            break
        model = train(model, selector.issued)
        if number < selector.rounds - 1:  # feedback after the last round would choose nothing
            selector.feedback(selector.issued, gap(model, selector.issued))
    return Refinement(batches, selector.history, model)
