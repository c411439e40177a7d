"""The active loop: look at every source a little, find the relevant ones, buy of these, and train on all of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from salience.data.lasso_task_selection.allocation import allocate_samples
from salience.data.lasso_task_selection.checks import counts, finite, prices
from salience.data.lasso_task_selection.linear import LinearMTRL
from salience.data.lasso_task_selection.relevance import TaskRelevance, task_relevance
from salience.errors import DataError, InputError
from salience.scores import Scores

STRATEGIES = {"l1": 1.0, "l2": 2.0, "passive": 0.0}  # the power of the relevance by which samples go

NOISE = 0.3  # residual of the Lasso as a share of the target head's expected error


class Trainer(Protocol):
    """What the loop trains: `LinearMTRL`, `TrunkMTRL`, or anything with these methods and attributes."""

    heads_: np.ndarray
    noise_: np.ndarray
    target_head_: np.ndarray
    target_noise_: Any
    target_error_: Any
    target_spread_: np.ndarray

    def fit(self, tasks: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any: ...
    def fit_target(self, X: ArrayLike, y: ArrayLike) -> Any: ...
    def predict(self, X: ArrayLike) -> Any: ...


@dataclass
class ActiveRun:
    """What `active_mtrl` bought and learned.

    Attributes
    ----------
    model : Trainer
        Trained on all rows, with its target head.
    taken : (T,) int64
        Rows bought of every source.
    tasks : list of (inputs, labels)
        The rows themselves.
    nu : (T,) float
        Relevance that the last purchase went by, as shares of 1; equal shares for "passive".
    residual : float
        What the penalty leaves over of the target's head, as a share of its length; NaN without an estimate.
    rounds : list of dict
        For each purchase: ``taken`` so far, ``nu``, ``residual``, ``lam``.
    """

    model: Trainer
    taken: Int[np.ndarray, " T"]
    tasks: list[tuple[np.ndarray, np.ndarray]]
    nu: Float[np.ndarray, " T"]
    residual: float = float("nan")
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def scores(self, names: Sequence[str]) -> Scores:
        """Relevance as `Scores` of tasks, to save or to combine with others."""
        return Scores(self.nu, list(names), "task", {"method": "lasso-task-selection", "residual": self.residual}
                      if self.residual == self.residual else {"method": "lasso-task-selection"})  # fmt: skip


def active_mtrl(
    sampler: Callable[[np.ndarray], Sequence[tuple[np.ndarray, np.ndarray]]], target: tuple[ArrayLike, ArrayLike],
    budget: int, *, sources: int, trainer: Trainer | None = None, strategy: str = "l1", floor: int = 10,
    rounds: int = 1, nu: ArrayLike | None = None, costs: ArrayLike | None = None,
    top: int | None = None,
    pools: ArrayLike | None = None,
) -> ActiveRun:  # fmt: skip
    """Buy samples of source tasks by their estimated relevance to a target task, and train on them (L1-A-MTRL).

    Phase 0 takes `floor` rows of every source, trains, and estimates the relevance from the heads (the Lasso, with the
    penalty set by the error of the target's head). Each of the `rounds` then buys so that ``n_t`` goes by ``|nu(t)|``,
    and trains anew, from scratch, on all rows so far. Rows of phase 0 count: the budget is spent exactly, and never
    exceeded where there are prices.

    Parameters
    ----------
    sampler : callable
        ``sampler(counts)`` with counts (T,) int gives, for each source, fresh inputs (n_t, d) and labels (n_t,).
    target : (inputs (n, d), labels (n,))
        The few rows of the target task; they make its head and, with it, the relevance, never the representation.
    budget : int
        Rows in all, or money where there are prices.
    sources : int
        Number T of source tasks.
    trainer : Trainer, optional
        `LinearMTRL` with its defaults, if not given. It is trained in place, again and again.
    strategy : {"l1", "l2", "passive"}
        The paper's, its predecessor's (least-norm relevance, ``n_t`` by ``nu(t)^2``), or equal shares.
    floor : int
        Rows of every source, also the size of phase 0. More than the rank, or the noise of a task cannot be told.
    rounds : int
        Estimates and purchases; what is bought of the rest of the budget grows by 4 from one to the next, as the
        predecessor's ``eps_i = 2^-i`` asks.
    nu : (T,) float, optional
        The relevance, where it is known: there is then no estimate, and one purchase.
    costs, top, pools
        See `allocate_samples`. Where the relevance is estimated, every source has the rows of phase 0 even with `top`,
        and where the pools of the `top` tasks are used up, the rest of the budget is not spent and a warning says so.

    Returns
    -------
    ActiveRun

    Raises
    ------
    InputError
        A parameter is not usable, or the budget does not cover phase 0.
    DataError
        The sampler gave other numbers of rows than it was asked for.

    Notes
    -----
    Source: arXiv 2306.02556; reconstructed in details: the growth of rounds, and that phase 0 counts in the budget, and
    that the Lasso's residual is 0.3 times the expected error of the target's head (the paper gives an order of
    magnitude; at a whole error, one or two sources explained the target in our development runs, often wrong ones).
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy must be 'l1', 'l2' or 'passive', not {strategy!r}")
    if rounds < 1 or floor < 0 or sources < 1:
        raise InputError(f"rounds and sources must be at least 1, floor at least 0; got {rounds}, {sources}, {floor}")
    if top is not None and not 1 <= top <= sources:
        raise InputError(f"top must be a whole number in 1..{sources}, not {top!r}")
    model = LinearMTRL() if trainer is None else trainer
    price, power = prices("costs", costs, sources), STRATEGIES[strategy]
    run = ActiveRun(model, np.zeros(sources, dtype=np.int64), [], np.full(sources, 1 / sources))
    if strategy == "passive" or nu is not None:
        known = np.ones(sources) if strategy == "passive" else finite("nu", nu, 1)  # type: ignore[arg-type]
        if len(known) != sources:
            raise InputError(f"nu has {len(known)} values for {sources} sources")
        wanted = allocate_samples(known, budget, floor=floor, power=power, costs=costs, pools=pools,
                                  top=None if strategy == "passive" else top)  # fmt: skip
        _buy(run, sampler, wanted, TaskRelevance(known, float("nan"), 0.0))
    else:
        first = np.full(sources, floor) if pools is None else np.minimum(floor, counts("pools", pools, sources))
        spent = float(price @ first)
        if spent > budget:
            raise InputError(
                f"budget of {budget:g} does not cover {floor} rows of each of {sources} sources ({spent:g})"
            )
        _buy(run, sampler, first, None)
        for number in range(1, rounds + 1):
            model.fit(run.tasks).fit_target(*target)
            found = relevance_of(model, strategy, costs)
            goal = spent + (budget - spent) * (4**number - 1) / (4**rounds - 1)
            goal = np.floor(goal) if costs is None else goal
            weights, limit = found.nu, pools
            if top is not None:
                weights = _largest(found.nu, top)
                most = np.full(sources, 2**53) if pools is None else counts("pools", pools, sources)
                limit = np.where(weights > 0, np.maximum(most, run.taken), run.taken)  # others keep what they have
                held = float(price @ limit)
                if held < goal and number == rounds:
                    warnings.warn(
                        f"the {(weights > 0).sum()} tasks that are bought of have no more rows: {goal - held:g} of the "
                        f"budget of {budget:g} are not spent (top={top})", stacklevel=2,
                    )  # fmt: skip
                goal = min(goal, held)
            wanted = allocate_samples(weights, goal, floor=run.taken, power=power, costs=costs, pools=limit)
            _buy(run, sampler, wanted - run.taken, found)
    model.fit(run.tasks).fit_target(*target)
    return run


def relevance_of(model: Trainer, strategy: str = "l1", costs: ArrayLike | None = None) -> TaskRelevance:
    """Relevance of the sources by the heads of a model that was fitted to them and to the target.

    Heads are divided by the deviation of their task's residuals first, so that the scale of labels does not count, and
    compared by what they predict on the target's rows, ``||R v||``: the theory's inputs are white, real ones are not. A
    model with several outputs a task has heads (outputs, k, T): there is one Lasso per output, and relevances are
    averaged in absolute value (a choice of ours).

    Parameters
    ----------
    model : Trainer
    strategy : {"l1", "l2"}
    costs : (T,) float, optional

    Raises
    ------
    DataError
        The target has too few rows for the noise of its head to be told.
    """
    noises, errors = np.atleast_1d(model.target_noise_), np.atleast_1d(model.target_error_)
    if not np.isfinite(errors).all():
        raise DataError("the target has too few rows: more than the rank of the representation are needed")
    heads = model.heads_.reshape(-1, *model.heads_.shape[-2:])
    found, length, left = [], 0.0, 0.0
    for W, w, sizes, noise, error in zip(
        heads, np.atleast_2d(model.target_head_), np.atleast_2d(model.noise_), noises, errors
    ):
        # A task too short for its noise is taken at the mean; labels without noise must not divide by 0.
        known = np.where(np.isfinite(sizes), sizes, np.nanmean(sizes) if np.isfinite(sizes).any() else 1.0)
        known = np.maximum(known, 1e-6 * np.linalg.norm(W, axis=0))
        unit = max(float(noise), 1e-6 * float(np.linalg.norm(w))) or 1.0
        columns, goal = model.target_spread_ @ W / np.where(known > 0, known, 1.0), model.target_spread_ @ w / unit
        expected = None if strategy == "l2" else NOISE * float(error) / unit
        found.append(
            task_relevance(columns, goal, norm="l2" if strategy == "l2" else "l1", noise=expected, costs=costs)
        )
        length, left = length + float(goal @ goal), left + found[-1].residual ** 2
    nu = np.mean([np.abs(one.nu) for one in found], axis=0)
    return TaskRelevance(nu, float(np.sqrt(left / (length or 1.0))), float(np.mean([one.lam for one in found])))


def _largest(nu: Float[np.ndarray, " T"], top: int) -> Float[np.ndarray, " T"]:
    """The sizes of the `top` largest, 0 for the others; ones for the first `top` where all are 0."""
    kept = np.zeros_like(nu)
    first = np.argsort(-np.abs(nu), kind="stable")[:top]
    kept[first] = np.abs(nu[first]) if nu.any() else 1.0
    return kept


def _buy(run: ActiveRun, sampler: Callable, wanted: Int[np.ndarray, " T"], found: TaskRelevance | None) -> None:
    bought = [(np.asarray(inputs), np.asarray(labels)) for inputs, labels in sampler(wanted)]
    got = [len(labels) for _, labels in bought]
    if got != wanted.tolist():
        raise DataError(f"the sampler was asked for {wanted.tolist()} rows and gave {got}")
    run.tasks = [
        (np.concatenate([old[0], new[0]]), np.concatenate([old[1], new[1]]))
        for old, new in zip(run.tasks, bought)
    ] if run.tasks else bought  # fmt: skip
    run.taken = run.taken + wanted
    if found is not None:
        size = np.abs(found.nu).sum()
        run.nu = np.abs(found.nu) / size if size else np.full(len(found.nu), 1 / len(found.nu))
        run.residual = found.residual
        run.rounds.append({"taken": run.taken.tolist(), "nu": run.nu.tolist(), "residual": found.residual,
                           "lam": found.lam})  # fmt: skip
