"""The contract of functions on a model, for each one that the catalogue enters.

A function is one if a parameter of it is called `model`. Enter an example of its call in EXAMPLES.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from salience import papers
from salience.errors import MissingExtra, SalienceError
from tiny import build, state_hash


class Example(NamedTuple):
    """How to call a function on a tiny model, and what of that model it may change.

    `arguments` takes the model, and returns all arguments but it. `changes` names what a call may change:
    "values" of parameters and buffers, "requires_grad". `refused` is a model that the function must refuse.
    """

    arguments: Callable[[nn.Module], dict[str, Any]]
    changes: frozenset[str] = frozenset()
    refused: Callable[[], nn.Module] | None = None


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16, generator=generator())


def chosen(model: nn.Module) -> Any:
    from salience.weights import select_params

    return select_params(model, "per_channel", generator=generator())


def optimizer(model: nn.Module) -> dict[str, Any]:
    return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "selection": chosen(model)}


def lesson(model: nn.Module) -> dict[str, Any]:
    return {
        "inputs": images(), "targets": torch.arange(8) % 3, "selection": chosen(model), "epochs": 1,
        "batch_size": 4, "generator": generator(),
    }  # fmt: skip


def lesson_batches(model: nn.Module) -> dict[str, Any]:
    return {"batches": [(images(), torch.arange(8) % 3)]}


def line(model: nn.Module) -> dict[str, Any]:
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value * 1.5 if value.is_floating_point() else value for name, value in start.items()}
    return {
        "state_a": start, "state_b": end, "points": 3, "recalibrate": [images()],
        "evaluate": lambda network: (float(network(images()).square().mean().detach()), 0.5),
    }  # fmt: skip


def forecast(model: nn.Module) -> dict[str, Any]:
    states = {name: value for name, value in line(model).items() if name.startswith("state")}
    return {**states, "loss": lambda network: network(images()).square().mean()}


def attacked(model: nn.Module) -> dict[str, Any]:
    pixels = torch.rand(8, 3, 16, 16, generator=generator())
    return {"inputs": pixels, "targets": torch.arange(8) % 3, "eps": 0.1, "steps": 2, "generator": generator()}


def adversarial_lesson(model: nn.Module) -> dict[str, Any]:
    return {
        **attacked(model), "recipe": "advprop", "epochs": 1, "batch_size": 4,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }  # fmt: skip


def layers_at_start(model: nn.Module) -> dict[str, Any]:
    """Two layers that were tuned, and what they were before."""
    start = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach() * 0.5 for name in ("conv", "conv2")}
    return {
        "layers": ["conv", "conv2"], "start": start, "batches": [images()],
        "loss_fn": lambda network, batch: network(batch).square().mean(),
    }  # fmt: skip


def samples() -> Any:
    return torch.utils.data.TensorDataset(images(), torch.arange(8) % 3)


def probed(model: nn.Module) -> dict[str, Any]:
    """Pictures of three colours and two brightnesses, which two channels of the network tell apart."""
    from salience.concepts import ProbeSet

    rows = torch.arange(60)
    pixels = images(60) + 2 * torch.eye(3)[rows % 3][:, :, None, None] + (rows % 2)[:, None, None, None]
    concepts = torch.stack([rows % 3 == 0, rows % 2 == 0], dim=1).numpy()
    with torch.no_grad():  # the head is set so that the network predicts more than one class
        net = copy.deepcopy(model).eval()
        features = net.relu2(net.conv2(net.relu(net.norm(net.conv(pixels))))).mean((2, 3))
        middle = features.mean(0)
        model.head.weight.copy_((torch.stack([features[rows % 3 == c].mean(0) for c in range(3)]) - middle) * 50)
        model.head.bias.copy_(-model.head.weight @ middle)
    return {"probes": {"A": ProbeSet(pixels, concepts, ("red", "even"))}, "generic": build("resnet"), "ks": (2,)}


FLAGS = frozenset({"requires_grad"})
EXAMPLES = {
    "salience.concepts:audit": Example(probed, refused=lambda: nn.Conv2d(3, 1, 3)),
    "salience.data:diversity_report": Example(
        lambda model: {"inputs": images(), "targets": torch.arange(8) % 3, "layer": "relu2"}
    ),
    "salience.data:diversity_scores": Example(lambda model: {"inputs": images(), "layer": "relu2"}),
    "salience.data:gradient_features": Example(
        lambda model: {"data": samples()}, refused=lambda: nn.ReLU()
    ),
    "salience.data:sample_scores": Example(lambda model: {"data": samples()}),
    "salience.features:pgd_attack": Example(attacked),
    "salience.features:adversarial_fit": Example(
        adversarial_lesson, frozenset({"values"}), lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    ),
    "salience.weights:attach": Example(lambda model: {"method": "bitfit"}, FLAGS | {"hooks"}, lambda: build("llama")),
    "salience.weights:select_params": Example(lambda model: {"which": "bn"}, FLAGS, lambda: build("gpt2")),
    "salience.weights:hold_frozen": Example(optimizer, FLAGS),
    "salience.weights:train_subset": Example(lesson, FLAGS | {"values"}),
    "salience.weights:gamma_report": Example(lambda model: {}, refused=lambda: build("llama")),
    "salience.weights:dead_channels": Example(
        lambda model: {"data": images()}, refused=lambda: nn.Conv2d(3, 1, 3)
    ),
    "salience.weights:iterative_feature_merging": Example(
        lambda model: {"example": images(1), "beta": 0.9}, refused=lambda: nn.Conv2d(3, 1, 3)
    ),
    "salience.weights:feature_complexity": Example(
        lambda model: {"example": images(1), "betas": (0.5,)}, refused=lambda: nn.Conv2d(3, 1, 3)
    ),
    "salience.weights:equivalence_report": Example(
        lambda model: {"other": build("plain"), "data": images(), "layers": ["conv"]}
    ),
    "salience.weights:layer_ablation": Example(layers_at_start, refused=lambda: nn.Conv2d(3, 1, 3)),
    "salience.weights:prune_channels": Example(
        lambda model: {"example": images(1), "keep": 0.5}, refused=lambda: nn.Conv2d(3, 1, 3)
    ),
    "salience.weights:score_magnitude": Example(lambda model: {}, refused=lambda: nn.BatchNorm2d(3)),
    "salience.weights:score_snip": Example(lesson_batches, refused=lambda: nn.BatchNorm2d(3)),
    "salience.weights:score_grasp": Example(lesson_batches, refused=lambda: nn.BatchNorm2d(3)),
    "salience.weights:score_wanda": Example(lesson_batches, refused=lambda: nn.BatchNorm2d(3)),
    "salience.weights:score_synflow": Example(lambda model: {"example": images(1)}, refused=lambda: build("vit")),
    "salience.weights:synflow_masks": Example(
        lambda model: {"example": images(1), "density": 0.5, "rounds": 3}, refused=lambda: build("vit")
    ),
    "salience.weights:sparsity_report": Example(
        lambda model: {"masks": None, "example": images(1)}, refused=lambda: nn.BatchNorm2d(3)
    ),
    "salience.weights:infer_spec": Example(lambda model: {"example": images()}, refused=lambda: nn.Conv2d(3, 1, 3)),
    "salience.weights:barrier": Example(line),
    "salience.weights:taylor_barrier": Example(forecast),
}  # fmt: skip


def functions() -> list[str]:
    """Entries of the catalogue that are functions on a model."""
    entries = []
    for paper in papers.load().values():
        for entry in paper.entry:
            module, name = entry.split(":")
            try:
                thing = getattr(importlib.import_module(module), name)
            except MissingExtra:
                continue
            if inspect.isfunction(thing) and "model" in inspect.signature(thing).parameters:
                entries.append(entry)
    return entries


FUNCTIONS = functions()


def of(entry: str) -> tuple[Callable, Example]:
    module, name = entry.split(":")
    if entry not in EXAMPLES:
        pytest.fail(f"{entry} is a function on a model: enter an example of its call in EXAMPLES")
    return getattr(importlib.import_module(module), name), EXAMPLES[entry]


def state(model: nn.Module) -> dict[str, Any]:
    """What a function may change of a model, part by part."""
    return {
        "values": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is not None for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "parameter hooks": {name: len(parameter._backward_hooks or ()) for name, parameter in model.named_parameters()},
        "grad mode": torch.is_grad_enabled(),
        "random state": torch.get_rng_state(),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def mixed_flags() -> nn.Module:
    """A small network with batch normalisation; one module is in training mode, the others are not."""
    model = build("plain")
    model.relu2.train()
    return model


def test_every_example_is_of_a_function() -> None:
    assert set(EXAMPLES) <= set(FUNCTIONS)


@pytest.mark.parametrize("entry", FUNCTIONS)
def test_it_says_what_it_takes(entry: str) -> None:
    function, example = of(entry)
    text = inspect.getdoc(function) or ""
    assert "Supported: " in text, "the docstring must state the supported families"
    assert "\nParameters\n----" in text
    if example.refused is not None:
        assert "\nRaises\n----" in text
    parameters = inspect.signature(function).parameters
    assert not {"seed", "random_state"} & set(parameters), "functions take a torch.Generator, `generator`"
    documented = text.split("\nParameters\n", 1)[1]
    missing = [name for name in parameters if name not in documented]
    assert not missing, f"undocumented: {missing}"


@pytest.mark.parametrize("entry", FUNCTIONS)
def test_it_leaves_the_rest_of_the_model_alone(entry: str) -> None:
    function, example = of(entry)
    model = mixed_flags()
    arguments = example.arguments(model)
    before = state(model)
    function(model=model, **arguments)
    after = state(model)
    changed = {part for part in before if not same(before[part], after[part])}
    assert changed <= example.changes


@pytest.mark.parametrize("entry", FUNCTIONS)
def test_it_repeats_itself(entry: str) -> None:
    function, example = of(entry)
    hashes, results = [], []
    for seed in (0, 1):
        model = build("plain")
        arguments = example.arguments(model)
        torch.manual_seed(seed)  # the global random state must play no part
        results.append(repr(function(model=model, **arguments)))
        hashes.append(state_hash(model))
    assert hashes[0] == hashes[1] and results[0] == results[1]


REFUSING = [entry for entry in FUNCTIONS if entry in EXAMPLES and EXAMPLES[entry].refused]


@pytest.mark.parametrize("entry", REFUSING)
def test_it_refuses_other_families_and_leaves_them_alone(entry: str) -> None:
    function, example = of(entry)
    assert example.refused is not None
    arguments = example.arguments(mixed_flags())
    model = example.refused()
    before = state(model)
    with pytest.raises(SalienceError, match=type(model).__name__):
        function(model=model, **arguments)
    assert same(before, state(model))
