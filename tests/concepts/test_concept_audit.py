"""The audit of concept explanations: figures worked by hand, parity with scikit-learn and captum, bad input."""

from __future__ import annotations

import json
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from captum.concept import TCAV, Concept
from captum.concept._utils.classifier import Classifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import nn
from torch.utils.data import DataLoader

from salience.concepts import (
    ConceptData,
    LinearExplanation,
    ProbeSet,
    UserStudyKit,
    audit,
    baseline_explanation,
    basis_decomposition,
    capacity_path,
    directional_derivatives,
    fit_cav,
    fit_cavs,
    learnability,
    normalized_ap,
    predicted_concepts,
    probe_shift,
    unit_concept_iou,
)
from salience.concepts.concept_audit.linear import CAV, GRID, logistic, split
from salience.concepts.concept_audit.observing import observe
from salience.errors import DataError, InputError, NothingToDo

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_warnings():
    """Deprecated options of scikit-learn, and solvers that do not converge, would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def world(n: int = 400, c: int = 6, seed: int = 0, turn: float = 0.0, share: float = 0.5) -> ConceptData:
    """Features in which concept i is coordinate i, turned towards coordinate i + c; four classes of the concepts."""
    rng = np.random.default_rng(seed)
    concepts = rng.random((n, c)) < share
    signs = 2.0 * concepts - 1
    features = np.concatenate([signs * np.cos(turn), signs * np.sin(turn)], axis=1) + rng.normal(size=(n, 2 * c))
    predictions = concepts[:, 0] + 2 * concepts[:, 1]
    return ConceptData(features, concepts, tuple(f"c{i}" for i in range(c)), predictions.astype(np.int64))


# Normalised average precision.


def test_nap_by_hand():
    # Down from the highest: hit, miss, hit. N = 4, R = 1/2, 1/2, 1 and F = 0, 1, 1.
    found = normalized_ap([1, 0, 1], [3.0, 2.0, 1.0], 4)
    assert found == pytest.approx(2 / 2 * 0.5 + 4 / (4 + 1) * 0.5)
    # The same with N = 1/4: the second half weighs 0.25 / (0.25 + 1).
    assert normalized_ap([1, 0, 1], [3.0, 2.0, 1.0], 0.25) == pytest.approx(0.5 + 0.2 * 0.5)
    # All equal: one threshold, R = 1 and F = 1.
    assert normalized_ap([1, 0, 1], [1.0, 1.0, 1.0], 2) == pytest.approx(2 / 3)


def test_nap_with_as_many_positives_is_the_average_precision():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth, scores = rng.random(97) < 0.3, rng.normal(size=97)
        for values in (scores, scores.round(1)):  # ties count together in both
            expected = average_precision_score(truth, values)
            assert abs(normalized_ap(truth, values, truth.sum()) - expected) < 1e-12


def test_nap_does_not_depend_on_the_order_of_ties_nor_on_how_frequent_a_concept_is():
    rng = np.random.default_rng(1)
    truth, scores = rng.random(200) < 0.4, rng.integers(0, 5, 200).astype(float)
    order = rng.permutation(200)
    assert normalized_ap(truth, scores, 10) == pytest.approx(normalized_ap(truth[order], scores[order], 10), abs=1e-15)
    hits = np.concatenate([np.ones(300), np.zeros(3000)]).astype(bool)
    values = np.where(hits, 1.0, 0.0) + rng.normal(size=3300)
    rare = np.concatenate([hits[:30], hits[300:]]), np.concatenate([values[:30], values[300:]])
    naps = normalized_ap(hits, values, 30), normalized_ap(*rare, 30)
    plain = average_precision_score(hits, values), average_precision_score(*rare)
    assert abs(naps[0] - naps[1]) < 0.1 < 0.15 < plain[0] - plain[1]


def test_random_scores_have_the_base_rate():
    truth = np.arange(20000) < 6000
    assert normalized_ap(truth, RNG.normal(size=20000), 2000) == pytest.approx(2000 / 16000, abs=0.01)


# Concept vectors and explanations.


def test_liblinear_options_are_those_of_either_name_of_the_penalty():
    """Pins what newer releases of scikit-learn renamed: sparse under l1, and the optimum of the l2 problem."""
    data = world()
    y = data.concepts[:, 0]
    sparse = logistic("l1", 0.02).fit(data.features, y).coef_
    dense = logistic("l2", 0.02).fit(data.features, y)
    assert (sparse == 0).any() and sparse[0, 0] > 0 and not (dense.coef_ == 0).any()
    # Gradient of |w|^2 / 2 + C sum log(1 + exp(-y f)), the intercept penalised too as liblinear does.
    margin = (2 * y - 1) * (data.features @ dense.coef_[0] + dense.intercept_[0])
    pull = 0.02 * ((2 * y - 1) / (1 + np.exp(margin))) @ np.column_stack([data.features, np.ones(len(y))])
    np.testing.assert_allclose(np.append(dense.coef_[0], dense.intercept_[0]), pull, atol=1e-3)


def test_a_cav_takes_the_penalty_of_the_best_validation_auc():
    data = world()
    train, val, _ = split(400)
    x, y = data.features, data.concepts[:, 2]
    cav = fit_cav(x[train], y[train], (x[val], y[val]))
    from sklearn.metrics import roc_auc_score

    aucs = [roc_auc_score(y[val], logistic("l2", C).fit(x[train], y[train]).decision_function(x[val])) for C in GRID]
    assert cav.auc == pytest.approx(max(aucs)) and GRID[int(np.argmax(aucs))] == cav.C
    assert int(np.abs(cav.coef).argmax()) == 2 and cav.coef[2] > 0
    np.testing.assert_allclose(cav.scores(x), x @ cav.coef + cav.intercept)


def test_captum_finds_the_same_vectors_and_the_same_scores(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # far from linear, so that the sign of the sensitivity differs between images
    pictures = torch.randn(200, 5)
    features = observe(model, pictures, "1").features
    has = (pictures[:, 0] > 0).numpy()
    train, val, _ = split(200)
    ours = fit_cav(features[train], has[train], (features[val], has[val]))

    class Liblinear(Classifier):
        def __init__(self):
            self.model = LogisticRegression(solver="liblinear", C=ours.C)

        def train_and_eval(self, dataloader, **options):
            rows = [(x.numpy(), y.numpy()) for x, y in dataloader]
            x, y = (np.concatenate(part) for part in zip(*rows))
            self.model.fit(x, y)
            return {"accs": torch.tensor(self.model.score(x, y))}

        def weights(self):
            coef = torch.tensor(self.model.coef_[0])
            return torch.stack([-coef, coef])

        def classes(self):
            return self.model.classes_.tolist()

    def concept(number: int, which: np.ndarray) -> Concept:
        return Concept(number, f"concept{number}", DataLoader(list(pictures[train][which[train]]), batch_size=16))

    without, with_it = concept(0, ~has), concept(1, has)
    tested = pictures[val]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of captum
        theirs = TCAV(model, ["1"], classifier=Liblinear(), save_path=str(tmp_path), model_id="m")
        found = theirs.interpret(tested, [[without, with_it]], target=2)["0-1"]["1"]
        vector = theirs.cavs["0-1"]["1"].stats["weights"][1].numpy()
    cosine = vector @ ours.coef / np.linalg.norm(vector) / np.linalg.norm(ours.coef)
    assert cosine > 0.99
    gradients = []
    for row in tested:
        h = model[:2](row).detach().requires_grad_()
        gradients.append(torch.autograd.grad(model[2:](h)[2], h)[0].numpy())
    along = directional_derivatives(np.array(gradients), {"c": ours})[:, 0]
    assert 0 < (along > 0).mean() < 1
    assert float(found["sign_count"][1]) == pytest.approx((along > 0).mean(), abs=1e-6)


def test_the_explanation_is_one_against_the_rest_by_liblinear():
    data = world()
    train, val, test = split(400)
    x, y = data.concepts.astype(float), data.predictions
    found = baseline_explanation(x[train], y[train], (x[val], y[val]), names=data.names, Cs=(0.5,))
    raw = [logistic("l1", found.C).fit(x[train], y[train] == c) for c in range(4)]
    np.testing.assert_allclose(found.coef, np.concatenate([one.coef_ for one in raw]), atol=1e-8)
    shift = np.concatenate([one.intercept_ for one in raw])
    np.testing.assert_allclose(found.intercept, shift - shift.min(), atol=1e-8)
    assert found.intercept.min() == 0 and set(found.used) >= {"c0", "c1"} and found.fidelity(x[test], y[test]) == 1
    assert found.top(3, 2)[0][1] > 0 and {name for name, _ in found.top(3, 2)} == {"c0", "c1"}
    assert [value < 0 for _, value in found.top(0, 2)] == [True, True]


def test_of_the_penalties_the_one_with_the_best_accuracy_is_taken():
    data = world(n=200, c=10, seed=3)
    noisy = np.where(RNG.random(200) < 0.3, RNG.integers(0, 4, 200), data.predictions)
    train, val, _ = split(200)
    x = data.concepts.astype(float)
    found = baseline_explanation(x[train], noisy[train], (x[val], noisy[val]))
    each = [baseline_explanation(x[train], noisy[train], (x[val], noisy[val]), Cs=(C,)).val_accuracy for C in GRID]
    assert found.val_accuracy == max(each) and GRID[int(np.argmax(each))] == found.C


def test_concepts_are_counted_over_the_union_of_the_classes():
    data = world(n=800, c=8)
    predictions = 2 * np.argmax(data.concepts[:, :6], axis=1).astype(np.int64)  # each class has concepts of its own
    train, val, _ = split(800)
    x = data.concepts.astype(float)
    few = baseline_explanation(x[train], predictions[train], (x[val], predictions[val]), max_concepts=3)
    assert 1 <= len(few.used) <= 3 == max(len(few.used), 3)
    union = {name for c in few.classes for name, _ in few.top(int(c), 8)}
    assert union == set(few.used)
    whole = baseline_explanation(x[train], predictions[train], (x[val], predictions[val]))
    assert len(whole.used) > max(len(whole.top(int(c), 8)) for c in whole.classes) - 1 and len(whole.used) >= 6
    assert few.val_accuracy <= whole.val_accuracy


def test_two_classes_and_weights():
    data = world()
    y = data.concepts[:, 0].astype(np.int64)
    x = data.concepts.astype(float)
    both = baseline_explanation(x[:300], y[:300], (x[300:], y[300:]))
    assert both.coef.shape == (2, 6) and (both.coef[0] == -both.coef[1]).all() and both.fidelity(x, y) == 1
    # A row of weight 2 is a row that is there twice.
    weights = np.ones(300)
    weights[:50] = 2
    a = baseline_explanation(x[:300], y[:300], (x[300:], y[300:]), sample_weight=weights, Cs=(0.05,))
    twice = np.r_[np.arange(300), np.arange(50)]
    b = baseline_explanation(x[twice], y[twice], (x[300:], y[300:]), Cs=(0.05,))
    np.testing.assert_allclose(a.coef, b.coef, atol=1e-2)
    assert not np.allclose(
        a.coef, baseline_explanation(x[:300], y[:300], (x[300:], y[300:]), Cs=(0.05,)).coef, atol=1e-2
    )


def test_the_path_gets_no_more_concepts_than_asked_for():
    data = world(n=600, c=8, seed=5)
    predictions = data.concepts[:, :3] @ np.array([1, 2, 4])
    path = capacity_path(data.concepts.astype(float), predictions, (1, 2, 4, 64), names=data.names)
    assert [one.k for one in path] == [1, 2, 4, 64]
    assert all(len(one.names) <= min(one.k, 8) for one in path)
    assert path[-1].fidelity == 1 and path[0].fidelity < 0.6
    assert [one.fidelity for one in path] == sorted(one.fidelity for one in path)


# Other methods.


def test_unit_overlap_by_hand():
    # Unit 0 is above its threshold in images 0 and 1, unit 1 in image 3 alone (ties with the threshold do not count).
    activations = np.array([[5.0, 0], [4, 0], [0, 1], [0, 9], [1, 2]])
    labels = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 0]], dtype=bool)
    iou = unit_concept_iou(activations, labels, 0.5)
    np.testing.assert_allclose(iou, [[2 / 3, 0], [0 / 5, 1 / 2]])
    # As maps: a unit that is on in the upper half, of half the resolution of the masks.
    maps = np.zeros((3, 1, 2, 2))
    maps[:, 0, 0] = 1
    masks = np.zeros((3, 2, 2, 2), dtype=bool)
    masks[:, 0, 0], masks[:, 1, :, 0] = True, True
    np.testing.assert_allclose(unit_concept_iou(maps, masks, 0.5), [[1, 1 / 3]])
    coarse = np.repeat(np.repeat(masks, 4, 2), 4, 3)
    assert unit_concept_iou(maps, coarse, 0.5)[0, 0] == 1


def test_basis_decomposition_finds_the_planted_concepts_and_the_rest():
    vectors = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    cavs = {f"c{i}": CAV(3 * v, 0.0, 1.0, 1.0) for i, v in enumerate(vectors[:4])}
    weights = np.stack([2 * vectors[0] + 0.5 * vectors[2] + vectors[5], -vectors[1] + 3 * vectors[3]])
    found = basis_decomposition(weights, cavs, 2)
    np.testing.assert_allclose(found.coef, [[2, 0, 0.5, 0], [0, 0, 0, 3]], atol=1e-9)
    np.testing.assert_allclose(found.residual, [vectors[5], -vectors[1]], atol=1e-9)
    np.testing.assert_allclose(found.share, [1 / np.sqrt(5.25), 1 / np.sqrt(10)], atol=1e-9)
    one = basis_decomposition(weights, cavs, 1)
    assert (one.coef[0] > 0).tolist() == [True, False, False, False]
    with pytest.raises(InputError, match="features"):
        basis_decomposition(np.ones((2, 5)), cavs)


def test_a_bottleneck_is_a_head_on_predicted_concepts():
    data = world(n=600)
    parts = split(600)
    cavs = fit_cavs(data.features, data.concepts, data.names, parts).cavs
    inner = predicted_concepts(cavs, data.features)
    assert inner.shape == (600, 6) and inner.min() >= 0 and inner.max() <= 1
    head = baseline_explanation(
        inner[parts.train], data.predictions[parts.train], (inner[parts.val], data.predictions[parts.val])
    )
    assert 0.5 < head.fidelity(inner[parts.test], data.predictions[parts.test]) < 1


def test_gradients_and_features_are_those_of_the_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 36, 4))
    pictures = torch.randn(5, 1, 8, 8)
    seen = observe(model, pictures, batch_size=2)
    chosen = seen.logits.argmax(1)
    np.testing.assert_allclose(seen.gradients, model[3].weight.detach().numpy()[chosen], rtol=1e-6)
    np.testing.assert_allclose(seen.features, model[:3](pictures).detach().numpy(), rtol=1e-5)
    maps = observe(model, pictures, "0")
    np.testing.assert_allclose(maps.features, model[0](pictures).mean((2, 3)).detach().numpy(), rtol=1e-4, atol=1e-6)
    # Moving all positions along one channel by a little moves the logit by the summed gradient.
    h, step = model[0](pictures).detach(), torch.zeros(1, 3, 1, 1)
    step[0, 1] = 1e-3
    moved = (model[1:](h + step) - model[1:](h.clone()))[torch.arange(5), chosen].detach().numpy() / 1e-3
    np.testing.assert_allclose(maps.gradients[:, 1], moved, rtol=0.1, atol=0.05)


# The audits.


def test_halves_of_one_set_agree_and_another_representation_does_not():
    probes = {"A": world(1200, seed=1), "same": world(1200, seed=2), "turned": world(1200, seed=3, turn=1.2)}
    report = probe_shift(probes)
    assert report.reference == "A (half 1)" and report.control == "A (half 2)" and report.others == ["same", "turned"]
    assert set(report.rows.values()) == {600}  # all cut to as many rows
    assert report.agrees("same") and not report.agrees("turned")
    assert report.gap("turned").mean > 0.3 and abs(report.gap("same").mean) < 0.1
    assert min(report.aucs["turned"].values()) > 0.7  # accurate all the same
    assert report.transfer["turned"] > 0.9  # concepts -> classes is the same rule in all three
    assert report.bottleneck_transfer["turned"] < report.bottleneck_transfer["same"] - 0.2
    assert report.tcav == {}
    named = probe_shift(probes, control="same")
    assert named.reference == "A" and named.others == ["turned"] and set(named.rows.values()) == {1200}


def test_units_of_the_same_concept():
    turns = {"A": 0.0, "B": 0.0, "C": np.pi / 2}  # in C another unit shows each concept
    sets = {name: world(1500, seed=i, turn=turn, share=0.1) for i, (name, turn) in enumerate(turns.items())}
    found = probe_shift(sets, control="B").units
    assert found["B"] > 0.8 and found["C"] < 0.4


def test_overlap_of_strongest_concepts_asks_for_the_same_sign():
    from salience.concepts.concept_audit.shift import _shared

    assert _shared([("a", 1.0), ("b", -2.0)], [("a", 0.5), ("b", 2.0)]) == 0.5
    assert _shared([("a", 1.0)], [("a", 2.0), ("c", 1.0)]) == 0.5 and _shared([], []) == 1


def test_rare_and_missing_concepts_are_left_out_and_listed():
    one, two = world(500, seed=1), world(500, seed=2)
    rare = np.zeros(500, dtype=bool)
    rare[:6] = True
    one = ConceptData(one.features, np.column_stack([one.concepts, rare, RNG.random(500) < 0.5]),
                      (*one.names, "rare", "here alone"), one.predictions)  # fmt: skip
    often = RNG.random(500) < 0.5
    two = ConceptData(two.features, np.column_stack([two.concepts, often]), (*two.names, "rare"), two.predictions)
    report = probe_shift({"A": one, "B": two})
    assert report.concepts == world().names and set(report.skipped) == {"rare", "here alone"}
    assert "2%" in report.skipped["rare"] and "all probe sets" in report.skipped["here alone"]
    assert "rare" in probe_shift({"A": one, "B": two}, rarest=0.0).skipped  # too few positives to fit then


def test_tcav_is_compared_where_gradients_are_given():
    probes = {}
    for name, seed, turn in (("A", 1, 0.0), ("B", 2, 0.0), ("C", 3, 1.5)):
        data = world(800, seed=seed, turn=turn)
        weights = np.random.default_rng(0).normal(size=(4, 12))
        probes[name] = ConceptData(
            data.features, data.concepts, data.names, data.predictions, weights[data.predictions]
        )
    found = probe_shift(probes, control="B").tcav
    assert set(found) == {"B", "C"} and found["B"] > 0.8 > found["C"]


def test_a_class_that_is_not_predicted_in_both_sets_is_noted():
    one, two = world(400, seed=1), world(400, seed=2)
    two = ConceptData(two.features, two.concepts, two.names, np.where(two.predictions == 3, 0, two.predictions))
    report = probe_shift({"A": one, "B": two})
    assert set(report.overlap["B"]) == {0, 1, 2} and any("classes 3" in note for note in report.notes)


def learned(**changes):
    data = world(600, seed=4)
    rng = np.random.default_rng(5)
    scores = np.eye(4)[data.predictions] + rng.normal(scale=0.1, size=(600, 4))
    given = {"generic_feats": data.features, "concepts": data.concepts, "class_scores": scores,
             "class_labels": data.predictions, "names": data.names} | changes  # fmt: skip
    return learnability(**given)


def test_hard_concepts_are_below_easy_classes():
    noise = np.random.default_rng(0).random(600) < 0.5
    data = world(600, seed=4)
    found = learned(concepts=np.column_stack([data.concepts, noise]), names=(*data.names, "noise"))
    assert found.n_pos == 30 and found.threshold > 0.95 and found.share_below == 1 and not any(found.keep.values())
    base = 30 / (30 + 60)  # half of the 120 test rows are negatives
    assert found.nap["noise"] == pytest.approx(base, abs=0.15) and found.nap["c0"] > 0.7
    assert set(found.nap_probed) == {0, 1, 2, 3}
    assert learned(threshold=0.5).share_below == 0


def test_shuffled_labels_give_nap_near_the_base_rate():
    data = world(2000, c=8, seed=6)
    shuffled = np.random.default_rng(7).permuted(data.concepts, axis=0)
    found = learnability(data.features, shuffled, np.eye(4)[data.predictions], data.predictions)
    base = 100 / (100 + 200)
    assert np.mean(list(found.nap.values())) == pytest.approx(base, abs=0.05)


def test_the_explained_models_own_features_are_refused():
    data = world(600, seed=4)
    turned = data.features @ np.linalg.qr(RNG.normal(size=(12, 12)))[0] * 3
    with pytest.raises(InputError, match="circle"):
        learned(explained_feats=turned)
    near = data.features + 0.15 * np.random.default_rng(0).normal(size=data.features.shape)
    with pytest.warns(UserWarning, match="nearly"):
        learned(explained_feats=near)
    learned(explained_feats=np.random.default_rng(1).normal(size=(600, 7)))


# Bad input.


def test_bad_input():
    data = world(60)
    x, y, p = data.features, data.concepts, data.predictions
    hole = x.copy()
    hole[7, 3] = np.nan
    one = np.zeros(60, dtype=np.int64)
    few = np.arange(60) < 2
    c = y.astype(float)
    cases = [
        (lambda: normalized_ap([0, 0], [1.0, 2.0], 1), InputError, "no positive"),
        (lambda: normalized_ap([0, 1], [1.0, np.nan], 1), InputError, "row 1"),
        (lambda: normalized_ap([0, 1], [1.0, 2.0], 0), InputError, "n_pos"),
        (lambda: normalized_ap([0, 1, 1], [1.0, 2.0], 1), InputError, "3 and 2"),
        (lambda: normalized_ap([0, 2], [1.0, 2.0], 1), InputError, "True and False"),
        (lambda: fit_cav(hole, y[:, 0], (x, y[:, 0])), InputError, "row 7"),
        (lambda: fit_cav(x, few, (x, y[:, 0])), InputError, "2 positives"),
        (lambda: fit_cav(x, y[:, 0], (x, one == 0)), InputError, "the same in all rows"),
        (lambda: baseline_explanation(c, one, (c, one)), DataError, "class 0"),
        (lambda: baseline_explanation(c, p.astype(float), (c, p)), InputError, "whole numbers"),
        (lambda: baseline_explanation(c, p, (c, p), max_concepts=0), InputError, "max_concepts"),
        (lambda: baseline_explanation(c, p, (c, p), names=["a"] * 6), InputError, "different names"),
        (lambda: baseline_explanation(c, p, (c[:, :3], p)), InputError, "3 concepts"),
        (lambda: capacity_path(c[:8], p[:8]), DataError, "8 rows"),
        (lambda: probe_shift({}), InputError, "at least one"),
        (lambda: probe_shift({"A": data}, control="B"), InputError, "'B'"),
        (lambda: probe_shift({"A": ConceptData(hole, y, data.names, p)}), InputError, "'A', features: row 7"),
        (lambda: probe_shift({"A": ConceptData(x, y, data.names, one)}), DataError, "'A .*class 0"),
        (lambda: probe_shift({"A": data, "B": ConceptData(x, y, tuple("abcdef"), p)}), DataError, "in common"),
        (lambda: probe_shift({"A": ConceptData(x, y & False, data.names, p)}), DataError, "no concept can be"),
        (lambda: unit_concept_iou(x, y[:30]), InputError, "same images"),
        (lambda: unit_concept_iou(x, y, 1.0), InputError, "quantile"),
        (lambda: learned(class_labels=np.full(600, 9)), InputError, "classes 0 to 3"),
        (lambda: learned(generic_feats=x), InputError, "60 and 600"),
        (lambda: learned(concepts=np.zeros((600, 6), dtype=bool)), DataError, "no concept"),
        (lambda: UserStudyKit(arm="neither"), InputError, "arm"),
    ]  # fmt: skip
    for call, kind, said in cases:
        with pytest.raises(kind, match=said):
            call()


def test_constant_and_rare_concepts_are_skipped_and_listed():
    data = world(300)
    concepts = np.column_stack([data.concepts, np.ones(300, bool), np.arange(300) < 3])
    found = fit_cavs(data.features, concepts, (*data.names, "always", "rare"), split(300))
    assert set(found.cavs) == set(data.names) and "0 negatives" in found.skipped["always"]
    assert set(found.skipped) == {"always", "rare"}


# The user study.


EXPLANATION = LinearExplanation(
    np.array([0, 1, 5]), np.array([[1.0, 0, 0], [0, -2.0, 0], [0.5, 0, 0]]), np.array([0.0, 1.0, 0.5]),
    ("<b>stripes</b>", "wheels & \"legs\"", "unused"), 1.0, 1.0,
)  # fmt: skip


def kit(arm: str = "concepts", n: int = 4, **options) -> tuple[UserStudyKit, str]:
    pictures = [np.full((6, 8, 3), 20 * i, dtype=np.uint8) for i in range(12)]
    concepts = np.array([[i % 2, i % 3 == 0, 1] for i in range(12)], dtype=bool)
    predictions = np.array([0, 1, 5, 9] * 3)
    made = UserStudyKit(arm=arm, random_state=1)
    page = made.make_tasks(pictures, concepts, predictions, EXPLANATION, n, **options)
    return made, page


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_the_page_holds_pictures_and_questions_and_no_answer():
    made, page = kit(class_names={0: "</script><script>alert(1)</script>", 1: "\u202eevil"})
    tags = Tags()
    tags.feed(page)
    assert len([1 for tag, at in tags.seen if tag == "section" and "data-task" in at]) == 4
    assert [at["src"][:22] for tag, at in tags.seen if tag == "img"] == ["data:image/png;base64,"] * 4
    assert len([1 for tag, _ in tags.seen if tag == "script"]) == 1 and not [1 for tag, _ in tags.seen if tag == "b"]
    assert not [at for _, at in tags.seen for name in at if name.startswith("on")]
    assert "alert(1)</script>" not in page and "\u202e" not in page and "U+202E" in page
    assert "&lt;b&gt;stripes&lt;/b&gt;" in page and "unused" not in page  # concepts of the explanation alone
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert "present" not in page and made.key_["study"] in page
    weights = [json.loads(at["data-weights"]) for _, at in tags.seen if at.get("data-weights")]
    assert weights[:3] == [[1.0, 0.0], [0.0, -2.0], [0.5, 0.0]]
    assert {task["class"] for task in made.key_["tasks"]} == {0, 1, 5}  # spread over the classes; 9 is not asked


def test_scoring_by_hand(tmp_path):
    made, _ = kit()
    made.save(tmp_path / "key.json")
    again = UserStudyKit.load(tmp_path / "key.json")
    key, stripes, wheels = again.key_, *EXPLANATION.used
    assert [set(task["present"]) for task in key["tasks"]] == [
        {name for name, there in ((stripes, task["row"] % 2), (wheels, task["row"] % 3 == 0)) if there}
        for task in key["tasks"]
    ]
    key["tasks"] = [
        {"row": 0, "present": [stripes, wheels], "class": 0}, {"row": 1, "present": [stripes], "class": 1},
        {"row": 2, "present": [], "class": 5}, {"row": 3, "present": [wheels], "class": 0},
    ]  # fmt: skip
    key["preferences"] = [8, 16]
    one = {"study": key["study"], "preferred": 8, "tasks": [
        {"task": 0, "marked": [stripes], "class": 0, "seconds": 10},  # recall 1/2, precision 1, right
        {"task": 1, "marked": [stripes, wheels], "class": 0, "seconds": 20},  # recall 1, precision 1/2, wrong
        {"task": 2, "marked": [wheels], "class": 5, "seconds": 6.0},  # no recall, precision 0, right
    ]}  # fmt: skip
    two = {"study": key["study"], "preferred": None, "tasks": [{"task": 3, "marked": [], "class": 1, "seconds": 4}]}
    found = again.score([one, two])  # the last: recall 0, no precision, wrong
    assert found == {
        "arm": "concepts", "people": 2, "photos": 4, "recall": pytest.approx((0.5 + 1 + 0) / 3),
        "precision": pytest.approx((1 + 0.5 + 0) / 3), "simulation_accuracy": 0.5, "seconds": 10.0, "preferred": {8: 1},
    }  # fmt: skip
    assert again.score(one)["people"] == 1


def test_answers_that_do_not_fit_are_refused():
    made, _ = kit()
    right = {"task": 0, "marked": [], "class": 0, "seconds": 1}
    for change, said in [
        ({"study": "other"}, "not of study"), ({"tasks": [{**right, "task": 4}]}, "task 4"),
        ({"tasks": [right, right]}, "twice"), ({"tasks": [{**right, "marked": ["unused"]}]}, "unused"),
        ({"tasks": [{**right, "class": 9}]}, "class 9"), ({"tasks": [{**right, "seconds": None}]}, "seconds"),
        ({"preferred": 8}, "no choice"), ({"tasks": ["x"]}, "'x'"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=said):
            made.score({"study": made.key_["study"], "tasks": [right], **change})
    with pytest.raises(NothingToDo):
        made.score([])
    with pytest.raises(InputError, match="make_tasks"):
        UserStudyKit().score({})


def test_the_control_group_sees_examples_and_no_concept():
    made, page = kit("examples", 3)
    tags = Tags()
    tags.feed(page)
    assert not [1 for tag, at in tags.seen if at.get("type") == "checkbox"] and made.key_["concepts"] == []
    assert len([1 for tag, at in tags.seen if tag == "img" and at["alt"] == "example"]) == 3 * 3  # one a class and task
    shown = {task["row"] for task in made.key_["tasks"]}
    assert len(shown) == 3
    found = made.score({"study": made.key_["study"], "tasks": [
        {"task": 0, "marked": [], "class": made.key_["tasks"][0]["class"], "seconds": 2}]})  # fmt: skip
    assert found["simulation_accuracy"] == 1 and np.isnan(found["recall"])


def test_pictures_that_cannot_be_shown_are_refused():
    none = LinearExplanation(np.array([0, 1]), np.zeros((2, 1)), np.zeros(2), ("a",), 1.0, 1.0)
    picture, has, says = [np.zeros((4, 4, 3), np.uint8)] * 2, np.ones((2, 1), bool), np.array([0, 1])
    with pytest.raises(InputError, match="no concept"):
        UserStudyKit().make_tasks(picture, has, says, none)
    some = LinearExplanation(np.array([0, 1]), np.ones((2, 1)), np.zeros(2), ("a",), 1.0, 1.0)
    with pytest.raises(NothingToDo, match="classes 0, 1"):
        UserStudyKit().make_tasks(picture, has, says + 3, some)
    with pytest.raises(InputError, match="uint8"):
        UserStudyKit().make_tasks([np.zeros((4, 4, 3))] * 2, has, says, some)


# The whole.


class Net(nn.Module):
    def __init__(self, seed: int, classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, classes)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x)))


def probes(labels: bool = True) -> dict[str, ProbeSet]:
    found = {}
    for name, seed, turn in (("street", 1, 0.0), ("studio|", 2, 1.3)):
        data = world(600, seed=seed, turn=turn)
        images = torch.from_numpy(data.features).float()
        truth = Net(0)(images).argmax(1).numpy()
        truth = np.where(np.random.default_rng(0).random(600) < 0.1, 0, truth)
        found[name] = ProbeSet(images, data.concepts, data.names, truth if labels else None)
    return found


def test_the_audit_says_first_what_it_found():
    report = audit(Net(0), probes(), Net(1))
    titles = [one.title for one in report.findings]
    assert (
        titles[0].startswith("street (half 1) and studio| ") and "learnable" in titles[1] and "against 32" in titles[2]
    )
    assert not report.findings[1].good and report.findings[2].good  # six concepts are few
    assert any("normalised average precision" in text for text in report.warnings)
    assert report.path[-1].k == 64 and report.learn.nap_classes and 0 < report.basis_left < 1
    assert set(report.basis) == set(report.shift.tops["street (half 1)"])
    text = report.to_markdown()
    assert text.index("Can the concept") < text.index("## Probe sets") < text.index("## Number of concepts")
    assert "studio\\|" in text and "| studio|" not in text
    again = audit(Net(0), probes(), Net(1))
    assert again.to_markdown() == text


def test_the_audit_without_labels_with_one_set_and_with_a_layer():
    only = {"street": probes(labels=False)["street"]}
    report = audit(Net(0), only, Net(1), layer="hidden", generator=torch.Generator().manual_seed(3))
    assert report.findings[0].good is None and "noise" in report.findings[0].text
    assert any("true labels" in note for note in report.notes) and not report.learn.nap_classes
    assert np.isnan(report.basis_left) and report.shift.tcav
    assert audit(Net(0), only, Net(1), threshold=0.0).findings[1].good is True


def test_what_is_said_of_learnability():
    from salience.concepts import LearnReport
    from salience.concepts.concept_audit.verdict import _on_learning

    def said(probed: float, threshold: float):
        return _on_learning(LearnReport({"a": 0.5, "b": 0.7}, {0: 0.95}, {0: probed}, threshold, 10.0))

    assert said(0.9, 0.6).good is False and "1 of 2" in said(0.9, 0.6).title and "50% of" in said(0.9, 0.6).text
    assert said(0.4, 0.6).good is None and said(0.4, 0.4).good is True


def test_a_generic_network_too_weak_to_tell_is_named():
    given = {"street": probes()["street"]}
    noisy = np.concatenate([given["street"].concepts * 1.0, np.zeros((600, 3))], axis=1)
    noisy = noisy + np.random.default_rng(0).normal(scale=0.3, size=noisy.shape)  # all of the concepts, nothing else
    found = audit(Net(0), given, noisy, threshold=0.995).findings[1]
    assert found.good is None and "too weak to tell" in found.text


def test_the_audit_refuses_to_go_in_a_circle():
    with pytest.raises(InputError, match="circle"):
        audit(Net(0), probes(), Net(0))
    with pytest.raises(InputError, match="Conv2d"):
        audit(nn.Conv2d(3, 1, 3), probes(), Net(1))
    with pytest.raises(InputError, match="at least one probe set"):
        audit(Net(0), {}, Net(1))
    same = probes()
    sure = Net(0)
    sure.head.bias.data[2] = 1e4
    with pytest.raises(DataError, match="class 2"):
        audit(sure, same, Net(1))
