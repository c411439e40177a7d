"""Learn the importance of layers by trial, and draw those that train at each step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from salience.errors import InputError
from salience.model.at import training_mode
from salience.scores import Scores
from salience.weights.ist.ablation import LossFn, check_suppression, own_loss
from salience.weights.ist.damping import damped, find_layers

_TRIES = 100  # to draw a set of layers that was not tried in this update yet


class ImportanceSparseTuning:
    """Train a few layers at a time, those that matter more often, in somebody's own loop.

    `before_step` goes before the forward pass of each optimiser step t (not of each micro-batch):

        if t > 0 and t mod T = 0, update the scores, with p = sigmoid(s):
            for k = 1..K:  draw S_k, N_v layers without replacement by p, no set twice
                           r_k = exp(-loss with the layers of S_k damped by beta)
            s_i <- s_i + mu (r_k - mean r) p_i (1 - p_i)   for every k and every i in S_k
        draw N_u layers without replacement by sigmoid(-s): they train, and no other layer does

    A set whose damping hurts less than the average pushes its layers up, to "can be done without"; the importance is
    ``-s``. All layers take part in the forward pass. Parameters outside of the layers (a classifier, `modules_to_save`,
    embeddings) train at every step if they were trainable.

    Parameters
    ----------
    model : torch.nn.Module
        With `requires_grad` set on what is tuned. Make the optimiser over all of that, before or after this.
    layers : "auto" or sequence of str
        "auto" is the longest outermost `nn.ModuleList` that holds trainable parameters; else names of layers, or of
        lists of layers. Layers without trainable parameters do not count.
    n_update, n_suppress : float
        N_u and N_v as shares of the layers, rounded down.
    suppression : float
        beta, in [0, 1): what damping leaves of an adapter (see `salience.weights.ist.damping.damped`).
    trials : int
        K, at least 2.
    score_lr : float
        mu.
    interval : int
        T, steps between updates of the scores.
    mode : {"importance", "random"}
        "random" never updates the scores: every layer is as likely (the paper's RST).
    idle_state : {"keep", "offload", "drop"}
        What becomes of the optimiser's state of a layer that is idle: kept where it is, as in the paper, waits in main
        memory, or is forgotten. Layers that were never drawn have none in any case.
    optimizer : torch.optim.Optimizer, optional
        Needed for "offload" and "drop".
    generator : torch.Generator, optional
        On the CPU; draws the sets. A fresh one by default. Ranks of a distributed run need the same.

    Attributes
    ----------
    layer_names_ : list of str
        The N_l layers, as in `model.named_modules()`.
    importance_ : Tensor of float64, shape (N_l,)
        ``-s``.
    probabilities_ : Tensor of float64, shape (N_l,)
        Of being drawn first: ``sigmoid(-s)``, normalised.
    active_ : list of int
        The layers that train now.
    counts_ : Tensor of int64, shape (N_l,)
        How often each was drawn.
    start_ : dict of str to Tensor
        Values before tuning of parameters that have no scaling, of layers drawn so far, in main memory; in both
        modes.
    history_ : list of dict
        Of each update: "step", "suppressed" (sets), "losses", "rewards".

    Raises
    ------
    InputError
        Nothing to draw from, an option out of range, or shares that leave no layer or no choice of layers.

    Notes
    -----
    The paper damps adapters by their scaling. To damp other parameters towards where they started, and with that IA3,
    OFT and full fine-tuning, is ours.

    References
    ----------
    Yao et al., arXiv 2410.11772, sections 3 and 4; defaults as in the authors' code.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Sequence[str] = "auto",
        n_update: float = 0.25,
        n_suppress: float = 0.5,
        suppression: float = 0.25,
        trials: int = 3,
        score_lr: float = 10.0,
        interval: int = 10,
        mode: Literal["importance", "random"] = "importance",
        idle_state: Literal["keep", "offload", "drop"] = "keep",
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if mode not in ("importance", "random"):
            raise InputError(f"mode: got {mode!r}; it must be 'importance' or 'random'")
        if idle_state not in ("keep", "offload", "drop"):
            raise InputError(f"idle_state: got {idle_state!r}; it must be 'keep', 'offload' or 'drop'")
        if idle_state != "keep" and optimizer is None:
            raise InputError(f"optimizer: idle_state={idle_state!r} needs the optimiser whose state it is")
        if trials < 2 or interval < 1:
            raise InputError(f"trials and interval: got {trials} and {interval}; at least 2 and 1")
        if not (math.isfinite(score_lr) and score_lr > 0):
            raise InputError(f"score_lr: got {score_lr!r}; it must be positive")
        check_suppression(suppression)
        self.model, self.suppression, self.score_lr = model, suppression, score_lr
        self.interval, self.mode = interval, mode
        self.idle_state, self.optimizer = idle_state, optimizer
        self.generator = generator or torch.Generator().manual_seed(0)
        self._layers = find_layers(model, layers)
        self.layer_names_ = [layer.name for layer in self._layers]
        total = len(self._layers)
        self.n_update = _count("n_update", n_update, total)
        if mode == "importance":
            self.n_suppress = _count("n_suppress", n_suppress, total)
            if self.n_suppress == total:
                raise InputError(f"n_suppress: got {n_suppress}, all {total} layers: no two sets could be compared")
            self.trials = min(trials, math.comb(total, self.n_suppress))
        self._scores = torch.zeros(total, dtype=torch.float64)  # s: large where the layer can be done without
        self.active_: list[int] = list(range(total))
        self.counts_: Int[Tensor, " layers"] = torch.zeros(total, dtype=torch.int64)
        self.start_: dict[str, Tensor] = {}
        self.history_: list[dict[str, Any]] = []

    @property
    def importance_(self) -> Float[Tensor, " layers"]:
        """Large where damping the layer hurts."""
        return -self._scores

    @property
    def probabilities_(self) -> Float[Tensor, " layers"]:
        """Of each layer to be the first that is drawn."""
        weights = torch.sigmoid(-self._scores)
        return weights / weights.sum()

    def scores(self) -> Scores:
        """The importance of the layers by name, to save or to hand to another method."""
        options = {"mode": self.mode, "updates": len(self.history_)}
        return Scores(self.importance_.numpy(), self.layer_names_, "layer", {"method": "ist", **options})

    def due(self, step: int) -> bool:
        """Whether the scores are updated before this step, which takes a scoring batch."""
        return self.mode == "importance" and step > 0 and step % self.interval == 0

    def before_step(self, step: int, scoring_batch: Any = None, loss_fn: LossFn | None = None) -> list[int]:
        """Update the scores if that is due, and draw the layers that train in this step.

        Parameters
        ----------
        step : int
            Optimiser steps taken so far.
        scoring_batch : optional
            Rows of the training set, for steps at which `due` says so: what `loss_fn` takes, or a function without
            arguments that returns it.
        loss_fn : callable, optional
            ``loss_fn(model, batch)``, a scalar loss. The loss that the model itself returns by default.

        Returns
        -------
        list of int
            Places of the drawn layers in `layer_names_`, rising.

        Raises
        ------
        InputError
            An update is due and there is no batch for it, or its loss cannot be used.
        """
        if self.due(step):
            if scoring_batch is None:
                raise InputError(f"scoring_batch: step {step} updates the scores and needs one (every {self.interval})")
            self._learn(step, scoring_batch() if callable(scoring_batch) else scoring_batch, loss_fn or own_loss)
        self._activate(self._draw(-self._scores, self.n_update))
        return self.active_

    def release(self) -> None:
        """Make everything trainable again that was: the drawing is over, or another object is to begin."""
        for layer in self._layers:
            for parameter in layer.parameters.values():
                parameter.requires_grad_(True)
        self._move_state(range(len(self._layers)))

    def state_dict(self) -> dict[str, Any]:
        """All that a later `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "scores": self._scores.clone(), "counts": self.counts_.clone(), "generator": self.generator.get_state(),
            "start": dict(self.start_), "layers": list(self.layer_names_), "history": list(self.history_),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises
        ------
        InputError
            It is of other layers.
        """
        if state["layers"] != self.layer_names_:
            raise InputError(f"state: it is of the layers {state['layers']}, not {self.layer_names_}")
        self._scores, self.counts_ = state["scores"].clone(), state["counts"].clone()
        self.generator.set_state(state["generator"])
        self.start_, self.history_ = dict(state["start"]), list(state["history"])

    def _learn(self, step: int, batch: Any, loss_fn: LossFn) -> None:
        """The importance-updating loop: trials with damped layers, and a step along their centred rewards."""
        sets = self._trial_sets()
        losses = []
        with training_mode(self.model, False), torch.no_grad():
            for chosen in sets:
                with damped([self._layers[i] for i in chosen], self.suppression, self.start_):
                    losses.append(float(loss_fn(self.model, batch)))
        losses = _agreed(losses, self._layers[0])
        rewards = [_reward(loss, step) for loss in losses]
        mean = sum(rewards) / len(rewards)
        p = torch.sigmoid(self._scores)  # of before the update, for all trials
        for chosen, reward in zip(sets, rewards):
            at = torch.tensor(chosen)
            self._scores[at] += self.score_lr * (reward - mean) * p[at] * (1 - p[at])
        self.history_.append({"step": step, "suppressed": sets, "losses": losses, "rewards": rewards})

    def _trial_sets(self) -> list[list[int]]:
        """Different sets of layers; fewer than asked for if chance keeps drawing the same ones."""
        sets: list[list[int]] = []
        for _ in range(_TRIES * self.trials):
            chosen = self._draw(self._scores, self.n_suppress)
            if chosen not in sets:
                sets.append(chosen)
            if len(sets) == self.trials:
                break
        return sets

    def _draw(self, logits: Tensor, count: int) -> list[int]:
        # Far out in the tail sigmoid is 0 in every precision, and a draw needs `count` weights above 0.
        weights = torch.sigmoid(logits).clamp_min(1e-30)
        return sorted(torch.multinomial(weights, count, generator=self.generator).tolist())

    def _activate(self, chosen: list[int]) -> None:
        self.active_ = chosen
        self.counts_[torch.tensor(chosen)] += 1
        for number, layer in enumerate(self._layers):
            active = number in chosen
            for parameter in layer.parameters.values():
                parameter.requires_grad_(active)
                if not active:
                    parameter.grad = None  # a zero would still be moved by momentum and decay
            if active:
                for name, parameter in layer.unscaled.items():
                    if name not in self.start_:
                        self.start_[name] = parameter.detach().to("cpu", copy=True)
        self._move_state(chosen)

    def _move_state(self, active: Sequence[int]) -> None:
        """Put the optimiser's state of idle layers away, and fetch that of active ones."""
        if self.optimizer is None or self.idle_state == "keep":
            return
        for number, layer in enumerate(self._layers):
            for parameter in layer.parameters.values():
                if number not in active and self.idle_state == "drop":
                    self.optimizer.state.pop(parameter, None)
                    continue
                device = parameter.device if number in active else torch.device("cpu")
                state = self.optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.ndim:  # the count of steps stays where it is
                        state[key] = value.to(device)


def _count(name: str, share: float, total: int) -> int:
    if not (math.isfinite(share) and 0 < share <= 1):
        raise InputError(f"{name}: got {share!r}; it is a share of the layers, above 0 and at most 1")
    count = math.floor(share * total + 1e-9)
    if not count:
        raise InputError(f"{name}: {share} of {total} layers is none; give at least {1 / total:.4g}")
    return count


def _reward(loss: float, step: int) -> float:
    """``exp(-loss)``; 0 for a loss that is not finite."""
    if not math.isfinite(loss):
        warnings.warn(f"step {step}: the loss of a trial is {loss}, which counts as reward 0", stacklevel=4)
        return 0.0
    if loss < -700:
        raise InputError(f"loss_fn: exp(-loss) of {loss} is beyond all numbers; give a loss that is not negative")
    return math.exp(-loss)


def _agreed(losses: list[float], layer: Any) -> list[float]:
    """The same losses on every rank, those of the first: ranks that drew other layers would wait for ever."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return losses
    device = next(iter(layer.parameters.values())).device
    values = torch.tensor(losses, dtype=torch.float64, device=device)
    torch.distributed.broadcast(values, 0)
    return values.tolist()
