"""Choose the parameters that may train, keep the others bit for bit, and train by the paper's recipe."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from salience.errors import InputError, NothingToDo, nearest
from salience.model.fitting import History, fit
from salience.weights.bn_only.layers import batch_norms, norm_layers, trainable_batch_norms

_GROUPS = ("bn", "norm", "output", "others")


@dataclass(frozen=True)
class ParamSelection:
    """Which parameters of a model may train.

    Parameters
    ----------
    which : str
        As given to `select_params`.
    names : tuple of str
        Parameters with at least one trainable entry, in the model's order.
    masks : dict of str to bool Tensor
        Of those that train only in part: True where an entry may train. `hold_frozen` keeps the others.
    count : int
        Trainable entries in all.
    shortfall : dict of str to int
        For ``"per_channel"``: the entries that a weight lacks, where its channels have fewer than two.
    """

    which: str
    names: tuple[str, ...]
    masks: dict[str, Bool[Tensor, "*_"]]
    count: int
    shortfall: dict[str, int]


def select_params(
    model: nn.Module,
    which: str = "bn",
    *,
    generator: torch.Generator | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> ParamSelection:
    """Choose the parameters that may train, and freeze all others.

    Supported: any `torch.nn.Module`. Normalisation layers are torch's own and their subclasses, and layers
    without children that have "norm" in the name of their class and only vectors for parameters, such as
    `LlamaRMSNorm`. The output layer is what `model.get_output_embeddings()` gives, or else the last
    `nn.Linear` that the model registers; where that is not so, use `include` and `exclude`.

    Parameters
    ----------
    model : torch.nn.Module
        Its `requires_grad` flags are set; gradients of frozen parameters are dropped, since an optimiser
        would still apply them. Values and training flags are left alone.
    which : str
        Groups joined by "+": "bn" (scale and shift of every batch normalisation), "norm" (of every
        normalisation), "output" (the output layer), "others" (what is neither normalisation nor output).
        "bn" is the paper's setting, "output+others" trains all but frozen normalisation. Or one of:

        - "all";
        - "per_channel", the matched control: two random weights in each channel of each convolution, as many
          as scale and shift give the channel, and nothing else;
        - "random": as many random entries as normalisation has, anywhere outside it.
    generator : torch.Generator, optional
        On the CPU. Draws the masks of "per_channel" and "random", which need it.
    include, exclude : sequence of str
        Patterns of names, such as ``"*.shortcut.*"`` or ``"*.bias"``. The parameters are added whole to what
        `which` chose, and then taken away from it.

    Returns
    -------
    ParamSelection
        Tied parameters are counted once, under the first of their names.

    Raises
    ------
    InputError
        Unknown group or pattern; no such layers, or batch normalisation that has no scale and shift or keeps
        no running statistics; a random set without a generator.
    NothingToDo
        `exclude` takes everything away.

    References
    ----------
    Frankle, Schwab, Morcos, arXiv 2003.00152, section 3. That "random" draws outside normalisation is a
    reconstruction.
    """
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    shortfall: dict[str, int] = {}
    if which == "all":
        chosen = set(parameters)
    elif which in ("per_channel", "random"):
        if generator is None:
            raise InputError(f"generator: which={which!r} draws at random; give a torch.Generator")
        masks, shortfall = (_per_channel if which == "per_channel" else _anywhere)(model, generator)
        chosen = set(masks)
    else:
        chosen = {name for group in which.split("+") for name in _group(model, group, which)}
    added = _matching("include", include, parameters)
    chosen = (chosen | added) - _matching("exclude", exclude, parameters)
    if not chosen:
        raise NothingToDo(f"which={which!r} and exclude={exclude!r} leave no parameter to train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
        if name not in chosen:
            parameter.grad = None
    names = tuple(name for name in parameters if name in chosen)
    masks = {name: masks[name] for name in names if name in masks and name not in added}
    count = sum(int(masks[name].sum()) if name in masks else parameters[name].numel() for name in names)
    return ParamSelection(which, names, masks, count, {k: n for k, n in shortfall.items() if k in masks})


def hold_frozen(optimizer: torch.optim.Optimizer, model: nn.Module, selection: ParamSelection) -> torch.optim.Optimizer:
    """Let each step of `optimizer` keep the frozen entries of partly trained tensors bit for bit.

    It is the *update* that is masked: gradients set to zero would not stop weight decay. They are set to
    zero as well, so that momentum and norms over a tensor do not see frozen entries. Hooks on the optimiser
    do it, so your own training loop stays as it is.

    Supported: any model; optimisers of `torch.optim` and others with its hooks that step in place.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Over the parameters to train; others among them do no harm.
    model : torch.nn.Module
        On the device where it trains.
    selection : ParamSelection
        The latest `select_params` of this model, or of the model that it is a copy of.

    Returns
    -------
    torch.optim.Optimizer
        The same one. Its first step warns if batch normalisation is in evaluation mode, since its statistics
        must follow the network.

    Raises
    ------
    InputError
        The model's `requires_grad` flags are not those of the selection, or the optimiser lacks a selected
        parameter.
    """
    parameters = dict(model.named_parameters())
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    odd = sorted(trainable ^ set(selection.names))
    if odd:
        raise InputError(f"selection: the model now trains others, such as {odd[0]!r}; select again")
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lacking = [name for name in selection.names if id(parameters[name]) not in given]
    if lacking:
        raise InputError(f"optimizer: it lacks the selected parameter {lacking[0]!r}")
    held = [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in selection.masks.items()]
    before: list[Tensor] = []
    unchecked = [True]

    def keep(*_: Any) -> None:
        if unchecked:
            unchecked.clear()
            _warn_of_evaluation(model)
        before[:] = [parameter.detach().clone() for parameter, _ in held]
        for parameter, frozen in held:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(frozen, 0)

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for (parameter, frozen), old in zip(held, before, strict=True):
            parameter.copy_(torch.where(frozen, old, parameter))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(restore)
    return optimizer


def train_subset(
    model: nn.Module,
    inputs: Shaped[Tensor, "n ..."],
    targets: Int[Tensor, " _"],
    selection: ParamSelection,
    *,
    generator: torch.Generator,
    epochs: int = 160,
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    progress: bool = False,
) -> History:
    """Train the selected parameters of a classifier in place, as the paper does on CIFAR-10.

    SGD on the cross-entropy; the learning rate falls to a tenth at a half and at three quarters of the
    epochs; weight decay acts on what trains. For another recipe use `hold_frozen` in a loop of your own.

    Supported: classifiers that return logits (batch, classes).

    Parameters
    ----------
    model : torch.nn.Module
        In training mode meanwhile, so that normalisation follows the batches, as in the paper.
    inputs, targets : Tensor, shape (n, ...) and (n,)
        Images and class numbers.
    selection : ParamSelection
        The latest `select_params` of this model.
    generator : torch.Generator
        On the CPU; draws the order of the rows.
    epochs, batch_size, lr, momentum, weight_decay, progress
        As usual. The last batch of an epoch is left out if it is smaller.

    Raises
    ------
    InputError
        The selection is not that of the model, or a batch leaves batch normalisation one value per channel.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(
        [parameters[name] for name in selection.names], lr, momentum=momentum, weight_decay=weight_decay
    )
    hold_frozen(optimizer, model, selection)
    drops = [epoch for epoch in (epochs // 2, epochs * 3 // 4) if epoch]  # after epoch 0 would be at once
    with _single_values_refused(model):
        return fit(
            model, inputs, targets, loss=nn.functional.cross_entropy, optimizer=optimizer, epochs=epochs,
            generator=generator, batch_size=batch_size, milestones=drops, progress=progress,
        )  # fmt: skip


def _group(model: nn.Module, group: str, which: str) -> set[str]:
    """Names of the parameters of one group."""
    if group not in _GROUPS:
        raise InputError(
            f"which: got {which!r}; give groups ({', '.join(_GROUPS)}) joined by '+', or all, per_channel or random"
        )
    if group == "bn":
        return _names_of(model, trainable_batch_norms(model).values())
    output = _output_layer(model)
    if group == "output":
        if output is None:
            raise InputError(f"model: {type(model).__name__} has no nn.Linear as output layer; use include")
        return _names_of(model, [output])
    norms = _names_of(model, norm_layers(model).values())
    if group == "others":
        return _names_of(model, [model]) - norms - _names_of(model, [output] if output else [])
    if batch_norms(model):
        trainable_batch_norms(model)  # raises if some cannot be trained or used
    if not norms:
        kinds = sorted({type(layer).__name__ for layer in norm_layers(model).values()})
        why = f"only {', '.join(kinds)} without scale and shift" if kinds else "no normalisation layer"
        raise InputError(f"model: {type(model).__name__} has {why}")
    return norms


def _output_layer(model: nn.Module) -> nn.Module | None:
    embeddings = getattr(model, "get_output_embeddings", None)
    found = embeddings() if embeddings is not None else None
    if found is not None:
        return found
    return next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)


def _names_of(model: nn.Module, layers: Iterable[nn.Module]) -> set[str]:
    """Names in the model of the parameters of some of its layers; tied ones have the first of their names."""
    wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def _per_channel(model: nn.Module, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Masks with two random weights of each output channel of each convolution, and what channels lack."""
    masks, shortfall = {}, {}
    for name, layer in model.named_modules():
        if not isinstance(layer, _ConvNd):
            continue
        if isinstance(layer, _ConvTransposeNd):
            raise InputError(f"layer {name!r}: 'per_channel' does not know transposed convolutions")
        weight = next((key for key, value in model.named_parameters() if value is layer.weight), None)
        if weight is None:
            raise InputError(f"layer {name!r}: its weight is computed from other parameters; fold it first")
        channels, size = len(layer.weight), layer.weight[0].numel()
        picked = torch.rand(channels, size, generator=generator).topk(min(2, size)).indices
        mask = torch.zeros(channels, size, dtype=torch.bool).scatter_(1, picked, True)
        masks[weight] = mask.view(layer.weight.shape)
        if size < 2:
            shortfall[weight] = channels
    if not masks:
        raise InputError(f"model: {type(model).__name__} has no convolution, which 'per_channel' needs")
    return masks, shortfall


def _anywhere(model: nn.Module, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Masks with as many random entries as the normalisation layers have, outside of these."""
    norms = _group(model, "norm", "random")
    sizes = {name: value.numel() for name, value in model.named_parameters() if name not in norms}
    count = sum(value.numel() for name, value in model.named_parameters() if name in norms)
    total = sum(sizes.values())
    if total < count:
        raise InputError(f"model: {count} entries of normalisation, but only {total} others to draw from")
    drawn = torch.zeros(total, dtype=torch.bool)
    drawn[torch.randperm(total, generator=generator)[:count]] = True
    parts = zip(sizes, drawn.split(list(sizes.values())), strict=True)
    return {name: part.view(model.get_parameter(name).shape) for name, part in parts if part.any()}, {}


def _matching(option: str, patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    matching: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise InputError(f"{option}: no parameter is called {pattern!r}; {nearest(pattern, names)}")
        matching.update(found)
    return matching


def _warn_of_evaluation(model: nn.Module) -> None:
    still = [name for name, layer in batch_norms(model).items() if not layer.training]
    if still:
        warnings.warn(
            f"batch normalisation {still[0]!r} and {len(still) - 1} more are in evaluation mode, so that "
            "their statistics stay those of the untrained network; call model.train()",
            stacklevel=2,
        )


@contextmanager
def _single_values_refused(model: nn.Module) -> Iterator[None]:
    """Name the layer if a batch leaves batch normalisation one value per channel, which has no variance."""

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            shape = tuple(args[0].shape)
            if len(shape) > 1 and args[0].numel() == shape[1]:
                raise InputError(f"layer {name!r}: one value per channel in a batch of shape {shape}; raise batch_size")

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in batch_norms(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
