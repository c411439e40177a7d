"""Holistic concepts: extractors, attributions at an affine head, measures by hand, strategies, bad input."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score
from torch import nn

from salience.concepts import (
    ConceptModel,
    KMeansConcepts,
    NMFConcepts,
    PCAConcepts,
    RandomConcepts,
    SAEConcepts,
    SemiNMFConcepts,
    concept_importance,
    dictionary_distance,
    draw_graph,
    extraction_report,
    frechet,
    importance_report,
    mean_importance,
    out_of_distribution,
    sobol_importance,
    strategy_graph,
    wasserstein,
)
from salience.concepts.attributions import METHODS
from salience.concepts.concept_curves import follow_orders
from salience.errors import DataError, InputError
from tiny import build

EXTRACTORS = (KMeansConcepts, PCAConcepts, NMFConcepts, SemiNMFConcepts, SAEConcepts, RandomConcepts)
EXACT = ("gradient_input", "integrated_gradients", "occlusion")


def activations(n: int = 200, p: int = 12, parts: int = 4, seed: int = 0) -> torch.Tensor:
    """Sums of sparse parts, as behind a ReLU, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, parts, generator=generator) * (torch.rand(n, parts, generator=generator) < 0.5)
    dictionary = torch.rand(parts, p, generator=torch.Generator().manual_seed(9)) ** 3
    return codes @ dictionary + 0.01 * torch.rand(n, p, generator=generator)


def network() -> nn.Module:
    """Behind "r1" it is not linear, behind "r2" it is a global average and a linear head."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(
        c1=nn.Conv2d(1, 6, 3, stride=2, padding=1), r1=nn.ReLU(), c2=nn.Conv2d(6, 8, 3, stride=2, padding=1),
        r2=nn.ReLU(), mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, 3),
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


PICTURES = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def seen_at(layer: str, k: int = 4, extractor=None) -> tuple[ConceptModel, torch.Tensor]:
    """A network seen through concepts of a layer, and the codes of the pictures."""
    concepts = ConceptModel(network(), layer, extractor or NMFConcepts(n_concepts=k))
    with torch.no_grad():
        a = concepts.activations(PICTURES)
        concepts.extractor.fit(a.reshape(-1, a.shape[-1]))
        return concepts, concepts.encode(PICTURES)


def weights(concepts: ConceptModel, target: int) -> np.ndarray:
    """w_i = (V W_c)_i of the linear head."""
    return (concepts.extractor.components_ @ concepts.model.head.weight[target].detach()).double().numpy()


# Extractors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_every_extractor_keeps_the_protocol(kind):
    known, new = activations(), activations(50, seed=1)
    found = kind(n_concepts=4).fit(known)
    codes = found.encode(new)
    assert found.components_.shape == (4, 12) and codes.shape == (50, 4) and found.decode(codes).shape == (50, 12)
    torch.testing.assert_close(found.encode(new[:7]), codes[:7])  # of a row, whatever comes with it
    again = clone(found).fit(known.numpy())  # an array is as good as a tensor
    torch.testing.assert_close(again.components_, found.components_)
    assert found.encode(new.double()).dtype == torch.float64
    assert not hasattr(clone(found), "components_")


def test_k_means_codes_are_one_hot_at_the_nearest_centre():
    found, new = KMeansConcepts(n_concepts=5).fit(activations()), activations(64, seed=1)
    codes = found.encode(new)
    assert float((codes == 0).double().mean()) == 4 / 5
    distance = ((new[:, None] - found.components_[None]) ** 2).sum(2)
    np.testing.assert_array_equal(codes.argmax(1), distance.argmin(1))
    torch.testing.assert_close(found.decode(codes), found.components_[distance.argmin(1)])


def test_pca_puts_its_mean_back():
    known = activations().double()
    found = PCAConcepts(n_concepts=3).fit(known)
    torch.testing.assert_close(found.components_ @ found.components_.T, torch.eye(3).double())
    torch.testing.assert_close(found.decode(torch.zeros(1, 3).double())[0], known.mean(0))
    tail = torch.linalg.svdvals(known - known.mean(0))[3:].square().sum().sqrt()  # Eckart and Young
    left = (known - found.decode(found.encode(known))).norm()
    torch.testing.assert_close(left, tail)


def test_semi_nmf_takes_negative_activations_and_never_gets_worse():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(4, 12, generator=generator)
    known = (activations(200, 4).sqrt() @ planted).double()
    found = SemiNMFConcepts(n_concepts=4, tol=0).fit(known)
    codes = found.encode(known)
    assert float(codes.min()) >= 0 and float(found.components_.min()) < 0
    assert (np.diff(found.errors_) <= 1e-9).all() and len(found.errors_) > 3
    left = float((known - found.decode(codes)).norm() / known.norm())
    assert left == pytest.approx(found.errors_[-1], rel=1e-6)
    hard = KMeansConcepts(n_concepts=4).fit(known)
    assert left < 0.1 * (known - hard.decode(hard.encode(known))).norm() / known.norm()
    torch.testing.assert_close(found.components_.norm(dim=1), torch.ones(4).double())


def test_the_autoencoder_keeps_k_codes_and_learns():
    known = activations(400)
    found = SAEConcepts(n_concepts=6, n_active=3).fit(known)
    codes = found.encode(activations(100, seed=1))
    active = (codes > 0).sum(1)
    assert int(active.max()) == 3 and float(codes.min()) >= 0
    torch.testing.assert_close(found.components_.norm(dim=1), torch.ones(6))
    centred = (known - known.mean(0)).norm()
    assert (known - found.decode(found.encode(known))).norm() < 0.3 * centred
    untrained = SAEConcepts(n_concepts=6, n_active=3, steps=1, learning_rate=1e-9).fit(known)
    assert (known - untrained.decode(untrained.encode(known))).norm() > 0.5 * centred
    assert SAEConcepts(n_concepts=20, steps=1).fit(known).n_active_ == 5  # more concepts than columns; a quarter


def test_the_random_dictionary_looks_at_no_activations():
    one = RandomConcepts(n_concepts=4, random_state=3).fit(activations())
    other = RandomConcepts(n_concepts=4, random_state=3).fit(activations(seed=5))
    torch.testing.assert_close(one.components_, other.components_)
    assert float(one.components_.min()) >= 0 and float(one.encode(activations()).min()) >= 0
    assert not torch.equal(one.components_, RandomConcepts(n_concepts=4).fit(activations()).components_)


def test_empty_clusters_are_told():
    with pytest.warns(UserWarning, match="2 of 4 clusters hold no row"):
        found = KMeansConcepts(n_concepts=4).fit(torch.eye(2, 12).repeat(10, 1))
    assert float(found.encode(torch.eye(2, 12)).sum()) == 2


@pytest.mark.parametrize("kind", EXTRACTORS)
@pytest.mark.parametrize("k, a, error, said", [
    (13, activations(), InputError, r"n_concepts: got 13"),
    (4, activations(3), InputError, r"allow 1\.\.3"),
    (0, activations(), InputError, "n_concepts: got 0"),
    (2, activations()[0], InputError, "matrix"),
    (2, torch.full((9, 4), math.nan), DataError, "row 0 is not finite"),
    (2, torch.ones(9, 4, dtype=torch.int64), InputError, "floats"),
])  # fmt: skip
def test_what_extractors_refuse(kind, k, a, error, said):
    if kind is SAEConcepts and k == 13:
        return  # may have more concepts than columns
    with pytest.raises(error, match=said):
        kind(n_concepts=k).fit(a)


def test_what_single_extractors_refuse():
    with pytest.raises(DataError, match="ReLU"):
        NMFConcepts(n_concepts=2).fit(activations() - 1)
    with pytest.raises(InputError, match="n_active"):
        SAEConcepts(n_concepts=2, n_active=3).fit(activations())
    with pytest.raises(InputError, match="steps"):
        SAEConcepts(n_concepts=2, steps=0).fit(activations())
    with pytest.raises(InputError, match="max_iter"):
        SemiNMFConcepts(n_concepts=2, max_iter=0).fit(activations())


# Attributions at an affine head: the closed forms ---------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["r2", "flat"])
def test_at_an_affine_head_methods_are_their_closed_forms(layer):
    concepts, codes = seen_at(layer)
    w, u = weights(concepts, 1), (codes.mean((1, 2)) if codes.ndim == 4 else codes).double().numpy()
    positions = codes[0, ..., 0].numel()
    exact = u * w

    def phi(method, **options):
        return concept_importance(concepts, codes, PICTURES, 1, method=method, **options)

    for method in (*EXACT, "kernelshap"):
        np.testing.assert_allclose(phi(method), exact, atol=1e-4, err_msg=method)
    np.testing.assert_allclose(phi("saliency"), np.tile(abs(w), (6, 1)), rtol=1e-5)
    np.testing.assert_allclose(phi("smoothgrad", n_samples=7), np.tile(w, (6, 1)), rtol=1e-5)
    np.testing.assert_allclose(phi("squaregrad", n_samples=7), np.tile(w**2 / positions, (6, 1)), rtol=1e-4)
    np.testing.assert_allclose(phi("vargrad", n_samples=7), 0, atol=1e-6)
    np.testing.assert_array_equal(phi("tcav"), np.tile(w > 0, (6, 1)))
    # All 2^4 masks: half of them hold a concept, and the others' mean is the same for all but for its own half.
    bias = float(concepts.model.head.bias[1].detach())
    np.testing.assert_allclose(phi("rise"), exact / 2 + exact.sum(1, keepdims=True) / 2 + bias, atol=1e-4)
    share = exact**2 / (exact**2).sum(1, keepdims=True)
    np.testing.assert_allclose(phi("sobol", n_design=2048), share, atol=0.03)
    np.testing.assert_array_equal(phi("hsic").argsort(1), abs(exact).argsort(1))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("k", [3, 6])
def test_no_order_beats_the_exact_methods_at_an_affine_head(method, k):
    concepts, codes = seen_at("r2", k)
    phi = concept_importance(concepts, codes, PICTURES, 2, method=method)
    report = importance_report(concepts, codes, PICTURES, 2, phi)
    orders = np.array([np.argsort(order) for order in itertools.permutations(range(k))], dtype=float)
    for mode, found, best in (("deletion", report.deletion, np.min), ("insertion", report.insertion, np.max)):
        changed, scores = follow_orders(concepts, codes, PICTURES, 2, orders, mode=mode, score="logit")
        areas = np.trapezoid(scores, changed, axis=-1)
        np.testing.assert_allclose(found.area, best(areas, axis=0), atol=1e-4)
        assert np.ptp(areas, axis=0).min() > 1e-3
    assert report.mu_fidelity.min() > 0.99 and report.mu_fidelity.mean() > 0.999
    linear = importance_report(concepts, codes, PICTURES, 2, phi, correlation="pearson")
    assert linear.mu_fidelity.min() > 0.999


def test_an_importance_without_a_sign_loses():
    concepts, codes = seen_at("r2")
    signed = concept_importance(concepts, codes, PICTURES, 1)
    ours = importance_report(concepts, codes, PICTURES, 1, signed)
    blind = importance_report(concepts, codes, PICTURES, 1, abs(signed))
    assert (signed.min(1) < 0).all() and (signed.max(1) > 0).all()
    assert (blind.deletion.area > ours.deletion.area + 1e-3).all()
    assert blind.mu_fidelity.mean() < 0.9


# Attributions where what follows is not linear ------------------------------------------------------------------------


def logit(concepts: ConceptModel, codes: torch.Tensor, i: int, target: int = 1) -> float:
    with torch.no_grad():
        return float(concepts(codes[None], PICTURES[i : i + 1])[0, target])


def test_integrated_gradients_add_up_and_are_the_midpoint_rule():
    concepts, codes = seen_at("r1")
    phi = concept_importance(concepts, codes, PICTURES, 1, method="integrated_gradients", n_steps=400)
    gained = [logit(concepts, codes[i], i) - logit(concepts, 0 * codes[i], i) for i in range(6)]
    np.testing.assert_allclose(phi.sum(1), gained, atol=2e-3)
    coarse = concept_importance(concepts, codes, PICTURES, 1, method="integrated_gradients", n_steps=2)
    at = [concept_importance(concepts, codes * share, PICTURES, 1) / share for share in (0.25, 0.75)]
    np.testing.assert_allclose(coarse, np.mean(at, 0), atol=1e-4)


def test_occlusion_takes_out_one_code_at_one_position():
    concepts, codes = seen_at("r1")
    found = concept_importance(concepts, codes[:1], PICTURES[:1], 1, method="occlusion")[0]
    whole, expected = logit(concepts, codes[0], 0), np.zeros(4)
    for row, column, i in itertools.product(range(6), range(6), range(4)):
        without = codes[0].clone()
        without[row, column, i] = 0
        expected[i] += whole - logit(concepts, without, 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    everywhere = [whole - logit(concepts, codes[0] * (torch.arange(4) != i), 0) for i in range(4)]
    assert abs(found - everywhere).max() > 0.01  # what follows is not linear


def masked(concepts: ConceptModel, codes: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    masks = np.array(list(itertools.product((0.0, 1.0), repeat=codes.shape[-1])))
    return masks, np.array([logit(concepts, codes * torch.from_numpy(m).float(), 0) for m in masks])


def test_rise_hsic_and_shapley_values_by_hand():
    concepts, codes = seen_at("r1")
    masks, logits = masked(concepts, codes[0])

    def phi(method):
        return concept_importance(concepts, codes[:1], PICTURES[:1], 1, method=method)[0]

    np.testing.assert_allclose(phi("rise"), [logits[masks[:, i] == 1].mean() for i in range(4)], atol=1e-4)
    distance = np.abs(logits[:, None] - logits)
    kernel = np.exp(-(distance**2) / (2 * np.median(distance[np.triu_indices(16, 1)]) ** 2))
    centre = np.eye(16) - 1 / 16
    expected = [np.trace((masks[:, [i]] == masks[:, i]) @ centre @ kernel @ centre) / 15**2 for i in range(4)]
    np.testing.assert_allclose(phi("hsic"), expected, rtol=1e-3)
    shapley = np.zeros(4)
    value = {tuple(m.astype(int)): y for m, y in zip(masks, logits, strict=True)}
    for order in itertools.permutations(range(4)):
        held = [0, 0, 0, 0]
        for i in order:
            before = value[tuple(held)]
            held[i] = 1
            shapley[i] += (value[tuple(held)] - before) / 24
    np.testing.assert_allclose(phi("kernelshap"), shapley, atol=0.1 * np.abs(shapley).max())
    np.testing.assert_allclose(phi("sobol"), sobol_importance(concepts, codes[:1], PICTURES[:1], 1, random_state=0)[0])


def test_noisy_gradients_share_their_draws():
    concepts, codes = seen_at("r1")

    def phi(method, **options):
        return concept_importance(concepts, codes, PICTURES, 1, method=method, n_samples=40, **options)

    # Where noise is next to none, it is the gradient: gradient x code without the code.
    unit = concept_importance(concepts, codes, PICTURES, 1, method="smoothgrad", noise=1e-7, n_samples=2)
    from captum.attr import Saliency

    plain = Saliency(concepts).attribute(codes.clone().requires_grad_(), target=1, abs=False,
                                         additional_forward_args=(PICTURES,))  # fmt: skip
    np.testing.assert_allclose(unit, plain.sum((1, 2)), atol=1e-3)
    assert abs(phi("smoothgrad", noise=1.0) - unit).max() > 0.01 and phi("vargrad").min() >= 0 < phi("vargrad").max()
    # Position by position a mean of squares is no less than the variance.
    assert (phi("squaregrad") >= phi("vargrad") * (39 / 40) - 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_the_seed(method):
    concepts, codes = seen_at("r1")
    few = {"rise": {"n_masks": 9}, "hsic": {"n_masks": 9}, "sobol": {"n_design": 4}}.get(method, {})
    np.random.seed(5)
    torch.manual_seed(5)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    one = concept_importance(concepts, codes, PICTURES, torch.tensor([0, 1, 2, 0, 1, 2]), method=method, **few)
    other = concept_importance(concepts, codes, PICTURES, [0, 1, 2, 0, 1, 2], method=method, batch_size=2, **few)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    alone = concept_importance(concepts, codes[:1], PICTURES[:1], 0, method=method, **few)
    np.testing.assert_allclose(one[:1], alone, rtol=1e-4, atol=1e-5)
    assert np.isfinite(one).all() and one.shape == (6, 4)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_the_mean_of_pca_is_what_codes_are_attributed_from():
    concepts, codes = seen_at("r2", extractor=PCAConcepts(n_concepts=3))
    phi = concept_importance(concepts, codes, PICTURES, 1, method="integrated_gradients")
    gained = [logit(concepts, codes[i], i) - logit(concepts, 0 * codes[i], i) for i in range(6)]
    np.testing.assert_allclose(phi.sum(1), gained, atol=1e-4)


def test_tokens_of_a_transformer_have_codes_and_maps():
    from salience.concepts.holistic.explain import _tops, layer_of

    model, pictures = build("vit"), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="ReLU"):
        layer_of(model, pictures, "nmf")
    concepts = ConceptModel(model, layer_of(model, pictures, "semi-nmf"), SemiNMFConcepts(n_concepts=3))
    with torch.no_grad():
        a = concepts.activations(pictures)
        concepts.extractor.fit(a.flatten(0, -2))
        codes = concepts.encode(pictures)
        torch.testing.assert_close(concepts.behind(a, pictures), model(pictures).logits)
    assert codes.shape == (*a.shape[:2], 3)
    for method in ("gradient_input", "occlusion", "kernelshap"):
        assert np.isfinite(concept_importance(concepts, codes, pictures, 1, method=method)).all()
    crops, maps = _tops(codes, pictures, np.arange(10, 14), 5)
    for i in range(3):
        assert maps[i].shape[1:] == (16, 16) and set(crops[i][:, 0]) <= {10, 11, 12, 13}
        assert crops[i][:, 1:].min() >= 0 and crops[i][:, 1:].max() <= 11


def test_crops_are_where_most_of_a_concept_is():
    from salience.concepts.holistic.explain import _tops

    codes = torch.zeros(3, 8, 8, 2)
    codes[0, 6, 1, 0], codes[2, 1:3, 4:6, 0] = 1, 1
    crops, maps = _tops(codes, torch.zeros(3, 1, 16, 16), np.array([7, 8, 9]), 4)
    assert crops[0][:, 0].tolist() == [9, 7] and len(crops[1]) == 0  # image 8 holds none, and nobody holds the other
    (_, top, left), (_, low, side) = crops[0]
    assert abs(top - 2) <= 1 and abs(left - 8) <= 1 and abs(low - 11) <= 1 and abs(side - 1) <= 1
    assert maps[0].shape == (2, 16, 16) and float(maps[0][1].argmax() // 16) in (12, 13)


def test_what_importance_refuses_and_warns_of():
    concepts, codes = seen_at("r2")
    for options, said in (
        ({"method": "lime"}, "lime"), ({"method": "rise", "n_steps": 3}, "n_masks"), ({"target": None}, "target"),
        ({"target": 9}, "classes 9"), ({"method": "saliency", "target": 9}, "classes 9"),
        ({"method": "occlusion", "noise": 1}, "no options"), ({"method": "smoothgrad", "noise": -1}, "above 0"),
        ({"images": PICTURES[:2]}, "rows"),
    ):  # fmt: skip
        given = {"images": PICTURES, "target": 1, **options}
        with pytest.raises(InputError, match=said):
            concept_importance(concepts, codes, given.pop("images"), given.pop("target"), **given)
    pooled, vectors = seen_at("mean")
    assert vectors.shape == (6, 1, 1, 4)
    with pytest.warns(UserWarning, match="single position"):
        concept_importance(pooled, vectors, PICTURES, 1)


def test_the_mean_over_images_has_an_interval_and_one_class():
    values = np.random.default_rng(0).normal(1, 1, (40, 3))
    found = mean_importance(values, 1)
    np.testing.assert_allclose([each.mean for each in found], values.mean(0))
    assert all(each.low < each.mean < each.high for each in found)
    with pytest.warns(UserWarning, match="images of 2 classes"):
        mean_importance(values, [0, 1] * 20)
    with pytest.raises(InputError, match="finite"):
        mean_importance(values * np.nan, 1)


# Measures of extraction -----------------------------------------------------------------------------------------------


def test_wasserstein_by_hand_and_against_scipy():
    assert wasserstein([[0.0, 5], [1, 6]], [[3.0, 6], [1, 5]]) == pytest.approx((1 + 2 + 0 + 0) / 4)
    a, b = activations().numpy(), activations(seed=2).numpy()
    columns = [scipy.stats.wasserstein_distance(x, y) for x, y in zip(a.T, b.T, strict=True)]
    assert wasserstein(a, b) == pytest.approx(np.mean(columns), rel=1e-5)


def test_frechet_against_the_matrix_root():
    assert frechet([[0.0], [2]], [[3.0], [7]]) == pytest.approx(16 + 2 + 8 - 2 * math.sqrt(2 * 8))
    a, b = activations().double().numpy(), activations(seed=2, parts=3).double().numpy()
    first, second = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_dictionaries_are_matched_by_direction():
    v = np.random.default_rng(0).normal(size=(5, 8))
    assert dictionary_distance(v, 3 * v[[4, 2, 0, 1, 3]]) == pytest.approx(0, abs=1e-12)
    # Greedy matching would pair (1, 0) with (1, 0.1) and leave orthogonal rows.
    first, second = [[1.0, 0], [0.6, 0.8]], [[1.0, 0.1], [-1.0, 0]]
    cosine = np.array([[1 / math.sqrt(1.01), -1], [0.68 / math.sqrt(1.01), -0.6]])
    best = min(2 - cosine[0, 0] - cosine[1, 1], 2 - cosine[0, 1] - cosine[1, 0]) / 2
    assert dictionary_distance(first, second) == pytest.approx(best)
    w = np.random.default_rng(1).normal(size=(5, 8))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, w)]
    table = 1 - unit[0] @ unit[1].T
    brute = min(table[range(5), order].mean() for order in map(list, itertools.permutations(range(5))))
    assert dictionary_distance(v, w) == pytest.approx(brute)
    assert dictionary_distance(np.vstack([v, 0 * v[:1]]), v) == pytest.approx(0, abs=1e-12)
    assert math.isnan(dictionary_distance(0 * v, v))


def test_out_of_distribution_by_hand():
    bank, real, written = [[0.0], [1], [2], [3]], [[0.0], [3.0]], [[0.0], [6.0]]
    # The second nearest of 0 is 1 away, that of 3 as well; that of 6 is 4 away.
    assert out_of_distribution(bank, real, written, neighbors=2) == pytest.approx((1 + 4) / 2 - 1)
    assert out_of_distribution(bank, real, real, neighbors=3) == 0
    with pytest.raises(InputError, match="at least 9 rows"):
        out_of_distribution(bank, real, written, neighbors=9)


def test_the_report_of_an_extraction():
    known, new = activations(), activations(80, seed=1)
    head = nn.Linear(12, 3)
    found = KMeansConcepts(n_concepts=4).fit(known)
    report = extraction_report(known, new, found, head=head)
    written = found.components_[torch.cdist(new, found.components_).argmin(1)]
    assert report.relative_l2 == pytest.approx(float((new - written).norm() / new.norm()), rel=1e-5)
    assert report.sparsity == 0.75 and report.dropped == 0
    assert report.w1 == pytest.approx(wasserstein(new, written), rel=1e-6)
    assert report.ood == pytest.approx(out_of_distribution(known, new, written), rel=1e-6) and report.ood < 0
    kept = head(written).argmax(1) == head(new).argmax(1)
    assert report.agreement == pytest.approx(float(kept.double().mean()))
    assert math.isnan(extraction_report(known, new, found).agreement)
    with pytest.raises(InputError, match="folds"):
        extraction_report(known, new, found, folds=1)
    with pytest.raises(InputError, match="n_concepts"):
        extraction_report(known[:12], new, found, folds=4)


def test_positions_are_rows_and_the_head_gets_maps():
    known, new = activations(240).view(60, 2, 2, 12), activations(80, seed=1).view(20, 2, 2, 12)
    found, shapes = PCAConcepts(n_concepts=3).fit(known.view(-1, 12)), []
    report = extraction_report(known, new, found, head=lambda a: shapes.append(a.shape) or a.sum((1, 2)))
    flat = extraction_report(known.view(-1, 12), new.view(-1, 12), found)
    assert set(shapes) == {(20, 2, 2, 12)} and report.w1 == flat.w1 and report.stability == flat.stability


def test_stability_is_of_refits_matched_on_direction():
    found = NMFConcepts(n_concepts=4).fit(activations(400))
    steady = extraction_report(activations(400), activations(), found).stability
    noise = torch.rand(400, 12, generator=torch.Generator().manual_seed(0))
    shaky = extraction_report(noise, noise[:50], NMFConcepts(n_concepts=4).fit(noise)).stability
    drawn = extraction_report(activations(400), activations(), RandomConcepts(n_concepts=4).fit(noise)).stability
    assert steady < 0.02 < 0.1 < min(shaky, drawn)


def test_rows_of_zeros_are_dropped_and_counted():
    class Idle(RandomConcepts):
        def fit(self, a):
            super().fit(a).components_[1] = 0
            return self

    report = extraction_report(activations(), activations(30), Idle(n_concepts=3).fit(activations()), folds=2)
    assert report.dropped == 2 and np.isfinite(report.stability)


# Measures of importance -----------------------------------------------------------------------------------------------


def test_fidelity_by_hand():
    concepts, codes = seen_at("r1")
    phi = np.random.default_rng(0).normal(size=(6, 4))
    for correlation, measure in (("spearman", scipy.stats.spearmanr), ("pearson", scipy.stats.pearsonr)):
        report = importance_report(concepts, codes, PICTURES, 1, phi, n_subsets=30, share=0.5, correlation=correlation)
        out = np.random.default_rng(0).random((30, 4)) < 0.5
        lost = [logit(concepts, codes[0], 0) - logit(concepts, codes[0] * ~torch.from_numpy(row), 0) for row in out]
        assert report.mu_fidelity[0] == pytest.approx(measure(lost, out @ phi[0]).statistic, abs=1e-3)
    assert not report.constant.any()


def test_what_does_not_vary_has_no_fidelity():
    concepts, codes = seen_at("r2")
    still = codes.clone()
    still[2] = 0
    phi = np.random.default_rng(0).normal(size=(6, 4))
    phi[4] = 0
    with pytest.warns(UserWarning, match="2 of 6 images"):
        report = importance_report(concepts, still, PICTURES, 1, phi)
    assert report.constant.tolist() == [False, False, True, False, True, False]
    assert not report.mu_fidelity[[2, 4]].any() and report.mu_fidelity[[0, 1, 3, 5]].all()
    for options, said in (({"correlation": "kendall"}, "correlation"), ({"share": 0}, "share"),
                          ({"n_subsets": 1}, "n_subsets")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            importance_report(concepts, codes, PICTURES, 1, phi, **options)
    with pytest.raises(InputError, match="importance"):
        importance_report(concepts, codes, PICTURES, 1, phi[:, :3])


# Strategies -----------------------------------------------------------------------------------------------------------


def two_ways(n: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Local importances of a class that is reached by concepts (0, 1) or (2, 3), its codes, and which way."""
    rng = np.random.default_rng(0)
    way = rng.integers(0, 2, n)
    codes = rng.uniform(0, 0.2, (n, 6))
    for i, each in enumerate(way):
        codes[i, 2 * each : 2 * each + 2] += rng.uniform(0.5, 2, 2)
    codes[:, 4:] = 5 * rng.integers(0, 2, (n, 2))  # held by the image, and not read
    return codes * np.array([1.0, 1, 1, 1, 0, 0]), codes, way


def test_two_planted_strategies_are_found_in_importances_and_not_in_codes():
    phi, codes, way = two_ways()
    graph = strategy_graph(phi, n_clusters=None)
    assert len(graph.nodes) == 2 and adjusted_rand_score(way, graph.labels) > 0.9
    assert {tuple(sorted(node.concepts[:2])) for node in graph.nodes} == {(0, 1), (2, 3)}
    for number in (None, 2):
        assert adjusted_rand_score(way, strategy_graph(codes, n_clusters=number).labels) < 0.5


def test_prevalence_and_reliability_by_hand():
    phi = np.array([[3.0, 1, 0], [2, 0, 1], [0, 5, 0], [1, -9, 0.5]])
    graph = strategy_graph(phi, [True, False, True, True], n_clusters=2)
    np.testing.assert_allclose(graph.prevalence, [3 / 4, 1 / 4, 0])
    np.testing.assert_allclose(graph.reliability[:2], [2 / 3, 1])
    assert math.isnan(graph.reliability[2])
    assert np.isnan(strategy_graph(phi, n_clusters=2).reliability).all()


def test_nodes_are_sorted_and_joined_to_the_nearest():
    ways = np.array([[1.0, 0, 0, 0], [0.9, 0.3, 0, 0], [0, 0, 1, 0], [0, 0, 0.9, 0.3]])
    phi = np.repeat(ways, [9, 5, 7, 3], axis=0) * np.linspace(1, 4, 24)[:, None]  # of any length
    graph = strategy_graph(phi, np.arange(24) < 14, n_clusters=4)
    assert [len(node.images) for node in graph.nodes] == [9, 7, 5, 3]
    assert [(i, j) for i, j, _ in graph.edges] == [(0, 2), (1, 3)]
    unit = ways / np.linalg.norm(ways, axis=1, keepdims=True)
    assert graph.edges[0][2] == pytest.approx(np.linalg.norm(unit[0] - unit[1]))
    np.testing.assert_allclose(graph.centers, unit[[0, 2, 1, 3]], atol=1e-9)
    assert [node.accuracy for node in graph.nodes] == [1, 0, 1, 0]
    assert graph.nodes[0].concepts == [0] and graph.nodes[2].concepts == [0, 1]
    assert sum(node.share for node in graph.nodes) == pytest.approx(1)
    # The layout keeps distances as well as two dimensions can: images of a strategy fall on one point.
    assert max(np.ptp(graph.layout[node.images], axis=0).max() for node in graph.nodes) < 1e-9


def test_a_graph_can_be_drawn_of_anything():
    from matplotlib.figure import Figure

    phi = two_ways()[0]
    for values, number in ((phi, 3), (phi[:, :1], 1), (np.zeros((4, 3)), 1), (phi[:1], None)):
        graph = strategy_graph(values, np.ones(len(values), dtype=bool), n_clusters=number)
        assert graph.layout.shape == (len(values), 2)
        draw_graph(Figure().subplots(), graph)


def test_what_the_graph_refuses():
    phi = two_ways()[0]
    for call, said in (
        (lambda: strategy_graph(phi, n_clusters=0), "n_clusters"),
        (lambda: strategy_graph(np.ones((9, 2)), n_clusters=2), "1 different importances"),
        (lambda: strategy_graph(phi * np.nan), "finite"),
        (lambda: strategy_graph(phi, [True] * 3), "correct"),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_nothing_warns_on_ordinary_input():
    concepts, codes = seen_at("r2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            concept_importance(concepts, codes[:2], PICTURES[:2], 1, method=method)
