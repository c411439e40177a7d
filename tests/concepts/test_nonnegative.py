"""Factorisation against scikit-learn, least squares against SciPy, its derivative against finite differences."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import nnls as scipy_nnls
from sklearn.decomposition import NMF

from salience.concepts import nmf, nnls
from salience.concepts.nonnegative import _ROWS
from salience.errors import DataError, InputError


def parts(n: int = 120, p: int = 30, k: int = 5, noise: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random((n, k)) * (rng.random((n, k)) < 0.4)) @ rng.random((k, p)) + noise * rng.random((n, p))


def sklearn_nmf(a: np.ndarray, k: int, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NMF(k, max_iter=options.pop("max_iter", 200), tol=options.pop("tol", 1e-4))
        return model.fit_transform(a, **options), model


# Factorisation ---------------------------------------------------------------------------------------------------


def test_from_the_same_beginning_it_is_scikit_learns():
    a, rng = parts(), np.random.default_rng(1)
    u, v = rng.random((120, 4)), rng.random((4, 30))
    found = nmf(torch.from_numpy(a), 4, init=(torch.from_numpy(u), torch.from_numpy(v)), max_iter=25, tol=0)
    theirs = NMF(4, init="custom", max_iter=25, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = theirs.fit_transform(a, W=u.copy(), H=v.copy())
    np.testing.assert_allclose(found.codes.numpy(), codes, atol=1e-10)
    np.testing.assert_allclose(found.dictionary.numpy(), theirs.components_, atol=1e-10)
    assert found.relative_error == pytest.approx(theirs.reconstruction_err_ / np.linalg.norm(a), rel=1e-9)
    assert found.n_iter == 25


@pytest.mark.parametrize("k", [1, 5, 12])
def test_its_own_beginning_is_as_good(k):
    a = parts()
    ours = np.mean([nmf(a, k, random_state=seed).relative_error for seed in range(4)])  # 12 fit noise: many optima
    _, theirs = sklearn_nmf(a, k)
    assert ours <= 1.01 * theirs.reconstruction_err_ / np.linalg.norm(a)


def test_an_exact_product_is_found():
    a = parts(noise=0.0)
    found = nmf(a, 5, max_iter=2000, tol=1e-9)
    assert found.relative_error < 1e-3
    assert float(found.codes.min()) >= 0 and float(found.dictionary.min()) >= 0


def test_rows_in_blocks_from_disk_are_the_same(tmp_path, monkeypatch):
    a = parts(n=100)
    whole = nmf(a, 3)
    np.save(tmp_path / "a.npy", a)
    monkeypatch.setattr("salience.concepts.nonnegative._ROWS", 17)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    blocks = nmf(mapped, 3)
    np.testing.assert_allclose(blocks.codes, whole.codes, atol=1e-9)
    assert _ROWS > 100 and blocks.n_iter == whole.n_iter


def test_it_reads_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr("salience.concepts.nonnegative._ROWS", 16)

    class Watched:
        ndim, dtype, shape = 2, np.dtype("float64"), (100, 30)
        largest = 0
        whole = parts(n=100)

        def __len__(self):
            return 100

        def __getitem__(self, rows):
            self.largest = max(self.largest, rows.stop - (rows.start or 0))
            return self.whole[rows]

    watched = Watched()
    found = nmf(watched, 3)
    assert watched.largest == 16
    np.testing.assert_allclose(found.codes, nmf(watched.whole, 3).codes, atol=1e-9)


def test_float32_and_the_seed():
    a = torch.from_numpy(parts()).float()
    first, again, other = nmf(a, 4, random_state=1), nmf(a, 4, random_state=1), nmf(a, 4, random_state=2)
    assert first.codes.dtype == torch.float32 and torch.equal(first.codes, again.codes)
    assert other.relative_error == pytest.approx(first.relative_error, rel=0.01)


def test_a_channel_and_a_row_of_zeros():
    a = parts()
    a[:, 3], a[7] = 0, 0
    found = nmf(a, 4)
    assert bool(torch.isfinite(found.codes).all()) and float(found.dictionary[:, 3].max()) == 0
    assert nmf(np.zeros((5, 4)), 2).relative_error == 0


@pytest.mark.parametrize(
    "a, k, error, said",
    [
        (np.full((4, 3), -1.0), 2, DataError, "ReLU"),
        (np.array([[1.0, 2.0], [np.nan, 1.0]]), 1, DataError, "row 1"),
        (np.ones((4, 3)), 4, InputError, "1..3"),
        (np.ones((4, 3)), 0, InputError, "n_concepts"),
        (np.ones((4, 3), int), 2, InputError, "floats"),
        (np.ones(4), 1, InputError, "matrix"),
        (np.ones((0, 3)), 1, InputError, "matrix"),
    ],
)
def test_what_cannot_be_factorised(a, k, error, said):
    with pytest.raises(error, match=said):
        nmf(a, k)


def test_an_init_that_does_not_fit():
    with pytest.raises(InputError, match="init"):
        nmf(parts(), 2, init=(torch.ones(120, 3), torch.ones(3, 30)))
    with pytest.raises(InputError, match="init"):
        nmf(parts(), 2, init=(torch.ones(120, 2), -torch.ones(2, 30)))


# Least squares ---------------------------------------------------------------------------------------------------


def problem(n: int = 60, k: int = 8, p: int = 20):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(n, p, generator=generator, dtype=torch.float64) - 0.25
    return a, torch.rand(k, p, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 8, 20])
def test_codes_are_scipys(k):
    a, v = problem(k=k)
    theirs = np.array([scipy_nnls(v.numpy().T, row)[0] for row in a.numpy()])
    np.testing.assert_allclose(nnls(a, v).numpy(), theirs, atol=1e-9)
    assert k == 1 or (theirs == 0).mean() > 0.2  # or nothing was non-negative about it


def test_codes_of_dependent_concepts_fit_as_well():
    a, v = problem(k=3)
    v = torch.cat([v, v, torch.zeros(1, 20, dtype=v.dtype)])
    codes = nnls(a, v)
    best = [scipy_nnls(v.numpy().T, row)[1] for row in a.numpy()]
    np.testing.assert_allclose((a - codes @ v).norm(dim=1).numpy(), best, atol=1e-5)
    assert float(codes.min()) >= 0 and float(codes[:, -1].abs().max()) == 0


def test_activations_of_zeros_and_none():
    _, v = problem()
    assert float(nnls(torch.zeros(3, 20, dtype=v.dtype), v).abs().max()) == 0
    assert nnls(torch.zeros(0, 20, dtype=v.dtype), v).shape == (0, 8)


def test_the_jacobian_is_that_of_finite_differences():
    a, v = problem(n=12)
    jacobian = torch.autograd.functional.jacobian(lambda x: nnls(x, v).sum(0), a).movedim(1, 0)
    step = 1e-6
    for row, ours in zip(a, jacobian, strict=True):
        moved = step * torch.eye(20, dtype=a.dtype)
        numeric = (nnls(row + moved, v) - nnls(row - moved, v)).T / (2 * step)
        assert float((ours - numeric).norm() / numeric.norm()) < 1e-5
        active = nnls(row[None], v)[0] > 0
        assert float(ours[~active].abs().max()) == 0  # where a code is 0 it stays 0
        closed = torch.linalg.solve(v[active] @ v[active].T, v[active])
        torch.testing.assert_close(ours[active], closed)
        # what a shortcut would give
        assert float((torch.linalg.pinv(v).T - numeric).norm() / numeric.norm()) > 0.1


def test_gradients_flow_through_and_stop_at_the_dictionary():
    a, v = problem(n=5)
    assert torch.autograd.gradcheck(lambda x: nnls(x, v), (a.clone().requires_grad_(),))
    with pytest.raises(InputError, match="detach"):
        nnls(a, v.clone().requires_grad_())


def test_float32_comes_back_as_such():
    a, v = problem()
    codes = nnls(a.float(), v.float())
    assert codes.dtype == torch.float32
    np.testing.assert_allclose(codes.numpy(), nnls(a, v).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "a, v, said", [((4, 3), (2, 4), "must be"), ((4,), (2, 4), "must be"), ((4, 3), (2, 3), "NaN")]
)
def test_what_least_squares_refuse(a, v, said):
    with pytest.raises(InputError, match=said):
        nnls(torch.full(a, torch.nan), torch.ones(v))
