"""Which axes of which tensors carry one permutation of hidden units: a specification, inferred by running the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salience.errors import DataError, InputError, NothingToDo
from salience.model.at import logits_of, run, training_mode

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes carry which permutation.

    An axis may be a multiple of the permutation's size: behind a flatten, unit i owns a block of columns.

    Parameters
    ----------
    axes_to_perm : dict of str to tuple of (str or None)
        By tensor name: for each axis the name of its permutation, or None where it stays.
    sizes : dict of str to int
        Number of units of each permutation.
    """

    axes_to_perm: dict[str, tuple[str | None, ...]]
    sizes: dict[str, int]

    @property
    def perm_to_axes(self) -> dict[str, list[tuple[str, int]]]:
        """By permutation: every (tensor name, axis) that carries it."""
        found: dict[str, list[tuple[str, int]]] = {name: [] for name in self.sizes}
        for tensor, perms in self.axes_to_perm.items():
            for axis, perm in enumerate(perms):
                if perm is not None:
                    found[perm].append((tensor, axis))
        return found

    def check(self, state: Mapping[str, Tensor], what: str) -> None:
        """Raise if a state does not have the tensors and axes that the specification names, or is not finite."""
        for name, perms in self.axes_to_perm.items():
            if name not in state:
                raise DataError(f"{what}: has no tensor {name!r}, which the specification names")
            tensor = state[name]
            if tensor.ndim != len(perms):
                raise DataError(f"{what}: {name!r} has {tensor.ndim} axes, the specification {len(perms)}")
            for axis, perm in enumerate(perms):
                if perm is not None and tensor.shape[axis] % self.sizes[perm]:
                    raise DataError(
                        f"{what}: axis {axis} of {name!r} has length {tensor.shape[axis]}, no multiple of the "
                        f"{self.sizes[perm]} units of {perm!r}"
                    )
        for name, tensor in state.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DataError(f"{what}: {name!r} holds NaN or infinite entries")


def infer_spec(model: nn.Module, example: Any) -> PermutationSpec:
    """Infer which axes permute together, by following hidden units through one pass of the model.

    Linear and convolution layers begin a permutation on their outputs; norms, activations, pooling, flattening and
    sums carry it on; a sum makes one of two, so that a residual stream has a single permutation. What is not
    understood (attention, concatenation, grouped convolution, padded channels) keeps its units in place, which is
    always right. The result is proved on the example: random permutations must leave the outputs as they are.

    Supported: any `torch.nn.Module` of linear, 1-d and 2-d convolution and norm layers, such as MLPs, VGG, ResNets; of
    transformers the hidden units of the feed-forward layers.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    example : Tensor, tuple or mapping
        Inputs of the model; two rows or more.

    Returns
    -------
    PermutationSpec
        A permutation bears the name of the first layer that has it on its outputs.

    Raises
    ------
    NothingToDo
        No hidden unit can be permuted.
    InputError
        The model does not take the example.
    DataError
        The outputs change under permutation: the model does something to its units that was not seen.
    """
    tracker = _Tracker(model)
    with training_mode(model, False), torch.no_grad():
        tracked = _tracked(example, tracker)
        try:
            output = run(model, tracked)
        except Exception as error:  # what a network raises at a wrong shape is up to its own code
            raise InputError(f"example: {type(model).__name__} does not take {_shapes(example)}: {error}") from error
    tracker.pin_all(output)
    spec = tracker.spec()
    if not spec.sizes:
        raise NothingToDo(f"{type(model).__name__}: has no hidden units that could be permuted")
    _prove(model, example, spec)
    return spec


def apply_permutation(
    spec: PermutationSpec, permutations: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Permute the hidden units of a state; the network computes the same.

        W_l -> P_l W_l P_{l-1}^T,   b_l -> P_l b_l

    Parameters
    ----------
    spec : PermutationSpec
    permutations : mapping of str to int64 Tensor (units,)
        New unit i is old unit ``permutation[i]``. One that is missing stays.
    state : mapping of str to Tensor

    Returns
    -------
    dict of str to Tensor
        All tensors of `state`; those without a permutation are the same objects.
    """
    permuted = dict(state)
    for name, perms in spec.axes_to_perm.items():
        for axis, perm in enumerate(perms):
            if perm is not None and perm in permutations:
                permuted[name] = take_units(permuted[name], axis, permutations[perm])
    return permuted


def take_units(tensor: Tensor, axis: int, order: Tensor) -> Tensor:
    """A tensor with the units along an axis in a new order; an axis longer than `order` moves by blocks."""
    block = tensor.shape[axis] // len(order)
    if block > 1:
        order = (order[:, None] * block + torch.arange(block, device=order.device)).flatten()
    return tensor.index_select(axis, order.to(tensor.device))


def _prove(model: nn.Module, example: Any, spec: PermutationSpec) -> None:
    draw = torch.Generator().manual_seed(0)
    other = copy.deepcopy(model).double().eval()
    inputs = _converted(example)
    random = {name: torch.randperm(size, generator=draw) for name, size in spec.sizes.items()}
    with torch.no_grad():
        before = logits_of(run(other, inputs))
        other.load_state_dict(apply_permutation(spec, random, other.state_dict()))
        after = logits_of(run(other, inputs))
    change = float((after - before).abs().max() / before.abs().max().clamp_min(1e-9))
    if not change < _TOLERANCE:
        raise DataError(
            f"{type(model).__name__}: permuting its hidden units changes the outputs by {change:.2g} of their size; "
            "write the PermutationSpec by hand"
        )


def _converted(example: Any) -> Any:
    if isinstance(example, Mapping):
        return {key: _converted(value) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(_converted(value) for value in example)
    return example.double() if isinstance(example, Tensor) and example.is_floating_point() else example


# Following the units. A label (axis, group, block) says that along `axis` of a tensor lie the units of a group, each
# of them `block` long. Groups are joined where tensors are added; group 0 is that of units that must stay in place.

_PINNED = 0
_POINTWISE = {
    "relu", "relu_", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "mish", "softplus", "tanh",
    "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "dropout", "dropout2d", "feature_dropout", "clone", "contiguous",
    "detach", "to", "float", "double", "neg", "abs", "sqrt", "exp", "pow", "square", "clamp", "type_as", "tanh_",
    "sigmoid_", "clamp_min", "hardtanh_", "logsigmoid",
}  # fmt: skip
_SUMS = {
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "true_divide", "__add__", "__radd__", "__iadd__", "__sub__",
    "__rsub__", "__mul__", "__rmul__", "__imul__", "__truediv__",
}  # fmt: skip
_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool1d", "avg_pool1d",
          "adaptive_avg_pool1d", "interpolate", "_max_pool2d", "_max_pool1d", "boolean_dispatch"}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_SHAPES = {"reshape", "view", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "unflatten", "t",
           "__getitem__", "movedim", "pad"}  # fmt: skip

Label = tuple[int, int, int]  # axis, group, block


class _Tracked(Tensor):
    """A tensor that knows along which axes its units lie."""

    labels: list[Label]
    tracker: _Tracker

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        tracked = [value for value in _leaves([args, kwargs or {}]) if isinstance(value, _Tracked)]
        if not tracked or not any(isinstance(value, Tensor) for value in _leaves(result)):
            return result
        return tracked[0].tracker.follow(func, args, kwargs or {}, result, tracked)


class _Tracker:
    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            self._names.setdefault(id(tensor), []).append(name)
        self._parent = [_PINNED]
        self._first: list[str] = [""]
        self._sizes = [0]
        self._axes: dict[str, list[int | None]] = {}

    def wrap(self, tensor: Tensor, labels: list[Label]) -> _Tracked:
        with torch._C.DisableTorchFunctionSubclass():
            wrapped = tensor.as_subclass(_Tracked)
        wrapped.labels, wrapped.tracker = labels, self
        return wrapped

    def follow(self, func: Callable, args: tuple, kwargs: dict, result: Any, tracked: list[_Tracked]) -> Any:
        name = getattr(func, "__name__", "")
        labels: list[Label] | None = None
        if isinstance(result, Tensor):
            if name == "linear":
                labels = self._linear(*_named(("input", "weight", "bias"), args, kwargs))
            elif name == "addmm" and len(args) == 3:  # GPT-2's Conv1D, whose weight is (in, out)
                labels = self._linear(args[1], args[2], args[0], outputs=1)
            elif name in ("conv1d", "conv2d"):
                labels = self._conv(args, kwargs)
            elif name == "batch_norm":
                labels = self._norm(_named(("input", "running_mean", "running_var", "weight", "bias"), args, kwargs), 1)
            elif name in ("layer_norm", "rms_norm"):
                x, shape, weight, bias = _named(("input", "normalized_shape", "weight", "bias"), args, kwargs)
                labels = self._norm((x, weight, bias), -1) if len(shape) == 1 else None
            elif name in _SUMS:
                labels = self._sum(args, result)
            elif name in _POINTWISE and result.shape == tracked[0].shape:
                labels = list(tracked[0].labels)
            elif name in _POOLS and result.ndim == tracked[0].ndim:
                labels = [label for label in tracked[0].labels if label[0] == 1]
            elif name in _REDUCTIONS:
                labels = self._reduced(func, args, kwargs, result)
            elif name in _SHAPES and len(tracked) == 1 and isinstance(args[0], _Tracked):
                labels = self._reshaped(func, args, kwargs, result)
        if labels is None:  # not understood: its units stay in place
            for each in tracked:
                self._pin(each)
            labels = []
        return _map(result, lambda tensor: self.wrap(tensor, list(labels)))

    def _linear(self, x: Any, weight: Tensor, bias: Tensor | None, outputs: int = 0) -> list[Label] | None:
        if not isinstance(x, _Tracked) or id(weight) not in self._names:
            return None
        units = self._layer(weight, outputs)
        self._join_axis(weight, 1 - outputs, self._along(x, x.ndim - 1))
        if bias is not None:
            self._join_axis(bias, 0, (0, units, 1))
        return [*(label for label in x.labels if label[0] != x.ndim - 1), (x.ndim - 1, units, 1)]

    def _conv(self, args: tuple, kwargs: dict) -> list[Label] | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        x, weight, bias, *_, groups = _named(names, args, kwargs)
        if not isinstance(x, _Tracked) or id(weight) not in self._names:
            return None
        if (groups or 1) > 1:
            label = self._along(x, 1)
            if groups != x.shape[1] or len(weight) != groups or label is None:
                return None
            self._join_axis(weight, 0, label)  # depthwise: channel i of the output is channel i of the input
            if bias is not None:
                self._join_axis(bias, 0, label)
            return [(1, label[1], label[2])]
        outputs = self._layer(weight, 0)
        self._join_axis(weight, 1, self._along(x, 1))
        if bias is not None:
            self._join_axis(bias, 0, (0, outputs, 1))
        return [(1, outputs, 1)]

    def _norm(self, tensors: tuple, axis: int) -> list[Label] | None:
        x, *others = tensors
        if not isinstance(x, _Tracked):
            return None
        label = self._along(x, axis % x.ndim)
        for tensor in others:
            if isinstance(tensor, Tensor):
                self._join_axis(tensor, 0, label)
        return list(x.labels)

    def _sum(self, args: tuple, result: Tensor) -> list[Label] | None:
        tensors = [value for value in args[:2] if isinstance(value, Tensor)]
        labels: list[Label] = []
        for axis in range(result.ndim):
            sides = []
            for tensor in tensors:
                own = axis - (result.ndim - tensor.ndim)
                if own >= 0 and tensor.shape[own] > 1:
                    sides.append((tensor, own))
            found = [self._along(t, own) if isinstance(t, _Tracked) else None for t, own in sides]
            known = [label for label in found if label is not None]
            if not known:
                continue
            for (tensor, own), label in zip(sides, found, strict=True):
                if label is not None and label[2] == known[0][2]:
                    self._join(label[1], known[0][1])
                elif label is None and id(tensor) in self._names and known[0][2] == 1:
                    self._join_axis(tensor, own, known[0])
                else:  # something whose units cannot move, or move otherwise
                    self._join(known[0][1], _PINNED)
                    if label is not None:
                        self._join(label[1], _PINNED)
            labels.append((axis, known[0][1], known[0][2]))
        return labels

    def _reduced(self, func: Callable, args: tuple, kwargs: dict, result: Tensor) -> list[Label] | None:
        x = args[0]
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(x, _Tracked) or dims is None:
            return None if isinstance(x, _Tracked) and result.ndim else []  # a sum over all units knows no order
        gone = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
        if result.ndim == x.ndim:
            return [label for label in x.labels if label[0] not in gone]
        return [(a - sum(d < a for d in gone), g, b) for a, g, b in x.labels if a not in gone]

    def _reshaped(self, func: Callable, args: tuple, kwargs: dict, result: Tensor) -> list[Label] | None:
        """Send the number of each unit through the same function, and look where the numbers come out in order."""
        x, labels = args[0], []
        for axis, group, block in x.labels:
            units = x.shape[axis] // block
            shape = [units * block if a == axis else 1 for a in range(x.ndim)]
            number = (torch.arange(units * block) // block).view(shape).expand(x.shape).contiguous().double() + 1
            with torch._C.DisableTorchFunctionSubclass():
                moved = func(number, *args[1:], **kwargs)
            place = _place(moved, units)
            if place is None:
                self._join(group, _PINNED)
            elif units > 1:
                labels.append((place[0], group, place[1]))
        return labels

    def _layer(self, weight: Tensor, axis: int) -> int:
        """The group of a layer's outputs: a new one, or that which a reused weight already has."""
        names = self._names[id(weight)]
        known = self._axes.get(names[0], [None] * weight.ndim)[axis]
        if known is None:
            known = len(self._parent)
            self._parent.append(known)
            self._first.append(names[0].removesuffix(".weight"))
            self._sizes.append(weight.shape[axis])
            self._join_axis(weight, axis, (axis, known, 1))
        return known

    def _along(self, x: _Tracked, axis: int) -> Label | None:
        return next((label for label in x.labels if label[0] == axis), None)

    def _join_axis(self, tensor: Tensor, axis: int, label: Label | None) -> None:
        if id(tensor) not in self._names:  # a tensor that is no parameter or buffer cannot follow
            if label is not None:
                self._join(label[1], _PINNED)
            return
        group = _PINNED if label is None else label[1]
        for name in self._names[id(tensor)]:
            axes = self._axes.setdefault(name, [None] * tensor.ndim)
            old = axes[axis]
            axes[axis] = group
            if old is not None:
                self._join(old, group)

    def _root(self, group: int) -> int:
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def _join(self, one: int, two: int) -> None:
        one, two = sorted((self._root(one), self._root(two)))
        self._parent[two] = one  # the smaller number wins, so that what is pinned stays pinned
        if one != _PINNED and one != two and self._sizes[one] != self._sizes[two]:
            self._parent[one] = _PINNED

    def _pin(self, x: _Tracked) -> None:
        for _, group, _ in x.labels:
            self._join(group, _PINNED)

    def pin_all(self, output: Any) -> None:
        """What leaves the network stays in order."""
        for value in _leaves(output):
            if isinstance(value, _Tracked):
                self._pin(value)

    def spec(self) -> PermutationSpec:
        axes_to_perm, sizes = {}, {}
        for name, groups in self._axes.items():
            perms: list[str | None] = []
            for group in groups:
                root = _PINNED if group is None else self._root(group)
                perms.append(None if root == _PINNED else self._first[root])
                if root != _PINNED:
                    sizes[self._first[root]] = self._sizes[root]
            if any(perms):
                axes_to_perm[name] = tuple(perms)
        return PermutationSpec(axes_to_perm, sizes)


def _place(moved: Tensor, units: int) -> tuple[int, int] | None:
    """The axis along which numbers 1..units lie in order, and how often each is repeated; None if they do not."""
    for axis, length in enumerate(moved.shape):
        if length % units:
            continue
        block = length // units
        shape = [length if a == axis else 1 for a in range(moved.ndim)]
        expected = (torch.arange(length) // block + 1).view(shape)
        if torch.equal(moved, expected.expand(moved.shape).to(moved.dtype)):
            return axis, block
    return None


def _tracked(example: Any, tracker: _Tracker) -> Any:
    if isinstance(example, Mapping):
        return {key: _tracked(value, tracker) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(_tracked(value, tracker) for value in example)
    if isinstance(example, Tensor):
        return tracker.wrap(example.detach(), [])
    raise InputError(f"example: got {type(example).__name__}; give a tensor, a tuple of them, or a mapping")


def _shapes(example: Any) -> str:
    return ", ".join(f"shape {tuple(leaf.shape)}" for leaf in _leaves(example) if isinstance(leaf, Tensor))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


def _map(value: Any, wrap: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return wrap(value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_map(inner, wrap) for inner in value)
    return value


def _named(names: tuple[str, ...], args: tuple, kwargs: dict) -> tuple:
    return tuple(args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names))
