"""captum's contract, for every entry of the catalogue that explains predictions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Attribution
from torch import nn

from salience import papers
from salience.errors import MissingExtra, SalienceError
from tiny import LAYER, build, example, state_hash

# How to build each attribution on a model, given one of its layers: entry -> (model, layer) -> attribution.
EXAMPLES: dict[str, Callable[[nn.Module, str], Attribution]] = {
    "salience.features:LayerSaliency": lambda model, layer: _features().LayerSaliency(
        model, layer, "conv3x3", "filter_norm"),
    "salience.features:NormGrad": lambda model, layer: _features().NormGrad(model, [None, layer]),
    "salience.features:GradCAM": lambda model, layer: _features().GradCAM(model, layer),
    "salience.features:LinearApproximation": lambda model, layer: _features().LinearApproximation(model, layer),
    "salience.features:Gradient": lambda model, layer: _features().Gradient(model),
    "salience.features:BEE": lambda model, layer: _features().BEE(
        model, layer, families=["normal", "blur", "const"], draws=4),
    "salience.features:RISE": lambda model, layer: _features().RISE(model, masks=16),
    "salience.features:MetaSaliency": lambda model, layer: _features().MetaSaliency(
        _features().NormGrad(model, layer)
    ),
}  # fmt: skip
FAMILIES = ["plain", "vit", "resnet"]


def _features() -> Any:
    return importlib.import_module("salience.features")


def attributions() -> list[str]:
    found = []
    for paper in papers.load().values():
        for entry in paper.entry:
            module, name = entry.split(":")
            try:
                kind = getattr(importlib.import_module(module), name)
            except MissingExtra:
                continue
            if inspect.isclass(kind) and issubclass(kind, Attribution):
                found.append(entry)
    return found


ENTRIES = attributions()


def made(entry: str, family: str) -> tuple[nn.Module, Attribution, torch.Tensor]:
    if entry not in EXAMPLES:
        pytest.fail(f"{entry} is an attribution: enter in EXAMPLES how it is built")
    model = build(family)
    inputs = example(family)
    images = inputs if isinstance(inputs, torch.Tensor) else inputs["pixel_values"]
    return model, EXAMPLES[entry](model, LAYER[family]), images


def test_the_catalogue_has_attributions() -> None:
    assert "salience.features:NormGrad" in ENTRIES
    assert set(EXAMPLES) <= set(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_it_reads_like_one_of_captums(entry: str) -> None:
    module, name = entry.split(":")
    kind = getattr(importlib.import_module(module), name)
    parameters = list(inspect.signature(kind.attribute).parameters)
    assert parameters[:2] == ["self", "inputs"] and "target" in parameters
    assert "additional_forward_args" in parameters
    for text in (inspect.getdoc(kind) or "", inspect.getdoc(kind.attribute) or ""):
        assert text, "a docstring is missing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_maps_fit_the_images_and_repeat_themselves(entry: str, family: str) -> None:
    _, attribution, images = made(entry, family)
    before = images.clone()
    torch.manual_seed(0)
    maps = attribution.attribute(images, target=1)
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    again = attribution.attribute(images, target=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(maps, again)
    assert torch.broadcast_shapes(maps.shape, images.shape) == images.shape
    assert bool(torch.isfinite(maps).all()) and not maps.requires_grad
    assert torch.equal(images, before) and not images.requires_grad and images.grad is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_image_gets_the_same_map_in_any_batch(entry: str, family: str) -> None:
    _, attribution, images = made(entry, family)
    whole = attribution.attribute(images, target=torch.tensor([0, 2, 1]))
    alone = attribution.attribute(images[1:2], target=2)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    other = attribution.attribute(images, target=[1, 0, 2])
    assert not torch.allclose(whole, other), "maps do not follow the target"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_model_is_left_as_it_was(entry: str, family: str) -> None:
    model, attribution, images = made(entry, family)
    model.train()
    next(model.children()).eval()  # flags that differ within the model
    next(iter(model.parameters())).requires_grad_(False)
    before = state_hash(model)
    with torch.no_grad():
        attribution.attribute(images, target=1)
        assert not torch.is_grad_enabled()
    assert state_hash(model) == before
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = state_hash(model)
    attribution.attribute(images, target=1)
    assert state_hash(model) == frozen


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_model_is_left_as_it_was_after_an_exception(entry: str, after: int, monkeypatch) -> None:
    model, attribution, images = made(entry, "plain")
    model.train()
    before = state_hash(model)
    forward, calls = model.head.forward, []

    def failing(x):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("in the middle of a pass")
        return forward(x)

    monkeypatch.setattr(model.head, "forward", failing)
    try:
        attribution.attribute(images, target=1)
    except RuntimeError:
        assert state_hash(model) == before
    assert state_hash(model) == before
    if after == 0:
        assert calls, "the model was never run"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_class_that_is_not_there_is_refused(entry: str) -> None:
    _, attribution, images = made(entry, "plain")
    for target in (3, -1, torch.tensor([0, 1]), "cat"):
        with pytest.raises(SalienceError, match="target"):
            attribution.attribute(images, target=target)
