"""Training of a selector, and the measure that it is judged by."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from rich.progress import track
from torch import Tensor, nn

from salience.data.inset.selector import SubsetExamples, SubsetSelector, warn_of_one_sided
from salience.errors import InputError
from salience.model.at import training_mode


@dataclass
class SelectorHistory:
    """What training did: mean `loss` of each objective by epoch, validation `jaccard` by epoch, the `best` epoch."""

    loss: dict[str, list[float]] = field(default_factory=dict)
    jaccard: list[float] = field(default_factory=list)
    best: int = 0


def mean_jaccard(chosen: Sequence[Int[Tensor, " k"]], S: Bool[Tensor, "sets n"]) -> float:
    """Mean over the sets of ``|S' and S*| / |S' or S*|``; 1 where both are empty.

    Parameters
    ----------
    chosen : sequence of (k,) int Tensors
        As `SubsetSelector.select` gives them.
    S : (sets, n) bool Tensor
        The best subsets.

    Raises
    ------
    InputError
        Numbers of sets differ.
    """
    if len(chosen) != len(S):
        raise InputError(f"chosen: {len(chosen)} choices for {len(S)} sets")
    found = torch.zeros_like(S, dtype=torch.bool)
    for row, positions in enumerate(chosen):
        found[row, positions] = True
    both, either = (found & S.bool()).sum(1).double(), (found | S.bool()).sum(1).double()
    return float(torch.where(either > 0, both / either.clamp(min=1), 1.0).mean())


def fit_selector(
    model: SubsetSelector,
    train: SubsetExamples,
    val: SubsetExamples,
    *,
    generator: torch.Generator,
    lr: float = 1e-4,
    weight_decay: float = 1e-5,
    clip: float = 10.0,
    epochs: int = 100,
    patience: int = 6,
    batch_size: int = 128,
    progress: bool = False,
) -> SelectorHistory:
    """Train a selector in place, and leave it as it was after its best validation epoch.

    On each batch every objective takes one step of its own Adam, in their order: for INSET first the recognition
    network's, then the utility's, which sees the recognition network just updated. After each epoch as many elements
    as are right are chosen on `val`, and their mean Jaccard index decides.

    Parameters
    ----------
    model : SubsetSelector
        In training mode meanwhile; every module gets its own flag back.
    train, val : SubsetExamples
        Batches are moved to the model's device.
    generator : torch.Generator
        On the CPU. Draws orders, subsets and negatives, and seeds what the encoder itself draws.
    lr, weight_decay : float
        Of every Adam.
    clip : float
        Largest norm of the gradient over all parameters of the model.
    epochs : int
        At most.
    patience : int
        Training ends after so many epochs in a row without a better validation index.
    batch_size : int
    progress : bool
        Draw a progress bar over the epochs.

    Raises
    ------
    InputError
        Shapes or sizes do not fit, or a loss is no longer finite: the model then holds its best state so far.

    Notes
    -----
    Source: the published code of EquiVSet, whose defaults these are; it counts what an earlier step left in the
    gradients when it clips, and here gradients are cleared before.
    """
    if min(epochs, patience, batch_size) < 1 or not 0 < clip < math.inf:
        raise InputError(
            f"epochs, patience, batch_size, clip: got {epochs}, {patience}, {batch_size}, {clip}; at least 1, and a "
            "positive clip, are needed"
        )
    train, val = train.checked("train"), val.checked("val")
    warn_of_one_sided(train.S, train.valid)  # type: ignore[arg-type]
    objectives = model.objectives()
    if not objectives:
        raise InputError(f"model: {type(model).__name__} has nothing to train")
    optimizers = [torch.optim.Adam(o.parameters, lr=lr, weight_decay=weight_decay) for o in objectives]
    history = SelectorHistory({o.name: [] for o in objectives})
    device = next(model.parameters()).device
    best, bad = copy.deepcopy(model.state_dict()), 0
    seeded = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(seeded), training_mode(model, True):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for epoch in track(range(epochs), "epochs", disable=not progress):
            sums = torch.zeros(len(objectives), dtype=torch.float64)
            for rows in torch.randperm(len(train.S), generator=generator).split(batch_size):
                batch = [part[rows].to(device) for part in train]  # type: ignore[index]
                for at, (objective, optimizer) in enumerate(zip(objectives, optimizers)):
                    model.zero_grad(set_to_none=True)
                    loss = objective.loss(*batch, generator)  # type: ignore[call-arg, arg-type]
                    if not bool(torch.isfinite(loss)):
                        model.load_state_dict(best)
                        raise InputError(
                            f"lr: the loss of the {objective.name} is {float(loss.detach())} in epoch {epoch + 1}; "
                            f"lower the learning rate of {lr:g}. The model holds its best state so far"
                        )
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    sums[at] += float(loss.detach()) * len(rows)
            for name, value in zip(history.loss, (sums / len(train.S)).tolist()):
                history.loss[name].append(value)
            history.jaccard.append(mean_jaccard(model.select(val.V, val.S.sum(1), val.valid), val.S))
            if history.jaccard[-1] > max(history.jaccard[:-1], default=-1.0):
                history.best, best, bad = epoch, copy.deepcopy(model.state_dict()), 0
            else:
                bad += 1
                if bad >= patience:
                    break
    model.load_state_dict(best)
    model.zero_grad(set_to_none=True)
    return history
