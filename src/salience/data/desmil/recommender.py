"""Train a multi-interest recommender with weights under which its interests are independent."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from salience.data.desmil.dependence import hsic_with_and_without
from salience.data.desmil.extractors import MultiInterest
from salience.data.desmil.sequences import history_and_truth, pad_histories, recall_ndcg_hit
from salience.data.desmil.weighting import StableWeights
from salience.errors import InputError
from salience.model.at import training_mode
from salience.scores import Scores


class DESMIL:
    """A multi-interest recommender that is trained to hold when interests go together differently than before.

    For each batch: interests z of the histories; weights w that make them independent, learned on z without gradient;
    one step of Adam on ``sum_s w_s l_s``, with l the sampled softmax of the item that followed. Weights are not used
    afterwards. Each epoch draws one cut per sequence, at 4 items or later: history before it, target at it.

    Parameters
    ----------
    model : MultiInterest
        `ComiRecSA` or `ComiRecDR`; trained in place.
    weights : StableWeights, optional
        With its defaults, otherwise.
    lr : float
        Of Adam. The published code takes 5e-3 for `ComiRecDR`.
    epochs, warmup : int
        Of them, the first `warmup` with equal weights; with ``warmup=epochs`` it is plain ComiRec.
    batch_size : int
    negatives : int, optional
        As of `MultiInterest.loss`.
    patience : int
        Where `fit` is given sequences for validation, epochs without a better recall before it stops.
    generator : torch.Generator, optional
        On the CPU: orders, cuts and negatives. Give `weights` one of its own.

    Attributes
    ----------
    history_ : list of dict
        Of each epoch: "loss" (weighted), "hsic" and "weighted hsic" (sum over pairs of interests, mean over batches,
        under equal and under learned weights), "ess" (effective sample size over batch size), "recall" (validation).
    weights_ : (n,) float array
        Weight of each training sequence when it was last used, times the size of its batch: 1 is average.

    Raises
    ------
    InputError
        A parameter out of range; at `fit`, see there.

    Notes
    -----
    Sources: arXiv 2207.07910; ComiRec's published code (training); Zhang et al., CVPR 2021, published code (warm-up).
    Reconstructed: how both join.
    """

    def __init__(
        self,
        model: MultiInterest,
        weights: StableWeights | None = None,
        *,
        lr: float = 1e-3,
        epochs: int = 20,
        warmup: int = 2,
        batch_size: int = 128,
        negatives: int | None = None,
        patience: int = 50,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < lr < math.inf:
            raise InputError(f"lr: got {lr!r}; it must be a positive finite number")
        for name, value, least in (
            ("epochs", epochs, 1),
            ("warmup", warmup, 0),
            ("batch_size", batch_size, 1),
            ("patience", patience, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}: got {value!r}; a whole number of at least {least} is needed")
        self.model, self.weights = model, StableWeights() if weights is None else weights
        self.lr, self.epochs, self.warmup, self.batch_size = lr, epochs, warmup, batch_size
        self.negatives, self.patience, self.generator = negatives, patience, generator

    def fit(self, sequences: Sequence[Sequence[int]], validation: Sequence[Sequence[int]] = ()) -> DESMIL:
        """Train on users' sequences of items, oldest first; with validation, keep the epoch of the best recall at 50.

        Parameters
        ----------
        sequences : n sequences of int
            Items 1 to V - 1, at least 2 a sequence.
        validation : sequences of int, optional
            Of other users: the first 80 % of each are the history, the others are to be found.

        Raises
        ------
        InputError
            No sequences, one of fewer than 2 items, a number that is no item, a loss that is not finite.
        """
        short = next((row for row, sequence in enumerate(sequences) if len(sequence) < 2), None)
        if short is not None or not len(sequences):
            told = "there are none" if short is None else f"number {short} has {len(sequences[short])} items"
            raise InputError(f"sequences: {told}; at least one, of 2 items or more, is needed")
        held_out = history_and_truth(validation, self.model.length) if len(validation) else None
        optimizer = torch.optim.Adam(self.model.parameters(), self.lr)
        self.history_: list[dict[str, float]] = []
        self.weights_: Float[np.ndarray, " n"] = np.ones(len(sequences))
        best, state, waited = -math.inf, None, 0
        for epoch in range(self.epochs):
            report = self._epoch(sequences, optimizer, learn=epoch >= self.warmup)
            self.history_.append(report)
            if held_out is None:
                continue
            k = min(50, self.model.items - 1)
            report["recall"] = recall_ndcg_hit(self.recommend(held_out[0], k), held_out[1], k).recall
            waited += 1
            if report["recall"] > best:
                best, state, waited = report["recall"], copy.deepcopy(self.model.state_dict()), 0
            if waited >= self.patience:
                break
        if state is not None:
            self.model.load_state_dict(state)
        return self

    def batch_loss(
        self, z: Float[Tensor, "b K d"], target: Int[Tensor, " b"], w: Float[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """``sum_s w_s l_s``."""
        return (w * self.model.loss(z, target, self.negatives, self.generator)).sum()

    def recommend(self, history: Int[Tensor, "b L"], n: int = 50) -> Int[Tensor, "b n"]:
        """As of `MultiInterest.recommend`, in batches and in evaluation mode."""
        device = self.model.item_embedding.weight.device
        with training_mode(self.model, False):
            return torch.cat([self.model.recommend(part.to(device), n).cpu() for part in history.split(512)])

    def sample_scores(self, ids: Sequence[str | int] | None = None) -> Scores:
        """The weights of the training sequences, as `Scores` for selections or other training."""
        name = {"method": "desmil", "model": type(self.model).__name__}
        return Scores(self.weights_, range(len(self.weights_)) if ids is None else ids, "sample", name)

    def _epoch(
        self, sequences: Sequence[Sequence[int]], optimizer: torch.optim.Optimizer, learn: bool
    ) -> dict[str, float]:
        sums = {"loss": 0.0, "hsic": 0.0, "weighted hsic": 0.0, "ess": 0.0}
        batches = torch.randperm(len(sequences), generator=self.generator).split(self.batch_size)
        with training_mode(self.model, True):
            for rows in batches:
                history, target = self._cut([sequences[row] for row in rows])
                z = self.model(history)
                w = self.weights(z) if learn else z.new_full((len(z),), 1 / len(z))
                loss = self.batch_loss(z, target, w)
                if not bool(loss.isfinite()):
                    raise InputError(f"lr: the loss is {float(loss.detach())}; lower the learning rate")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.weights_[rows.numpy()] = w.double().cpu().numpy() * len(w)
                sums["loss"] += float(loss.detach())
                sums["ess"] += float(1 / w.square().sum() / len(w))
                for name, dependence in zip(("hsic", "weighted hsic"), hsic_with_and_without(z, w)):
                    sums[name] += dependence
        return {name: value / len(batches) for name, value in sums.items()}

    def _cut(self, sequences: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b L"], Int[Tensor, " b"]]:
        least = torch.tensor([min(4, len(sequence) - 1) for sequence in sequences])
        room = torch.tensor([len(sequence) for sequence in sequences]) - least
        cuts = (least + (torch.rand(len(sequences), generator=self.generator) * room).long()).tolist()
        device = self.model.item_embedding.weight.device
        history = pad_histories([sequence[:cut] for sequence, cut in zip(sequences, cuts)], self.model.length)
        target = torch.tensor([int(sequence[cut]) for sequence, cut in zip(sequences, cuts)])
        return history.to(device), target.to(device)
