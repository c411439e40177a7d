"""What to take of each source task for a target task in a table, measured on the target's own rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold

from salience.data.lasso_task_selection.active import ActiveRun, active_mtrl
from salience.data.lasso_task_selection.linear import LinearMTRL
from salience.data.lasso_task_selection.tables import Pool, Tables, read_tasks, together
from salience.errors import InputError
from salience.measure import Interval, PairedDifference, bootstrap_interval, difference_over_draws
from salience.scores import Scores

STRATEGY_NAMES = {"l1": "L1 relevance", "l2": "L2 relevance", "passive": "equal shares", "alone": "target rows alone"}
_FOLDS = 5
_RIDGE = 1e-2  # columns of real tables are correlated


@dataclass
class TaskSelection:
    """What `select_tasks` chose, and how it fares on held-out target rows.

    Attributes
    ----------
    names : list of str
        The tasks.
    available, taken : (T,) int64
        Complete rows that there are, and rows to take.
    nu : (T,) float
        Relevance as shares of 1.
    residual : float
        Share of the target's head that the penalty leaves over, because the head is only known so well.
    chosen : pa.Table
        The rows, as they stand in the sources (text for a CSV file), with the task's name in the column ``task``.
    errors : dict of str to list of (n,) arrays
        Held-out error of each target row by strategy; several random draws of "passive".
    measure : str
        What the errors are.
    settings : dict
    """

    names: list[str]
    available: Int[np.ndarray, " T"]
    taken: Int[np.ndarray, " T"]
    nu: Float[np.ndarray, " T"]
    residual: float
    strategy: str
    chosen: pa.Table
    errors: dict[str, list[np.ndarray]]
    measure: str
    counts: dict[str, int]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def scores(self) -> Scores:
        """Relevance of the tasks."""
        return Scores(self.nu, self.names, "task", {"method": "lasso-task-selection", **self.settings})

    def mean(self, name: str) -> Interval:
        """Mean error of a strategy on held-out target rows, with its interval."""
        return bootstrap_interval(np.mean(self.errors[name], axis=0), random_state=0)

    def gain(self, other: str) -> PairedDifference:
        """By how much the error of `other` is above that of the chosen strategy, over the same rows."""
        draws = self.errors[other]
        found = difference_over_draws(np.mean(self.errors[self.strategy], axis=0), draws, random_state=0)
        return found._replace(mean=-found.mean, low=-found.high, high=-found.low)

    @property
    def verdict(self) -> str:
        """One sentence: did choosing beat equal shares, and the target's rows alone?"""
        if not self.errors:
            return "not measured: the target has too few rows to hold some out"
        words = []
        for other in [name for name in ("passive", "alone") if name in self.errors and name != self.strategy]:
            gain = self.gain(other)
            word = "better than" if gain.low > 0 else "worse than" if gain.high < 0 else "no better than"
            words.append(f"{word} {STRATEGY_NAMES[other]} ({gain.mean:+.4f} in its favour, 95 % interval "
                         f"{gain.low:+.4f} … {gain.high:+.4f})")  # fmt: skip
        return (
            f"{STRATEGY_NAMES[self.strategy]} is {' and '.join(words)} here, by {self.measure} of held-out target rows"
        )

    @property
    def equation(self) -> str:
        """What became of the source rows."""
        left = self.counts["used"] - int(self.taken.sum())
        same = self.counts["in the target"]
        return (f"{self.counts['rows']:,} source rows read = {int(self.taken.sum()):,} taken + {left:,} not taken + "
                f"{self.counts['incomplete']:,} incomplete + {self.counts['unreadable']:,} unreadable"
                + (f" + {same:,} equal to a target row" if same else ""))  # fmt: skip


def select_tasks(
    sources: Sequence[Any], target: Any, label: str, budget: int, *, task: str | None = None,
    positive: str | None = None, strategy: str = "l1", rank: int | None = None, floor: int | None = None,
    rounds: int = 1, top: int | None = None, costs: Mapping[str, float] | None = None, draws: int = 3,
    random_state: int = 0, progress: Callable[[str], object] | None = None,
) -> TaskSelection:  # fmt: skip
    """Choose how many rows of each source task to train on, for the sake of one target task with few rows.

    `active_mtrl` on tables, with rows drawn at random within a task and never twice. A label is looked at only when its
    row is taken. Measured by 5-fold cross-validation over the target's rows: in each fold the whole choice is made
    anew without the held-out rows. Not measured, with a note, where the rank leaves too few rows for that.

    Parameters
    ----------
    sources, target, label, task, positive
        See `salience.data.lasso_task_selection.tables.read_tasks`.
    budget : int
        Source rows to take in all; money with `costs`.
    strategy : {"l1", "l2", "passive"}
    rank : int, optional
        Width of the representation; by default a fifth of the target's rows, at least 1, at most 8 and the columns.
    floor : int, optional
        Rows of every task, also what relevance is estimated from; by default ``rank + 6``, or fewer if the budget would
        not cover twice that.
    rounds, top
        See `salience.data.active_mtrl`.
    costs : mapping of task name to float, optional
        Price of a row of each task.
    draws : int
        Random draws of the baseline that takes equal shares.
    random_state : int

    Returns
    -------
    TaskSelection

    Raises
    ------
    InputError, DataError, NothingToDo
        See `read_tasks` and `active_mtrl`.
    """
    say = progress or (lambda message: None)
    tables = read_tasks(sources, target, label, task=task, positive=positive)
    plan = plan_of(tables, budget, rank=rank, floor=floor, costs=costs)
    options = {"rounds": rounds, "top": top, **plan}
    say("choosing")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run, rows = _run(tables, tables.target, strategy, options, random_state)
    tables.notes += list(dict.fromkeys(str(one.message) for one in told))
    errors: dict[str, list[np.ndarray]] = {}
    fewest = len(tables.target) - -(-len(tables.target) // _FOLDS)  # rows that a fold trains on
    if len(tables.target) >= 2 * _FOLDS and fewest <= plan["rank"] + 1:
        tables.notes.append(
            f"not measured: rank {plan['rank']} needs {plan['rank'] + 2} rows of the target or more, and {fewest} are "
            "left when a fifth of them is held out; a lower rank can be measured"
        )
    elif len(tables.target) >= 2 * _FOLDS:
        errors = _cross_validated(tables, strategy, options, draws, random_state, say)
    names = [pool.name for pool in tables.sources]
    chosen = [pool.raw.take(pa.array(pool.rows[taken])) for pool, taken in zip(tables.sources, rows)]
    if task != "task":
        chosen = [table.append_column("task", pa.array([name] * len(table), pa.string()))
                  for name, table in zip(names, chosen)]  # fmt: skip
    settings = {
        "label": label, "budget": budget, "strategy": strategy, "rank": plan["rank"], "floor": plan["floor"],
        "rounds": rounds, "top": top, "costs": None if costs is None else dict(costs), "seed": random_state,
        "inputs": len(tables.columns), "classes": list(tables.classes) if tables.classes else None,
    }  # fmt: skip
    return TaskSelection(
        names, np.array([len(pool) for pool in tables.sources]), run.taken, run.nu, run.residual, strategy,
        together(chosen, "the sources"), errors,
        "share of wrong signs" if tables.classes else "squared error", tables.counts, settings, tables.notes,
    )  # fmt: skip


def plan_of(
    tables: Tables, budget: int, *, rank: int | None, floor: int | None, costs: Mapping[str, float] | None
) -> dict[str, Any]:
    """The parameters of a run over these tables, defaults filled in and checked before anything is computed."""
    count, width = len(tables.sources), len(tables.columns)
    if budget < 1:
        raise InputError(f"budget must be at least 1, not {budget}")
    if rank is None:
        rank = max(1, min(8, width, len(tables.target) // 5))
    prices = None
    if costs is not None:
        missing = [pool.name for pool in tables.sources if pool.name not in costs]
        if missing:
            raise InputError(f"there is no price for task {missing[0]!r}; every source needs one")
        prices = np.array([costs[pool.name] for pool in tables.sources], dtype=np.float64)
    if floor is None:
        each = count if prices is None else float(prices.sum())
        floor = max(rank + 2, min(rank + 6, int(budget / (2 * each))))
    return {"budget": budget, "rank": rank, "floor": floor, "costs": prices}


def _run(
    tables: Tables, target: Pool, strategy: str, options: dict[str, Any], seed: int
) -> tuple[ActiveRun, list[Int[np.ndarray, " _"]]]:
    """One active run over the pools, and which rows of each pool it took."""
    options = dict(options)
    orders = [
        np.random.default_rng([seed, number]).permutation(len(pool)) for number, pool in enumerate(tables.sources)
    ]
    taken = np.zeros(len(orders), dtype=np.int64)

    def sampler(counts: Int[np.ndarray, " T"]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for number, (pool, order, count) in enumerate(zip(tables.sources, orders, counts)):
            rows = order[taken[number] : taken[number] + count]
            found.append((pool.inputs[rows], pool.labels[rows]))
            taken[number] += count
        return found

    run = active_mtrl(
        sampler, (target.inputs, target.labels), options.pop("budget"), sources=len(orders), strategy=strategy,
        trainer=LinearMTRL(rank=options.pop("rank"), ridge=_RIDGE, scale_labels=True),
        pools=[len(pool) for pool in tables.sources], **options,
    )  # fmt: skip
    return run, [np.sort(order[:count]) for order, count in zip(orders, run.taken)]


def _cross_validated(
    tables: Tables, strategy: str, options: dict[str, Any], draws: int, seed: int, say: Callable[[str], object]
) -> dict[str, list[np.ndarray]]:
    target, n = tables.target, len(tables.target)
    plans = [(strategy, seed), *(("passive", seed + 1 + draw) for draw in range(draws)), ("l2", seed), ("l1", seed)]
    plans = list(dict.fromkeys(plan for plan in plans if plan[0] != strategy or plan[1] == seed))
    errors = {plan: np.empty(n) for plan in plans}
    alone = np.empty(n)
    for number, (train, test) in enumerate(KFold(_FOLDS, shuffle=True, random_state=seed).split(target.inputs)):
        say(f"measuring: fold {number + 1} of {_FOLDS}")
        part = Pool(target.name, target.inputs[train], target.labels[train], target.rows[train], target.raw)
        for plan in plans:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a fold without a relevant source
                run, _ = _run(tables, part, plan[0], options, plan[1])
            errors[plan][test] = _error(run.model.predict(target.inputs[test]), target.labels[test], tables.classes)
        ridge = RidgeCV(np.logspace(-2, 4, 13)).fit(part.inputs, part.labels)
        alone[test] = _error(ridge.predict(target.inputs[test]), target.labels[test], tables.classes)
    found: dict[str, list[np.ndarray]] = {}
    for (name, _), values in errors.items():
        found.setdefault(name, []).append(values)
    return {**found, "alone": [alone]}


def _error(given: np.ndarray, labels: np.ndarray, classes: tuple[str, str] | None) -> Float[np.ndarray, " n"]:
    if classes:
        return (np.where(given > 0, 1.0, -1.0) != labels).astype(np.float64)
    return (given - labels) ** 2
