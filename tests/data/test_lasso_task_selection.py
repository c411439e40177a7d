"""Relevance of source tasks by hand and against other solvers, budgets, the linear class, the active loop."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.optimize import linprog
from sklearn.linear_model import Lasso, lars_path

from salience.data import LinearMTRL, active_mtrl, allocate_samples, task_relevance
from salience.data.lasso_task_selection.active import relevance_of
from salience.errors import DataError, InputError


def heads(seed: int, rank: int = 4, tasks: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(rank, tasks))
    W /= np.linalg.norm(W, axis=0)
    return W, W[:, :3] @ [0.5, -0.3, 0.8]


class World:
    """Linear tasks whose heads are known."""

    def __init__(self, seed: int = 0, tasks: int = 6, width: int = 8, rank: int = 2, noise: float = 0.1) -> None:
        self.rng = np.random.default_rng(seed)
        self.B = np.linalg.qr(self.rng.normal(size=(width, rank)))[0]
        self.W = self.rng.normal(size=(rank, tasks))
        self.W /= np.linalg.norm(self.W, axis=0)  # a longer head would be the better source
        self.noise, self.asked = noise, []

    def rows(self, head: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        X = self.rng.normal(size=(count, len(self.B)))
        return X, X @ self.B @ head + self.noise * self.rng.normal(size=count)

    def sampler(self, counts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        self.asked.append(counts.tolist())
        return [self.rows(head, int(n)) for head, n in zip(self.W.T, counts)]


# Relevance.


def test_the_shortest_way_in_each_norm_by_hand() -> None:
    """Sources along x, y and the diagonal; the diagonal alone is the sparse way to (1, 1), all three the shortest."""
    W = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    sparse, dense = task_relevance(W, [1.0, 1.0]), task_relevance(W, [1.0, 1.0], norm="l2")
    np.testing.assert_allclose(sparse.nu, [0, 0, 1], atol=1e-9)
    np.testing.assert_allclose(dense.nu, [1 / 3, 1 / 3, 2 / 3])  # W'(WW')^-1 w with WW' = [[2, 1], [1, 2]]
    assert sparse.residual < 1e-9 and dense.residual < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_exact_relevance_meets_a_plain_linear_program_and_is_sparse(seed: int) -> None:
    W, w = heads(seed)
    found = task_relevance(W, w)
    program = linprog(np.ones(24), A_eq=np.hstack([W, -W]), b_eq=w, method="highs")
    assert np.abs(found.nu).sum() == pytest.approx(program.fun)
    assert (np.abs(found.nu) > 1e-9).sum() <= len(W)  # a vertex
    least = task_relevance(W, w, norm="l2").nu
    np.testing.assert_allclose(least, np.linalg.pinv(W) @ w)
    assert np.linalg.norm(least) <= np.linalg.norm(found.nu) and np.abs(found.nu).sum() <= np.abs(least).sum()


def test_the_lasso_is_scikit_learns_and_goes_to_the_exact_solution() -> None:
    W, w = heads(1)
    gaps = []
    for lam in (0.1, 0.01, 0.001):
        found = task_relevance(W, w, lam=lam)
        other = Lasso(alpha=lam / 4, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(W, w).coef_
        np.testing.assert_allclose(found.nu, other, atol=1e-7)
        correlations = W.T @ (w - W @ found.nu)  # optimality: lam sign(nu) on the support, smaller elsewhere
        support = np.abs(found.nu) > 1e-9
        np.testing.assert_allclose(correlations[support], lam * np.sign(found.nu[support]), atol=1e-6)
        assert (np.abs(correlations) <= lam + 1e-6).all()
        gaps.append(np.abs(found.nu - task_relevance(W, w).nu).sum())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.01


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_the_penalty_of_a_noise_leaves_just_that_residual(noise: float) -> None:
    W, w = heads(2)
    found = task_relevance(W, w, noise=noise)
    assert found.residual == pytest.approx(noise)
    np.testing.assert_allclose(found.nu, task_relevance(W, w, lam=found.lam).nu, atol=1e-7)
    alphas = lars_path(W, w, method="lasso")[0] * len(w)
    assert alphas[-1] <= found.lam <= alphas[0]


def test_noise_beyond_the_target_leaves_nothing_and_none_all() -> None:
    W, w = heads(2)
    assert not task_relevance(W, w, noise=2 * np.linalg.norm(w)).nu.any()
    np.testing.assert_allclose(task_relevance(W, w, noise=0.0).nu, task_relevance(W, w).nu)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_relevance_follows_the_scale_of_the_target(scale: float) -> None:
    W, w = heads(3)
    base = task_relevance(W, w, lam=0.01).nu
    np.testing.assert_allclose(task_relevance(W, scale * w, lam=scale * 0.01).nu, scale * base, rtol=1e-6)
    exact = task_relevance(scale * W, w)
    np.testing.assert_allclose(exact.nu, task_relevance(W, w).nu / scale, rtol=1e-6, atol=1e-9 / scale)


def test_a_target_outside_the_span_is_told() -> None:
    W = np.array([[1.0, 2.0], [0.0, 0.0]])
    found = task_relevance(W, [3.0, 4.0])
    np.testing.assert_allclose(W @ found.nu, [3.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(found.nu, [0.0, 1.5])  # the longer head takes less
    assert found.residual == pytest.approx(4.0)
    assert task_relevance(np.zeros((2, 3)), [1.0, 0.0]).residual == pytest.approx(1.0)


def test_one_source_and_two_that_are_equal() -> None:
    assert task_relevance([[2.0], [0.0]], [4.0, 0.0]).nu == pytest.approx([2.0])
    twins = task_relevance([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0]).nu
    assert np.abs(twins).sum() == pytest.approx(1.0) and (twins > 1e-9).sum() == 1


def test_a_dear_source_is_left_where_another_does_as_well() -> None:
    W = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    cheap = task_relevance(W, [1.0, 1.0], costs=[1, 1, 9])  # sqrt(9) = 3 > 1 + 1
    np.testing.assert_allclose(cheap.nu, [1, 1, 0], atol=1e-9)
    np.testing.assert_allclose(task_relevance(W, [1.0, 1.0], costs=[1, 1, 3]).nu, [0, 0, 1], atol=1e-9)


# Budgets.


def test_shares_by_hand() -> None:
    assert allocate_samples([3, -1], 100).tolist() == [75, 25]
    assert allocate_samples([3, -1], 100, power=2).tolist() == [90, 10]
    assert allocate_samples([3, -1, 0], 99, power=0).tolist() == [33, 33, 33]
    assert allocate_samples([3, 1, 0], 100, floor=10).tolist() == [68, 22, 10]  # 90 by 3 to 1: 67.5 and 22.5
    assert allocate_samples([1, 1], 100, costs=[1, 4]).tolist() == [36, 16]  # 2 to 1: 33 + 4 * 16 = 97, and 3 are left
    assert allocate_samples([3, 2, 1], 100, top=2).tolist() == [60, 40, 0]
    assert allocate_samples([3, 1, 0], 120, opening=10).tolist() == [75, 25, 0]  # two are opened for 20
    with pytest.warns(UserWarning, match="50 of the budget of 100 go to tasks of relevance 0"):
        assert allocate_samples([1, 1, 0], 100, pools=[20, 30, 70]).tolist() == [20, 30, 50]


@pytest.mark.parametrize("seed", range(20))
def test_no_budget_is_lost_by_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nu = rng.normal(size=17) * (rng.random(17) < 0.6)
    nu[0] = 1.0
    floor, pools = rng.integers(0, 5, 17), rng.integers(40, 400, 17)
    got = allocate_samples(nu, 700, floor=floor, pools=pools, power=float(rng.integers(0, 3)))
    assert got.sum() == 700 and (got >= floor).all() and (got <= pools).all() and got.dtype == np.int64
    prices = rng.uniform(0.5, 3, 17)
    paid = allocate_samples(nu, 700, costs=prices)
    assert 700 - prices[nu != 0].min() < prices @ paid <= 700 + 1e-6


def test_l1_shares_have_the_least_error_of_all() -> None:
    """sum nu^2 / n, at its bound ||nu||_1^2 / N and below that of 2,000 other ways to spend the same."""
    W, w = heads(4)
    nu = task_relevance(W, w).nu
    used = np.flatnonzero(np.abs(nu) > 1e-9)

    def error(samples: np.ndarray, of: np.ndarray) -> float:
        return float((of[used] ** 2 / samples[used]).sum())

    ours = error(allocate_samples(nu, 100_000), nu)
    assert ours == pytest.approx(np.abs(nu).sum() ** 2 / 100_000, rel=1e-3)
    rng = np.random.default_rng(0)
    for shares in rng.dirichlet(np.ones(len(nu)), 2000):
        assert error(1e5 * shares, nu) >= ours * (1 - 1e-6)
    dense = task_relevance(W, w, norm="l2").nu
    assert np.abs(dense).sum() ** 2 / 1e5 > ours  # the sparse vector needs fewer samples than the short one


def test_shares_with_prices_have_the_least_error_of_all() -> None:
    nu, prices = np.array([0.7, 0.2, 0.5]), np.array([1.0, 5.0, 2.0])
    got = allocate_samples(nu, 50_000, costs=prices)
    ours = (nu**2 / got).sum()
    assert ours == pytest.approx((np.sqrt(prices) @ nu) ** 2 / 50_000, rel=1e-3)
    for shares in np.random.default_rng(0).dirichlet(np.ones(3), 500):
        assert (nu**2 * prices / (50_000 * shares)).sum() >= ours * (1 - 1e-6)


def test_nothing_relevant_gives_equal_shares_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="no source task is relevant"):
        assert allocate_samples([0.0, 0.0], 10).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"floor": 60}, "does not cover the floor, which takes 120"),
        ({"floor": -1}, "floor of task 0 is -1"),
        ({"pools": [10, 20]}, "more than the pools of the 2 tasks that are taken hold: 30"),
        ({"costs": [1.0, np.nan]}, "costs of task 1 is nan"),
        ({"costs": [1.0, 0.0]}, "costs of task 1 is 0"),
        ({"costs": [1.0, 1.0, 1.0]}, "costs has shape"),
        ({"opening": -1.0}, "opening of task 0 is -1"),
        ({"opening": 80.0}, "does not cover"),
        ({"top": 3}, "top must be a whole number in 1..2"),
        ({"power": -1.0}, "power must be 0 or larger"),
    ],
)
def test_budgets_that_cannot_be_are_refused(arguments: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        allocate_samples([1.0, 2.0], 100, **arguments)


@pytest.mark.parametrize("budget", [10.5, -1, np.inf, np.nan])
def test_a_budget_is_a_number_of_samples(budget: float) -> None:
    with pytest.raises(InputError, match="budget"):
        allocate_samples([1.0, 2.0], budget)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"heads": np.ones((2, 0))}, "heads must have 2 dimensions and a value"),
        ({"heads": np.ones((3, 2))}, r"\(k, T\) and \(k,\) are needed"),
        ({"heads": [[np.nan, 1.0], [1.0, 1.0]]}, r"heads\[0, 0\] is nan"),
        ({"target": [np.inf, 1.0]}, r"target\[0\] is inf"),
        ({"target": ["a", "b"]}, "target must be numbers"),
        ({"norm": "l3"}, "norm must be 'l1' or 'l2'"),
        ({"lam": -1.0}, "lam and noise must be finite"),
        ({"lam": 1.0, "noise": 1.0}, "lam or noise, not both"),
        ({"norm": "l2", "lam": 1.0}, "neither goes with norm='l2'"),
        ({"costs": [1.0, np.nan]}, "costs of task 1 is nan"),
    ],
)
def test_relevance_that_cannot_be_is_refused(arguments: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        task_relevance(**{"heads": np.eye(2), "target": np.ones(2)} | arguments)


# The linear class.


def test_noiseless_tasks_are_recovered_exactly() -> None:
    world = World(noise=0.0)
    model = LinearMTRL(rank=2, fit_intercept=False).fit(world.sampler(np.full(6, 30)))
    np.testing.assert_allclose(model.B_ @ model.B_.T, world.B @ world.B.T, atol=1e-3)  # the same subspace
    np.testing.assert_allclose(model.B_ @ model.heads_, world.B @ world.W, atol=1e-3)
    model.fit_target(*world.rows(np.array([1.0, -2.0]), 5))
    np.testing.assert_allclose(model.coef_, world.B @ [1.0, -2.0], atol=1e-2)


def test_no_representation_near_it_is_better() -> None:
    """The squared error at the end of the alternation is a minimum over the representation."""
    world = World(noise=1.0)
    tasks = world.sampler(np.full(6, 20))

    def error(B: np.ndarray) -> float:
        return sum(float(np.linalg.lstsq(X @ B, y, rcond=None)[1][0]) for X, y in tasks)

    model = LinearMTRL(rank=2, fit_intercept=False, max_iter=1000, tol=1e-13).fit(tasks)
    least = error(model.B_)
    for _ in range(30):
        moved = model.B_ + 0.03 * world.rng.normal(size=model.B_.shape)
        assert error(moved) >= least - 1e-8
    assert least < error(world.B)


def test_each_task_has_its_own_level_and_scale() -> None:
    world = World()
    tasks = world.sampler(np.full(6, 40))
    base = LinearMTRL(rank=2, ridge=1e-12).fit(tasks)
    moved = LinearMTRL(rank=2, ridge=1e-12).fit([(X + 3, y + 10 * n) for n, (X, y) in enumerate(tasks)])
    np.testing.assert_allclose(np.abs(moved.heads_), np.abs(base.heads_), rtol=1e-6)
    np.testing.assert_allclose(base.noise_, 0.1, rtol=0.5)


def test_labels_in_other_units_have_the_same_relevance() -> None:
    world = World(seed=1)
    tasks, target = world.sampler(np.full(6, 200)), world.rows(world.W[:, 0], 200)
    scaled = [(X, 100 * y if n == 3 else y) for n, (X, y) in enumerate(tasks)]
    model = LinearMTRL(rank=2, scale_labels=True)
    first, second = (relevance_of(model.fit(rows).fit_target(*target)).nu for rows in (tasks, scaled))
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert np.linalg.norm(model.heads_[:, 3]) > 20 * np.linalg.norm(model.heads_[:, 2])  # heads keep their units


def test_the_error_of_a_head_is_what_it_says() -> None:
    """Over 400 targets, the mean of ||R (w - w*)||^2 is sigma^2 k / n."""
    world = World(noise=0.5)
    model = LinearMTRL(rank=2, fit_intercept=False).fit(world.sampler(np.full(6, 2000)))
    true = model.B_.T @ world.B @ [1.0, 1.0]
    seen, told = [], []
    for _ in range(400):
        model.fit_target(*world.rows(np.array([1.0, 1.0]), 25))
        seen.append(np.linalg.norm(model.target_spread_ @ (model.target_head_ - true)) ** 2)
        told.append(model.target_error_**2)
    assert np.mean(told) == pytest.approx(0.25 * 2 / 25, rel=0.1)
    assert np.mean(seen) == pytest.approx(np.mean(told), rel=0.2)


def test_a_target_never_moves_the_representation() -> None:
    world = World()
    model = LinearMTRL(rank=2).fit(world.sampler(np.full(6, 20)))
    before = model.B_.copy(), model.heads_.copy()
    model.fit_target(*world.rows(np.array([5.0, 5.0]), 50))
    np.testing.assert_array_equal(model.B_, before[0])
    np.testing.assert_array_equal(model.heads_, before[1])


@pytest.mark.parametrize(
    ("arguments", "tasks", "error", "told"),
    [
        ({}, [], InputError, "no source task"),
        ({"rank": 9}, None, InputError, r"rank must be a whole number in 1..8"),
        ({"ridge": 0.0}, None, InputError, "ridge must be a number above 0"),
        ({"max_iter": 0}, None, InputError, "max_iter"),
        ({}, [(np.ones((3, 2)), np.ones(4))], InputError, "source task 0 has inputs of shape"),
        ({}, [(np.ones((3, 2)), np.ones(3)), (np.ones((3, 5)), np.ones(3))], InputError, "source task 1 has inputs"),
        ({"rank": 1}, [(np.full((3, 2), np.nan), np.ones(3))], DataError, "inputs of source task 0, row 0: nan"),
        ({"rank": 2}, [(np.ones((1, 2)), np.ones(1))], DataError, "1 rows in all"),
    ],
)
def test_tasks_that_cannot_be_are_refused(arguments: dict, tasks: list | None, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        LinearMTRL(**arguments).fit(World().sampler(np.full(6, 10)) if tasks is None else tasks)


# The active loop.


def run(world: World, budget: int = 600, **options):
    target = world.rows(world.W[:, 0], 40)
    trainer = LinearMTRL(rank=2, fit_intercept=False)
    return active_mtrl(world.sampler, target, budget, sources=6, **{"trainer": trainer, "floor": 20} | options)


def test_phase_0_looks_at_all_and_the_rest_goes_to_the_relevant() -> None:
    world = World()
    found = run(world)
    assert world.asked[0] == [20] * 6 and found.taken.sum() == 600 and (found.taken >= 20).all()
    assert found.nu.sum() == pytest.approx(1) and found.taken[0] == max(found.taken)
    assert (found.taken > 20).sum() <= 2  # at most as many as the rank
    assert [len(y) for _, y in found.tasks] == found.taken.tolist()
    assert found.scores(list("abcdef")).top(1).ids[0] == "a"


def test_strategies_share_as_they_say() -> None:
    assert run(World(), strategy="passive").taken.tolist() == [100] * 6
    dense = run(World(), strategy="l2")
    assert (dense.taken > 20).sum() > 2
    known = run(World(), nu=[1, 0, 0, -3, 0, 0])
    assert known.taken.tolist() == [130, 20, 20, 390, 20, 20] and len(known.rounds) == 1
    assert (run(World(), strategy="l2", top=1).taken > 20).sum() == 1


def test_the_lasso_leaves_a_share_of_the_expected_error() -> None:
    world = World(noise=0.5)
    model = LinearMTRL(rank=2, fit_intercept=False).fit(world.sampler(np.full(6, 50)))
    model.fit_target(*world.rows(world.W[:, 0], 25))
    left = relevance_of(model).residual * np.linalg.norm(model.target_spread_ @ model.target_head_)
    assert left == pytest.approx(0.3 * model.target_error_, rel=1e-6)


def test_top_is_kept_where_its_pools_are_used_up() -> None:
    with pytest.warns(UserWarning, match=r"more rows: 400 of the budget of 600 are not spent \(top=1\)"):
        found = run(World(), pools=[100] * 6, top=1)
    assert sorted(found.taken) == [20] * 5 + [100]
    with pytest.warns(UserWarning, match="go to tasks of relevance 0"):
        assert run(World(), pools=[100] * 6, budget=580).taken.sum() == 580


def test_later_rounds_buy_more() -> None:
    world = World()
    found = run(world, rounds=3, budget=120 + 21 * 20)
    assert [sum(asked) for asked in world.asked] == [120, 20, 80, 320] and found.taken.sum() == 540
    assert len(found.rounds) == 3 and found.rounds[-1]["taken"] == found.taken.tolist()


def test_money_is_never_overspent() -> None:
    prices = np.array([1, 2, 3, 1, 2, 3.0])
    found = run(World(), budget=1000, costs=prices, rounds=2)
    assert 1000 - 3 < prices @ found.taken <= 1000


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = run(World(3)), run(World(3))
    assert first.taken.tolist() == second.taken.tolist()
    np.testing.assert_array_equal(first.model.coef_, second.model.coef_)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"strategy": "l3"}, InputError, "strategy must be"),
        ({"budget": 100}, InputError, "does not cover 20 rows of each of 6 sources"),
        ({"rounds": 0}, InputError, "rounds and sources"),
        ({"nu": [1.0]}, InputError, "nu has 1 values for 6 sources"),
        ({"top": 7}, InputError, "top must be"),
        ({"costs": [np.nan] * 6}, InputError, "costs of task 0 is nan"),
    ],
)
def test_runs_that_cannot_be_are_refused(options: dict, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        run(World(), **options)


def test_a_sampler_that_gives_too_few_and_a_target_too_short_are_told() -> None:
    world = World()
    with pytest.raises(DataError, match="asked for"):
        active_mtrl(lambda counts: world.sampler(counts - 1), world.rows(world.W[:, 0], 40), 600, sources=6)
    with pytest.raises(DataError, match="too few rows"):
        active_mtrl(world.sampler, world.rows(world.W[:, 0], 2), 600, sources=6, trainer=LinearMTRL(rank=2))


def test_pools_are_never_exceeded() -> None:
    pools = [200, 15, 200, 200, 200, 200]
    found = run(World(), budget=900, pools=pools)
    assert (found.taken <= pools).all() and found.taken[1] == 15 and found.taken.sum() == 900


# The network.


def test_a_network_as_trunk_finds_the_relevant_source() -> None:
    torch = pytest.importorskip("torch")
    from salience.data import TrunkMTRL

    world = World(tasks=4, rank=2, noise=0.1)
    world.W = np.array([[1.0, 0.0, 1.0, 0.3], [0.0, 1.0, -1.0, 0.9]]) * 2
    trainer = TrunkMTRL(trunk=lambda: torch.nn.Linear(8, 3), epochs=15, lr=0.03)
    state = torch.random.get_rng_state()
    found = active_mtrl(world.sampler, world.rows(world.W[:, 2], 60), 600, sources=4, trainer=trainer, floor=60)
    assert torch.equal(state, torch.random.get_rng_state())
    assert found.taken.argmax() == 2 and found.taken.sum() == 600
    X, y = world.rows(world.W[:, 2], 200)
    assert np.mean((found.model.predict(X) - y) ** 2) < 0.1 * y.var()
    frozen = [p.clone() for p in found.model.network_.parameters()]
    found.model.fit_target(X, y)
    assert all(torch.equal(a, b) for a, b in zip(frozen, found.model.network_.parameters()))


def test_several_outputs_are_averaged_by_size() -> None:
    """Two outputs of three tasks: relevance is the mean of the absolute relevance of each output."""
    torch = pytest.importorskip("torch")
    from salience.data import TrunkMTRL

    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, 5, 2))
    tasks = [(X, X @ m + 0.05 * rng.normal(size=(80, 2))) for m in mix for X in [rng.normal(size=(80, 5))]]
    X = rng.normal(size=(50, 5))
    model = TrunkMTRL(trunk=lambda: torch.nn.Linear(5, 6), epochs=40, lr=0.02).fit(tasks)
    model.fit_target(X, X @ mix[1])
    assert model.heads_.shape == (2, 6, 3) and model.predict(X).shape == (50, 2) and model.noise_.shape == (2, 3)
    assert relevance_of(model).nu.argmax() == 1


def test_silence_without_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(World())
