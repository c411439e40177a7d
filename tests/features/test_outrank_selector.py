"""OutRank as a selector of scikit-learn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from salience.errors import InputError
from salience.features import OutRankSelector, ca_mutual_info


@parametrize_with_checks([OutRankSelector(), OutRankSelector(n_features_to_select=1)])
def test_the_contract_of_scikit_learn(estimator, check) -> None:
    check(estimator)


def test_it_keeps_what_tells_and_drops_ids() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    weak = y ^ (rng.random(4000) < 0.4)
    X = np.stack([rng.integers(0, 500, 4000), weak, rng.integers(0, 2, 4000), np.arange(4000)], axis=1)
    found = OutRankSelector(n_features_to_select=1, bins=4000).fit(X, y)  # ids stay ids
    assert found.get_support().tolist() == [False, True, False, False]
    assert np.argmax(found.plain_) == 3 and found.plain_[0] > found.plain_[1]  # what plain information falls for
    assert found.scores_[3] == pytest.approx(0, abs=1e-12)


def test_one_batch_is_the_score_of_all_rows_in_the_drawn_order() -> None:
    rng = np.random.default_rng(1)
    X, y = rng.integers(0, 9, (300, 3)), rng.integers(0, 3, 300)
    X[:, 1] = (X[:, 1] + y) % 4
    order = np.random.RandomState(7).permutation(300)
    found = OutRankSelector(random_state=7, shifts=3).fit(X, y)
    expected = [ca_mutual_info(X[order, at], y[order], shifts=3) for at in range(3)]
    np.testing.assert_allclose(found.scores_, expected, atol=1e-12)


def test_frames_text_missing_values_and_numbers_as_target() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=600)
    frame = pd.DataFrame({
        "noise": rng.normal(size=600), "sign": np.where(y > 0, "up", "down"), "gap": np.where(y > 1, np.nan, 1.0),
    })  # fmt: skip
    frame.loc[3, "sign"] = None
    found = OutRankSelector(n_features_to_select=2).fit(frame, y)
    assert list(found.get_feature_names_out()) == ["sign", "gap"]
    assert found.scores_[1] == pytest.approx(np.log(2), abs=0.1)


def test_it_works_in_a_pipeline() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    rng = np.random.default_rng(0)
    X = np.hstack([X, rng.integers(0, 284, (569, 10))])
    pipe = make_pipeline(OutRankSelector(n_features_to_select=10), LogisticRegression(max_iter=5000)).fit(X, y)
    assert not pipe[0].get_support()[30:].any() and pipe.score(X, y) > 0.9


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"n_features_to_select": 0}, "n_features_to_select must be None or in 1..2, not 0"),
        ({"n_features_to_select": 3}, "1..2, not 3"),
        ({"bins": 1}, "bins must be a whole number of at least 2"),
        ({"batch_rows": 1.5}, "batch_rows must be"),
        ({"shifts": 0}, "shifts must be"),
    ],
)
def test_parameters_out_of_range(parameters: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OutRankSelector(**parameters).fit(np.eye(4)[:, :2], [0, 1, 0, 1])
