"""CRAFT: crops, concepts of a class, importance at an affine head, curves, recursion, maps, bad input."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, IntegratedGradients
from sklearn.base import clone
from torch import nn
from torch.nn.functional import interpolate, unfold
from torch.utils.data import TensorDataset

from salience.concepts import (
    ConceptModel,
    ConceptScores,
    Craft,
    NMFConcepts,
    concept_deletion,
    concept_insertion,
    gradient_input,
    make_crops,
    nonnegative_layers,
    sobol_importance,
    tcav,
)
from salience.concepts.concept_curves import follow_orders
from salience.errors import DataError, InputError, NothingToDo
from salience.features import RISE
from tiny import build, state_hash


def network(channels: int = 1, width: int = 8, classes: int = 4) -> nn.Module:
    """Two resolutions, a global average and a linear head; ReLU in place."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(
        c1=nn.Conv2d(channels, 6, 3, padding=1), r1=nn.ReLU(inplace=True), pool=nn.MaxPool2d(2),
        c2=nn.Conv2d(6, width, 3, padding=1), r2=nn.ReLU(inplace=True), mean=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(), head=nn.Linear(width, classes),
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def images(n: int = 12, channels: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def fitted() -> Craft:
    return Craft(n_concepts=4, patch_size=8, stride=4).fit(network(), images())


# Crops -----------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_authors_and_crops_fill_the_image():
    pixels = images(3, channels=2)
    crops = make_crops(pixels, patch_size=6)  # a stride of int(0.8 * 6) = 4
    windows = unfold(pixels, 6, stride=4).transpose(1, 2).reshape(-1, 2, 6, 6)
    assert len(crops) == len(windows) == 3 * 9
    whole = interpolate(windows, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.stack(list(crops)), whole)


def test_images_that_are_not_square_and_default_sides():
    assert make_crops(images(1, height=224, width=300)).patch_size == 64
    assert make_crops(images(1, height=32, width=32)).patch_size == 16
    assert make_crops(images(1, height=8, width=8)).patch_size == 4
    crops = make_crops(images(2, height=12, width=20), patch_size=8, stride=4)
    assert len(crops) == 2 * 2 * 4 and crops[0].shape == (1, 12, 20)


def test_random_crops_of_an_image_do_not_depend_on_others():
    few = make_crops(images(2), patch_size=5, kind="random", per_image=7, random_state=3)
    many = make_crops(images(9), patch_size=5, kind="random", per_image=7, random_state=3)
    np.testing.assert_array_equal(few.boxes, many.boxes[:14])
    assert few.boxes[:, 1:].min() >= 0 and few.boxes[:, 1:].max() <= 11
    other = make_crops(images(2), patch_size=5, kind="random", per_image=7, random_state=4)
    assert not np.array_equal(few.boxes, other.boxes)


# Concepts of a class ---------------------------------------------------------------------------------------------


def test_activations_are_means_over_positions_of_whole_size_crops(fitted):
    crops = torch.stack(list(fitted.crops_))
    with torch.no_grad():
        activations = fitted.concepts_.model[:5](crops).mean((2, 3))
    again = NMFConcepts(n_concepts=4).fit(activations)
    torch.testing.assert_close(fitted.components_, again.components_)
    torch.testing.assert_close(fitted.crop_codes_, again.codes_)
    left = (activations - fitted.crop_codes_ @ fitted.components_).norm() / activations.norm()
    assert fitted.relative_error_ == pytest.approx(float(left), rel=1e-4)
    assert fitted.layer_ == "r2"


def test_only_images_predicted_as_the_class_are_used():
    model, pixels = network(), images(30)
    with torch.no_grad():
        model.head.bias -= model(pixels).median(0).values  # or it predicts the same class throughout
        predicted = model(pixels).argmax(1)
    class_id = int(predicted.mode().values)
    craft = Craft(n_concepts=2, patch_size=8).fit(model, pixels, class_id)
    np.testing.assert_array_equal(craft.kept_, np.flatnonzero(predicted == class_id))
    assert 0 < len(craft.kept_) < 30
    alone = Craft(n_concepts=2, patch_size=8).fit(model, pixels[craft.kept_])
    torch.testing.assert_close(craft.components_, alone.components_)
    labelled = TensorDataset(pixels, torch.zeros(30, dtype=torch.long))
    torch.testing.assert_close(Craft(n_concepts=2, patch_size=8).fit(model, labelled, class_id).components_,
                               craft.components_)  # fmt: skip
    absent = next(c for c in range(9) if c not in predicted)
    with pytest.raises(NothingToDo, match=f"class {absent}"):
        craft.fit(model, pixels, absent)


def test_activations_beyond_the_memory_go_to_disk(monkeypatch):
    seen = []
    fit = NMFConcepts.fit
    monkeypatch.setattr(NMFConcepts, "fit", lambda self, a, device=None: seen.append(type(a)) or fit(self, a, device))
    held = Craft(n_concepts=3, patch_size=8).fit(network(), images())
    mapped = Craft(n_concepts=3, patch_size=8, memory=100).fit(network(), images())
    assert seen == [torch.Tensor, np.memmap]
    torch.testing.assert_close(held.components_, mapped.components_)


def test_codes_of_images_are_position_by_position(fitted):
    codes = fitted.transform(images(3))
    assert codes.shape == (3, 8, 8, 4)
    with torch.no_grad():
        one = fitted.concepts_.model[:5](images(3))[2, :, 5, 1]
    torch.testing.assert_close(codes[2, 5, 1], fitted.concepts_.extractor.encode(one[None])[0])


def test_the_model_is_left_as_it_was():
    model = build("plain").train()
    before = state_hash(model)
    pixels = images(8, channels=3)
    craft = Craft(layer="relu2", n_concepts=2, patch_size=8).fit(model, pixels)
    craft.estimate_importance(pixels[:2], 0, n_design=4)
    craft.attribution_maps(pixels[:2])
    assert state_hash(model) == before


def test_a_transformers_network_and_a_clone():
    model, pixels = build("resnet"), images(8, channels=3)
    craft = Craft(n_concepts=3, patch_size=8)
    found = craft.fit(model, pixels)
    totals = found.estimate_importance(pixels[:2], 1, n_design=8)
    assert totals.shape == (2, 3) and np.isfinite(totals).all()
    assert not hasattr(clone(found), "components_")


def test_the_layer_is_the_last_that_is_never_negative():
    assert nonnegative_layers(network(), images()) == ["r1", "r2"]  # "pool" has the resolution of "r2", and ends first
    assert nonnegative_layers(build("resnet"), images(2, channels=3))[-1] == "resnet.encoder"
    with pytest.raises(InputError, match="ReLU"):
        nonnegative_layers(build("vit"), images(2, channels=3))


# Importance ------------------------------------------------------------------------------------------------------


def worth(craft: Craft, codes: torch.Tensor, class_id: int) -> np.ndarray:
    """At a linear head behind a mean: what each concept adds to the logit."""
    weights = craft.components_ @ craft.concepts_.model.head.weight[class_id].detach()
    return (codes.mean((1, 2)) * weights).double().numpy()


def test_at_an_affine_head_gradient_integrated_gradients_and_occlusion_are_one(fitted):
    pixels = images(3)
    codes, concepts = fitted.transform(pixels), fitted.concepts_
    exact = worth(fitted, codes, 1)
    np.testing.assert_allclose(gradient_input(concepts, codes, pixels, 1), exact, atol=1e-4)
    path = IntegratedGradients(concepts).attribute(codes, target=1, additional_forward_args=(pixels,), n_steps=4)
    np.testing.assert_allclose(path.sum((1, 2)).detach(), exact, atol=1e-4)
    mask = torch.arange(4).expand(1, 8, 8, 4)
    gone = FeatureAblation(concepts).attribute(codes, target=1, feature_mask=mask, additional_forward_args=(pixels,))
    np.testing.assert_allclose(gone[:, 0, 0].detach(), exact, atol=1e-4)


def test_at_an_affine_head_sobol_is_the_share_of_the_squares(fitted):
    pixels = images(3)
    codes = fitted.transform(pixels)
    exact = worth(fitted, codes, 1) ** 2
    totals = sobol_importance(fitted.concepts_, codes, pixels, 1, n_design=2048, random_state=0)
    np.testing.assert_allclose(totals, exact / exact.sum(1, keepdims=True), atol=0.02)


def test_tcav_is_the_sign_of_the_weights(fitted):
    pixels = images(3)
    codes = fitted.transform(pixels)
    weights = fitted.components_ @ fitted.concepts_.model.head.weight[2].detach()
    expected = np.broadcast_to(weights.numpy() > 0, (3, 4))
    np.testing.assert_array_equal(tcav(fitted.concepts_, codes, pixels, torch.tensor([2, 2, 2])), expected)


def test_sobol_makes_exactly_the_passes_of_its_design(fitted):
    pixels = images(2)
    codes, rows = fitted.transform(pixels), []
    handle = fitted.concepts_.model.head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    sobol_importance(fitted.concepts_, codes, pixels, 0, n_design=16, batch_size=10)
    handle.remove()
    assert sum(rows) == 2 * 16 * (4 + 2) and max(rows) == 10


def test_a_dead_concept_has_no_importance(fitted):
    pixels = images(2)
    codes = fitted.transform(pixels)
    codes[..., 2] = 0
    totals = sobol_importance(fitted.concepts_, codes, pixels, 0)
    assert not totals[:, 2].any() and np.isfinite(totals).all()
    with pytest.warns(UserWarning, match="do not vary"):
        assert not sobol_importance(fitted.concepts_, 0 * codes, pixels, 0).any()


def test_designs_are_shared_or_each_images_own(fitted):
    pixels = images(1).expand(3, -1, -1, -1)
    codes = fitted.transform(pixels)
    shared = sobol_importance(fitted.concepts_, codes, pixels, 0)
    np.testing.assert_allclose(shared, shared[:1].repeat(3, 0))
    own = sobol_importance(fitted.concepts_, codes, pixels, 0, random_state=1)
    assert np.ptp(own[:, 0]) > 0
    np.testing.assert_array_equal(own, sobol_importance(fitted.concepts_, codes, pixels, 0, random_state=1))


def test_what_goes_around_the_layer_is_kept():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.inner(x)).mean((2, 3)) + x.mean((1, 2, 3))[:, None]

    pixels = images(4)
    craft = Craft(layer="relu", n_concepts=2, patch_size=8).fit(Around().eval(), pixels)
    codes = craft.transform(pixels)
    empty = concept_deletion(craft.concepts_, codes, pixels, 0, np.arange(2), score="logit").scores[:, -1]
    np.testing.assert_allclose(empty, pixels.mean((1, 2, 3)), atol=1e-5)


# Deletion and insertion ------------------------------------------------------------------------------------------


def all_orders(k: int) -> np.ndarray:
    """Importances of every order of k concepts."""
    return np.array([np.argsort(order) for order in itertools.permutations(range(k))], dtype=float)


@pytest.mark.parametrize("k", [3, 5, 6])
def test_no_order_beats_gradient_x_code_at_an_affine_head(k):
    pixels = images(4)
    craft = Craft(n_concepts=k, patch_size=8, stride=4).fit(network(), images())
    codes = craft.transform(pixels)
    local = gradient_input(craft.concepts_, codes, pixels, 1)
    for mode, curve, best in (("deletion", concept_deletion, np.min), ("insertion", concept_insertion, np.max)):
        changed, scores = follow_orders(craft.concepts_, codes, pixels, 1, all_orders(k), mode=mode, score="logit")
        areas = np.trapezoid(scores, changed, axis=-1)
        ours = curve(craft.concepts_, codes, pixels, 1, local, score="logit").area
        np.testing.assert_allclose(ours, best(areas, axis=0), atol=1e-4)
        assert np.ptp(areas, axis=0).min() > 1e-3  # the order matters


def test_no_order_beats_sobol_where_all_concepts_speak_for_the_class():
    model, pixels = network(), images(4)
    with torch.no_grad():
        model.head.weight.abs_()
    craft = Craft(n_concepts=5, patch_size=8, stride=4).fit(model, images())
    codes = craft.transform(pixels)
    local = sobol_importance(craft.concepts_, codes, pixels, 1, n_design=1024)
    changed, scores = follow_orders(craft.concepts_, codes, pixels, 1, all_orders(5), mode="deletion", score="logit")
    best = np.trapezoid(scores, changed, axis=-1).min(0)
    found = concept_deletion(craft.concepts_, codes, pixels, 1, local, score="logit").area
    np.testing.assert_allclose(found, best, rtol=1e-3)


def test_curves_begin_and_end_where_they_must(fitted):
    pixels = images(3)
    codes, concepts = fitted.transform(pixels), fitted.concepts_
    with torch.no_grad():
        whole = concepts(codes, pixels).double().softmax(1)[:, 1].numpy()
        empty = concepts(0 * codes, pixels).double().softmax(1)[:, 1].numpy()
    out = concept_deletion(concepts, codes, pixels, 1, np.arange(4.0))
    back = concept_insertion(concepts, codes, pixels, 1, np.arange(4.0))
    for one, (first, last) in ((out, (whole, empty)), (back, (empty, whole))):
        np.testing.assert_allclose(one.scores[:, 0], first, atol=1e-6)
        np.testing.assert_allclose(one.scores[:, -1], last, atol=1e-6)
    codes[..., 3] = 0  # the most important by that order
    with torch.no_grad():
        np.testing.assert_allclose(out.scores[:, 1], concepts(codes, pixels).double().softmax(1)[:, 1], atol=1e-6)


# Recursion and maps ----------------------------------------------------------------------------------------------


def test_refine_takes_the_upper_tenth_to_an_earlier_layer(fitted):
    parts = fitted.refine(1, n_concepts=3)
    codes = fitted.crop_codes_[:, 1].double().numpy()
    chosen = np.flatnonzero(codes >= np.quantile(codes, 0.9))
    np.testing.assert_array_equal(parts.crops_.boxes, fitted.crops_.boxes[chosen])
    assert parts.layer_ == "r1" and parts.components_.shape == (3, 6)
    with torch.no_grad():
        crops = torch.stack(list(parts.crops_))
        activations = fitted.concepts_.model[:2](crops).mean((2, 3))
    torch.testing.assert_close(parts.crop_codes_, NMFConcepts(n_concepts=3).fit(activations).codes_)
    assert parts.refine(0, "r1", 1, quantile=0.5).layer_ == "r1"


def test_codes_as_maps(fitted):
    pixels = images(2)
    maps = fitted.attribution_maps(pixels, [2, 0], "code")
    expected = interpolate(fitted.transform(pixels).movedim(-1, 1), size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps, expected[:, [2, 0]])


def test_gradient_maps_are_those_of_finite_differences():
    model, pixels = network().double(), images(1).double()
    craft = Craft(n_concepts=3, patch_size=8).fit(model, images(8).double())
    scores = ConceptScores(craft.concepts_)
    concept = int(scores(pixels)[0].argmax())
    found = craft.attribution_maps(pixels, [concept], "gradient")[0, 0]
    step = 1e-6
    for row, column in ((3, 4), (8, 8), (15, 0)):
        moved = pixels.clone()
        moved[0, 0, row, column] += step
        numeric = float((scores(moved) - scores(pixels))[0, concept].detach() / step)
        assert float(found[row, column]) == pytest.approx(abs(numeric), rel=1e-3, abs=1e-7)


def test_grad_cam_reads_the_derivative_of_least_squares():
    model, pixels = network().double(), images(3).double()
    craft = Craft(n_concepts=3, patch_size=8).fit(model, images(8).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        maps = craft.attribution_maps(pixels)
    v = craft.components_
    for x, shown in zip(pixels, maps, strict=True):
        a = model[:5](x[None]).detach()[0]
        active = ConceptScores(craft.concepts_)(x[None])[0].detach() > 0
        readout = torch.zeros_like(v)
        readout[active] = torch.linalg.solve(v[active] @ v[active].T, v[active])
        small = torch.einsum("kp,phw->khw", readout / 64, a).clamp(min=0)
        expected = interpolate(small[None], size=(16, 16), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(shown, expected)


def test_any_attribution_of_captum_explains_a_concept(fitted):
    maps = RISE(ConceptScores(fitted.concepts_), masks=8).attribute(images(2), target=1)
    assert maps.shape == (2, 1, 16, 16)


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, pixels, error, said",
    [
        ({"layer": "c2"}, images(), DataError, "ReLU"),
        ({"layer": "nowhere"}, images(), InputError, "nearest names|there are"),
        ({"patch_size": 17}, images(), InputError, "patch_size"),
        ({"n_concepts": 9}, images(), InputError, "1..8"),
        ({"n_concepts": 4, "patch_size": 16}, images(3), InputError, "1..3"),
        ({"crops": "hexagon"}, images(), InputError, "crops"),
        ({"stride": 0}, images(), InputError, "stride"),
        ({}, images()[:0], NothingToDo, "none"),
        ({}, images()[0], InputError, "shape"),
    ],
)
def test_what_fit_refuses(parameters, pixels, error, said):
    with pytest.raises(error, match=said):
        Craft(**{"n_concepts": 3, "patch_size": 8, **parameters}).fit(network(), pixels)


def test_what_the_fitted_refuses(fitted):
    pixels = images(2)
    codes = fitted.transform(pixels)
    cases = [
        (lambda: fitted.refine(4), "concept"),
        (lambda: fitted.refine(0, quantile=1.0), "quantile"),
        (lambda: fitted.refine(0, n_concepts=99), "n_concepts"),
        (lambda: fitted.refine(0, "r3"), "r1"),
        (lambda: fitted.refine(0).refine(0), "no never negative layer"),
        (lambda: fitted.attribution_maps(pixels, [4]), "concepts"),
        (lambda: fitted.attribution_maps(pixels, method="camgrad"), "method"),
        (lambda: fitted.estimate_importance(pixels, 4), "classes 4"),
        (lambda: fitted.estimate_importance(pixels, 0, n_design=1), "n_design"),
        (lambda: sobol_importance(fitted.concepts_, codes, images(3), 0), "rows"),
        (lambda: sobol_importance(fitted.concepts_, codes, pixels, "cat"), "target"),
        (lambda: concept_deletion(fitted.concepts_, codes, pixels, 0, np.ones(3)), "importance"),
        (lambda: concept_deletion(fitted.concepts_, codes, pixels, 0, np.full(4, np.nan)), "NaN"),
        (lambda: concept_deletion(fitted.concepts_, codes, pixels, 0, np.ones(4), score="odds"), "score"),
        (lambda: ConceptModel(network(), "r9", fitted.concepts_.extractor), "r9"),
    ]  # fmt: skip
    for call, said in cases:
        with pytest.raises(InputError, match=said):
            call()


def test_a_layer_of_vectors_has_codes_but_no_map():
    craft = Craft(layer="flat", n_concepts=3, patch_size=8).fit(network(), images())
    assert craft.transform(images(2)).shape == (2, 3)
    for method in ("code", "gradcam"):
        with pytest.raises(InputError, match="map"):
            craft.attribution_maps(images(2), method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an image without a concept has a flat map
        assert craft.attribution_maps(images(2), method="gradient").shape == (2, 3, 16, 16)
    assert craft.estimate_importance(images(2), 0).shape == (2, 3)
