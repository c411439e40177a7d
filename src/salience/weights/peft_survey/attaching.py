"""One call for every method: `attach` puts it on a model, through `peft` where peft has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from salience.errors import InputError, NothingToDo, nearest
from salience.weights.peft_survey.adapters import add_adapters
from salience.weights.peft_survey.blocks import (
    hold_statistics,
    is_quantised,
    linear_layers,
    unchanged_on_failure,
    without_storage,
)
from salience.weights.peft_survey.budget import largest_size
from salience.weights.peft_survey.cards import MethodCard, card_of
from salience.weights.peft_survey.hybrid import add_mam, add_unipelt
from salience.weights.peft_survey.peft_types import build_peft
from salience.weights.peft_survey.selective import FreezeSelector, GradientMask, add_diffs, diffs_of
from salience.weights.peft_survey.visual_prompt import add_visual_prompt


class TunedModel(nn.Module):
    """A model with one of our own methods on it; calls and attributes go through to the model.

    Attributes
    ----------
    model : nn.Module
        The base itself, changed in place; its tensors keep their names.
    card : MethodCard
    options : dict
        With which the method was built.
    head : tuple of str
        Modules that train beside the method.
    mask : GradientMask or None
        Which entries may train, where not whole tensors do.
    """

    def __init__(self, model: nn.Module, card: MethodCard, options: Mapping[str, Any], head: Sequence[str]) -> None:
        super().__init__()
        self.model, self.card, self.options, self.head = model, card, dict(options), tuple(head)
        self.mask: GradientMask | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # while it is being copied
                raise
            return getattr(self.model, name)


def attach(
    model: nn.Module,
    method: str,
    *,
    budget: int | float | None = None,
    target: str | Sequence[str] = "auto",
    head: Sequence[str] = (),
    generator: torch.Generator | None = None,
    **options: Any,
) -> Any:
    """Put a method of the survey on a model, in place, and freeze the rest.

    Supported: `peft`'s members on what peft supports; adapters on any model with blocks of attention and feed-forward
    layers (`find_blocks`: Llama, Mistral, Qwen, GPT-2, BERT, T5, ViT, the transformers of `diffusers`); UniPELT and MAM
    on models of `transformers` with the attention interface; visual prompts on its vision transformers; BitFit, masks
    and last layers on any network that has what they train. UniPELT does not take encoder-decoders. Running statistics
    of BatchNorm stay the base's: its layers run in evaluation mode, in training too.

    Parameters
    ----------
    model : nn.Module
        Its parameters' `requires_grad` flags are set. If the method cannot be put on, the model is left as it was.
    method : str
        A name of `peft_methods`.
    budget : int or float, optional
        Most parameters to train besides the head, or their share of the model's if below 1: sets the option that the
        method grows with (`MethodCard.size`).
    target : str or sequence of str
        For methods on linear layers: "auto" (all of the blocks), "attention", "feed_forward", or names.
    head : sequence of str
        Modules to train whole, such as ``["classifier"]``: give it for all methods that you compare, or for none.
    generator : torch.Generator, optional
        On the CPU; draws first values. By default torch's global one does, as in peft.
    options : optional
        Of the method: ``r``, ``m``, ``num_virtual_tokens``, ``keep``, ``batches`` (FISH, Child-Tuning_D), ``p``,
        ``k``, ``skip``, ``scale``, and all fields of peft's configuration of its members.

    Returns
    -------
    PeftModel or TunedModel

    Raises
    ------
    InputError
        Unknown method (with the nearest names) or option; the model lacks what the method trains; the budget is too
        small (with the smallest count); the base is quantised and the method cannot sit on it.
    NothingToDo
        Nothing would train.

    References
    ----------
    Zhang et al., arXiv 2501.13787. Where several methods sit on one layer, hooks run in the order in which they were
    attached.
    """
    card = card_of(method)
    _check_base(model, card)
    heads = head_parameters(model, head)
    given = {**card.defaults, **options}
    own = card.via == "own"
    if not own:
        given = {**given, "target": target}
        build: Callable[[nn.Module, Mapping[str, Any]], Any] = lambda base, o: build_peft(base, card, o, head)  # noqa: E731
    else:
        if card.name not in _BUILDERS:
            raise InputError(f"method: {card.name!r} has no builder")
        if card.name == "diff_pruning":
            given = {**given, "target": target}
        elif target != "auto":
            raise InputError(f"target: {card.name} finds its own places; leave target at 'auto'")
        build = lambda base, o: _build_own(base, card, o, head)  # noqa: E731
    if budget is not None:
        total = sum(parameter.numel() for parameter in model.parameters())
        limit = int(budget * total) if 0 < budget < 1 else int(budget)
        given = largest_size(model, card, given, limit, build, set(heads))
    with _drawing(generator), unchanged_on_failure(model):
        if own:  # what cannot be built fails on a copy without storage, and the model itself is left alone
            with torch.random.fork_rng(devices=[]):
                build(without_storage(model), {**given, "dry": True})
        tuned = build(model, given)
        if not any(parameter.requires_grad for parameter in tuned.parameters()):
            raise NothingToDo(f"method: {method} leaves nothing to train")
    hold_statistics(tuned)
    return tuned


def trainable(tuned: nn.Module) -> int:
    """Entries that train, those of masked tensors counted one by one, the head included."""
    mask = getattr(tuned, "mask", None)
    masks = mask.masks if isinstance(mask, GradientMask) and mask.p is None else {}
    inner = tuned.model if isinstance(tuned, TunedModel) else tuned
    return sum(
        int(masks[name].sum()) if name in masks else parameter.numel()
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad
    )


def prepare_optimizer(tuned: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let an optimiser obey what the method asks of a step; for most methods there is nothing to do.

    FISH and Child-Tuning_D keep masked entries bit for bit, Child-Tuning_F thins gradients, AdaLoRA moves its ranks.

    Parameters
    ----------
    tuned : PeftModel or TunedModel
    optimizer : torch.optim.Optimizer
        Over the parameters with `requires_grad`; returned.
    """
    mask = getattr(tuned, "mask", None)
    if isinstance(tuned, TunedModel) and isinstance(mask, GradientMask):
        return mask.apply(optimizer, tuned.model)
    allocate = getattr(getattr(tuned, "base_model", None), "update_and_allocate", None)
    if allocate is not None:
        steps = [0]

        def after(*_: Any) -> None:
            allocate(steps[0])
            steps[0] += 1

        optimizer.register_step_post_hook(after)
    return optimizer


def extra_loss(tuned: nn.Module, weight: float = 1e-6) -> Tensor | float:
    """What a method adds to the loss: `weight` times the expected number of changed entries in diff pruning, else 0.

    Parameters
    ----------
    tuned : PeftModel or TunedModel
    weight : float
        Price of one changed entry.
    """
    diffs = diffs_of(tuned) if isinstance(tuned, TunedModel) else []
    return weight * sum((diff.expected_count() for diff in diffs), torch.zeros(())) if diffs else 0.0


def _bitfit(model: nn.Module, o: dict[str, Any]) -> list[str]:
    return FreezeSelector("bitfit").names(model)


def _last_layers(model: nn.Module, o: dict[str, Any]) -> list[str]:
    return FreezeSelector(f"last:{o.pop('k')}").names(model)


def _everything(model: nn.Module, o: dict[str, Any]) -> list[str]:
    o.pop("p")
    return [name for name, _ in model.named_parameters()]


def _masked(model: nn.Module, o: dict[str, Any]) -> list[str]:
    known = {"batches", "keep", "log_likelihood", "samples"}
    if o.get("batches") is None:
        raise InputError("batches: this method chooses weights by data; give batches=[(inputs, targets), ...]")
    names = [name for name, _ in model.named_parameters()]
    for option in known & set(o):
        del o[option]
    return names


def _added(add: Callable[..., None], **fixed: Any) -> Callable[[nn.Module, dict[str, Any]], list[str]]:
    def builder(model: nn.Module, o: dict[str, Any]) -> list[str]:
        before = {name for name, _ in model.named_parameters()}
        allowed = set(add.__kwdefaults__ or {}) - set(fixed)
        add(model, **fixed, **{name: o.pop(name) for name in list(o) if name in allowed})
        return [name for name, _ in model.named_parameters() if name not in before]

    return builder


def _diffs(model: nn.Module, o: dict[str, Any]) -> list[str]:
    add_diffs(model, linear_layers(model, o.pop("target")), o.pop("start", 0.0))
    return [name for name, _ in model.named_parameters() if name.endswith((".delta", ".log_alpha"))]


_FFN = ("feed_forward",)
_BUILDERS: dict[str, Callable[[nn.Module, dict[str, Any]], list[str]]] = {
    "bitfit": _bitfit,
    "last_layers": _last_layers,
    "fish": _masked,
    "child_tuning_d": _masked,
    "child_tuning_f": _everything,
    "diff_pruning": _diffs,
    "houlsby": _added(add_adapters, after=("attention", "feed_forward"), position="sequential"),
    "pfeiffer": _added(add_adapters, after=_FFN, position="sequential"),
    "adapterdrop": _added(add_adapters, after=_FFN, position="sequential"),
    "parallel_adapter": _added(add_adapters, after=_FFN, position="parallel"),
    "adaptformer": _added(add_adapters, after=_FFN, position="parallel", act="relu"),
    "vpt_shallow": _added(add_visual_prompt, deep=False),
    "vpt_deep": _added(add_visual_prompt, deep=True),
    "unipelt": _added(add_unipelt),
    "mam": _added(add_mam),
}


def _build_own(model: nn.Module, card: MethodCard, options: Mapping[str, Any], head: Sequence[str]) -> TunedModel:
    left = dict(options)
    dry = left.pop("dry", False)
    chosen = set(_BUILDERS[card.name](model, left))
    if left:
        raise InputError(f"{sorted(left)[0]}: {card.name} has no such option; {nearest(sorted(left)[0], options)}")
    heads = head_parameters(model, head)
    tuned = TunedModel(model, card, {k: v for k, v in options.items() if k not in ("dry", "batches", "log_likelihood")},
                       head)  # fmt: skip
    if card.name in ("fish", "child_tuning_d") and not dry:
        choice = {key: options[key] for key in ("log_likelihood", "samples") if key in options}
        tuned.mask = GradientMask.fisher(
            model, options["batches"], options["keep"], names=sorted(chosen - set(heads)), **choice
        )
        chosen = set(tuned.mask.masks)
    elif card.name == "child_tuning_f":
        seed = int(torch.randint(2**62, ()))
        tuned.mask = GradientMask.child(options["p"], torch.Generator().manual_seed(seed))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or name in heads)
        if not parameter.requires_grad:
            parameter.grad = None
    return tuned


def head_parameters(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Names of the parameters inside the modules `head`."""
    modules = dict(model.named_modules())
    for name in head:
        if name not in modules or not name:
            raise InputError(f"head: the model has no module {name!r}; {nearest(name, [n for n in modules if n])}")
    inside = tuple(f"{name}." for name in head)
    return [name for name, _ in model.named_parameters() if inside and name.startswith(inside)]


def _check_base(model: nn.Module, card: MethodCard) -> None:
    if isinstance(model, TunedModel) or hasattr(model, "peft_config"):
        raise InputError("model: has a method on it already; attach to the base, or merge first")
    if not card.on_quantised and is_quantised(model):
        raise InputError(
            f"model: {type(model).__name__} is quantised; {card.name} changes or reads the weights themselves. Methods "
            "for a quantised base: lora, rslora, dora, lora_fa"
        )


@contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
