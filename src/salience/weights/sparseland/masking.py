"""From scores to masks with exact counts, and masks over a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from salience.errors import InputError, nearest
from salience.weights.sparseland.densities import Prunable, allocate, count_kept, counts_kept, prunable
from salience.weights.sparseland.scoring import score_synflow

Masks = dict[str, Tensor]
Grain = Literal["weight", "kernel", "channel"]


def mask_from_scores(
    scores: Mapping[str, Tensor],
    density: float | Mapping[str, float] | None = None,
    *,
    scope: Literal["global", "layer", "row"] = "global",
    n_m: tuple[int, int] | None = None,
    grain: Grain = "weight",
    transposed: Collection[str] = (),
) -> Masks:
    """Keep the weights with the largest scores: exactly as many as asked for, ties by position.

    Parameters
    ----------
    scores : dict of str to Tensor
        One per weight, as the `score_` functions give them.
    density : float or dict of str to float
        Share to keep; one for each weight (see `allocate`) goes with scope "layer" or "row". Left out with `n_m`.
    scope : {"global", "layer", "row"}
        Compare all weights, those of a layer, or those that lead to one output.
    n_m : (N, M), optional
        Instead: the N largest of each M consecutive inputs, such as (2, 4).
    grain : {"weight", "kernel", "channel"}
        What is kept or dropped as one, by the sum of its scores: single weights, all places of a kernel, or all
        that leads to an output channel.
    transposed : collection of str
        Weights that are stored (in, out), as `Conv1D` of `transformers` does.

    Returns
    -------
    dict of str to bool Tensor
        True where the weight stays. Warns of a layer that is left without any.

    Raises
    ------
    InputError
        Options that do not fit together or are out of range, scores that are not finite, or inputs that M does
        not divide.
    """
    if (density is None) == (n_m is None):
        raise InputError("density: give either it or n_m")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise InputError(f"scores: those of {name!r} are not finite")
    if n_m is not None:
        return {name: _n_of_m(name, score, n_m, name in transposed) for name, score in scores.items()}
    shares: dict[str, Any] = dict(density) if isinstance(density, Mapping) else dict.fromkeys(scores, density)
    _check_shares(shares, scores, scope, isinstance(density, Mapping))
    units = {name: _units(score, grain, name in transposed) for name, score in scores.items()}
    if scope == "global":
        flat = torch.cat([unit.flatten().to(torch.promote_types(unit.dtype, torch.float32)) for unit in units.values()])
        sizes = torch.cat([
            torch.full((unit.numel(),), scores[name].numel() // unit.numel()) for name, unit in units.items()
        ])  # fmt: skip
        kept = _within_budget(flat, sizes, next(iter(shares.values())))
        parts = kept.split([unit.numel() for unit in units.values()])
        masks = {name: part.view(units[name].shape) for name, part in zip(units, parts)}
    elif scope == "layer":
        counts = counts_kept(shares, {name: unit.numel() for name, unit in units.items()})
        masks = {name: _largest(unit.flatten(), counts[name]).view(unit.shape) for name, unit in units.items()}
    else:
        masks = {name: _rows(unit, shares[name], name in transposed) for name, unit in units.items()}
    masks = {name: mask.expand(scores[name].shape).clone() for name, mask in masks.items()}
    warn_of_collapse(masks)
    return masks


def random_masks(
    densities: Mapping[str, float], shapes: Mapping[str, Sequence[int]], generator: torch.Generator
) -> Masks:
    """Random masks with ``d_l N_l`` ones in each layer, rounded up or down so that their total is right.

    Parameters
    ----------
    densities : mapping of str to float
        As of `allocate`.
    shapes : mapping of str to sequence of int
    generator : torch.Generator
        On the CPU.
    """
    scores = {name: torch.rand(tuple(shapes[name]), generator=generator) for name in densities}
    return mask_from_scores(scores, dict(densities), scope="layer")


def shuffle_masks(masks: Mapping[str, Bool[Tensor, "*_"]], generator: torch.Generator) -> Masks:
    """The same number of ones in each layer, at random places: what is left of a method but its densities.

    Parameters
    ----------
    masks : dict of str to bool Tensor
    generator : torch.Generator
        On the CPU.
    """
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }


def synflow_masks(
    model: nn.Module,
    example: Tensor,
    density: float | Mapping[str, float],
    rounds: int = 100,
    exclude: Sequence[str] = (),
    *,
    scope: Literal["global", "layer", "row"] = "global",
    grain: Grain = "weight",
) -> Masks:
    """SynFlow pruning before training: after round k the density is ``d^(k / rounds)``, scored anew each time.

    Supported: as of `score_synflow`.

    Parameters
    ----------
    model : torch.nn.Module
        Unchanged.
    example : Tensor
        As of `score_synflow`.
    density : float or mapping of str to float
        Share to keep of all weights, in (0, 1]; or of each.
    rounds : int
        One round collapses layers.
    exclude : sequence of str
        As of `prunable`.
    scope, grain
        As of `mask_from_scores`. The paper's is global; within layers each is brought to its density in these rounds.

    Raises
    ------
    InputError
        An option out of range, or as of `score_synflow` and `mask_from_scores`.
    """
    if rounds < 1 or not (isinstance(density, Mapping) or 0 < density <= 1):
        raise InputError(f"density and rounds: got {density!r} and {rounds!r}; density in (0, 1], rounds at least 1")

    def after(k: int) -> float | dict[str, float]:
        if isinstance(density, Mapping):
            return {name: share ** (k / rounds) for name, share in density.items()}
        return density ** (k / rounds)

    masks: Masks | None = None
    for k in range(1, rounds + 1):
        scores = score_synflow(model, example, masks, exclude)
        with warnings.catch_warnings():
            if k < rounds:
                warnings.simplefilter("ignore")  # of collapse the last round tells
            masks = mask_from_scores(scores, after(k), scope=scope, grain=grain)
    assert masks is not None
    return masks


def densities_of(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of ones in each mask."""
    return {name: float(mask.double().mean()) for name, mask in masks.items()}


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights outside the masks to 0, in place.

    Supported: as of `prunable`.

    Parameters
    ----------
    model : torch.nn.Module
    masks : dict of str to bool Tensor

    Raises
    ------
    InputError
        A mask without its weight, or of another shape.
    """
    for name, weight in weights_of(model, masks).items():
        weight.masked_fill_(~masks[name].to(weight.device), 0)


class MaskOf(nn.Module):
    """Parametrisation of a weight by its mask, ``W * M``; the mask is a buffer, so `state_dict` keeps it."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask.to(weight.dtype)  # type: ignore[operator]


class SRSTE(nn.Module):
    """Parametrisation that trains an N:M sparse weight from dense: sparse forward, straight-through backward.

        W_forward = W * M(W),   dL/dW = dL/dW_forward + decay (1 - M) W

    Parameters
    ----------
    n_m : (int, int)
        N of M consecutive inputs are kept.
    decay : float
        Lambda, 2e-4 in the paper.
    transposed : bool
        The weight is stored (in, out).

    References
    ----------
    Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """

    def __init__(self, n_m: tuple[int, int] = (2, 4), decay: float = 2e-4, transposed: bool = False) -> None:
        super().__init__()
        self.n_m, self.decay, self.transposed = n_m, decay, transposed

    def forward(self, weight: Tensor) -> Tensor:
        mask = _n_of_m("weight", weight.detach().abs(), self.n_m, self.transposed)
        return _StraightThrough.apply(weight, mask, self.decay)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradient + ctx.decay * ~mask * weight, None, None


def parametrize_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put each mask over its weight as a parametrisation, in place: any loop trains it, `state_dict` keeps it.

    Supported: as of `prunable`, without tied weights. Undo with
    ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``, which leaves the masked weight.

    Parameters
    ----------
    model : torch.nn.Module
    masks : dict of str to bool Tensor

    Raises
    ------
    InputError
        A mask without its weight or of another shape, or a tied weight.
    """
    weights_of(model, masks)
    entries = prunable(model)
    for name in masks:
        shared = [n for n, p in model.named_parameters(remove_duplicate=False) if p is entries[name].weight]
        if len(shared) > 1:
            raise InputError(f"masks: {name!r} is tied to {shared[-1]!r}; use apply_masks or SparseTrainer")
    for name, mask in masks.items():
        weight = entries[name].weight
        parametrize.register_parametrization(
            model.get_submodule(entries[name].layer), "weight", MaskOf(mask.to(weight.device))
        )


def finalize(
    model: nn.Module, masks: Mapping[str, Tensor], format: Literal["dense", "csr", "prune", "2:4"] = "dense"
) -> nn.Module:
    """A copy of the model with the masks made permanent.

    Supported: as of `prunable`; "csr" and "2:4" turn linear layers only.

    Parameters
    ----------
    model : torch.nn.Module
        Unchanged.
    masks : dict of str to bool Tensor
    format : {"dense", "csr", "prune", "2:4"}
        Zeros in dense weights; compressed sparse rows, which run on the CPU; `torch.nn.utils.prune` over the
        weight; or the semi-structured format of NVIDIA GPUs, which needs 2:4 masks and half precision there.

    Raises
    ------
    InputError
        Unknown format, masks that do not fit, or "2:4" without such masks or a GPU.
    """
    if format not in ("dense", "csr", "prune", "2:4"):
        raise InputError(f"format: got {format!r}; it must be dense, csr, prune or 2:4")
    done = copy.deepcopy(model)
    apply_masks(done, masks)
    entries = prunable(done)
    for name, mask in masks.items():
        layer: Any = done.get_submodule(entries[name].layer)
        weight = entries[name].weight
        if format == "prune":
            prune.custom_from_mask(layer, "weight", mask.to(weight.device))
        elif format == "csr" and isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(weight.detach().to_sparse_csr(), requires_grad=False)
        elif format == "2:4" and isinstance(layer, nn.Linear):
            if weight.device.type != "cuda" or not _is_two_of_four(mask):
                raise InputError(f"format: '2:4' needs masks with 2 of 4 and a GPU; {name!r} is on {weight.device}")
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.detach()), requires_grad=False)
    return done


def weights_of(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that masks are for, checked."""
    entries = prunable(model)
    for name, mask in masks.items():
        if name not in entries:
            raise InputError(f"masks: the model has no prunable weight {name!r}; {nearest(name, entries)}")
        if mask.shape != entries[name].weight.shape or mask.dtype != torch.bool:
            shape = tuple(entries[name].weight.shape)
            raise InputError(f"masks: {name!r} is {mask.dtype} {tuple(mask.shape)}; it must be bool {shape}")
    return {name: entries[name].weight for name in masks}


def transposed_names(weights: Mapping[str, Prunable]) -> set[str]:
    """Names of the weights that are stored (in, out)."""
    return {name for name, entry in weights.items() if entry.in_axis == 0}


def warn_of_collapse(masks: Mapping[str, Tensor]) -> None:
    """Warn if a layer is left without a single weight, which cuts the network."""
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        warnings.warn(f"layer collapse: {', '.join(empty[:5])} kept no weight", stacklevel=3)


def starting_masks(weights: Mapping[str, Prunable], density: float, mode: Any, generator: torch.Generator) -> Masks:
    """Random masks at the densities that `allocate` gives."""
    shapes = {name: tuple(entry.weight.shape) for name, entry in weights.items()}
    return random_masks(allocate(shapes, density, mode), shapes, generator)


def _largest(flat: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest entries; of equal ones at the border the first."""
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if count <= 0:
        return mask
    border = flat.kthvalue(flat.numel() - count + 1).values if count < flat.numel() else flat.min()
    mask = flat > border
    ties = (flat == border).nonzero()[: count - int(mask.sum()), 0]
    mask[ties] = True
    return mask


def _within_budget(flat: Tensor, sizes: Tensor, share: float) -> Tensor:
    """Mask of the largest units that hold the share of all weights; units differ in size where they are channels."""
    budget = count_kept(share, int(sizes.sum()))
    if bool((sizes == 1).all()):
        return _largest(flat, budget)
    order = flat.argsort(descending=True, stable=True)
    held = sizes.to(order.device)[order].cumsum(0)
    count = int((held <= budget).sum())
    if count < len(flat) and int(held[count]) - budget < budget - (int(held[count - 1]) if count else 0):
        count += 1  # the next one brings it closer
    return _largest(flat, max(count, 1))


def _rows(unit: Tensor, share: float, transposed: bool) -> Tensor:
    moved = unit.transpose(0, 1) if transposed else unit
    flat = moved.flatten(1)
    kept = flat.sort(dim=1, descending=True, stable=True).indices[
        :, : max(int(share > 0), count_kept(share, flat.shape[1]))
    ]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view(moved.shape)
    return mask.transpose(0, 1) if transposed else mask


def _n_of_m(name: str, score: Tensor, n_m: tuple[int, int], transposed: bool) -> Tensor:
    n, m = n_m
    axis = 0 if transposed else 1
    if not 0 < n <= m:
        raise InputError(f"n_m: got {n_m!r}; N must lie in 1..M")
    if score.ndim < 2 or score.shape[axis] % m:
        raise InputError(
            f"n_m: {name!r} has {score.shape[axis] if score.ndim > 1 else 1} inputs, not a multiple of {m}"
        )
    moved = score.movedim(axis, -1)
    groups = moved.reshape(-1, m)
    kept = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
    return mask.view(moved.shape).movedim(-1, axis)


def _units(score: Tensor, grain: str, transposed: bool) -> Tensor:
    """Mean scores of what is kept or dropped as one, in a shape that broadcasts to that of the weight."""
    if grain == "weight":
        return score
    if grain not in ("kernel", "channel"):
        raise InputError(f"grain: got {grain!r}; it must be weight, kernel or channel")
    if grain == "kernel":
        return score.mean(tuple(range(2, score.ndim)), keepdim=True) if score.ndim > 2 else score
    out = 1 if transposed else 0
    return score.mean([axis for axis in range(score.ndim) if axis != out], keepdim=True)


def _check_shares(shares: Mapping[str, Any], scores: Mapping[str, Tensor], scope: str, each: bool) -> None:
    if scope not in ("global", "layer", "row"):
        raise InputError(f"scope: got {scope!r}; it must be global, layer or row")
    if each and scope == "global":
        raise InputError("density: one for each weight goes with scope 'layer' or 'row'")
    if set(shares) != set(scores):
        odd = min(set(shares) ^ set(scores))
        raise InputError(f"density and scores name different weights, such as {odd!r}")
    for name, share in shares.items():
        if not 0 <= share <= 1 or (share == 0 and not each):
            raise InputError(f"density: got {share!r} for {name!r}; it must lie in (0, 1]")


def _is_two_of_four(mask: Tensor) -> bool:
    return mask.shape[1] % 4 == 0 and bool((mask.reshape(-1, 4).sum(1) <= 2).all())
