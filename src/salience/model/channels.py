"""Which tensors of a network carry the same channels: found by watching one forward pass.

A *channel group* is one hidden width of a network: the rows of the layer that makes it, its bias and
normalisation vectors, the columns of the layers that read it, and, on a residual stream, all tensors that write
to or read from the stream. What keeps a channel apart through the pass (an activation function, a pooling, a sum
of two streams) hands the group on; what mixes channels or looks at their position (attention heads, layer
normalisation, a shift of channels) *fixes* it, and the reason is kept. Nothing is assumed about names or classes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from salience.errors import InputError
from salience.model.at import logits_of, run, training_mode
from salience.model.narrowing import layer_kind

Role = Literal["out", "in", "vector", "depthwise"]


class Member(NamedTuple):
    """One tensor of a group.

    Parameters
    ----------
    tensor : str
        Name as in `state_dict`.
    axis : int
        Where it carries the channels.
    role : {"out", "in", "vector", "depthwise"}
        It makes the channels, reads them, is a vector over them (bias, normalisation), or filters each by itself.
    block : int
        Consecutive entries that belong to one channel: H*W behind the flattening of an image, else 1.
    """

    tensor: str
    axis: int
    role: Role
    block: int


@dataclass(frozen=True)
class ChannelGroup:
    """A hidden width of a network.

    Parameters
    ----------
    name : str
        Name of the first layer that makes the channels.
    width : int
        Number of channels.
    members : tuple of Member
        In the order of the pass.
    fixed : str
        Why its channels cannot be merged or removed one by one; empty where they can.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    fixed: str


class ChannelMap(NamedTuple):
    """The groups of a network in the order of the pass, and the batch normalisations that can be folded.

    `norms` maps the name of a normalisation to the name of the convolution or linear layer whose output it alone
    reads.
    """

    groups: list[ChannelGroup]
    norms: dict[str, str]


def channel_groups(model: nn.Module, example: Any) -> ChannelMap:
    """Find the channel groups of `model` by running it once.

    Parameters
    ----------
    model : torch.nn.Module
        Linear and convolution layers, also the `Conv1D` of `transformers`. Left as it was.
    example : tensor, tuple or mapping
        Inputs for one pass; one or two rows will do.

    Raises
    ------
    InputError
        A convolution with several groups that is not depthwise, whose channels have no one place.
    """
    watch = _Watch(model)
    with training_mode(model, False), torch.no_grad():
        # Fused attention or not makes no difference: it fixes the channels either way.
        with watch:
            output = run(model, example)
        watch.fix_all(_tensors(output), "it is the network's output")
        logits_of(output)  # refuses a model that returns no tensor
    return ChannelMap(watch.groups(), watch.norms())


class _Tag:
    """A set of channels while it is being traced; groups that turn out to be one are joined."""

    def __init__(self, width: int, name: str) -> None:
        self.width, self.name = width, name
        self.members: dict[tuple[str, int], Member] = {}
        self.fixed = ""
        self.parent: _Tag | None = None

    def root(self) -> _Tag:
        tag = self
        while tag.parent is not None:
            tag = tag.parent
        return tag

    def fix(self, reason: str) -> None:
        root = self.root()
        root.fixed = root.fixed or reason


class _At(NamedTuple):
    """Where an activation carries the channels of a tag: dimension, and entries per channel."""

    tag: _Tag
    dim: int
    block: int


# Functions that treat each channel by itself and keep all dimensions where they are.
_ELEMENTWISE = frozenset({
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu", "silu",
    "mish", "softplus", "softsign", "tanh", "sigmoid", "hardtanh", "hardtanh_", "hardswish", "hardsigmoid",
    "logsigmoid", "clamp", "clamp_", "clip", "abs", "neg", "exp", "pow", "square", "sqrt", "rsqrt",
    "hardshrink", "softshrink", "tanhshrink", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_alpha_dropout", "clone", "contiguous", "to", "float", "half", "double",
    "bfloat16", "detach", "type", "type_as", "cpu", "cuda", "max_pool1d", "max_pool2d", "max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate",
    "upsample",
})  # fmt: skip
_SUMS = frozenset({
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "mul", "mul_", "__mul__",
    "__rmul__", "__imul__", "div", "div_",
})  # fmt: skip
_VIEWS = frozenset({
    "view", "reshape", "flatten",
})  # fmt: skip
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_LOOKS = frozenset({
    "dim", "size", "numel", "__get__", "is_floating_point", "is_complex", "__len__", "ndimension", "stride",
    "data_ptr", "element_size",
})  # fmt: skip


class _Watch(TorchFunctionMode):
    """Hands tags from the inputs of each function to its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        state = model.state_dict(keep_vars=True)
        self.names: dict[int, str] = {}
        for name, tensor in state.items():
            self.names.setdefault(id(tensor), name)
        self.owned = dict(state)
        modules = dict(model.named_modules())
        self.owner = {name: modules[name.rpartition(".")[0]] for name in state}
        shared = Counter(id(tensor) for tensor in state.values())
        self.tied = {name for name, tensor in state.items() if shared[id(tensor)] > 1}
        self.at: dict[int, _At] = {}
        self.alive: list[Tensor] = []  # an id is only that of one tensor as long as the tensor lives
        self.tags: list[_Tag] = []
        self.made_by: dict[int, str] = {}  # output of a layer -> name of its weight
        self.reads: dict[int, int] = {}
        self.norm_of: list[tuple[str, str, int]] = []  # normalisation, weight of the layer before it, its output
        self.calls: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        output = func(*args, **kwargs)
        given = [t for t in _tensors((args, kwargs))]
        if name not in _LOOKS:
            for tensor in given:
                self.reads[id(tensor)] = self.reads.get(id(tensor), 0) + 1
        self._follow(name, func, args, kwargs, given, output)
        self.alive += _tensors(output)
        return output

    def _follow(self, name: str, func: Any, args: Any, kwargs: Any, given: list[Tensor], output: Any) -> None:
        tagged = [tensor for tensor in given if id(tensor) in self.at]
        if name in _LOOKS and not isinstance(output, Tensor):
            return
        if name == "linear":
            inputs, weight, bias = _arguments(args, kwargs, "input", "weight", "bias")
            self._layer(name, inputs, weight, bias, output, groups=1)
        elif name == "addmm" and self._named(_arguments(args, kwargs, "input", "mat1", "mat2")[2]):
            bias, inputs, weight = _arguments(args, kwargs, "input", "mat1", "mat2")
            self._layer(name, inputs, weight, bias, output, groups=1, transposed=True)
        elif name in _CONVOLUTIONS:
            inputs, weight, bias, *_, groups = _arguments(
                args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
            )
            self._layer(name, inputs, weight, bias, output, groups=1 if groups is None else groups)
        elif name == "batch_norm":
            self._batch_norm(args, kwargs, output)
        elif name in _ELEMENTWISE and len(tagged) == 1 and isinstance(output, Tensor):
            self._same(tagged[0], output)
            self._fix_parameters(given, name)
        elif name in _SUMS and tagged and isinstance(output, Tensor):
            self._sum(name, given, output)
        elif name in _VIEWS and len(tagged) == 1:
            self._view(tagged[0], output)
        elif name in ("mean", "sum", "amax") and len(tagged) == 1 and isinstance(output, Tensor):
            self._reduce(name, tagged[0], args, kwargs, output)
        elif name == "__getitem__" and len(tagged) == 1 and isinstance(output, Tensor):
            self._index(tagged[0], args[1], output)
        else:
            self.fix_all(tagged, f"{name} mixes its channels or looks at their position")
            self._fix_parameters(given, name)

    def _layer(self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, *, groups: int,
               transposed: bool = False) -> None:  # fmt: skip
        label = self._named(weight)
        if label is None:  # the weight itself is computed: whatever reads or writes it stays as it is
            self.fix_all([t for t in (inputs, weight, bias) if t is not None and id(t) in self.at], "a computed weight")
            self._fix_parameters([t for t in (weight, bias) if t is not None], name)
            return
        self.calls[label] = self.calls.get(label, 0) + 1
        source = self.at.get(id(inputs))
        # Counted from the end, so that a single image without a batch dimension does as well.
        from_end = weight.ndim - 1 if name in _CONVOLUTIONS else 1
        dim = inputs.ndim - from_end
        if source is not None and source.dim != dim:
            source.tag.fix(f"{label} reads it along another dimension")
            source = None
        if groups > 1:
            self._depthwise(label, inputs, weight, bias, output, groups, source, dim)
            return
        out_axis, in_axis = (1, 0) if transposed else (0, 1)
        if source is not None:
            self._join(source.tag, label, in_axis, "in", source.block)
        tag = self._tag_of(label, out_axis, weight.shape[out_axis])
        self._join(tag, label, out_axis, "out", 1)
        self._vector(tag, bias)
        self.at[id(output)] = _At(tag, output.ndim - from_end, 1)
        self.made_by[id(output)] = label

    def _depthwise(self, label: str, inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, groups: int,
                   source: _At | None, dim: int) -> None:  # fmt: skip
        if not (groups == inputs.shape[dim] == len(weight)):
            raise InputError(
                f"layer {label.removesuffix('.weight')!r}: a convolution with {groups} groups; only depthwise ones "
                "(as many groups as channels in and out) keep each channel by itself"
            )
        if source is None:
            return
        self._join(source.tag, label, 0, "depthwise", source.block)
        self._vector(source.tag, bias)
        self.at[id(output)] = source
        self.made_by[id(output)] = label

    def _batch_norm(self, args: Any, kwargs: Any, output: Tensor) -> None:
        inputs, mean, variance, weight, bias, *_ = _arguments(
            args, kwargs, "input", "running_mean", "running_var", "weight", "bias"
        )
        source = self.at.get(id(inputs))
        if source is None:
            return
        if source.dim != 1 or mean is None:
            source.tag.fix("a normalisation of it has no running statistics" if mean is None else "it is permuted")
            return
        for vector in (mean, variance, weight, bias):
            self._vector(source.tag, vector, source.block)
        self.at[id(output)] = source
        label, maker = self._named(mean), self.made_by.get(id(inputs))
        if label is not None and maker is not None:
            self.norm_of.append((label.rpartition(".")[0], maker, id(inputs)))

    def _sum(self, name: str, given: list[Tensor], output: Tensor) -> None:
        """A sum or product: both sides carry the same channels, or one is a number or is even over channels."""
        places = [self.at[id(t)] for t in given if id(t) in self.at]
        first = places[0]
        width = first.tag.root().width * first.block
        for tensor in given:
            place = self.at.get(id(tensor))
            dim = first.dim - output.ndim  # counted from the end, as broadcasting does
            if place is not None:
                aligned = place.dim - tensor.ndim == dim and place.block == first.block
                if aligned and place.tag.root().width == first.tag.root().width:
                    self._unite(first.tag, place.tag)
                else:
                    first.tag.fix(f"{name} of differently laid out channels")
                    place.tag.fix(f"{name} of differently laid out channels")
            elif tensor.ndim >= -dim and tensor.shape[dim] == width and width > 1:
                first.tag.fix(f"{name} with a tensor that tells its channels apart")
                self._fix_parameters([tensor], name)
        if output.ndim > first.dim and output.shape[first.dim] == width:
            self.at[id(output)] = first
        else:
            first.tag.fix(f"{name} broadcasts it")

    def _view(self, source: Tensor, output: Tensor) -> None:
        place = self.at[id(source)]
        width = place.tag.root().width
        before = int(torch.tensor(source.shape[: place.dim]).prod())
        passed = 1
        for dim, size in enumerate(output.shape):
            if passed == before and size % (width * place.block) == 0 and size > 1:
                self.at[id(output)] = _At(place.tag, dim, size // width)
                return
            passed *= size
        place.tag.fix("it is cut into parts, such as the heads of attention")

    def _reduce(self, name: str, source: Tensor, args: Any, kwargs: Any, output: Tensor) -> None:
        place = self.at[id(source)]
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None:
            place.tag.fix(f"{name} over its channels")
            return
        gone = {d % source.ndim for d in ([dims] if isinstance(dims, int) else dims)}
        if place.dim in gone:
            place.tag.fix(f"{name} over its channels")
            return
        kept = output.ndim == source.ndim
        dim = place.dim if kept else place.dim - sum(d < place.dim for d in gone)
        self.at[id(output)] = _At(place.tag, dim, place.block)

    def _index(self, source: Tensor, index: Any, output: Tensor) -> None:
        place = self.at[id(source)]
        parts = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(part, slice) for part in parts) and output.ndim == source.ndim
        whole = place.dim >= len(parts) or parts[place.dim] == slice(None)
        if plain and whole:
            self.at[id(output)] = place
        else:
            place.tag.fix("a part of it is cut out")

    def _same(self, source: Tensor, output: Tensor) -> None:
        place = self.at[id(source)]
        if output.ndim == source.ndim and output.shape[place.dim] == source.shape[place.dim]:
            self.at[id(output)] = place
        else:
            place.tag.fix("its shape changes")

    def _named(self, tensor: Any) -> str | None:
        return self.names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _tag_of(self, label: str, axis: int, width: int) -> _Tag:
        """The tag of a weight's output; a layer that runs twice gives the same channels both times."""
        for tag in self.tags:
            if (label, axis) in tag.members:
                return tag.root()
        tag = _Tag(width, label.rpartition(".")[0] or label)
        self.tags.append(tag)
        return tag

    def _join(self, tag: _Tag, label: str, axis: int, role: Role, block: int) -> None:
        for other in self.tags:
            if (label, axis) in other.members and other.root() is not tag.root():
                self._unite(tag, other)
        tag.root().members.setdefault((label, axis), Member(label, axis, role, block))

    def _vector(self, tag: _Tag, vector: Tensor | None, block: int = 1) -> None:
        if vector is None:
            return
        label = self._named(vector)
        if label is None:
            tag.fix("a vector over it is computed")
        else:
            self._join(tag, label, 0, "vector", block)

    def _unite(self, one: _Tag, two: _Tag) -> None:
        one, two = one.root(), two.root()
        if one is two:
            return
        if one.width != two.width:
            one.fix("a shared layer reads it beside another width")
            two.fix("a shared layer reads it beside another width")
            return
        first, second = (one, two) if self.tags.index(one) < self.tags.index(two) else (two, one)
        first.members |= {key: member for key, member in second.members.items() if key not in first.members}
        first.fixed = first.fixed or second.fixed
        second.parent = first

    def fix_all(self, tensors: list[Tensor], reason: str) -> None:
        for tensor in tensors:
            if id(tensor) in self.at:
                self.at[id(tensor)].tag.fix(reason)

    def _fix_parameters(self, tensors: list[Tensor], name: str) -> None:
        """A parameter that something other than its layer reads, such as a tied embedding, keeps its shape."""
        for tensor in tensors:
            label = self._named(tensor)
            if label is not None:
                tag = _Tag(0, label)
                tag.fixed = f"{name} reads {label}"
                tag.members = {(label, axis): Member(label, axis, "vector", 1) for axis in range(tensor.ndim)}
                self.tags.append(tag)

    def groups(self) -> list[ChannelGroup]:
        roots = [tag for tag in self.tags if tag.parent is None and tag.width]
        lone = {key: tag.fixed for tag in self.tags if not tag.width for key in tag.members}
        found = []
        for tag in roots:
            members = tuple(tag.members.values())
            reasons = [tag.fixed, *(lone.get((m.tensor, m.axis), "") for m in members)]
            names = [member.tensor for member in members if self.owned[member.tensor].ndim > 1]
            if len(set(names)) < len(names):
                reasons.append("one tensor carries it along two axes")
            kinds = {member.tensor: layer_kind(self.owner[member.tensor]) for member in members}
            reasons += [
                f"{name} belongs to no layer that can be resized" for name, kind in kinds.items() if kind is None
            ]
            if self.tied & {member.tensor for member in members}:
                reasons.append("its weights are tied to others")
            if not any(member.role == "in" for member in members):
                reasons.append("no layer reads it")
            found.append(ChannelGroup(tag.name, tag.width, members, next(filter(None, reasons), "")))
        return found

    def norms(self) -> dict[str, str]:
        """Batch normalisations whose input is made by one layer for them alone, once in a pass."""
        runs = Counter(norm for norm, *_ in self.norm_of)
        return {
            norm: weight.rpartition(".")[0]
            for norm, weight, made in self.norm_of
            if self.reads[made] == runs[norm] == self.calls[weight] == 1
        }


def _arguments(args: Any, kwargs: Any, *names: str) -> list[Any]:
    """Arguments by position or name; None where left out."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a nesting of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for inner in value for t in _tensors(inner)] if isinstance(value, list | tuple) else []
