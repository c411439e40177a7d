"""Multi-task representation learning with a network: a shared trunk, and one linear head per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from salience.data.lasso_task_selection.linear import head
from salience.errors import DataError, InputError
from salience.model import fit, map_batches


class SharedTrunk(nn.Module):
    """A network whose features serve linear heads of many tasks.

    Parameters
    ----------
    trunk : torch.nn.Module
        Inputs (n, ...) to features (n, width).
    width : int
    tasks : int
    outputs : int
        Outputs of each head: 1 for numbers and two classes, C for C classes.
    """

    def __init__(self, trunk: nn.Module, width: int, tasks: int, outputs: int = 1) -> None:
        super().__init__()
        self.trunk = trunk
        self.tasks = tasks
        self.heads = nn.Linear(width, tasks * outputs)

    def forward(self, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n tasks outputs"]:
        """Outputs of every head for every row."""
        return self.heads(self.trunk(inputs)).unflatten(1, (self.tasks, -1))


class TrunkMTRL(BaseEstimator):
    """The deep class of the paper: trunk and source heads by gradient descent, then a target head on frozen features.

    Squared error throughout; labels are numbers, -1 and 1 for two classes, or one-hot rows for more. Every `fit` trains
    a new network, from scratch.

    Parameters
    ----------
    trunk : callable
        Gives a new trunk, ``trunk() -> nn.Module`` from inputs (n, ...) to features (n, width).
    epochs, batch_size : int
    lr, weight_decay : float
        Of AdamW.
    device : str
        Where the network is trained.
    random_state : int
        Seed of the weights and of the order of rows.

    Attributes
    ----------
    network_ : SharedTrunk
    heads_ : (k, T) or (outputs, k, T) float
        Heads of the source tasks.
    noise_ : (T,) or (outputs, T) float
        Root mean square residual of each task.
    target_head_, target_level_, target_noise_, target_error_, target_spread_
        As of `LinearMTRL`, with a first axis for several outputs.

    Notes
    -----
    Source: arXiv 2306.02556, experiments. Reconstructed: squared error for both classes, and the least-squares target
    head (the problem is convex once features are frozen, so that its minimum needs no training loop).
    """

    def __init__(
        self, *, trunk: Callable[[], nn.Module] | None = None, epochs: int = 20, batch_size: int = 64, lr: float = 3e-3,
        weight_decay: float = 1e-2, device: str = "cpu", random_state: int = 0,
    ) -> None:  # fmt: skip
        self.trunk = trunk
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.device = device
        self.random_state = random_state

    def fit(self, tasks: Sequence[tuple[ArrayLike, ArrayLike]], y: Any = None) -> TrunkMTRL:
        """Train trunk and heads.

        Parameters
        ----------
        tasks : sequence of (inputs (n_t, ...), labels (n_t,) or (n_t, outputs))
        """
        if self.trunk is None:
            raise InputError("trunk must be a function that gives a new network from inputs to features")
        rows = [_tensors(f"source task {number}", *pair) for number, pair in enumerate(tasks)]
        if not rows:
            raise InputError("there is no source task")
        inputs, labels = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
        owners = torch.cat([torch.full((len(y), 1), float(number)) for number, (_, y) in enumerate(rows)])
        generator = torch.Generator().manual_seed(self.random_state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            trunk = self.trunk()
            with torch.no_grad():
                width = trunk(inputs[:2]).shape[1]
            self.network_ = SharedTrunk(trunk, width, len(rows), labels.shape[1]).to(self.device)
        optimizer = torch.optim.AdamW(self.network_.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        fit(
            self.network_, inputs, torch.cat([owners, labels], 1), loss=_own_head, optimizer=optimizer,
            epochs=self.epochs, generator=generator, batch_size=min(self.batch_size, len(inputs)),
        )  # fmt: skip
        self.network_.eval()
        outputs = labels.shape[1]
        weights = self.network_.heads.weight.detach().double().cpu().numpy()  # (T * outputs, k)
        heads = weights.reshape(len(rows), outputs, width).transpose(1, 2, 0)
        noise = np.stack([self._residual(number, *pair) for number, pair in enumerate(rows)], axis=1)
        self.heads_, self.noise_ = (heads[0], noise[0]) if outputs == 1 else (heads, noise)  # type: ignore[var-annotated]
        return self

    def fit_target(self, X: ArrayLike, y: ArrayLike) -> TrunkMTRL:
        """Fit the target's head on the features of its rows by least squares; the trunk stays as it is."""
        inputs, labels = _tensors("target", X, y)
        features = self._features(inputs)
        found = [head(features, column, True) for column in labels.double().numpy().T]
        self.target_level_ = np.array([one.level for one in found])
        self.target_spread_ = found[0].spread
        parts = [np.array([getattr(one, name) for one in found]) for name in ("weights", "noise", "error")]
        single = len(found) == 1
        self.target_head_, self.target_noise_, self.target_error_ = [p[0] for p in parts] if single else parts  # type: ignore[var-annotated]
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels of the target task, (n,) or (n, outputs)."""
        check_is_fitted(self, "target_head_")
        values = self._features(_inputs("X", X)) @ np.atleast_2d(self.target_head_).T + self.target_level_
        return values[:, 0] if self.target_head_.ndim == 1 else values

    def _features(self, inputs: Tensor) -> Float[np.ndarray, "n k"]:
        check_is_fitted(self, "network_")
        return self._apply(self.network_.trunk, inputs).numpy()

    def _apply(self, module: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return map_batches(lambda batch: module(batch.to(self.device)), inputs, batch_size=512).double()

    def _residual(self, number: int, inputs: Tensor, labels: Tensor) -> Float[np.ndarray, " outputs"]:
        if not len(inputs):
            return np.full(labels.shape[1], np.nan)
        given = self._apply(self.network_, inputs)[:, number]
        return ((given - labels.double()) ** 2).mean(0).sqrt().numpy()


def _own_head(outputs: Float[Tensor, "n tasks outputs"], targets: Float[Tensor, "n _"]) -> Tensor:
    """Mean squared error of each row at the head of its own task; the first column of targets says which."""
    own = outputs[torch.arange(len(outputs), device=outputs.device), targets[:, 0].long()]
    return ((own - targets[:, 1:]) ** 2).mean()


def _tensors(name: str, X: ArrayLike, y: ArrayLike) -> tuple[Tensor, Tensor]:
    inputs, labels = _inputs(f"inputs of {name}", X), _inputs(f"labels of {name}", y)
    if len(labels) != len(inputs) or labels.ndim > 2:
        raise InputError(f"{name} has inputs of shape {tuple(inputs.shape)} and labels of shape {tuple(labels.shape)}")
    return inputs, labels.reshape(len(labels), -1) if labels.ndim == 2 else labels[:, None]


def _inputs(name: str, values: ArrayLike) -> Tensor:
    tensor = torch.as_tensor(np.asarray(values, dtype=np.float32))
    if not torch.isfinite(tensor).all():
        raise DataError(f"{name} hold a value that is not finite")
    return tensor
