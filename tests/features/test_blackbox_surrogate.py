"""HighDimExplainer: networks against their formulas, probes against scikit-learn, rules against the tree, bad input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from salience.errors import DataError, InputError
from salience.features import (
    CAEClassifier,
    ConvAutoencoder,
    HighDimExplainer,
    SANClassifier,
    SelfAttentionNet,
    comprehensiveness,
    fidelity_of,
    probe_importance,
    sufficiency,
)
from salience.features.blackbox_surrogate.rules import Condition, rules_of
from salience.features.table_explanation import encode, explain_table, labelled


def world(n: int = 400, noise: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Class 1 where column 2 is above 0 or column 5 above 1; the others are noise."""
    x = np.random.default_rng(seed).normal(size=(n, noise + 6))
    return x, ((x[:, 2] > 0) | (x[:, 5] > 1)).astype(int)


def oracle(rows: np.ndarray) -> np.ndarray:
    """A black box that knows the rule of `world`, softly."""
    score = np.maximum(4 * rows[:, 2], 4 * (rows[:, 5] - 1))
    chance = 1 / (1 + np.exp(-score))
    return np.column_stack([1 - chance, chance])


def fitted(**settings) -> tuple[HighDimExplainer, np.ndarray]:
    x, _ = world()
    return HighDimExplainer(black_box=oracle, **settings).fit(x), x


def test_attention_is_the_two_formulas() -> None:
    torch.manual_seed(0)
    net = SelfAttentionNet(5, 3, heads=2, hidden=4).eval()
    x = torch.randn(7, 5)
    weights = [(head.weight.detach().numpy(), head.bias.detach().numpy()) for head in net.heads]

    def softmax(z: np.ndarray) -> np.ndarray:
        z = np.exp(z - z.max(axis=-1, keepdims=True))
        return z / z.sum(axis=-1, keepdims=True)

    local = np.mean([softmax(x.numpy() @ w.T + b) for w, b in weights], axis=0)
    hidden = (local * x.numpy()) @ net.inner.weight.detach().numpy().T + net.inner.bias.detach().numpy()
    selu = 1.0507009873554805 * np.where(hidden > 0, hidden, 1.6732632423543772 * np.expm1(hidden))
    logits = selu @ net.outer.weight.detach().numpy().T + net.outer.bias.detach().numpy()
    np.testing.assert_allclose(net.local_attention(x).detach(), local, atol=1e-6)
    np.testing.assert_allclose(net(x).detach(), logits, atol=1e-5)
    wanted = np.mean([softmax(np.diag(w)) for w, _ in weights], axis=0)
    np.testing.assert_allclose(net.global_attention().detach(), wanted, atol=1e-6)


@pytest.mark.parametrize("columns", [9, 10, 86 * 86 - 305])
def test_the_autoencoder_pads_and_cuts(columns: int) -> None:
    net = ConvAutoencoder(columns).eval()
    x = torch.randn(2, columns)
    assert net(x).shape == (2, columns) and net.side**2 >= columns > (net.side - 1) ** 2
    if columns > 1000:
        assert net.encode(x).shape == (2, 968)  # the paper's 11 x 11 x 8
    padded = torch.nn.functional.pad(x, (0, net.side**2 - columns)).view(2, 1, net.side, net.side)
    torch.testing.assert_close(net.encode(x), net.encoder(padded).flatten(1))


def test_the_autoencoder_learns_to_give_rows_back() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(np.repeat(rng.normal(size=(200, 4, 4)), 2, axis=1), 2, axis=2).reshape(200, 64)
    model = CAEClassifier(pretraining=40, epochs=15).fit(x, (x[:, 0] > 0).astype(int))
    assert model.reconstruction_ < 0.85  # 1 is what the mean gives
    assert model.score(x, (x[:, 0] > 0).astype(int)) > 0.8
    np.testing.assert_allclose(model.predict_proba(x).sum(axis=1), 1)


def test_the_attention_classifier_learns_names_its_classes_and_attends() -> None:
    x, y = world(600, noise=6)
    labels = np.array(["no", "yes"])[y]
    model = SANClassifier(epochs=40, learning_rate=1e-2).fit(x, labels)
    assert model.score(x, labels) > 0.85 and set(model.predict(x)) == {"no", "yes"}
    assert model.attention_.sum() == pytest.approx(1) and model.local_attention(x[:3]).shape == (3, 12)
    np.testing.assert_allclose(model.local_attention(x).sum(axis=1), 1, rtol=1e-5)
    again = SANClassifier(epochs=40, learning_rate=1e-2).fit(x, labels)
    np.testing.assert_array_equal(model.predict_proba(x), again.predict_proba(x))
    with pytest.warns(UserWarning, match="only the 5 columns"):
        few = SANClassifier(epochs=2, max_features=5).fit(x, labels)
    assert len(few.columns_) == 5 and 2 in few.columns_ and (few.attention_ > 0).sum() == 5
    for bad in ({"epochs": 0}, {"batch_size": 1.5}):
        with pytest.raises(InputError):
            SANClassifier(**bad).fit(x, labels)


def test_training_leaves_the_global_generator_alone() -> None:
    x, y = world(60)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    SANClassifier(epochs=1).fit(x, y)
    assert torch.equal(before, torch.get_rng_state())


def test_permutation_is_scikit_learns() -> None:
    x, y = world(150, noise=4)
    model = RandomForestClassifier(10, random_state=0).fit(x, y)

    def likelihood(estimator, rows, truth):
        return np.log(np.clip(estimator.predict_proba(rows)[np.arange(len(rows)), truth], 1e-6, 1)).mean()

    wanted = permutation_importance(model, x, y, scoring=likelihood, n_repeats=3, random_state=7).importances_mean
    found = probe_importance(model.predict_proba, x, y=y, methods=["permutation"], repeats=3, random_state=7)
    np.testing.assert_allclose(found.scores["permutation"], wanted, atol=1e-12)


def test_probes_find_the_two_columns_and_no_others() -> None:
    x, _ = world()
    found = probe_importance(oracle, x, methods=["permutation", "sensitivity"])
    assert set(found.order()[:2]) == {2, 5}
    for scores in found.scores.values():
        assert (np.delete(scores, [2, 5]) == 0).all()
    assert found.flips is not None and found.flips[2] > 0.1 and found.flips[0] == 0
    frame = found.frame()
    assert list(frame["feature"][:2]) in (["x2", "x5"], ["x5", "x2"]) and frame["rank"].is_monotonic_increasing


def test_sensitivity_worked_by_hand() -> None:
    """Two rows, one shuffle that swaps them or not: the probability moves by |0.9 - 0.2| in both, or not at all."""
    rows = np.array([[0.0, 5.0], [1.0, 5.0]])
    box = lambda x: np.column_stack([0.9 - 0.7 * x[:, 0], 0.1 + 0.7 * x[:, 0]])  # noqa: E731
    swaps = []
    for seed in range(8):
        found = probe_importance(box, rows, methods=["sensitivity"], repeats=1, random_state=seed)
        assert found.scores["sensitivity"][1] == 0  # constant
        swaps.append(round(float(found.scores["sensitivity"][0]), 9))
    assert set(swaps) == {0.0, 0.7}


def test_class_numbers_instead_of_probabilities() -> None:
    x, _ = world()
    found = probe_importance(lambda rows: oracle(rows).argmax(axis=1), x, methods=["sensitivity"])
    assert set(found.order()[:2]) == {2, 5}
    np.testing.assert_allclose(found.scores["sensitivity"], found.flips)


def test_given_attention_joins_the_rank() -> None:
    x, _ = world()
    attention = np.zeros(26)
    attention[7] = 1
    found = probe_importance(oracle, x, attention=attention)
    assert set(found.scores) == {"permutation", "sensitivity", "attention"}
    assert set(found.order()[:3]) == {2, 5, 7}


def test_erasure() -> None:
    x, _ = world()
    used, unused = [2, 5], [0, 1]
    assert comprehensiveness(oracle, x, used, x).mean() > 0.2
    np.testing.assert_allclose(comprehensiveness(oracle, x, unused, x), 0, atol=1e-12)
    np.testing.assert_allclose(sufficiency(oracle, x, used, x), 0, atol=1e-12)
    np.testing.assert_allclose(
        sufficiency(oracle, x, unused, x), comprehensiveness(oracle, x, range(2, 26), x), atol=1e-12
    )


def test_rules_are_the_tree_on_every_row() -> None:
    explainer, x = fitted()
    fresh = np.random.default_rng(9).normal(size=(500, 26))
    for rows in (x, fresh):
        covers = np.stack([rule.covers(rows) for rule in explainer.rules_])
        assert (covers.sum(axis=0) == 1).all()  # each row fires one rule
        labels = np.array([rule.label for rule in explainer.rules_])
        np.testing.assert_array_equal(labels[covers.argmax(axis=0)], explainer.predict(rows))
    assert sum(rule.support for rule in explainer.rules_) == pytest.approx(1)
    for rule in explainer.rules_:
        assert len({condition.feature for condition in rule.conditions}) == len(rule.conditions)  # bounds are merged
        assert rule.confidence == pytest.approx((explainer.answers(x)[rule.covers(x)] == rule.label).mean())
    held = explainer.rules(min_support=0.05, min_confidence=0.9, X=fresh)
    assert held and all(rule.support >= 0.05 and rule.confidence >= 0.9 for rule in held)
    assert "THEN yes" in next(r for r in held if r.label == 1).text(["no", "yes"])


def test_the_surrogate_mimics_the_black_box_and_not_the_labels() -> None:
    x, _ = world()
    contrary = lambda rows: oracle(rows)[:, ::-1]  # noqa: E731
    explainer = HighDimExplainer(black_box=contrary).fit(x, world()[1])
    assert explainer.fidelity(x)["agreement"] > 0.95
    assert (explainer.predict(x) == world()[1]).mean() < 0.1


def test_fidelity_by_its_formulas() -> None:
    explainer, _ = fitted(k=2, max_depth=2)
    rows = np.random.default_rng(3).normal(size=(300, 26))
    found = explainer.fidelity(rows)
    wanted, given = oracle(rows), explainer.surrogate_.predict_proba(rows[:, explainer.columns_])
    assert found["agreement"] == pytest.approx((given.argmax(1) == wanted.argmax(1)).mean())
    assert found["r2"] == pytest.approx(1 - ((given - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())
    noise = explainer.with_columns([0, 1]).surrogate_
    assert fidelity_of(noise, np.array([0, 1]), rows, oracle)["agreement"] < found["agreement"] - 0.15


def test_k_is_the_elbow() -> None:
    explainer, _ = fitted()
    assert len(explainer.columns_) in (2, 3) and explainer.ks_[0] == 1
    assert explainer.fidelities_[1] > explainer.fidelities_[0]
    chosen = explainer.fidelities_[explainer.ks_.index(len(explainer.columns_))]
    assert chosen >= max(explainer.fidelities_) - 0.06


def test_explanations_are_passed_through_the_black_box() -> None:
    explainer, x = fitted()
    for row in x[:25]:
        found = explainer.explain(row)
        assert found.answer == oracle(row[None]).argmax() and found.rule is not None and found.rule.covers(row[None])[0]
        assert set(found.attributions) == {explainer.names_[c] for c in explainer.columns_}
        sizes = [(len(item.changes), item.size) for item in found.counterfactuals]
        assert sizes == sorted(sizes)  # the nearest first, whatever the black box says
        for item in found.counterfactuals:
            assert oracle(item.row[None]).argmax() == item.answer and item.flips == (item.answer != found.answer)
            assert {explainer.names_[c] for c in np.flatnonzero(item.row != row)} == set(item.changes)
            assert item.rule.covers(item.row[None])[0] and item.rule.label != found.answer
        assert found.counterfactuals[0].flips and found.extended is None


def test_a_search_for_a_flip_is_no_counterfactual_of_the_surrogate() -> None:
    """The sum of ten columns decides; a tree on one of them cannot flip it by that column, further columns can."""
    x = np.random.default_rng(0).normal(size=(400, 10))

    def box(rows: np.ndarray) -> np.ndarray:
        chance = 1 / (1 + np.exp(-rows.sum(axis=1)))
        return np.column_stack([1 - chance, chance])

    explainer = HighDimExplainer(black_box=box, k=1, max_depth=1).fit(x)
    row = np.full(10, 2.0)
    found = explainer.explain(row)
    nearest, further = found.counterfactuals[0], found.extended
    assert len(nearest.changes) == 1 and not nearest.flips and nearest.answer == found.answer == 1
    assert further is not None and further.flips and box(further.row[None]).argmax() == 0
    assert set(nearest.changes) < set(further.changes) and len(further.changes) > 1


@pytest.mark.parametrize("steps", [0, 1])
def test_rules_on_neighbouring_float32_values(steps: int) -> None:
    """The threshold between two neighbours lies between them in float64; in float32 it is one of them."""
    low = np.float32(1024 + steps * 2**-13)
    x = np.array([[low], [np.nextafter(low, np.float32(np.inf))]] * 30, dtype=np.float64)
    upper = (x[:, 0] > low).astype(int)
    tree = DecisionTreeClassifier().fit(x, upper)
    rules = rules_of(tree, np.array([0]), ["v"], x, upper)
    np.testing.assert_array_equal(tree.predict(x), upper)
    labels = np.array([rule.label for rule in rules])
    covers = np.stack([rule.covers(x) for rule in rules])
    assert (covers.sum(axis=0) == 1).all()
    np.testing.assert_array_equal(labels[covers.argmax(axis=0)], tree.predict(x))


def test_the_ends_of_a_condition_can_be_told_apart() -> None:
    assert str(Condition(0, "v", 1.00001, 1.00002)) == "1.00001 < v <= 1.00002"
    assert str(Condition(0, "v", -np.inf, 1.00002)) == "v <= 1"
    assert str(Condition(0, "v", 1.0, 2.0)) == "1 < v <= 2"
    assert str(Condition(0, "job=none", 0.5, np.inf, binary=True)) == "job = none"
    assert str(Condition(0, "job=none", -np.inf, 0.5, binary=True)) == "job != none"
    assert str(Condition(0, "smoker", 0.5, np.inf, binary=True)) == "smoker = 1"


def test_a_rare_answer_is_probed() -> None:
    """One row in a hundred is answered otherwise: 200 rows at random need not hold one."""
    x = np.random.default_rng(0).normal(size=(2000, 4))
    cut = np.sort(x[:, 1])[-6]
    box = lambda rows: (rows[:, 1] > cut).astype(int)  # noqa: E731
    for seed in range(4):
        explainer = HighDimExplainer(black_box=box, random_state=seed, k=1, probe_rows=50).fit(x)
        assert explainer.columns_.tolist() == [1]


def test_class_numbers_and_classifiers_without_probabilities() -> None:
    x, _ = world()
    kinds = np.digitize(x[:, 2], [-0.5, 0.5])
    numbers = lambda rows: np.digitize(rows[:, 2], [-0.5, 0.5])  # noqa: E731
    labels = np.array(["high", "low", "middle"])[[1, 2, 0]]
    for box in (numbers, LinearSVC(random_state=0).fit(x, labels[kinds])):
        explainer = HighDimExplainer(black_box=box, k=1).fit(x)
        assert explainer.n_classes_ == 3
        few = x[explainer.answers(x) < 2]  # the largest class is not among the answers
        assert explainer.fidelity(few)["agreement"] > 0.8
        assert explainer.explain(few[0]).attributions
        some = HighDimExplainer(black_box=box, k=1).fit(few)  # nor among those of the surrogate
        assert some.fidelity(x)["agreement"] < explainer.fidelity(x)["agreement"]
    with pytest.raises(InputError, match="count from 0"):
        HighDimExplainer(black_box=lambda rows: numbers(rows) - 1).fit(x)


def test_the_tree_on_labels_is_another_tree() -> None:
    explainer, x = fitted(k=2)
    wrong = 1 - explainer.answers_
    other = explainer.with_columns(explainer.columns_, wrong)
    assert other.fidelity(x)["agreement"] < 0.1 and explainer.fidelity(x)["agreement"] > 0.9


def test_attribution_of_a_column_that_does_nothing_is_zero() -> None:
    explainer, x = fitted(k=5)
    found = explainer.explain(x[0])
    idle = [name for name in found.attributions if name not in ("x2", "x5")]
    assert len(idle) == 3 and all(found.attributions[name] == pytest.approx(0) for name in idle)
    assert max(abs(found.attributions[name]) for name in ("x2", "x5")) > 0.01


def test_constant_columns_stand_behind_those_that_are_used() -> None:
    x, _ = world()
    x[:, [0, 7]] = 3.0
    explainer = HighDimExplainer(black_box=oracle, k=2).fit(x)
    assert set(explainer.columns_) == {2, 5} and (explainer.importance_.scores["sensitivity"][[0, 7]] == 0).all()


@pytest.mark.parametrize("surrogate", ["rf", "gb"])
def test_other_surrogates_have_fidelity_but_no_rules(surrogate: str) -> None:
    explainer, x = fitted(surrogate=surrogate, k=2, max_depth=3)
    assert explainer.fidelity(x)["agreement"] > 0.9
    with pytest.raises(InputError, match="surrogate='tree'"):
        explainer.rules()
    found = explainer.explain(x[0])
    assert found.rule is None and found.counterfactuals == [] and found.attributions


def test_same_seed_same_result_and_names_of_a_frame() -> None:
    x, y = world()
    frame = pd.DataFrame(x, columns=[f"column {i}" for i in range(26)])
    model = LogisticRegression().fit(x, y)
    first, second = (HighDimExplainer(black_box=model, random_state=1).fit(frame) for _ in range(2))
    np.testing.assert_array_equal(first.order_, second.order_)
    assert first.names_[first.order_[0]] in ("column 2", "column 5")


@pytest.mark.parametrize(
    ("settings", "rows", "error", "words"),
    [
        ({"k": 27}, None, InputError, "from 1 to the 26 columns"),
        ({"k": 0}, None, InputError, "k must be"),
        ({"surrogate": "net"}, None, InputError, "surrogate"),
        ({"max_depth": 0}, None, InputError, "max_depth"),
        ({"methods": ("shap",)}, None, InputError, "methods"),
        ({"repeats": 0}, None, InputError, "repeats"),
        ({"random_state": -1}, None, InputError, "random_state"),
        ({"black_box": 3}, None, InputError, "black_box is a int"),
        ({"black_box": lambda rows: np.ones((len(rows), 2)) * [1, 0]}, None, DataError, "answers one class"),
        ({"black_box": lambda rows: np.ones(3)}, None, InputError, "returned shape"),
        ({}, [[1.0, np.nan]] * 20, DataError, "missing or infinite values, first in row 0, column 1"),
        ({}, [["a", "b"]] * 20, DataError, "holds text"),
        ({}, np.empty((0, 3)), InputError, "rows and columns"),
    ],
)
def test_bad_input(settings, rows, error, words) -> None:
    with pytest.raises(error, match=words):
        HighDimExplainer(**{"black_box": oracle, **settings}).fit(world()[0] if rows is None else rows)


def test_more_bad_input() -> None:
    explainer, x = fitted(k=2)
    with pytest.raises(InputError, match="fitted on 26"):
        explainer.fidelity(x[:, :5])
    with pytest.raises(DataError, match="one class for all"):
        explainer.fidelity(x[explainer.answers(x) == 1])
    with pytest.raises(InputError, match="names has 1"):
        HighDimExplainer(black_box=oracle).fit(x, names=["a"])
    with pytest.raises(InputError, match="attention has shape"):
        probe_importance(oracle, x, attention=np.ones(3))
    with pytest.raises(InputError, match="y must name"):
        probe_importance(oracle, x, y=np.full(len(x), 2), methods=["permutation"])


def test_a_class_that_the_surrogate_never_saw() -> None:
    """Three classes in the probabilities, two among the answers on the training rows."""
    x, _ = world()
    box = lambda rows: np.column_stack([oracle(rows) * 0.9, np.full(len(rows), 0.1)])  # noqa: E731
    explainer = HighDimExplainer(black_box=box, k=2).fit(x)
    assert set(explainer.predict(x)) == {0, 1} and explainer.fidelity(x)["agreement"] > 0.9


def test_tables_are_encoded_with_their_names() -> None:
    columns = {"a": [1.0, None, 3.0, 99.0], "g": ["u", "v", None, "w"], "void": [None] * 4, "y": [0, 1, 0, 1]}
    table, labels, _ = labelled(columns, "y")
    found = encode(table, ["a", "g", "void"], np.array([0, 1, 2]))
    assert found.names == ["a", "g=u", "g=v"] and list(labels) == ["0", "1", "0", "1"]
    # Row 3 trains nothing: neither its number nor its level is known.
    np.testing.assert_array_equal(found.rows, [[1, 1, 0], [2, 0, 1], [3, 0, 0], [99, 0, 0]])
    assert any("missing values" in note for note in found.notes) and any("no number" in note for note in found.notes)
    for label, error in (("none", InputError), ("void", DataError)):
        with pytest.raises(error):
            labelled(columns, label)
    with pytest.raises(DataError, match="no column is left"):
        encode(table, [], np.arange(3))


def test_explain_table_measures_itself() -> None:
    data = load_breast_cancer(as_frame=True)
    frame = data.data.iloc[:, :12].copy()
    rng = np.random.default_rng(0)
    frame = frame.join(pd.DataFrame(rng.normal(size=(len(frame), 30)), columns=[f"n{i}" for i in range(30)]))
    frame["label"] = data.target
    found = explain_table(frame, "label", examples=2)
    assert found.better and found.agreement > 0.85 and "random columns" in found.verdict
    assert not any(found.explainer.names_[c].startswith("n") for c in found.explainer.columns_[:2])
    assert len(found.examples) == 2 and 0 <= found.flips <= 1 and found.as_dict()["columns"]
    with pytest.raises(DataError, match="too few"):
        explain_table(frame.iloc[:30], "label")
    with pytest.raises(InputError, match="black_box"):
        explain_table(frame, "label", black_box="pickle")
    for bad in ({"examples": -1}, {"min_support": -0.1}, {"min_support": 1.5}, {"random_state": -1}, {"test": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            explain_table(frame, "label", **bad)


def test_black_box_surrogate_and_measure_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box that repeats the labels of its own rows: the surrogate sees none of them."""
    import salience.features.table_explanation as made

    class Box(RandomForestClassifier):
        def fit(self, X, y):
            seen["box"] = set(X[:, 0])
            return super().fit(X, y)

    seen: dict[str, set] = {}
    x, y = world(200, noise=2)
    monkeypatch.setattr(made, "_black_box", lambda name, seed: Box(20, random_state=seed))
    found = explain_table(pd.DataFrame(x, columns=list("abcdefgh")).assign(y=y), "y")
    seen["surrogate"] = set(found.explainer.rows_[:, 0])
    held = {x[row, 0] for row, _ in found.examples}
    assert not seen["box"] & seen["surrogate"] and not held & (seen["box"] | seen["surrogate"])
    assert found.train_rows + found.fresh_rows + found.test_rows == 200


def test_one_lucky_draw_of_random_columns_is_in_the_interval() -> None:
    """Ten draws that differ widely: the interval is wider than that of their mean."""
    x, y = world(400, noise=2)
    frame = pd.DataFrame(x, columns=list("abcdefgh")).assign(y=y)
    gain = explain_table(frame, "y", k=2).gains[0]
    assert gain.difference > 0 and gain.low < 0  # one draw in four holds the column that decides


def test_noise_alone_is_told_plainly() -> None:
    rng = np.random.default_rng(1)
    table = {f"n{i}": rng.normal(size=300) for i in range(8)} | {"y": rng.integers(0, 2, 300)}
    found = explain_table(table, "y", k=8)
    assert not found.better and "no better than random columns here" in found.verdict


@pytest.mark.realdata
def test_adult_income(tmp_path) -> None:
    import os
    from pathlib import Path

    file = Path(os.environ.get("SALIENCE_DATA", "")) / "adult" / "adult-train.csv"
    if not os.environ.get("SALIENCE_DATA") or not file.exists():
        pytest.skip("SALIENCE_DATA names no folder with adult/adult-train.csv")
    frame = pd.read_csv(file, header=None, skipinitialspace=True).sample(4000, random_state=0)
    frame.columns = [f"c{i}" for i in range(frame.shape[1])]
    found = explain_table(frame, "c14", examples=1)
    assert found.better and found.agreement > 0.85
    names = {found.explainer.names_[c] for c in found.explainer.order_[:12]}
    assert names & {"c4", "c10", "c0"} and any(name.startswith(("c5=", "c7=")) for name in names)
