"""Claim: at a small sample budget sparse task relevance reaches a lower target error than least-norm relevance and equal
shares.

Two stand-ins for the paper's setting. The theorem's: a linear representation of rank 4 in 20 dimensions, 40 source
tasks with unit heads, a target that equals one of them (and one that mixes two), and noise of deviation 1. All
strategies buy the same number of rows, and at least 5 of every source. The experiment's: scikit-learn's digits in place
of MNIST-C; 10 ways to change an image times "this digit or another" are 100 source tasks, and the target is one digit
under a mixture of two changes that no source shows together, with 40 labels; relevance is estimated from 10 rows a task.

Headline of the paper: L1-A-MTRL is below L2-A-MTRL and passive sampling on MNIST-C, at full sampling and with few
selected tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter, shift
from torch import nn

from salience.data import LinearMTRL, TrunkMTRL, active_mtrl, allocate_samples, task_relevance
from salience.evidence import Bar, Control, Outcome, Run
from salience.reproductions.worlds.digits import ink

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANK, WIDTH, TASKS, LABELS = 4, 20, 40, 60  # of the simulation; labels of the target
FLOOR = 5  # rows of every source: one more than the rank, so that each head has a residual
BUDGETS = (500, 1000, 2000)
STRATEGIES = ("passive", "l2", "l1")


class Linear:
    """Tasks with heads in one random subspace, as the theory has them."""

    def __init__(self, seed: int, mixed: bool) -> None:
        rng = self.rng = np.random.default_rng(seed)
        self.B = np.linalg.qr(rng.normal(size=(WIDTH, RANK)))[0]
        self.W = rng.normal(size=(RANK, TASKS))
        self.W /= np.linalg.norm(self.W, axis=0)
        self.w = self.W[:, :2] @ [0.8, 0.6] if mixed else self.W[:, 0]
        self.target = self._rows(self.w, LABELS)

    def _rows(self, head: Float[np.ndarray, " k"], count: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = self.rng.normal(size=(count, WIDTH))
        return inputs, inputs @ self.B @ head + self.rng.normal(size=count)

    def sampler(self, counts: Int[np.ndarray, " T"]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self._rows(head, int(count)) for head, count in zip(self.W.T, counts)]

    def error(self, strategy: str, budget: int, nu: Any, floor: int = FLOOR) -> float:
        """Excess risk of the target: the squared distance of its coefficients from the true ones."""
        model = LinearMTRL(rank=RANK, fit_intercept=False)
        active_mtrl(self.sampler, self.target, budget, sources=TASKS, trainer=model, strategy=strategy, nu=nu,
                    floor=floor)  # fmt: skip
        return float(((model.coef_ - self.B @ self.w) ** 2).sum())
