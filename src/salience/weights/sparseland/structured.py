"""Remove whole channels: a network that is smaller in fact, without masks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from salience.errors import InputError, NothingToDo, nearest
from salience.model.at import run, training_mode
from salience.model.channels import ChannelGroup, channel_groups
from salience.model.narrowing import fold_norms, input_rows, replace_tensors, slices
from salience.weights.ifm.merging import choose_groups, example_of

By = Literal["l1", "l2", "gamma", "activation", "random"]


class PrunedChannels(NamedTuple):
    """The new network, channels before and after by group, and which of the old ones are left."""

    model: nn.Module
    widths: dict[str, tuple[int, int]]
    kept: dict[str, tuple[int, ...]]


def prune_channels(
    model: nn.Module,
    keep: float | Mapping[str, int],
    *,
    by: By = "l1",
    example: Any = None,
    batches: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
    groups: Sequence[str] | None = None,
    fold_norm: bool = False,
) -> PrunedChannels:
    """Remove the least important channels of each hidden width, with all that makes or reads them.

        l1, l2      norm of the weights that make the channel
        gamma       |scale| of the batch normalisations over it
        activation  ||x_c||_2 over data, times the L1 norm of the weights that read it (as Wanda, by channel)
        random      a random number

    Supported: as of `iterative_feature_merging`.

    Parameters
    ----------
    model : torch.nn.Module
        Unchanged.
    keep : float or dict of str to int
        Share of the channels of each group to keep, in (0, 1]; or how many of each, as ``{group: width}``.
    by : {"l1", "l2", "gamma", "activation", "random"}
    example : tensor, tuple or mapping, optional
        Inputs of one pass; `model.dummy_inputs` by default.
    batches : iterable, optional
        Of inputs, or pairs of inputs and targets; for "activation".
    generator : torch.Generator, optional
        On the CPU, for "random".
    groups : sequence of str, optional
        Names or patterns, as of `iterative_feature_merging`.
    fold_norm : bool
        Fold batch normalisation into the layers first, so that norms count what it scales.

    Raises
    ------
    InputError
        An option out of range, an unknown group, or a group without what `by` needs.
    NothingToDo
        There are no batches.

    References
    ----------
    l1: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; gamma: Liu et al., "Network Slimming", 2017.
    """
    if by not in ("l1", "l2", "gamma", "activation", "random"):
        raise InputError(f"by: got {by!r}; it must be l1, l2, gamma, activation or random")
    if (by == "activation") != (batches is not None) or (by == "random") != (generator is not None):
        raise InputError("by: 'activation' needs batches, 'random' needs a generator, and nothing else takes them")
    example = example_of(model, example)
    narrow = copy.deepcopy(model)
    found = channel_groups(narrow, example)
    if fold_norm and by != "gamma":
        fold_norms(narrow, found.norms)
        found = channel_groups(narrow, example)
    names = list(keep) if isinstance(keep, Mapping) else groups
    chosen, _ = choose_groups(model, found.groups, names)
    if isinstance(keep, Mapping) and (odd := set(keep) - {group.name for group in chosen}):
        free = [group.name for group in found.groups if not group.fixed]
        raise InputError(f"keep: {min(odd)!r} is no group that can be narrowed; {nearest(min(odd), free)}")
    state = {name: value.cpu() for name, value in narrow.state_dict().items()}
    device = {name: value.device for name, value in narrow.state_dict().items()}
    norms = _activations(narrow, chosen, batches) if batches is not None else {}
    kept: dict[str, tuple[int, ...]] = {}
    new = dict(state)
    for group in chosen:
        count = _count(keep, group)
        scores = _importance(state, group, by, norms, generator)
        order = scores.sort(descending=True, stable=True).indices[:count].sort().values
        kept[group.name] = tuple(order.tolist())
        for member in group.members:
            new[member.tensor] = slices(new[member.tensor], member.axis, order, member.block)
    changed = {member.tensor for group in chosen for member in group.members}
    replace_tensors(narrow, {name: new[name].clone().to(device[name]) for name in changed})
    return PrunedChannels(narrow, {g.name: (g.width, len(kept[g.name])) for g in chosen}, kept)


def _count(keep: float | Mapping[str, int], group: ChannelGroup) -> int:
    if isinstance(keep, Mapping):
        count = keep[group.name]
    elif not 0 < keep <= 1:
        raise InputError(f"keep: got {keep!r}; it must lie in (0, 1]")
    else:
        count = max(1, round(keep * group.width))
    if not 1 <= count <= group.width:
        raise InputError(f"keep: got {count} for {group.name!r}; it must lie in 1..{group.width}")
    return count


def _importance(
    state: Mapping[str, Tensor], group: ChannelGroup, by: str, norms: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    if by == "random":
        return torch.rand(group.width, generator=generator)
    scores = torch.zeros(group.width, dtype=torch.float64)
    counted = 0
    for member in group.members:
        tensor = state[member.tensor].double()
        rows = tensor.movedim(member.axis, 0).reshape(group.width, -1)
        if by in ("l1", "l2") and member.role == "out":
            scores += rows.abs().sum(1) if by == "l1" else rows.square().sum(1)
        elif by == "gamma" and member.tensor.endswith(".weight") and member.role == "vector":
            scores += tensor.abs()
        elif by == "activation" and member.role == "in":
            scores += norms[member.tensor].cpu() * rows.abs().sum(1)
        else:
            continue
        counted += 1
    if not counted:
        raise InputError(f"by: {by!r} finds nothing to go by in group {group.name!r}")
    return scores


def _activations(model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Size of each channel over the data, at each layer that reads it."""
    readers = {m.tensor: (g.width, m.block) for g in groups for m in g.members if m.role == "in"}
    squares: dict[str, Tensor] = {}

    def hook_of(name: str, width: int) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            total = input_rows(layer, args[0].detach()).double().square().sum(0).view(width, -1).sum(1)
            squares[name] = squares.get(name, 0) + total

        return hook

    modules = dict(model.named_modules())
    owners = {name: modules[name.rpartition(".")[0]] for name in readers}
    handles = [owners[name].register_forward_pre_hook(hook_of(name, width)) for name, (width, _) in readers.items()]
    try:
        with training_mode(model, False), torch.no_grad():
            for batch in batches:
                run(model, batch[0] if isinstance(batch, tuple | list) else batch)
    finally:
        for handle in handles:
            handle.remove()
    if not squares:
        raise NothingToDo("batches: there are none")
    return {name: value.sqrt() for name, value in squares.items()}
