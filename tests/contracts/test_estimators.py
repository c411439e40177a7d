"""scikit-learn's contract, for every entry of the catalogue (and every baseline) that is one of its estimators."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from salience.data import HeuristicClassifier
from salience.errors import MissingExtra
from salience.papers import load
from tiny import build

RAW = ["the cat sat on the mat and saw a dog"] * 8 + [f"def add{n}(a, b): return a + b" for n in range(8)]
TARGET = ["def sub(a, b): return a - b", "def mul(a, b): return a * b"]

_RNG = np.random.default_rng(0)
NUMBERS = _RNG.integers(0, 9, (60, 4)), _RNG.integers(0, 2, 60)


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A small network before and after fine-tuning."""
    torch.manual_seed(0)
    return tuple(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)) for _ in range(2))


PATCHES = (
    torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(1)),
    torch.rand(8, 5, generator=torch.Generator().manual_seed(2)),
)
PICTURES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))

# How each estimator is fitted on something small, and what it chooses then: entry -> (parameters, fit, result).
TABLE = np.random.default_rng(0).normal(size=(80, 4))
LABELS = (TABLE[:, 0] > 0).astype(float)
GOLD = np.where(np.arange(80) % 2 == 0, LABELS, np.nan)


def first_or_second(rows: np.ndarray) -> np.ndarray:
    """A black box that two columns decide alike, so that chance decides their order."""
    chance = 1 / (1 + np.exp(-3 * (rows[:, 0] + rows[:, 1])))
    return np.column_stack([1 - chance, chance])


FITS = {
    "salience.trust:DSL": (
        {"model": "lm", "splits": 2, "assume_random": True},
        lambda model: model.fit(TABLE[:, 1:2], GOLD, LABELS, W=TABLE),
        lambda model: model.conf_int(),
    ),
    "salience.features:HighDimExplainer": (
        {"black_box": first_or_second, "k": 2, "probe_rows": 40},
        lambda model: model.fit(TABLE),
        lambda model: (model.predict(TABLE), model.importance_.scores["sensitivity"])[1],
    ),
    "salience.data:DSIR": (
        {"num_buckets": 200, "min_tokens": 1, "workers": 1, "smoothing": 1.0},
        lambda model: model.fit(RAW, TARGET),
        lambda model: model.select(RAW, 5),
    ),
    "salience.data:LinearMTRL": (
        {"rank": 2},
        lambda model: model.fit([(TABLE[:40], LABELS[:40]), (TABLE[40:], TABLE[40:, 1])]).fit_target(TABLE, LABELS),
        lambda model: model.predict(TABLE),
    ),
    "salience.data:GAIS": (
        {"epochs": 2, "hidden": 4, "reduction": 0.8},
        lambda model: model.fit(TABLE, LABELS),
        lambda model: model.select(),
    ),
    "salience.concepts:Craft": (
        {"layer": "relu2", "n_concepts": 3, "patch_size": 8, "crops": "random", "crops_per_image": 4},
        lambda model: model.fit(build("plain"), PICTURES),
        lambda model: (model.transform(PICTURES[:1]), model.components_.numpy())[1],
    ),
    "salience.concepts:PACE": (
        {"n_concepts": 3, "max_iter": 2},
        lambda model: model.fit(PATCHES[0], PATCHES[1], PATCHES[1][:, :2].softmax(1)),
        lambda model: model.transform(*PATCHES).numpy(),
    ),
    "salience.data:KMQSelector": (
        {"n_clusters": 4},
        lambda model: model.fit(TABLE),
        lambda model: model.select(20),
    ),
    "salience.data:RCALHead": (
        {"neighbors": 5},
        lambda model: model.fit(TABLE, LABELS),
        lambda model: model.predict_proba(TABLE),
    ),
    "salience.weights:DeltaPruner": (
        {"rate": 0.5, "rescale": "global", "exclude": ()},
        lambda model: model.fit(*networks(), batches=[torch.ones(4, 3)]),
        lambda model: model.transform()["0.weight"].to_dense().numpy(),
    ),
    "salience.data:HeuristicClassifier": (
        {"num_buckets": 200},
        lambda model: model.fit(RAW, TARGET),
        lambda model: model.select(RAW, 5),
    ),
    "salience.features:OutRankSelector": (
        {"bins": 4, "batch_rows": 20},
        lambda model: model.fit(*NUMBERS),
        lambda model: check_is_fitted(model) or model.scores_,
    ),
}

# Concept extractors are fitted and asked alike; principal components draw nothing.
ACTIVATIONS = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))
FITS |= {
    f"salience.concepts:{name}Concepts": (
        {"n_concepts": 3, **more},
        lambda model: model.fit(ACTIVATIONS),
        lambda model: (model.encode(ACTIVATIONS[:5]), model.components_.numpy())[1],
    )
    for name, more in {
        "KMeans": {}, "PCA": {}, "NMF": {}, "SemiNMF": {}, "Random": {}, "SAE": {"steps": 20},
    }.items()
}  # fmt: skip


def estimators() -> list[str]:
    found = ["salience.data:HeuristicClassifier"]  # a baseline: no row of its own in the catalogue
    for paper in load().values():
        for entry in paper.entry:
            module, name = entry.split(":")
            try:
                kind = getattr(importlib.import_module(module), name)
            except MissingExtra:
                continue
            if inspect.isclass(kind) and hasattr(kind, "get_params"):
                found.append(entry)
    return found


@pytest.fixture(params=estimators())
def case(request: pytest.FixtureRequest):
    assert request.param in FITS, f"tell tests/contracts/test_estimators.py how to fit {request.param}"
    module, name = request.param.split(":")
    return getattr(importlib.import_module(module), name), *FITS[request.param]


def test_the_catalogue_has_estimators() -> None:
    assert "salience.data:DSIR" in estimators()
    assert isinstance(HeuristicClassifier(), BaseEstimator)


def test_init_only_stores_its_keyword_parameters(case) -> None:
    """Whatever comes is kept as it is, unchecked: `clone` and `set_params` rely on that."""
    kind = case[0]
    parameters = [p for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    odd = {p.name: object() for p in parameters}
    model = kind(**odd)
    assert vars(model) == odd and model.get_params() == odd
    assert all(model.get_params()[name] is value for name, value in odd.items())


def test_get_and_set_params_and_clone(case) -> None:
    kind, parameters, fit, _ = case
    model = kind(**parameters)
    assert kind().set_params(**parameters).get_params() == model.get_params()
    with pytest.raises(ValueError, match="Invalid parameter"):
        model.set_params(no_such_parameter=1)
    fitted = fit(model)
    copy = clone(fitted)
    assert copy is not fitted and copy.get_params() == fitted.get_params() and vars(copy) == parameters_of(copy)
    assert f"{kind.__name__}(" in repr(model)


def parameters_of(model: BaseEstimator) -> dict[str, object]:
    return model.get_params(deep=False)


def test_fit_returns_itself_keeps_parameters_and_adds_only_trailing_underscores(case) -> None:
    kind, parameters, fit, _ = case
    model = kind(**parameters)
    before = dict(model.get_params())
    assert fit(model) is model and model.get_params() == before
    learned = set(vars(model)) - set(before)
    assert learned and all(name.endswith("_") and not name.startswith("_") for name in learned)


def test_nothing_is_given_before_fit(case) -> None:
    kind, parameters, _, result = case
    with pytest.raises(NotFittedError):
        result(kind(**parameters))


def test_random_state_decides(case) -> None:
    kind, parameters, fit, result = case
    if "random_state" not in inspect.signature(kind.__init__).parameters:
        pytest.skip("draws nothing")
    results = [result(fit(kind(**parameters, random_state=seed))) for seed in (0, 0, 1, 2, 3)]
    np.testing.assert_array_equal(results[0], results[1])
    assert any(not np.array_equal(results[0], other) for other in results[2:])
    again = kind(**parameters, random_state=0)
    np.testing.assert_array_equal(result(fit(fit(again))), results[0])  # a second fit starts afresh
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    result(fit(again))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # the global generator is left alone
