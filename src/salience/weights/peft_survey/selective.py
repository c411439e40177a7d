"""Train a part of what is there: by name (BitFit, last layers), by Fisher information, at random, or sparsely."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.model.at import run, training_mode
from salience.weights.bn_only.layers import norm_layers
from salience.weights.bn_only.select import ParamSelection, hold_frozen
from salience.weights.peft_survey.blocks import find_blocks

Batch = Any


class FreezeSelector:
    """Chooses parameters by name.

    Parameters
    ----------
    patterns : str or sequence of str
        "bitfit" (every bias), "layernorm" (gains and biases of normalisation), "last:k" (the last k transformer
        blocks), or patterns of names such as ``"*.q_proj.weight"``.

    References
    ----------
    Ben Zaken et al., ACL 2022 (BitFit).
    """

    def __init__(self, patterns: str | Sequence[str]) -> None:
        self.patterns = patterns

    def names(self, model: nn.Module) -> list[str]:
        """Names of the chosen parameters, in the model's order.

        Raises
        ------
        InputError
            Nothing is chosen: the model has no biases, no normalisation with parameters, fewer blocks, no such name.
        """
        names = [name for name, _ in model.named_parameters()]
        if self.patterns == "bitfit":
            chosen = {name for name in names if name.rpartition(".")[2] == "bias"}
            if not chosen:
                raise InputError(
                    f"model: {type(model).__name__} has no biases, so there is nothing for BitFit to train"
                )
        elif self.patterns == "layernorm":
            inside = tuple(f"{layer}." for layer in norm_layers(model))
            chosen = {name for name in names if name.startswith(inside)} if inside else set()
            if not chosen:
                raise InputError(f"model: {type(model).__name__} has no normalisation with gains or biases")
        elif isinstance(self.patterns, str) and self.patterns.startswith("last:"):
            chosen = _last(model, self.patterns, names)
        else:
            chosen = set()
            for pattern in [self.patterns] if isinstance(self.patterns, str) else self.patterns:
                found = fnmatch.filter(names, pattern)
                if not found:
                    raise InputError(f"patterns: no parameter is called {pattern!r}; {nearest(pattern, names)}")
                chosen.update(found)
        return [name for name in names if name in chosen]


def _last(model: nn.Module, pattern: str, names: Sequence[str]) -> set[str]:
    blocks, count = find_blocks(model), pattern.removeprefix("last:")
    if not count.isdigit() or not 1 <= int(count) <= len(blocks):
        raise InputError(f"patterns: got {pattern!r}; give last:k with k from 1 to {len(blocks)}, the model's blocks")
    inside = tuple(f"{block.name}." for block in blocks[-int(count) :])
    return {name for name in names if name.startswith(inside)}


class GradientMask:
    """Which entries may train: fixed ones, kept by `hold_frozen`, or new random ones at every step.

    Parameters
    ----------
    masks : dict of str to bool Tensor
        By name of the parameter; True trains.
    p : float, optional
        Child-Tuning_F instead: at every step each gradient is kept with probability p and divided by it.
    generator : torch.Generator, optional
        On the CPU; draws the masks of Child-Tuning_F.
    """

    def __init__(
        self, masks: dict[str, Tensor], p: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        self.masks, self.p, self.generator = masks, p, generator

    @classmethod
    def fisher(
        cls,
        model: nn.Module,
        batches: Iterable[tuple[Batch, Tensor]],
        keep: float = 0.005,
        *,
        names: Sequence[str] | None = None,
        log_likelihood: Callable[[Any, Tensor], Tensor] | None = None,
        samples: int = 1024,
    ) -> GradientMask:
        """The entries with the largest empirical Fisher information.

            F_j = (1/N) sum_i (d log p(y_i | x_i) / d theta_j)^2

        one sample at a time, since the square of a batch's gradient is another number. The mask is chosen once,
        before training.

        Parameters
        ----------
        model : nn.Module
            Left as it was.
        batches : iterable of (inputs, targets)
        keep : float in (0, 1]
            Share of entries that may train; ``round(keep n)``, at least one, over all tensors together.
        names : sequence of str, optional
            Parameters to choose from; all by default.
        log_likelihood : callable, optional
            ``log p`` of one sample from (output, targets), both with one row; by default that of class labels.
        samples : int
            N at most; 128 to 1024 are usual.

        References
        ----------
        Sung et al., NeurIPS 2021 (FISH mask), section 3.1; Xu et al., EMNLP 2021 (Child-Tuning_D).
        """
        if not 0 < keep <= 1:
            raise InputError(f"keep: got {keep!r}; the share of entries to train must be above 0 and at most 1")
        information = fisher_information(model, batches, names=names, log_likelihood=log_likelihood, samples=samples)
        flat = torch.cat([value.flatten() for value in information.values()])
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[flat.topk(max(1, round(keep * len(flat)))).indices] = True
        parts = chosen.split([value.numel() for value in information.values()])
        return cls({name: part.view(value.shape) for (name, value), part in zip(information.items(), parts)
                    if part.any()})  # fmt: skip

    @classmethod
    def child(cls, p: float, generator: torch.Generator) -> GradientMask:
        """Child-Tuning_F: ``g <- g * Bernoulli(p) / p``, drawn anew at every step.

        References
        ----------
        Xu et al., EMNLP 2021, section 2.2.
        """
        if not 0 < p <= 1:
            raise InputError(f"p: got {p!r}; the probability to keep a gradient must be above 0 and at most 1")
        return cls({}, p, generator)

    @property
    def count(self) -> int:
        """Entries that may train by fixed masks."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def apply(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
        """Let each step of `optimizer` obey the mask; masked entries stay as they are, weight decay or not."""
        if self.p is None:
            names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
            hold_frozen(optimizer, model, ParamSelection("mask", names, self.masks, self.count, {}))
            return optimizer
        p, generator = self.p, self.generator

        def thin(*_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        kept = torch.rand(parameter.shape, generator=generator).to(parameter.device) < p
                        parameter.grad.mul_(kept.to(parameter.grad.dtype) / p)

        optimizer.register_step_pre_hook(thin)
        return optimizer


def fisher_information(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Tensor]],
    *,
    names: Sequence[str] | None = None,
    log_likelihood: Callable[[Any, Tensor], Tensor] | None = None,
    samples: int = 1024,
) -> dict[str, Float[Tensor, "*_"]]:
    """Mean square of the gradient of each sample's log-likelihood, by name of the parameter; on the CPU, in float64.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode meanwhile; left as it was.
    batches, names, log_likelihood, samples
        As of `GradientMask.fisher`.

    Raises
    ------
    NothingToDo
        There is no sample.
    DataError
        The information is not finite.
    """
    wanted = {name: p for name, p in model.named_parameters() if names is None or name in set(names)}
    likelihood = log_likelihood or _log_likelihood
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in wanted.items()}
    seen = 0
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        with training_mode(model, False), torch.enable_grad():
            for inputs, targets in batches:
                for row in range(min(len(targets), samples - seen)):
                    value = likelihood(run(model, _row(inputs, row)), targets[row : row + 1])
                    grads = torch.autograd.grad(value.sum(), list(wanted.values()), allow_unused=True)
                    for name, grad in zip(wanted, grads):
                        if grad is not None:
                            total[name] += grad.detach().double().square().cpu()
                    seen += 1
                if seen >= samples:
                    break
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
    if not seen:
        raise NothingToDo("batches: there is no sample to compute Fisher information from")
    for name, value in total.items():
        if not torch.isfinite(value).all():
            raise DataError(f"batches: the Fisher information of {name!r} is not finite")
    return {name: value / seen for name, value in total.items()}


def _log_likelihood(output: Any, targets: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return -nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")


def _row(inputs: Batch, row: int) -> Batch:
    if isinstance(inputs, Tensor):
        return inputs[row : row + 1]
    if isinstance(inputs, dict):
        return {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return type(inputs)(_row(part, row) for part in inputs)


class SparseDiff(nn.Module):
    """A weight plus a change most of whose entries are zero, in the end: diff pruning.

        theta + z * delta,   z = clamp(s (zeta - gamma) + gamma, 0, 1),
        s = sigmoid((log u - log(1 - u) + log_alpha) / beta),  u uniform; without the noise in evaluation mode

    Parameters
    ----------
    like : Tensor
        The weight that it is a parametrisation of.
    start : float
        First value of log_alpha; 0 gives every entry a fair chance.

    References
    ----------
    Guo et al., ACL 2021, section 3; hard-concrete distribution of Louizos et al., ICLR 2018 (beta 2/3, gamma -0.1,
    zeta 1.1).
    """

    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

    def __init__(self, like: Tensor, start: float = 0.0) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(like))
        self.log_alpha = nn.Parameter(torch.full_like(like, start))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + self.gates() * self.delta

    def gates(self) -> Float[Tensor, "*_"]:
        """z, drawn in training mode."""
        if self.training:
            u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / self.BETA)
        else:
            s = torch.sigmoid(self.log_alpha)
        return (s * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

    def expected_count(self) -> Float[Tensor, ""]:
        """How many entries of z are expected not to be zero."""
        return torch.sigmoid(self.log_alpha - self.BETA * math.log(-self.GAMMA / self.ZETA)).sum()

    @torch.no_grad()
    def kept(self) -> Bool[Tensor, "*_"]:
        """Entries that change the weight in evaluation mode."""
        s = torch.sigmoid(self.log_alpha)
        return (s * (self.ZETA - self.GAMMA) + self.GAMMA > 0) & (self.delta != 0)


def add_diffs(model: nn.Module, layers: Sequence[str], start: float = 0.0) -> None:
    """Give the weights of some layers a `SparseDiff`, in place."""
    for name in layers:
        layer: Any = model.get_submodule(name)
        diff = SparseDiff(layer.weight.detach(), start)
        diff.train(layer.training)
        parametrize.register_parametrization(layer, "weight", diff, unsafe=True)


def diffs_of(model: nn.Module) -> list[SparseDiff]:
    """All diffs of a model."""
    return [module for module in model.modules() if isinstance(module, SparseDiff)]
