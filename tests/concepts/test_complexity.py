"""Feature complexity: closed forms, parity with scikit-learn and captum, flow found in any family, a study, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from scipy.stats import norm
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from salience.concepts import (
    ComplexityStudy,
    FeatureDictionary,
    block_layers,
    feature_cka,
    feature_complexity,
    feature_importance,
    hoyer,
    layer_activations,
    learn_dictionary,
    linear_head,
    meta_features,
    nnls,
    noise_sensitivity,
    rank_correlation,
    redundancy,
    residual_flow,
    residual_paths,
    same_order,
    split_signs,
    support_features,
    time_to_decode,
    v_information,
)
from salience.concepts.complexity.decoding import RIDGES
from salience.concepts.complexity.residuals import residual_sums
from salience.errors import DataError, InputError, NothingToDo
from salience.measure.ranking import spearman
from salience.measure.similarity import linear_cka
from tiny import build

RNG = np.random.default_rng(0)
H, H_TEST = RNG.normal(size=(80, 6)), RNG.normal(size=(60, 6))
WEIGHTS = RNG.normal(size=(6, 4))
Z, Z_TEST = H @ WEIGHTS + RNG.normal(size=(80, 4)), H_TEST @ WEIGHTS + RNG.normal(size=(60, 4))


class Block(nn.Module):
    """A residual block, its sum written in one of the usual ways."""

    def __init__(self, wide: int, out: int, inplace: bool) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(wide, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.project = nn.Conv2d(wide, out, 1) if wide != out else nn.Identity()
        self.inplace = inplace

    def forward(self, x):
        y = self.again(torch.relu(self.conv(x)))
        if self.inplace:
            y += self.project(x)
            return y.relu_()
        return torch.relu(torch.add(self.project(x), y))


class Residual(nn.Module):
    """Stem, two blocks, ReLU, average, linear."""

    def __init__(self, sign: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two = Block(4, 4, True), Block(4, 6, False)
        self.head = nn.Linear(6, 3)
        self.sign = sign

    def forward(self, x):
        x = self.two(self.one(torch.relu(self.stem(x))))
        return self.head(x.mean((2, 3)) * self.sign)


def residual(sign: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = Residual(sign)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def images(n: int = 60, seed: int = 1, size: int = 12) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# V-information ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [6, 200])
def test_the_closed_form_is_the_difference_of_likelihoods(columns):
    train, test = RNG.normal(size=(80, columns)), RNG.normal(size=(60, columns))
    train[:, :6], test[:, :6] = 3 * H, 3 * H_TEST
    predicted = Ridge(5.0).fit(train, Z).predict(test)
    sigma = 0.5**0.5
    gain = norm.logpdf(Z_TEST, predicted, sigma) - norm.logpdf(Z_TEST, Z_TEST.mean(0), sigma)
    found = v_information(train, Z, test, Z_TEST, ridge=5.0)
    np.testing.assert_allclose(found, gain.mean(0).clip(min=0), atol=1e-6)
    assert found.max() > 0.5
    expected = Z_TEST.var(0) * r2_score(Z_TEST, predicted, multioutput="raw_values").clip(min=0)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("rows, columns", [(80, 6), (40, 90)])
def test_the_penalty_is_that_of_leave_one_out(rows, columns):
    train, test = RNG.normal(size=(rows, columns)) + 3, RNG.normal(size=(50, columns)) + 3
    weights = RNG.normal(size=(columns, 3))
    z = train @ weights + np.array([0.1, 5, 50]) * RNG.normal(size=(rows, 3))
    z_test = test @ weights + np.array([0.1, 5, 50]) * RNG.normal(size=(50, 3))
    unit = ((train - train.mean(0)) ** 2).sum() / min(rows, columns)
    peer = RidgeCV([share * unit for share in RIDGES], alpha_per_target=True).fit(train, z)
    found = feature_complexity({"a": (train, test), "b": (train, test)}, z, z_test)
    np.testing.assert_allclose(found.ridge[0], peer.alpha_)
    assert len(set(peer.alpha_)) > 1
    expected = r2_score(z_test, peer.predict(test), multioutput="raw_values").clip(min=0)
    np.testing.assert_allclose(found.information[0], expected, atol=1e-6)


def test_complexity_is_one_minus_the_mean_over_all_layers():
    layers = {"a": (H, H_TEST), "b": (H[:, :2], H_TEST[:, :2]), "c": (0 * H, 0 * H_TEST)}
    scale = Z_TEST.std(0)
    found = feature_complexity(layers, 7 * Z + 3, 7 * Z_TEST + 3)
    each = [v_information(a, Z / scale, b, Z_TEST / scale) for a, b in layers.values()]
    np.testing.assert_allclose(found.information, each, atol=1e-9)
    np.testing.assert_allclose(found.score, 1 - np.mean(each, axis=0))
    assert not found.information[2].any() and found.names == ("a", "b", "c")
    when = time_to_decode({"early": layers["b"], "late": layers["a"]}, Z, Z_TEST)
    np.testing.assert_allclose(when.score, 1 - (found.information[0] + found.information[1]) / 2)


def test_single_precision_does_not_overflow_and_disk_is_as_good(tmp_path):
    big = (1e18 * H).astype(np.float32)
    np.testing.assert_allclose(
        v_information(big, Z, (1e18 * H_TEST).astype(np.float32), Z_TEST),
        v_information(H, Z, H_TEST, Z_TEST),
        atol=1e-5,
    )
    np.save(tmp_path / "h.npy", H)
    on_disk = np.load(tmp_path / "h.npy", mmap_mode="r")
    np.testing.assert_array_equal(v_information(on_disk, Z, H_TEST, Z_TEST), v_information(H, Z, H_TEST, Z_TEST))


def test_a_planted_linear_feature_is_simpler_than_a_product():
    x, x_test = RNG.normal(size=(1500, 6)), RNG.normal(size=(800, 6))

    def deeper(a):  # a second layer in which the product is linear
        return np.concatenate([a, a[:, :1] * a[:, 1:2]], 1)

    def planted(a):
        return np.stack([a[:, 2], (a[:, 0] > 0) ^ (a[:, 1] > 0)], 1).astype(float)

    layers = {"input": (x, x_test), "late": (deeper(x), deeper(x_test))}
    linear, xor = feature_complexity(layers, planted(x), planted(x_test)).score
    assert xor - linear > 0.2 and linear < 0.01
    rows = RNG.permutation(1500)
    lost = feature_complexity(layers, planted(x)[rows], planted(x_test)).score
    assert lost.min() > 0.95
    wide = RNG.normal(size=(200, 300)), RNG.normal(size=(100, 300))
    nothing = RNG.normal(size=(200, 5)), RNG.normal(size=(100, 5))
    assert feature_complexity({"a": wide, "b": wide}, *nothing).score.min() > 0.95  # in sample it would be 0


def test_dead_features_are_dropped_and_counted():
    z, z_test = Z.copy(), Z_TEST.copy()
    z[:, 1], z_test[:, 2] = 4.0, 1e6
    found = feature_complexity({"a": (H, H_TEST), "b": (H, H_TEST)}, z, z_test)
    assert found.live.tolist() == [True, False, False, True] and found.dead == 2
    assert np.isnan(found.score[1:3]).all() and np.isfinite(found.score[[0, 3]]).all()
    with pytest.raises(DataError, match="none of 2"):
        time_to_decode({"a": (H, H_TEST)}, z[:, 1:3], z_test[:, 1:3])


def test_one_layer_warns():
    with pytest.warns(UserWarning, match="single"):
        found = feature_complexity({"a": (H, H_TEST)}, Z, Z_TEST)
    np.testing.assert_allclose(found.score, 1 - found.information[0])


# Features --------------------------------------------------------------------------------------------------------


def activations(n: int = 120, p: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 12, generator=generator) ** 4 @ torch.rand(12, p, generator=generator)


def test_an_overcomplete_dictionary_rebuilds_and_its_codes_are_a_function_of_the_image():
    A = activations()
    found = learn_dictionary(A, 20)
    assert found.components_.shape == (20, 8) and float(found.components_.min()) >= 0
    assert found.relative_error_ < 0.01 and float(found.codes_.min()) >= 0
    torch.testing.assert_close(found.components_.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(found.encode(A[40:41]), found.codes_[40:41], atol=1e-4, rtol=1e-3)
    near = found.encode(A + 1e-5)
    assert float((near - found.codes_).abs().max()) < 0.05  # plain least squares may jump to another best code
    torch.testing.assert_close(found.decode(found.codes_), A, atol=0.05, rtol=0.05)


def test_with_few_features_codes_are_plain_least_squares():
    A = activations().double()
    found = learn_dictionary(A, 4)
    torch.testing.assert_close(found.codes_, nnls(A, found.components_), atol=2e-3, rtol=2e-3)


def test_features_class_by_class():
    A, labels = activations(), np.arange(120) % 3
    found = learn_dictionary(A, 9, "per_class", labels)
    own = FeatureDictionary(n_concepts=3, tol=1e-7).fit(A[labels == 1])
    torch.testing.assert_close(found.components_[3:6], own.components_)
    assert found.codes_.shape == (120, 9)


def test_split_signs_keeps_the_logit():
    A, W = torch.randn(10, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(split_signs(A) @ torch.cat([W, -W], 1).T, A @ W.T)
    assert float(split_signs(A).min()) >= 0


def test_importance_is_occlusion_and_captum():
    rng = np.random.default_rng(1)
    z, D, W = rng.random((30, 7)), rng.random((7, 5)), rng.normal(size=(4, 5))
    b, targets = rng.normal(size=4), rng.integers(0, 4, 30)
    found = feature_importance(z, D, W, targets)
    logit = (z @ D @ W.T + b)[np.arange(30), targets]
    for i in range(7):
        without = z.copy()
        without[:, i] = 0
        change = logit - (without @ D @ W.T + b)[np.arange(30), targets]
        assert found.absolute[i] == pytest.approx(np.abs(change).mean(), abs=1e-6)
        assert found.signed[i] == pytest.approx(change.mean(), abs=1e-6)
    head = nn.Linear(7, 4).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy((D @ W.T).T))
    peer = InputXGradient(head).attribute(torch.from_numpy(z).requires_grad_(), target=torch.from_numpy(targets))
    np.testing.assert_allclose(found.signed, peer.detach().numpy().mean(0), atol=1e-12)
    assert (found.signed < 0).any() and not np.allclose(found.absolute, np.abs(found.signed))


def test_support_features_by_hand():
    D, W, b = np.eye(3), np.array([[1.0, 0, 0], [0, 1, 1]]), np.zeros(2)
    z = np.array([[2.0, 0, 1], [1, 0, 3], [0, 5, 0]])  # classes 0, 1, 1
    found = support_features(z, D, W, b, [3, 1, 2], np.array([0, 1, 1]), [0, 1, 2, 3])
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, 2 / 3, 1])  # ties, of logits of 0, go to class 0


def test_hoyer_by_hand():
    np.testing.assert_allclose(hoyer([[1.0, 0, 0, 0], [2, 2, 2, 2], [3, 4, 0, 0]]), [1, 0, (2 - 7 / 5) / (2 - 1)])
    assert np.isnan(hoyer([[0.0, 0, 0], [1, 0, 0]])[0])


def test_groups_of_atoms():
    D = np.array([[1.0, 0], [5, 0.1], [0, 1], [0.1, 3]])
    groups, mean = meta_features(D, np.array([0.2, 0.4, 0.9, np.nan]), 2)
    assert groups[0] == groups[1] != groups[2] == groups[3]
    np.testing.assert_allclose(mean[[groups[0], groups[2]]], [0.3, 0.9])


# Flow and companions ---------------------------------------------------------------------------------------------


def test_cka_of_single_features_and_what_does_not_change_it():
    found = feature_cka(H, Z)
    np.testing.assert_allclose(found, [linear_cka(H, Z[:, i : i + 1]) for i in range(4)])
    wide = RNG.normal(size=(80, 100))
    np.testing.assert_allclose(feature_cka(wide, Z), [linear_cka(wide, Z[:, i : i + 1]) for i in range(4)])
    turned, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    np.testing.assert_allclose(feature_cka(5 * H @ turned + 2, 3 * Z - 1), found)
    assert np.isnan(feature_cka(H, np.ones((80, 1)))).all()


@pytest.mark.parametrize("family", ["residual", "resnet", "vit"])
def test_residual_sums_are_found_by_watching(family):
    model = residual() if family == "residual" else other(family)
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with torch.no_grad():
        sums = residual_sums(model, images(2, size=16))
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == before
    x = images(2, size=16)
    if family == "residual":
        assert [s.name for s in sums] == ["one", "two"] and sums[0].stem == "stem"
        inner = torch.relu(model.stem(x))
        torch.testing.assert_close(sums[0].skip, inner)
        torch.testing.assert_close(sums[0].branch, model.one.again(torch.relu(model.one.conv(inner))))
        torch.testing.assert_close(sums[1].skip, model.two.project(model.one(inner)))
        assert block_layers(model, x) == ["input", "stem", "one", "two", "penultimate"]
    elif family == "resnet":
        assert len(sums) == 3 and all(s.name.startswith("resnet.encoder.stages") for s in sums)
        assert len(block_layers(model, x)) in (5, 6)
    else:
        assert [s.name.split("layer")[-1] for s in sums] == ["s.0", "s.0#2", "s.1", "s.1#2"]
        assert len(block_layers(model, x)) in (4, 5)  # a layer has two sums and one output


def other(family: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    if family == "resnet":
        config = t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", num_labels=3)
        return t.ResNetForImageClassification(config).eval()
    config = t.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16,
                         patch_size=4, num_labels=3)  # fmt: skip
    return t.ViTForImageClassification(config).eval()


def test_flow_is_cka_or_information_of_the_two_paths():
    model, x = residual(), images() * torch.linspace(0.2, 1, 60)[:, None, None, None]
    z = np.random.default_rng(1).random((60, 3))
    z[:, 0] = x.mean((1, 2, 3))
    paths = residual_paths(model, x, batch_size=16)
    found = residual_flow(model, x, z)
    assert found.blocks == ("one", "two") and found.skip.shape == found.branch.shape == (2, 3)
    for row, name in enumerate(found.blocks):
        np.testing.assert_allclose(found.skip[row], feature_cka(paths[name][0], z), atol=1e-9)
        np.testing.assert_allclose(found.branch[row], feature_cka(paths[name][1], z), atol=1e-9)
    told = residual_flow(model, x, z, measure="information", blocks=["two"])
    test = np.arange(60) % 3 == 2
    scaled = z / z[test].std(0)
    skip = paths["two"][0]
    np.testing.assert_allclose(
        told.skip[0], v_information(skip[~test], scaled[~test], skip[test], scaled[test]), atol=1e-9
    )
    assert told.blocks == ("two",) and told.skip[0, 0] > 0.5


def test_redundancy_of_a_copied_and_of_a_lone_neuron():
    u = RNG.normal(size=(200, 2))
    A = np.concatenate([np.repeat(u[:, :1], 10, 1), 10**0.5 * u[:, 1:]], 1)
    copied, lone = redundancy(A, u, n_masks=200)
    assert copied > 0.9 > lone
    np.testing.assert_array_equal(redundancy(A, u, 5, random_state=3), redundancy(A, u, 5, random_state=3))


def test_noise_on_a_linear_network_has_the_variance_of_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].bias.fill_(50)  # far from the kink
    extractor = FeatureDictionary(n_concepts=4)
    extractor.components_ = torch.eye(4)
    x = torch.rand(6, 3, 2, 2)
    found = noise_sensitivity(model, x, extractor, [0.0, 0.1], draws=400, batch_size=4)
    assert found[0.0].max() < 1e-8
    np.testing.assert_allclose(found[0.1], 0.01 * (model[1].weight.detach() ** 2).sum(1), rtol=0.15)


# Layers and the study --------------------------------------------------------------------------------------------


def test_layers_as_matrices(tmp_path):
    model, x = residual(), images(10)
    names = block_layers(model, x[:2])
    seen = layer_activations(model, x, names, grid=2, batch_size=4)
    torch.testing.assert_close(seen.layers["input"], nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
    head = linear_head(model, x[:2])
    assert head.name == "head"
    torch.testing.assert_close((seen.layers["penultimate"].double() @ head.weight.T + head.bias).float(), seen.logits)
    kept = layer_activations(model, DataLoader(TensorDataset(x), 3), names, grid=2, out=tmp_path / "a.npy")
    for name in names:
        np.testing.assert_allclose(kept.layers[name], seen.layers[name], atol=1e-6)
    same_order(seen, kept)
    with pytest.raises(DataError, match="first at row 2"):
        same_order(seen, layer_activations(model, x[[0, 1, 3, 2, *range(4, 10)]], names))
    assert block_layers(build("plain"), images(2, size=16)) == ["input", "relu", "relu2", "penultimate"]


@pytest.fixture(scope="module")
def report():
    model, early = residual(), residual()
    with torch.no_grad():
        early.two.again.weight.mul_(0)
    study = ComplexityStudy(n_features=10, noise=[0.1], draws=3)
    return study.run(model, images(150), images(80, 2), {"1": early, "2": model})


def test_a_study(report):
    live = report.complexity.live
    assert report.complexity.names == ("input", "stem", "one", "two", "penultimate")
    shown = report.complexity.score[live]
    assert (shown >= 0).all() and report.shuffled.score[live].mean() > 0.9 > shown.mean()
    found = report.correlations["importance"]
    assert found.value == pytest.approx(spearman(shown, report.importance.absolute[live])) and found.n == live.sum()
    assert found.low <= found.value <= found.high and set(report.flow) == {"cka", "information"}
    assert report.support[1][-1] == 1 and report.order.tolist() == [
        i for i in np.argsort(report.complexity.score) if live[i]
    ]
    at_end = report.complexity.information[-1]
    assert report.readable.tolist() == [bool(one and r > 0.5) for one, r in zip(live, at_end, strict=True)]


def test_its_two_experiments_over_checkpoints_differ(report):
    assert report.time.names == ("1", "2")
    np.testing.assert_allclose(report.time.information[1], report.complexity.information[-1], atol=1e-6)
    assert [epoch.name for epoch in report.epochs] == ["1", "2"]
    last = report.epochs[-1]
    assert last.mean == pytest.approx(np.nanmean(report.complexity.score), abs=1e-6) and last.agreement == 1
    assert last.against_importance.value == pytest.approx(report.correlations["importance"].value)
    first = report.epochs[0]
    assert first.mean != pytest.approx(float(1 - report.time.information[0].mean()), abs=1e-3)


def test_without_checkpoints_there_are_no_dynamics_and_negative_layers_are_split():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ComplexityStudy(n_features=6, layers=["one", "two"]).run(residual(-1), images(90), images(60, 2))
    assert found.time is None and found.epochs == [] and "time to decode" not in found.correlations
    assert any("negative" in note for note in found.notes)
    assert found.dictionary.components_.shape == (6, 12) and found.companions["localisation"].max() <= 1


def test_the_same_seed_twice_and_a_memory_on_disk():
    model, parts = residual(), (images(90), images(60, 2))
    a = ComplexityStudy(n_features=6, random_state=3).run(model, *parts)
    b = ComplexityStudy(n_features=6, random_state=3, memory=1).run(model, *parts, {"1": residual(), "2": model})
    np.testing.assert_allclose(b.time.information[0], b.time.information[1])
    np.testing.assert_allclose(a.complexity.score, b.complexity.score)
    np.testing.assert_array_equal(a.shuffled.score, b.shuffled.score)
    assert a.correlations["importance"] == b.correlations["importance"]


def test_rank_correlation():
    a, b = RNG.normal(size=30), RNG.normal(size=30)
    found = rank_correlation(a, a + b)
    assert found.value == pytest.approx(spearman(a, a + b)) and found.low < found.value < found.high
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]).value) and np.isnan(rank_correlation([1, 2], [1, 2]).value)


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda: v_information(RNG.normal(size=(20, 30)), Z[:20], RNG.normal(size=(5, 30)), Z[:5], 0.0), InputError, "30 columns for 20"),
        (lambda: v_information(H, Z, H_TEST, Z_TEST, -1.0), InputError, "ridge"),
        (lambda: v_information(H, Z, H_TEST, Z_TEST, "best"), InputError, "ridge"),
        (lambda: v_information(H[:-1], Z, H_TEST, Z_TEST), InputError, "79"),
        (lambda: v_information(H, Z, H_TEST[:, :3], Z_TEST), InputError, "6 columns"),
        (lambda: v_information(H[:, 0], Z, H_TEST, Z_TEST), InputError, "matrix"),
        (lambda: v_information(np.where(H[3, 2] == H, np.nan, H), Z, H_TEST, Z_TEST), DataError, "row 3"),
        (lambda: v_information(H, np.where(Z[5, 1] == Z, np.inf, Z), H_TEST, Z_TEST), DataError, "row 5, feature 1"),
        (lambda: feature_complexity({}, Z, Z_TEST), InputError, "none"),
        (lambda: feature_complexity({"conv9": (H, H_TEST[:-2])}, Z, Z_TEST), InputError, "conv9"),
        (lambda: time_to_decode({}, Z, Z_TEST), InputError, "checkpoints"),
        (lambda: learn_dictionary(activations() - 1, 4), DataError, "ReLU"),
        (lambda: learn_dictionary(activations(), 4, "local"), InputError, "scope"),
        (lambda: learn_dictionary(activations(), 6, "per_class"), InputError, "labels"),
        (lambda: learn_dictionary(activations(), 7, "per_class", np.arange(120) % 3), InputError, "multiple of the 3"),
        (lambda: learn_dictionary(activations(4), 20, "per_class", [0, 0, 0, 1]), InputError, "class 1 has 1"),
        (lambda: learn_dictionary(activations(), 0), InputError, "n_concepts"),
        (lambda: feature_importance(Z, H, H, [0] * 80), InputError, "must be"),
        (lambda: feature_importance(Z[:2], np.eye(4), np.eye(4), np.array([0, 4])), InputError, "0..3"),
        (lambda: support_features(Z[:2], np.eye(4), np.eye(4), np.zeros(4), [1, 2, 3, 4], np.array([0, 1]), [5]), InputError, "kept"),
        (lambda: hoyer(np.ones((3, 1))), InputError, "2 dimensions"),
        (lambda: meta_features(np.eye(3), np.zeros(3), 4), InputError, "n_clusters"),
        (lambda: redundancy(H, Z, 0), InputError, "n_masks"),
        (lambda: feature_cka(H, Z[:-1]), InputError, "rows"),
        (lambda: residual_flow(build("plain"), images(6, size=16), Z[:6]), InputError, "residual"),
        (lambda: residual_flow(residual(), images(6), Z[:6], blocks=["onne"]), InputError, "'one'"),
        (lambda: residual_flow(residual(), images(6), Z[:6], measure="cca"), InputError, "measure"),
        (lambda: residual_flow(residual(), images(6), Z[:6], held_out=np.ones(6, bool)), InputError, "held_out"),
        (lambda: layer_activations(residual(), images(4), ["two", "two"]), InputError, "once"),
        (lambda: layer_activations(residual(), images(4), ["tow"]), InputError, "'two'"),
        (lambda: linear_head(nn.Sequential(nn.Conv2d(3, 2, 12), nn.Flatten()), images(2)), InputError, "linear"),
        (lambda: noise_sensitivity(residual(), images(2), FeatureDictionary(), draws=1), InputError, "draws"),
        (lambda: ComplexityStudy(n_features=4).run(residual(), images(90), images(20)), NothingToDo, "20"),
        (lambda: ComplexityStudy(n_features=4).run(
            residual(), DataLoader(TensorDataset(images(90)), 8, shuffle=True), images(60)), DataError, "shuffle"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(error, match=said):
            call()


def test_a_loader_that_changes_images_is_found_at_the_next_checkpoint():
    class Changing(TensorDataset):
        def __getitem__(self, i):
            return (self.tensors[0][i] + 0.01 * torch.rand(1),)

    with pytest.raises(DataError, match="checkpoint late"):
        ComplexityStudy(n_features=4).run(residual(), Changing(images(80)), images(60, 2), {"late": residual()})
