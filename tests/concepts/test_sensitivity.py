"""Sobol indices: closed forms, SciPy's estimator, the authors' figures on a stored design, what designs are made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import sobol_indices

from salience.concepts import sobol_design, sobol_total, total_indices
from salience.concepts.sensitivity import ESTIMATORS
from salience.errors import InputError

STORED = json.loads((Path(__file__).parent / "sobol_reference.json").read_text())


def ishigami(masks, a=7.0, b=0.1):
    x = np.pi * (2 * masks - 1)
    return np.sin(x[:, 0]) + a * np.sin(x[:, 1]) ** 2 + b * x[:, 2] ** 4 * np.sin(x[:, 0])


def ishigami_totals(a=7.0, b=0.1):
    """The closed form."""
    first = 0.5 * (1 + b * np.pi**4 / 5) ** 2
    both = b**2 * np.pi**8 * (1 / 18 - 1 / 50)
    whole = first + both + a**2 / 8
    return np.array([first + both, a**2 / 8, both]) / whole


def test_the_closed_form_is_the_one_in_books():
    np.testing.assert_allclose(ishigami_totals(), [0.5576, 0.4424, 0.2437], atol=1e-4)


@pytest.mark.parametrize("sampler", ["halton", "sobol", "lhs"])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_ishigami(estimator, sampler):
    found = sobol_total(ishigami, 3, 4096 if sampler == "lhs" else 1024, estimator=estimator, sampler=sampler)
    np.testing.assert_allclose(found, ishigami_totals(), atol=0.1 if sampler == "lhs" else 0.05)


def test_few_points_tell_the_order_of_plain_functions():
    found = sobol_total(lambda m: 3 * m[:, 0] + 2 * m[:, 1] + m[:, 2], 3, 32)
    assert list(np.argsort(-found)) == [0, 1, 2]


def test_an_additive_function_has_shares_of_the_squares():
    weights = np.array([3.0, -2.0, 1.0, 0.0])
    found = sobol_total(lambda m: m @ weights, 4, 8192, random_state=0)
    np.testing.assert_allclose(found, weights**2 / (weights**2).sum(), atol=0.01)
    assert found[3] == 0


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_the_authors_figures_on_a_stored_design(estimator):
    found = total_indices(STORED["outputs"], STORED["n_dims"], estimator)
    np.testing.assert_allclose(found, STORED["totals"][estimator], atol=1e-6)


def test_scipys_estimator_agrees():
    design = sobol_design(5, 64)
    values = np.exp(design @ np.array([1.0, 0.5, -1.0, 0.0, 2.0])) * (1 + design[:, 0] * design[:, 4])
    a, b = values[:64], values[64:128]
    theirs = sobol_indices(func={"f_A": a[None], "f_B": b[None], "f_AB": values[128:].reshape(5, 1, 64)}, n=64)
    ratio = np.var([a, b]) / np.var(a, ddof=1)  # theirs is the variance over both blocks
    np.testing.assert_allclose(total_indices(values, 5), theirs.total_order * ratio, atol=1e-12)


def test_a_design_has_its_blocks():
    design = sobol_design(3, 8)
    assert design.shape == (8 * 5, 3) and design.min() >= 0 and design.max() < 1
    a, b, c = design[:8], design[8:16], design[16:].reshape(3, 8, 3)
    np.testing.assert_array_equal(a[:3, 0], [0, 0.5, 0.25])  # the plain Halton sequence in base 2, as the authors'
    for i in range(3):
        np.testing.assert_array_equal(c[i, :, i], b[:, i])
        np.testing.assert_array_equal(np.delete(c[i], i, 1), np.delete(a, i, 1))
    assert not np.array_equal(design, sobol_design(3, 8, random_state=1))
    np.testing.assert_array_equal(sobol_design(3, 8, random_state=1), sobol_design(3, 8, random_state=1))


def test_functions_side_by_side():
    design = sobol_design(2, 16)
    values = np.stack([design @ [1.0, 2.0], design @ [2.0, 1.0]])
    both = total_indices(values, 2)
    np.testing.assert_allclose(both[0], total_indices(values[0], 2))
    np.testing.assert_allclose(both[1], total_indices(values[1], 2))


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_what_does_not_vary_has_no_index(estimator):
    with pytest.warns(UserWarning, match="1 of 1 functions do not vary"):
        assert not sobol_total(lambda m: np.full(len(m), 1e6), 4, 8, estimator=estimator).any()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"n_dims": 0, "n_design": 8}, "n_dims"),
        ({"n_dims": 2, "n_design": 1}, "n_design"),
        ({"n_dims": 2, "n_design": 8, "sampler": "haltom"}, "'halton'"),
        ({"n_dims": 2, "n_design": 8, "estimator": "jansenn"}, "'jansen'"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        sobol_total(lambda m: m[:, 0], **arguments)


def test_outputs_that_do_not_fit():
    with pytest.raises(InputError, match="rows"):
        total_indices(np.ones(15), 2)
    with pytest.raises(InputError, match="NaN"):
        total_indices(np.full(16, np.nan), 2)
