"""Merge the most similar channels of each hidden width, one pair at a time."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor, nn

from salience.errors import DataError, InputError, nearest
from salience.model.channels import ChannelGroup, Member, channel_groups
from salience.model.flops import layer_flops
from salience.model.narrowing import fold_norms, replace_tensors, slices

Rule = Literal["mean_in", "sum_in"]


class Merge(NamedTuple):
    """One merge: channel `gone` of a group went into channel `kept`, at this distance of the largest then."""

    round: int
    group: str
    kept: int
    gone: int
    distance: float
    largest: float


@dataclass(frozen=True)
class IFMResult:
    """A network of fewer channels.

    Parameters
    ----------
    model : torch.nn.Module
        The new network, smaller in fact and not by masks; the one that was given is unchanged. Save it with
        `salience.model.save_narrowed`.
    widths : dict of str to (int, int)
        Channels before and after, by group.
    grouping : dict of str to tuple of tuples of int
        For each group and each channel that is left, the channels of the old network that it stands for.
    dead : dict of str to tuple of int
        Channels that nothing read and that were dropped.
    merges : list of Merge
        In order.
    skipped : dict of str to str
        Groups that were left alone, and why.
    params, flops : (int, int)
        Entries of all tensors, and operations of one pass over the example, before and after.
    """

    model: nn.Module
    widths: dict[str, tuple[int, int]]
    grouping: dict[str, tuple[tuple[int, ...], ...]]
    dead: dict[str, tuple[int, ...]]
    merges: list[Merge]
    skipped: dict[str, str]
    params: tuple[int, int]
    flops: tuple[int, int]


def channel_distance(state: Mapping[str, Tensor], group: ChannelGroup) -> Float[Tensor, "n n"]:
    """Squared distance of the channels of a group, over all weights that make or read them.

        d_ij = sum over tensors t with two dimensions or more of ||t[i] - t[j]||^2

    with the group's axis of t moved to the front and the rest flattened; biases and normalisation do not count.

    Parameters
    ----------
    state : mapping of str to Tensor
        As `model.state_dict()`.
    group : ChannelGroup

    Returns
    -------
    Tensor, shape (n, n), float64
        Not below 0; what is below rounding is exactly 0.

    References
    ----------
    Chen et al., arXiv 2310.06756, algorithm 1, and `self_merge_weight` of the official code.
    """
    return _distances(_gram(state, group))


def iterative_feature_merging(
    model: nn.Module,
    *,
    example: Any = None,
    beta: float = 0.1,
    max_ratio: float = 1.0,
    groups: Sequence[str] | None = None,
    rule: Rule = "mean_in",
    fold_norm: bool = True,
    progress: bool = False,
) -> IFMResult:
    """Merge similar channels until those left are different: no data, no training.

    In rounds, each group of channels (see `salience.model.channels`) in turn merges its closest pair (i, j) if

        min d <= beta * max d

    (`channel_distance`, computed anew after each merge). With m the number of channels that i and j stand for,

        mean_in:  what makes them  (m_i w_i + m_j w_j) / (m_i + m_j),  what reads them  v_i + v_j
        sum_in:   what makes them  w_i + w_j,  what reads them  (m_i v_i + m_j v_j) / (m_i + m_j)

    Both are exact for duplicates behind a ReLU; behind other activations only "mean_in" is. The end is reached
    when no group moved. Ties go to the lowest (i, j); there is no randomness.

    Supported: networks of linear and convolution layers with batch normalisation and residual sums (MLPs, VGG,
    ResNet), and the feed-forward parts of transformers (Llama, Qwen2, GPT-2, ViT). Channels that attention,
    layer normalisation or the output hold in place are skipped, with the reason.

    Parameters
    ----------
    model : torch.nn.Module
        Unchanged; taken as in evaluation mode.
    example : tensor, tuple or mapping, optional
        Inputs of one pass, to see which tensors carry the same channels. By default a blank image or the
        `dummy_inputs` that models of `transformers` have.
    beta : float
        Threshold in [0, 1]. At 1 or above (`math.inf`) everything would merge, so `max_ratio` must be below 1.
    max_ratio : float
        Share of the channels of each group that may be merged away, in [0, 1]; rounded up.
    groups : sequence of str, optional
        Only groups with these names or patterns, such as ``["layer3.*", "layer4.*"]``.
    rule : {"mean_in", "sum_in"}
        The second is that of the official code.
    fold_norm : bool
        Fold batch normalisation into the layer before it first. Without, its four vectors are averaged.
    progress : bool
        Draw a progress bar.

    Returns
    -------
    IFMResult

    Raises
    ------
    InputError
        An option out of range, an unknown group, a convolution in groups, "sum_in" with batch normalisation that
        stays, or no group whose channels can be merged.
    DataError
        A weight is not finite.

    References
    ----------
    Chen, Zhou, Yan, arXiv 2310.06756, section 4. "mean_in", folding and the dropping of channels that nothing
    reads are ours.
    """
    _check_options(beta, max_ratio, rule)
    example = example_of(model, example)
    narrow = copy.deepcopy(model)
    found = channel_groups(narrow, example)
    if fold_norm and found.norms:
        fold_norms(narrow, found.norms)
        found = channel_groups(narrow, example)
    chosen, skipped = choose_groups(model, found.groups, groups)
    if rule == "sum_in":
        _refuse_norms(narrow, chosen)
    state = narrow.state_dict()
    names = {member.tensor for group in chosen for member in group.members}
    for name in sorted(names):
        if not torch.isfinite(state[name]).all():
            raise DataError(f"{name}: holds values that are not finite")
    # On the CPU, one pair after another; halves are merged in float32, and all distances are sums in float64.
    work = {
        name: state[name].to("cpu", torch.promote_types(state[name].dtype, torch.float32), copy=True) for name in names
    }
    merger = _Merger(work, chosen, rule)
    merges = merger.run(beta, max_ratio, progress)
    replace_tensors(narrow, {name: tensor.to(state[name]) for name, tensor in merger.kept().items()})
    return IFMResult(
        model=narrow,
        widths={group.name: (group.width, int(merger.alive[group.name].sum())) for group in chosen},
        grouping={name: tuple(tuple(sorted(cell)) for cell in cells if cell) for name, cells in merger.cells.items()},
        dead={name: tuple(gone) for name, gone in merger.dead.items()},
        merges=merges,
        skipped=skipped,
        params=(count_entries(model), count_entries(narrow)),
        flops=(sum(layer_flops(model, example).values()), sum(layer_flops(narrow, example).values())),
    )


def example_of(model: nn.Module, example: Any) -> Any:
    """The example, or a made-up one for models of `transformers`."""
    if example is not None:
        return example
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.zeros(1, config.num_channels, *sides, device=_device(model))}
    own = getattr(model, "dummy_inputs", None)
    if own is None:
        raise InputError(f"example: {type(model).__name__} has no dummy_inputs; give inputs for one pass")
    return {name: value.to(_device(model)) if isinstance(value, Tensor) else value for name, value in own.items()}


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def choose_groups(
    model: nn.Module, groups: Sequence[ChannelGroup], wanted: Sequence[str] | None
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Groups that can be narrowed and are wanted, and why the others are not."""
    names = [group.name for group in groups]
    patterns = [wanted] if isinstance(wanted, str) else wanted
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise InputError(f"groups: no group of channels is called {pattern!r}; {nearest(pattern, names)}")
    asked = [g for g in groups if patterns is None or any(fnmatch.fnmatchcase(g.name, p) for p in patterns)]
    free = [group for group in asked if not group.fixed]
    skipped = {group.name: group.fixed or "not asked for" for group in groups if group not in free}
    if not free:
        first = next((f"; {name!r} because {why}" for name, why in skipped.items()), "")
        raise InputError(f"model: {type(model).__name__} has no group of channels that can be narrowed{first}")
    return free, skipped


def count_entries(model: nn.Module) -> int:
    """Entries of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


class _Merger:
    """The loop. A channel that was merged away is zero in every tensor until the end, when it is cut out."""

    def __init__(self, work: dict[str, Tensor], groups: Sequence[ChannelGroup], rule: Rule) -> None:
        self.work, self.groups, self.rule = work, groups, rule
        self.grams = {group.name: _gram(work, group) for group in groups}
        self.alive = {group.name: torch.ones(group.width, dtype=torch.bool) for group in groups}
        self.counts = {group.name: [1] * group.width for group in groups}
        self.cells = {group.name: [[i] for i in range(group.width)] for group in groups}
        self.dead: dict[str, list[int]] = {}
        # Other groups that see a tensor along another axis, and must hear of its changes.
        holders = [(member.tensor, group, member) for group in groups for member in group.members]
        self.others = {
            (group.name, member.tensor): [(g, m) for name, g, m in holders if name == member.tensor and g is not group]
            for group in groups
            for member in group.members
            if work[member.tensor].ndim > 1
        }

    def run(self, beta: float, max_ratio: float, progress: bool) -> list[Merge]:
        limits = {group.name: min(math.ceil(max_ratio * group.width - 1e-9), group.width - 1) for group in self.groups}
        for group in self.groups:
            self._drop_unread(group, limits)
        merges: list[Merge] = []
        moved, number = True, 0
        with Progress(disable=not progress) as bar:
            task = bar.add_task("merging", total=sum(limits.values()))
            while moved:
                moved, number = False, number + 1
                for group in self.groups:
                    if limits[group.name] and (pair := self._closest(group, beta)):
                        merges.append(Merge(number, group.name, *pair))
                        self._merge(group, pair[0], pair[1])
                        limits[group.name] -= 1
                        moved = True
                        bar.advance(task)
        return merges

    def kept(self) -> dict[str, Tensor]:
        """The tensors without the channels that are gone."""
        tensors = dict(self.work)
        for group in self.groups:
            left = self.alive[group.name].nonzero()[:, 0]
            for member in group.members:
                tensors[member.tensor] = slices(tensors[member.tensor], member.axis, left, member.block)
        return tensors

    def _closest(self, group: ChannelGroup, beta: float) -> tuple[int, int, float, float] | None:
        left = self.alive[group.name].nonzero()[:, 0]
        if len(left) < 2:
            return None
        distances = _distances(self.grams[group.name][left][:, left])
        largest = float(distances.max())
        distances.fill_diagonal_(math.inf)
        first = int(distances.argmin())  # of equal ones the first, whose row is above its column
        smallest = float(distances.flatten()[first])
        if not smallest <= beta * largest and not math.isinf(beta):
            return None
        row, column = divmod(first, len(left))
        return int(left[row]), int(left[column]), smallest, largest

    def _merge(self, group: ChannelGroup, i: int, j: int) -> None:
        count = self.counts[group.name]
        share = count[i] / (count[i] + count[j])
        for member in group.members:
            reads = member.role == "in"
            mean = member.role == "depthwise" or reads == (self.rule == "sum_in")
            one, two = (_entries(self.work[member.tensor], member, at) for at in (i, j))
            new = share * one + (1 - share) * two if mean else one + two
            self._replace(group, member, {i: new, j: torch.zeros_like(two)})
        count[i] += count[j]
        self.cells[group.name][i] += self.cells[group.name][j]
        self.cells[group.name][j] = []
        self.alive[group.name][j] = False
        self._refresh(group, i)

    def _replace(self, group: ChannelGroup, member: Member, new: Mapping[int, Tensor]) -> None:
        """Overwrite the entries of some channels in a tensor, and keep the products of other groups up to date."""
        tensor = self.work[member.tensor]
        for other, its in self.others.get((group.name, member.tensor), ()):
            for at, entries in new.items():
                before = _features(_entries(tensor, member, at), its, other.width)
                after = _features(entries, its, other.width)
                self.grams[other.name] += after @ after.T - before @ before.T
        for at, entries in new.items():
            _entries(tensor, member, at).copy_(entries)

    def _refresh(self, group: ChannelGroup, i: int) -> None:
        row = torch.zeros(group.width, dtype=torch.float64)
        for member in group.members:
            if self.work[member.tensor].ndim > 1:
                flat = _features(self.work[member.tensor], member, group.width)
                row += flat @ flat[i]
        self.grams[group.name][i] = self.grams[group.name][:, i] = row

    def _drop_unread(self, group: ChannelGroup, limits: dict[str, int]) -> None:
        """Drop channels that every reader gives weight 0: exact for any activation."""
        read = torch.zeros(group.width, dtype=torch.bool)
        for member in group.members:
            if member.role == "in":
                read |= (_features(self.work[member.tensor], member, group.width) != 0).any(1)
        for i in (~read).nonzero()[: limits[group.name], 0].tolist():
            for member in group.members:
                entries = _entries(self.work[member.tensor], member, i)
                self._replace(group, member, {i: torch.zeros_like(entries)})
            self.cells[group.name][i] = []
            self.alive[group.name][i] = False
            self.dead.setdefault(group.name, []).append(i)
            limits[group.name] -= 1


def _entries(tensor: Tensor, member: Member, channel: int) -> Tensor:
    """The part of a tensor that belongs to a channel, as a view."""
    return tensor.narrow(member.axis, channel * member.block, member.block)


def _features(tensor: Tensor, member: Member, width: int) -> Float[Tensor, "n dim"]:
    """One row per channel."""
    return tensor.movedim(member.axis, 0).reshape(width, -1).double()


def _gram(state: Mapping[str, Tensor], group: ChannelGroup) -> Float[Tensor, "n n"]:
    gram = torch.zeros(group.width, group.width, dtype=torch.float64)
    for member in group.members:
        if state[member.tensor].ndim > 1:
            flat = _features(state[member.tensor], member, group.width)
            gram += flat @ flat.T
    return gram


def _distances(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    squares = gram.diagonal()
    distances = squares[:, None] + squares[None] - 2 * gram
    # Rounding must not decide which of several duplicates merges first, nor whether they are duplicates.
    distances[distances < 1e-13 * (squares[:, None] + squares[None])] = 0
    return distances.fill_diagonal_(0)


def _check_options(beta: float, max_ratio: float, rule: str) -> None:
    if rule not in ("mean_in", "sum_in"):
        raise InputError(f"rule: got {rule!r}; it must be 'mean_in' or 'sum_in'")
    if not 0 <= max_ratio <= 1:
        raise InputError(f"max_ratio: got {max_ratio!r}; it must lie in [0, 1]")
    if not beta >= 0:
        raise InputError(f"beta: got {beta!r}; it must lie in [0, 1]")
    if beta >= 1 and max_ratio == 1:
        raise InputError(f"beta: got {beta!r}, which merges each layer to one channel; give max_ratio below 1 with it")


def _refuse_norms(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    for group in groups:
        for member in group.members:
            if member.tensor.endswith("running_var"):
                layer = member.tensor.rpartition(".")[0]
                raise InputError(
                    f"rule: 'sum_in' doubles what batch normalisation {layer!r} has measured; fold it, or use 'mean_in'"
                )
