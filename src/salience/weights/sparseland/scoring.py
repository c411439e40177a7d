"""Which weights matter: one score per weight, larger is kept. Models are left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from salience.errors import InputError, NothingToDo
from salience.model.at import logits_of, run, training_mode
from salience.model.narrowing import input_rows
from salience.weights.bn_only.layers import batch_norms, norm_layers
from salience.weights.sparseland.densities import prunable

_HALF = (torch.float16, torch.bfloat16)

WeightScores = dict[str, Tensor]
Batches = Iterable[tuple[Any, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def score_random(model: nn.Module, generator: torch.Generator, exclude: Sequence[str] = ()) -> WeightScores:
    """A random number for each weight: the baseline that is stronger than it looks.

    Supported: as of `prunable`.

    Parameters
    ----------
    model : torch.nn.Module
    generator : torch.Generator
        On the CPU.
    exclude : sequence of str
        As of `prunable`.
    """
    weights = prunable(model, exclude)
    return {name: torch.rand(entry.weight.shape, generator=generator) for name, entry in weights.items()}


def score_magnitude(model: nn.Module, exclude: Sequence[str] = ()) -> WeightScores:
    """Magnitude, ``|w|``.

    Supported: as of `prunable`.

    Parameters
    ----------
    model : torch.nn.Module
    exclude : sequence of str
        As of `prunable`.

    Raises
    ------
    NothingToDo
        There is no weight to prune.
    """
    return {name: entry.weight.detach().abs() for name, entry in prunable(model, exclude).items()}


def score_snip(
    model: nn.Module, batches: Batches, loss: Loss = nn.functional.cross_entropy, exclude: Sequence[str] = ()
) -> WeightScores:
    """SNIP: how much the loss depends on the mask of each weight, ``|dL/dM| = |g w|`` at M = 1.

    Supported: models that return logits, alone or in a `ModelOutput`.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile.
    batches : iterable of (inputs, targets)
        Gradients are summed over the batches.
    loss : callable
        ``loss(logits, targets)``.
    exclude : sequence of str
        As of `prunable`.

    Returns
    -------
    dict of str to Tensor
        Divided by their total.

    Raises
    ------
    NothingToDo
        There are no batches.

    References
    ----------
    Lee, Ajanthan, Torr, "SNIP", ICLR 2019.
    """
    model = _wide(model)
    weights = prunable(model, exclude)
    with _differentiable(model, weights) as tensors:
        gradients = _summed(_gradients(model, batches, loss, tensors))
    scores = [(g * w.detach()).abs() for g, w in zip(gradients, tensors)]
    total = sum(float(score.double().sum()) for score in scores) or 1.0
    return {name: score / total for name, score in zip(weights, scores)}


def score_grasp(
    model: nn.Module,
    batches: Batches,
    loss: Loss = nn.functional.cross_entropy,
    temperature: float = 200.0,
    exclude: Sequence[str] = (),
) -> WeightScores:
    """GraSP: what a weight does for the flow of gradients, ``w * (H g)``; the largest *signed* scores are kept.

    H is the Hessian of the loss of logits over the temperature, g its gradient. The original removes the largest
    ``-w * (H g)``, which is the same.

    Supported: models that return logits, and can be differentiated twice.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile.
    batches : sequence of (inputs, targets)
        Gone through twice.
    loss : callable
        ``loss(logits, targets)``.
    temperature : float
        Divides the logits.
    exclude : sequence of str
        As of `prunable`.

    Returns
    -------
    dict of str to Tensor
        Divided by the absolute value of their total.

    Raises
    ------
    InputError
        The temperature is not positive.
    NothingToDo
        There are no batches.

    References
    ----------
    Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
    """
    if not temperature > 0:
        raise InputError(f"temperature: got {temperature!r}; it must be positive")
    batches, model = list(batches), _wide(model)
    weights = prunable(model, exclude)

    def tempered(logits: Tensor, targets: Tensor) -> Tensor:
        return loss(logits / temperature, targets)

    with _differentiable(model, weights) as tensors:
        fixed = _summed(_gradients(model, batches, tempered, tensors))
        products = []
        for gradient in _gradients(model, batches, tempered, tensors, create_graph=True):
            flow = torch.stack([(f * g).sum() for f, g in zip(fixed, gradient)]).sum()
            again = torch.autograd.grad(flow, tensors, allow_unused=True)
            products.append([torch.zeros_like(w) if g is None else g for g, w in zip(again, tensors)])
        hessian = _summed(iter(products))
    scores = [h * w.detach() for h, w in zip(hessian, tensors)]
    total = abs(sum(float(score.double().sum()) for score in scores)) + 1e-10
    return {name: score / total for name, score in zip(weights, scores)}


def score_synflow(
    model: nn.Module, example: Tensor, masks: Mapping[str, Tensor] | None = None, exclude: Sequence[str] = ()
) -> WeightScores:
    """SynFlow: the flow of ones through absolute weights, ``|dR/dw * w|`` with ``R = sum f_|w|(1)``; no data.

    The total is the same in each layer of a network without biases. One round collapses layers: `synflow_masks`
    takes a hundred.

    Supported: networks of linear and convolution layers with batch normalisation.

    Parameters
    ----------
    model : torch.nn.Module
        A copy in float64 is worked on, since deep networks overflow float32.
    example : Tensor
        Its shape without the batch is that of the ones; its values are not used.
    masks : dict of str to bool Tensor, optional
        Over the weights.
    exclude : sequence of str
        As of `prunable`.

    Raises
    ------
    InputError
        The network has layer normalisation, which undoes the flow, or the score is not finite.

    References
    ----------
    Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
    flow", NeurIPS 2020.
    """
    others = [name for name in norm_layers(model) if name not in batch_norms(model)]
    if others:
        raise InputError(f"model: {type(model).__name__} has {others[0]!r}, behind which no flow is conserved")
    linear = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in linear.state_dict().values():
            value.abs_()
        weights = prunable(linear, exclude)
        for name, mask in (masks or {}).items():
            weights[name].weight.mul_(mask)
    ones = torch.ones(1, *example.shape[1:], dtype=torch.float64, device=example.device)
    tensors = [entry.weight.requires_grad_() for entry in weights.values()]
    with torch.enable_grad():
        total = logits_of(run(linear, ones)).sum()
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    scores = {
        name: torch.zeros_like(w) if g is None else (g * w.detach()).abs()
        for name, w, g in zip(weights, tensors, gradients)
    }
    _refuse_nonfinite(scores)
    return {name: score.detach() for name, score in scores.items()}


def score_wanda(model: nn.Module, batches: Iterable[Any], exclude: Sequence[str] = ()) -> WeightScores:
    """Wanda: a weight times the size of its input, ``|w_ij| * ||x_j||_2``; compared within rows of the weight.

    Supported: as of `prunable`; of a convolution x_j is the whole input channel.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile.
    batches : iterable
        Inputs (a tensor, a mapping), or pairs of inputs and targets.
    exclude : sequence of str
        As of `prunable`.

    Raises
    ------
    NothingToDo
        There are no batches.

    References
    ----------
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024. The treatment of
    convolutions is ours.
    """
    weights = prunable(model, exclude)
    squares: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            total = input_rows(layer, args[0].detach()).double().square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return hook

    modules = dict(model.named_modules())
    handles = [modules[entry.layer].register_forward_pre_hook(hook_of(name)) for name, entry in weights.items()]
    try:
        with training_mode(model, False), torch.no_grad():
            for batch in batches:
                run(model, batch[0] if isinstance(batch, tuple | list) else batch)
    finally:
        for handle in handles:
            handle.remove()
    if not squares:
        raise NothingToDo("batches: there are none")
    scores = {}
    for name, entry in weights.items():
        if name not in squares:
            raise InputError(f"model: layer {entry.layer!r} did not run on these batches, so nothing is known of it; "
                             "exclude it")  # fmt: skip
        norms = squares[name].sqrt()
        if entry.in_axis == 1 and entry.weight.shape[1] < len(norms):  # a convolution in groups
            norms = norms.view(-1, entry.weight.shape[1])
            norms = norms.repeat_interleave(len(entry.weight) // len(norms), 0)
            shape = (*norms.shape, *[1] * (entry.weight.ndim - 2))
        else:
            shape = tuple(-1 if axis == entry.in_axis else 1 for axis in range(entry.weight.ndim))
        scores[name] = entry.weight.detach().abs().float() * norms.view(shape).float()
    return scores


def _gradients(
    model: nn.Module, batches: Batches, loss: Loss, tensors: list[Tensor], create_graph: bool = False
) -> Iterator[list[Tensor]]:
    with training_mode(model, False), torch.enable_grad():
        for inputs, targets in batches:
            value = loss(logits_of(run(model, _wide_inputs(inputs))), targets)
            gradients = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
            yield [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, tensors)]


def _wide(model: nn.Module) -> nn.Module:
    """The model itself, or a copy in float32 of one in half precision, in which small gradients vanish."""
    half = any(parameter.dtype in _HALF for parameter in model.parameters())
    return copy.deepcopy(model).float() if half else model


def _wide_inputs(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _wide_inputs(value) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(_wide_inputs(value) for value in inputs)
    return inputs.float() if isinstance(inputs, Tensor) and inputs.dtype in _HALF else inputs


def _summed(parts: Iterator[list[Tensor]]) -> list[Tensor]:
    total: list[Tensor] = []
    for part in parts:
        total = [a + b.detach() for a, b in zip(total, part)] if total else [g.detach() for g in part]
    if not total:
        raise NothingToDo("batches: there are none")
    return total


@contextmanager
def _differentiable(model: nn.Module, weights: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """The weights, all open to gradients; flags are given back, gradients are not touched."""
    tensors = [entry.weight for entry in weights.values()]
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield tensors
    finally:
        for tensor, flag in zip(tensors, flags):
            tensor.requires_grad_(flag)


def _refuse_nonfinite(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise InputError(f"scores: those of {name!r} are not finite")
