"""Find the permutations: from the weights, from activations, or with a straight-through estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

from salience.errors import DataError, InputError
from salience.model.at import logits_of, run, training_mode
from salience.weights.weight_matching.spec import PermutationSpec, apply_permutation, take_units


class Matching(NamedTuple):
    """Permutations that line one network up with another.

    Attributes
    ----------
    permutations : dict of str to int64 Tensor (units,)
        Unit i of the permuted network is its old unit ``permutation[i]`` (`apply_permutation`).
    objective : float
        Inner product of the weights, or of the activations, after matching; for the straight-through estimator the
        lowest loss of a midpoint.
    sweeps : int
        Passes over all layers.
    """

    permutations: dict[str, Int[Tensor, " units"]]
    objective: float
    sweeps: int


def match_weights(
    spec: PermutationSpec,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    *,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
    init: Mapping[str, Tensor] | None = None,
) -> Matching:
    """Permute the units of b so that its weights come near those of a.

        max over P of sum_l <W_l^a, P_l W_l^b P_{l-1}^T>

    by coordinate ascent: layer by layer in random order, the others held, an assignment problem on the inner products
    of the units over *every* axis that carries the permutation (rows of a weight, columns of the next, bias, norm).
    It ends when no layer gains, which is a local optimum.

    Parameters
    ----------
    spec : PermutationSpec
    state_a, state_b : mapping of str to Tensor
    max_iter : int
        Passes at most.
    generator : torch.Generator, optional
        Draws the order of the layers; by default seeded with 0.
    init : mapping of str to Tensor, optional
        Permutations to start from; identity by default.

    Returns
    -------
    Matching

    Raises
    ------
    DataError
        Tensors that the specification names are missing, differ in shape, or are not finite.
    InputError
        `max_iter` below 1, or an initial permutation that is none.

    References
    ----------
    Ainsworth et al., arXiv 2209.04836, algorithm 1.
    """
    _check_states(spec, state_a, state_b)
    if max_iter < 1:
        raise InputError(f"max_iter: got {max_iter}; at least 1")
    draw = generator if generator is not None else torch.Generator().manual_seed(0)
    permutations = _started(spec, init)
    fixed = {name: _wide(state_a[name]) for name in spec.axes_to_perm}
    moving = apply_permutation(spec, permutations, {name: _wide(state_b[name]) for name in spec.axes_to_perm})
    # Running statistics move along, but only what was learned decides.
    names, sweeps = list(spec.sizes), 0
    places = {perm: [place for place in axes if _learned(place[0])] for perm, axes in spec.perm_to_axes.items()}
    rows = {place: _units(fixed[place[0]], place[1], spec.sizes[perm]) for perm in names for place in places[perm]}
    pending = set(names)  # a layer whose neighbours have not moved since cannot gain
    while pending and sweeps < max_iter:
        sweeps += 1
        for number in torch.randperm(len(names), generator=draw).tolist():
            name = names[number]
            if name not in pending:
                continue
            pending.remove(name)
            size = spec.sizes[name]
            gain = np.zeros((size, size))
            for tensor, axis in places[name]:
                gain += (rows[tensor, axis] @ _units(moving[tensor], axis, size).T).numpy()
            order = linear_sum_assignment(gain, maximize=True)[1]
            # What moves is permuted already, so that the present permutation is the identity here.
            if gain[np.arange(size), order].sum() > gain.trace() + 1e-12 and (order != np.arange(size)).any():
                step = torch.from_numpy(order)
                permutations[name] = permutations[name][step]
                for tensor, axis in places[name]:
                    moving[tensor] = take_units(moving[tensor], axis, step)
                    pending |= {perm for perm in spec.axes_to_perm[tensor] if perm not in (None, name)}
    objective = sum(float((fixed[name] * moving[name]).sum(dtype=torch.float64)) for name in fixed if _learned(name))
    return Matching(permutations, objective, sweeps)


def match_activations(spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, batches: Any) -> Matching:
    """Permute the units of b so that their activations agree with those of a on data.

        P_l = argmax <P_l, Z_l^a Z_l^bT>

    for each layer by itself; Z_l are the activations that the layers behind receive.

    Parameters
    ----------
    spec : PermutationSpec
    model_a, model_b : torch.nn.Module
    batches : iterable
        Inputs of the models (tensor, tuple or mapping).

    Raises
    ------
    InputError
        There are no batches.
    DataError
        The models differ, or no layer receives a group of units.
    """
    _check_states(spec, model_a.state_dict(), model_b.state_dict())
    consumers = _consumers(spec, model_a)
    gains = {name: np.zeros((size, size)) for name, size in spec.sizes.items()}
    count = 0
    for batch in batches:
        one, two = (_received(model, consumers, spec, batch) for model in (model_a, model_b))
        for layer, perm in consumers.items():
            gains[perm] += (one[layer] @ two[layer].T).double().numpy()
        count += 1
    if not count:
        raise InputError("batches: there are none")
    found, objective = {}, 0.0
    for name, gain in gains.items():
        if not np.isfinite(gain).all():
            raise DataError(f"activations of {name!r} are not finite")
        rows, order = linear_sum_assignment(gain, maximize=True)
        found[name], objective = torch.from_numpy(order), objective + float(gain[rows, order].sum())
    return Matching(found, objective, 1)


def match_straight_through(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    inputs: Shaped[Tensor, "n ..."],
    targets: Shaped[Tensor, "n ..."],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int = 250,
    lr: float = 1e-2,
    momentum: float = 0.9,
    batch_size: int = 1000,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
) -> Matching:
    """Permute the units of b so that the midpoint with a has a low loss, by gradient descent through the matching.

    Free weights ``theta~`` start at a. In each batch b is matched to them, warm-started; the loss is that of the
    midpoint of a and ``stopgrad(pi(b)) + theta~ - stopgrad(theta~)``, so that the gradient reaches theta~ as if the
    matching were not there. The permutation of the lowest batch loss is kept.

    Parameters
    ----------
    spec : PermutationSpec
    model_a, model_b : torch.nn.Module
        Not changed; run in evaluation mode.
    inputs, targets : Tensor (n, ...)
    loss : callable
        ``loss(logits, targets)``, the mean over the batch.
    epochs, lr, momentum, batch_size
        Of the descent; the defaults are the published ones.
    max_iter : int
        Passes of each matching at most.
    generator : torch.Generator, optional
        Order of the data and of the layers; seeded with 0 by default.

    References
    ----------
    Ainsworth et al., algorithm 3; `mnist_mlp_ste2.py` of their code.
    """
    names = [name for name, _ in model_a.named_parameters()]
    a = {name: value.detach() for name, value in model_a.state_dict().items()}
    b = {name: value.detach() for name, value in model_b.state_dict().items()}
    _check_states(spec, a, b)
    if len(inputs) != len(targets) or not len(inputs):
        raise InputError(f"inputs and targets: {len(inputs)} and {len(targets)} rows; as many of each, at least 1")
    draw = generator if generator is not None else torch.Generator().manual_seed(0)
    free = {name: a[name].clone().requires_grad_(True) for name in names}
    optimizer = torch.optim.SGD(free.values(), lr=lr, momentum=momentum)
    last: dict[str, Tensor] | None = None
    best, lowest, sweeps = _started(spec, None), float("inf"), 0
    with training_mode(model_a, False), torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs), generator=draw).split(batch_size):
                state = {**b, **{name: value.detach() for name, value in free.items()}}
                found = match_weights(spec, state, b, max_iter=max_iter, generator=draw, init=last)
                last, sweeps = found.permutations, sweeps + found.sweeps
                projected = apply_permutation(spec, last, b)
                middle = {name: (value + projected[name]) / 2 for name, value in a.items() if value.is_floating_point()}
                for name in names:
                    through = projected[name] + free[name] - free[name].detach()
                    middle[name] = (a[name] + through) / 2
                value = loss(logits_of(functional_call(model_a, middle, (inputs[batch],))), targets[batch])
                if not torch.isfinite(value):
                    raise InputError(f"lr: the loss of a midpoint became {float(value.detach())}; lower lr")
                if float(value.detach()) < lowest:
                    best, lowest = last, float(value.detach())
                grads = torch.autograd.grad(value, list(free.values()), allow_unused=True)
                for parameter, grad in zip(free.values(), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
    return Matching(best, lowest, sweeps)


def _started(spec: PermutationSpec, init: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    start = {name: torch.arange(size) for name, size in spec.sizes.items()}
    for name, order in (init or {}).items():
        if name not in start or not torch.equal(order.sort().values, start[name]):
            raise InputError(f"init: {name!r} is no permutation of the specification")
        start[name] = order.clone()
    return start


def _check_states(spec: PermutationSpec, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor]) -> None:
    for name in [*state_a, *state_b]:
        if name not in state_a or name not in state_b:
            raise DataError(f"model {'a' if name not in state_a else 'b'}: has no tensor {name!r}, the other has")
        if state_a[name].shape != state_b[name].shape:
            one, two = tuple(state_a[name].shape), tuple(state_b[name].shape)
            raise DataError(f"{name!r} has shape {one} in model a and {two} in model b")
    spec.check(state_a, "model a")
    spec.check(state_b, "model b")


def _learned(name: str) -> bool:
    return name.split(".")[-1] not in ("running_mean", "running_var")


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _units(tensor: Tensor, axis: int, size: int) -> Float[Tensor, "units rest"]:
    """One row per unit."""
    return tensor.movedim(axis, 0).reshape(size, -1)


def _consumers(spec: PermutationSpec, model: nn.Module) -> dict[str, str]:
    """By layer that receives permuted units: the permutation."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        perms = spec.axes_to_perm.get(f"{name}.weight" if name else "weight", ())
        inputs = 0 if type(module).__name__ == "Conv1D" else 1  # GPT-2's layers have their weight as (in, out)
        layer = inputs == 0 or isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        perm = perms[inputs] if layer and len(perms) > 1 else None
        if perm is not None:
            found[name] = perm
    missing = set(spec.sizes) - set(found.values())
    if missing:
        raise DataError(f"no linear or convolution layer receives the units of {min(missing)!r}")
    return found


def _received(model: nn.Module, consumers: Mapping[str, str], spec: PermutationSpec, batch: Any) -> dict[str, Tensor]:
    """What each of these layers receives, one row per unit."""
    seen: dict[str, Tensor] = {}
    hooks = []
    modules = dict(model.named_modules())
    try:
        for layer, perm in consumers.items():

            def record(module: nn.Module, args: tuple, layer: str = layer, size: int = spec.sizes[perm]) -> None:
                axis = 1 if isinstance(module, nn.Conv1d | nn.Conv2d) else args[0].ndim - 1
                seen[layer] = _units(args[0].detach().float().cpu(), axis, size)

            hooks.append(modules[layer].register_forward_pre_hook(record))
        with training_mode(model, False), torch.no_grad():
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
