"""Detection measures: parity with scikit-learn and torchmetrics, hand-worked ties, OSCR's identities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from salience.errors import InputError
from salience.measure import aupr, auroc, detection_report, fpr_at_tpr, oscr

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=30).map(lambda v: np.array(v, dtype=float))


def labelled(positive, negative):
    return np.repeat([1, 0], [len(positive), len(negative)]), np.concatenate([positive, negative])


@given(scores, scores)
def test_parity_with_sklearn_under_ties(positive, negative):
    y, s = labelled(positive, negative)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(y, s))
    assert aupr(positive, negative) == pytest.approx(average_precision_score(y, s))
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
    assert fpr_at_tpr(positive, negative) == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)])


def test_parity_with_torchmetrics():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 200), rng.normal(0, 1, 300)
    y, s = labelled(positive, negative)
    s = torch.sigmoid(torch.from_numpy(s))
    assert auroc(positive, negative) == pytest.approx(float(binary_auroc(s, torch.from_numpy(y))), abs=1e-6)
    theirs = float(binary_average_precision(s, torch.from_numpy(y)))
    assert aupr(positive, negative) == pytest.approx(theirs, abs=1e-6)


@given(scores, scores, st.randoms(use_true_random=False))
def test_invariances(positive, negative, random):
    shuffled = list(positive)
    random.shuffle(shuffled)
    assert auroc(shuffled, negative) == auroc(positive, negative)
    assert auroc(np.exp(positive), np.exp(negative)) == pytest.approx(auroc(positive, negative))
    assert auroc(negative, positive) == pytest.approx(1 - auroc(positive, negative))
    assert 0 <= fpr_at_tpr(positive, negative) <= 1


def test_fpr_by_hand():
    positive = np.arange(1, 21)  # 95 % of 20 are 19: the threshold is 2
    assert fpr_at_tpr(positive, [0, 1, 2, 2, 30]) == pytest.approx(3 / 5)
    assert fpr_at_tpr(positive, [0, 1, 2, 2, 30], tpr=1.0) == pytest.approx(4 / 5)
    assert fpr_at_tpr([1, 1, 1, 2], [1, 0], tpr=0.25) == 0
    assert fpr_at_tpr([1, 1, 1, 2], [1, 0], tpr=0.5) == 0.5  # the three tied ones come together


def test_report_covers_both_ways():
    known, unknown = np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0])
    report = detection_report(known, unknown)
    assert report.auroc == pytest.approx((2 + 1.5 + 1) / 6)
    # unknown as positive, lowest score first: 0 (hit), 1 (miss), then 2 and 2 together
    assert report.aupr_unknown == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert report.aupr_known == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 4)
    assert report.fpr95 == pytest.approx(0.5)


def test_oscr_by_hand():
    result = oscr([4, 3, 2, 1], [True, False, True, True], [3, 0])
    # thresholds 4, 3, 2, 1, 0
    np.testing.assert_allclose(result.fpr, [0, 0, 0.5, 0.5, 0.5, 1])
    np.testing.assert_allclose(result.ccr, [0, 0.25, 0.25, 0.5, 0.75, 0.75])
    assert result.area == pytest.approx(0.5 * 0.25 + 0.5 * 0.75)


@given(scores, scores, st.data())
def test_oscr_identities(known, unknown, data):
    correct = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    result = oscr(known, correct, unknown)
    assert oscr(known, np.ones(len(known), bool), unknown).area == pytest.approx(auroc(known, unknown))
    assert result.area <= min(auroc(known, unknown), correct.mean()) + 1e-12
    assert (result.fpr[0], result.ccr[0], result.fpr[-1]) == (0, 0, 1)
    assert result.ccr[-1] == pytest.approx(correct.mean())
    order = np.argsort(-known, kind="stable")
    assert oscr(known[order], correct[order], unknown[::-1]).area == pytest.approx(result.area)


@pytest.mark.parametrize("measure", [auroc, aupr, fpr_at_tpr])
@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ([], [1.0], "positive must not be empty"),
        ([1.0], [], "negative must not be empty"),
        ([1.0, np.nan], [1.0], r"positive must be finite; 1 of 2 values .* index 1"),
        ([1.0], [np.inf], "negative must be finite"),
        ([[1.0]], [1.0], r"positive must have shape \(n,\)"),
        (["a"], [1.0], "positive must be an array of numbers"),
    ],
)
def test_bad_input(measure, positive, negative, message):
    with pytest.raises(InputError, match=message):
        measure(positive, negative)


def test_bad_options():
    with pytest.raises(InputError, match="tpr must lie in"):
        fpr_at_tpr([1.0], [0.0], tpr=95.0)
    with pytest.raises(InputError, match=r"correct must have shape \(2,\)"):
        oscr([1.0, 2.0], [True], [0.0])
    with pytest.raises(InputError, match="correct must hold only True and False"):
        oscr([1.0, 2.0], [0.5, 1.0], [0.0])
    with pytest.raises(InputError, match="unknown must be finite"):
        oscr([1.0], [True], [np.nan])
