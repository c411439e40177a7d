"""PACE: densities, coordinate updates against their bound, the three terms, tokens of transformers, measures."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import multivariate_normal
from sklearn.decomposition._online_lda_fast import _dirichlet_expectation_2d
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from salience.concepts import PACE, desiderata, perturb, vit_tokens
from salience.concepts.pace import variational as vb
from salience.concepts.pace.moments import Moments
from salience.errors import DataError, InputError, NothingToDo
from tiny import build, example, state_hash

M, J, D, K, N = 30, 12, 4, 3, 2


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Patches of three Gaussians; class 0 holds the first two, class 1 the last two. Last: which is which."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(K, D)) * 6
    z = np.array([rng.permutation([m % 2, m % 2 + 1] * (J // 2)) for m in range(M)])
    emb = torch.from_numpy(centres[z] + rng.normal(size=(M, J, D)) * rng.uniform(0.3, 1.5, (K, D))[z])
    attn = torch.from_numpy(rng.uniform(0.2, 3, (M, J)))
    side = torch.from_numpy(rng.uniform(0.7, 0.95, M))
    probs = torch.where(torch.arange(M)[:, None] % 2 == torch.arange(2), side[:, None], 1 - side[:, None])
    return emb, attn, probs, z


def twin_of(emb: torch.Tensor) -> torch.Tensor:
    return emb + 0.3 * torch.randn(emb.shape, generator=torch.Generator().manual_seed(3), dtype=emb.dtype)


def random_state(seed: int = 0, alpha: float = 0.4):
    """Concepts, log densities, attention, phi and gamma that nothing was fitted to."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, D, generator=generator, dtype=torch.float64)
    root = torch.randn(K, D, D, generator=generator, dtype=torch.float64)
    covariances = root @ root.mT + 0.5 * torch.eye(D, dtype=torch.float64)
    means = torch.randn(K, D, generator=generator, dtype=torch.float64)
    gaussians = vb.Gaussians(means, torch.linalg.cholesky(covariances))
    attention = torch.rand(5, 7, generator=generator, dtype=torch.float64) * 2
    phi = torch.rand(5, 7, K, generator=generator, dtype=torch.float64).log_softmax(-1).exp()
    gamma = alpha + torch.rand(5, K, generator=generator, dtype=torch.float64) * 5
    return x, covariances, gaussians, attention, phi, gamma


# The exact parts ---------------------------------------------------------------------------------------------------


def test_densities_are_scipys():
    x, covariances, gaussians, *_ = random_state()
    found = gaussians.log_density(x)
    for k in range(K):
        expected = multivariate_normal(gaussians.means[k], covariances[k]).logpdf(x.numpy())
        np.testing.assert_allclose(found[..., k], expected, rtol=1e-10)


def test_an_e_step_is_the_responsibility_of_a_gaussian_mixture():
    emb, _, probs, _ = planted()
    model = PACE(n_concepts=K, alpha=1e9, faithfulness=0, stability=0, attention_scale=None, e_steps=1, max_iter=3)
    ones = torch.ones(M, J)
    model.fit(emb, ones, probs)
    mixture = GaussianMixture(K, covariance_type="full")
    mixture.weights_, mixture.means_ = np.full(K, 1 / K), model.means_.numpy()
    mixture.covariances_ = model.covariances_.numpy()
    mixture.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(mixture.covariances_)).swapaxes(1, 2)
    spread = torch.from_numpy(np.random.default_rng(1).normal(size=(M, J, D)) * 4)  # where concepts are in doubt
    expected = mixture.predict_proba(model.standardize(spread).flatten(0, 1).numpy())
    found = model.explain(spread, ones).phi.flatten(0, 1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert ((expected > 0.01) & (expected < 0.99)).any(1).sum() > 10


def test_an_em_step_is_that_of_a_gaussian_mixture():
    emb, _, probs, _ = planted()
    emb = emb + 2 * torch.from_numpy(np.random.default_rng(1).normal(size=emb.shape))
    ones, common = torch.ones(M, J), {"alpha": 1e9, "faithfulness": 0, "stability": 0, "attention_scale": None}
    first, second = (PACE(n_concepts=K, max_iter=n, cov_floor=1e-9, **common).fit(emb, ones, probs) for n in (1, 2))
    mixture = GaussianMixture(
        K, max_iter=1, tol=0, reg_covar=0, means_init=first.means_, weights_init=np.full(K, 1 / K),
        precisions_init=torch.linalg.inv(first.covariances_),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="converge"):
        mixture.fit(first.standardize(emb).flatten(0, 1).numpy())
    np.testing.assert_allclose(second.means_, mixture.means_, atol=1e-6)
    np.testing.assert_allclose(second.covariances_, mixture.covariances_, atol=1e-6)


def test_dirichlet_expectations_are_those_of_lda():
    gamma = random_state()[-1]
    np.testing.assert_allclose(vb.expected_log_theta(gamma), _dirichlet_expectation_2d(gamma.numpy()), atol=1e-6)


def test_gamma_takes_attention_as_fractional_counts():
    *_, attention, phi, _ = random_state()
    expected = 0.4 + (phi * attention[..., None]).sum(1)
    torch.testing.assert_close(vb.update_gamma(phi, attention, 0.4), expected)
    twice = vb.update_gamma(torch.cat([phi, phi], 1), torch.cat([attention, attention], 1), 0.4)
    torch.testing.assert_close(vb.update_gamma(phi, 2 * attention, 0.4), twice)


def test_moments_are_numpys_with_attention_as_weights():
    x, _, gaussians, attention, phi, _ = random_state()
    sums = Moments(K, x)
    for rows in (slice(0, 2), slice(2, 5)):
        sums.add(x[rows], attention[rows], phi[rows], gaussians.log_density(x[rows]))
    emb, _, probs, _ = planted()
    model = PACE(n_concepts=K, cov_floor=1e-9, max_iter=1).fit(emb, torch.ones(M, J), probs)
    model._move_gaussians(sums, reseed=False)
    for k in range(K):
        weights = (phi[..., k] * attention).flatten().numpy()
        flat = x.flatten(0, 1).numpy()
        np.testing.assert_allclose(model.means_[k], np.average(flat, axis=0, weights=weights), atol=1e-12)
        expected = np.cov(flat.T, aweights=weights, ddof=0)
        np.testing.assert_allclose(model.covariances_[k], expected, atol=1e-12)


def plain_bound(phi, gamma, attention, log_density, alpha) -> float:
    """`L_e` of one image in plain loops."""
    patches, k = phi.shape
    digamma = lambda v: float(torch.digamma(torch.tensor(v, dtype=torch.float64)))  # noqa: E731
    log_theta = [digamma(float(g)) - digamma(float(gamma.sum())) for g in gamma]
    total = math.lgamma(k * alpha) - k * math.lgamma(alpha) + sum((alpha - 1) * e for e in log_theta)
    total -= math.lgamma(float(gamma.sum())) - sum(math.lgamma(float(g)) for g in gamma)
    total -= sum((float(g) - 1) * e for g, e in zip(gamma, log_theta, strict=True))
    for j in range(patches):
        for c in range(k):
            p = float(phi[j, c])
            total += p * float(attention[j]) * (float(log_density[j, c]) + log_theta[c]) - p * math.log(p)
    return total


def test_the_parts_of_the_bound_against_plain_loops():
    x, _, gaussians, attention, phi, gamma = random_state()
    density = gaussians.log_density(x)
    found = vb.mixture_bound(vb.Local(phi, gamma), density, attention, 0.4)
    for m in range(5):
        assert float(found[m]) == pytest.approx(plain_bound(phi[m], gamma[m], attention[m], density[m], 0.4), rel=1e-10)
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=4, batch_size=7, faithfulness=0.5, stability=2.0)
    twin = twin_of(emb)
    model.fit(emb, attn, probs, twin, attn)
    # The same images again, so that others of a block may have been brought up to date before it: one step, from even.
    once = PACE(**{**model.get_params(), "batch_size": M, "faithfulness": 0, "stability": 0})
    once.__dict__.update({k: v for k, v in vars(model).items() if k.endswith("_")})
    phibars = [once.explain(e, attn).phi.mean(1) for e in (emb, twin)]
    f = s = 0.0
    for m in range(M):
        logits = [float(phibars[0][m] @ model.heads_[:, n]) for n in range(N)]
        f += sum(float(probs[m, n]) * logits[n] for n in range(N)) - math.log(sum(map(math.exp, logits)))
        pair = [float((phibars[0][m] * phibars[0][f_]) @ model.beta_) for f_ in range(M) if f_ != m]
        s += float((phibars[0][m] * phibars[1][m]) @ model.beta_) - math.log(sum(map(math.exp, pair)))
    own = torch.zeros(M, M).double().fill_diagonal_(-torch.inf)
    assert float(vb.faithfulness(phibars[0], probs, model.heads_).sum()) == pytest.approx(f, rel=1e-10)
    found = vb.stability(phibars[0], phibars[1], phibars[0], own, model.beta_).sum()
    assert float(found) == pytest.approx(s, rel=1e-10)
    parts = model.elbo(emb, attn, probs, twin, attn)
    assert parts["total"] == pytest.approx(parts["e"] + 0.5 * parts["f"] + 2 * parts["s"])
    assert parts["f"] == pytest.approx(f, rel=0.05) and parts["s"] == pytest.approx(s, rel=0.05)
    assert model.elbo(emb, attn, probs)["s"] == 0


def climbed(printed: bool, seed: int) -> list[float]:
    """`L_e` after each single coordinate update: phi, gamma, and the Gaussians."""
    emb, attn, probs, _ = planted(seed)
    emb = emb + 2 * torch.from_numpy(np.random.default_rng(seed).normal(size=emb.shape))
    model = PACE(n_concepts=K, max_iter=1, stability=0, cov_floor=0.05, random_state=seed).fit(emb, attn, probs)
    x, a = model.standardize(emb), attn / attn.sum(1, keepdim=True) * J
    gamma, values = torch.full((M, K), 1.0, dtype=torch.float64), []
    for _ in range(12):
        gaussians = model._gaussians()
        density = gaussians.log_density(x)
        for _ in range(3):
            phi = vb.update_phi(density, a, gamma, printed=gaussians.log_det if printed else None)
            values.append(float(vb.mixture_bound(vb.Local(phi, gamma), density, a, 0.1).sum()))
            gamma = vb.update_gamma(phi, a, 0.1)
            values.append(float(vb.mixture_bound(vb.Local(phi, gamma), density, a, 0.1).sum()))
        sums = Moments(K, x)
        sums.add(x, a, phi, density)
        model._move_gaussians(sums, reseed=False)
        values.append(float(vb.mixture_bound(vb.Local(phi, gamma), model._gaussians().log_density(x), a, 0.1).sum()))
    return values


@pytest.mark.parametrize("seed", range(4))
def test_no_coordinate_update_lowers_the_bound_of_the_patches(seed):
    values = climbed(printed=False, seed=seed)
    assert np.diff(values).min() > -1e-8 * abs(values[-1]) and values[-1] > values[2] + 1


def test_the_printed_form_of_the_update_can_lower_it():
    assert min(np.diff(climbed(printed=True, seed=seed)[1:]).min() for seed in range(4)) < -1e-3


def test_the_bounds_of_a_fit_never_fall_without_the_other_terms():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=15, faithfulness=0, stability=0, batch_size=8).fit(emb, attn, probs)
    totals = [one["total"] for one in model.bounds_]
    assert len(totals) == 15 and model.reseeded_ == 0
    assert np.diff(totals).min() > -1e-8 * abs(totals[-1])
    assert all(one["total"] == pytest.approx(one["e"]) for one in model.bounds_)


def test_pulls_are_derivatives():
    *_, gamma = random_state()
    phibar = (gamma / gamma.sum(1, keepdim=True)).requires_grad_()
    twin, others = phibar.detach().roll(1, 1), torch.cat([phibar.detach(), phibar.detach().flip(0)])
    own = torch.zeros(5, 10).double()
    own[torch.arange(5), torch.arange(5)] = -torch.inf
    probs, heads = torch.rand(5, N).double().softmax(1), torch.randn(K, N).double()
    beta = torch.tensor([3.0, -1.0, 7.0]).double()
    (expected,) = torch.autograd.grad(vb.faithfulness(phibar, probs, heads).sum(), phibar)
    torch.testing.assert_close(vb.faithfulness_pull(phibar.detach(), probs, heads), expected)
    (expected,) = torch.autograd.grad(vb.stability(phibar, twin, others, own, beta).sum(), phibar)
    torch.testing.assert_close(vb.stability_pull(phibar.detach(), twin, others, own, beta), expected)


def test_the_ascent_follows_the_gradient_and_never_falls():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=1).fit(emb, attn, probs, twin_of(emb), attn)
    phibars = [model.explain(e, attn).phi.mean(1) for e in (emb, twin_of(emb))]
    own = torch.zeros(M, M).double().fill_diagonal_(-torch.inf)
    heads, beta = (torch.zeros_like(v, requires_grad=True) for v in (model.heads_, model.beta_))
    values = []
    for _ in range(10):
        f = vb.faithfulness(phibars[0], probs, heads).mean()
        s = vb.stability(phibars[0], phibars[1], phibars[0], own, beta).mean()
        values.append((float(f.detach()), float(s.detach())))
        slopes = torch.autograd.grad(f + s, (heads, beta))
        heads, beta = ((v + 2 * g).detach().requires_grad_() for v, g in zip((heads, beta), slopes, strict=True))
    model.heads_, model.beta_ = torch.zeros_like(model.heads_), torch.zeros_like(model.beta_)
    model._climb(probs, phibars)
    torch.testing.assert_close(model.heads_, heads.detach())
    torch.testing.assert_close(model.beta_, beta.detach())
    assert np.diff(np.array(values), axis=0).min() > 0


# What the terms do -------------------------------------------------------------------------------------------------


def test_it_finds_planted_concepts_at_all_three_levels():
    emb, attn, probs, z = planted()
    model = PACE(n_concepts=K, max_iter=10).fit(emb, attn, probs)
    found = model.explain(emb, attn, probs)
    assert adjusted_rand_score(z.ravel(), found.phi.argmax(-1).flatten()) > 0.95
    torch.testing.assert_close(found.theta.sum(1), torch.ones(M).double())
    torch.testing.assert_close(found.phi.sum(2), torch.ones(M, J).double())
    torch.testing.assert_close(found.gamma.sum(1), torch.full((M,), J + K * 0.1).double())  # attention sums to J
    torch.testing.assert_close(model.transform(emb, attn, probs), found.theta)
    shared = int(found.phi[torch.from_numpy(z == 1)].mean(0).argmax())
    assert torch.allclose(model.heads_[shared, 0], model.heads_[shared, 1], atol=0.3)
    assert float((model.heads_[:, 0] - model.heads_[:, 1]).abs().max()) > 0.5
    assert float(model.weights_.sum()) == pytest.approx(1)


def test_what_is_not_attended_to_does_not_count():
    emb, attn, probs, _ = planted()
    attn = attn.clone()
    attn[:, :3] = 0
    moved = emb.clone()
    moved[:, :3] += 0.2
    model = PACE(n_concepts=K, max_iter=5).fit(emb, attn, probs)
    torch.testing.assert_close(model.transform(moved, attn), model.transform(emb, attn))
    more = attn.clone()
    more[:, 4] *= 1e4
    found = model.explain(emb, more)
    torch.testing.assert_close(found.theta, found.phi[:, 4], atol=0.03, rtol=0)
    scaled = PACE(n_concepts=K, max_iter=5).fit(emb, 7 * attn, probs)  # "J" takes what the sum was out
    torch.testing.assert_close(scaled.means_, model.means_)
    assert float(PACE(n_concepts=K, max_iter=1, attention_scale=5.0).fit(emb, attn, probs).explain(emb, attn)
                 .gamma.sum(1)[0]) == pytest.approx(5 + K * 0.1)  # fmt: skip
    counts = PACE(n_concepts=K, max_iter=1, attention_scale=None).fit(emb, attn, probs).explain(emb, attn).gamma
    torch.testing.assert_close(counts.sum(1), attn.sum(1) + K * 0.1)


def test_soft_predictions_pull_at_training_and_at_inference():
    emb, attn, probs, _ = planted()
    plain = PACE(n_concepts=K, max_iter=5, faithfulness=0).fit(emb, attn, probs)
    model = PACE(n_concepts=K, max_iter=5, faithfulness=60.0).fit(emb, attn, probs)
    assert not plain.heads_.any() and not torch.allclose(plain.means_, model.means_)
    doubt = torch.zeros_like(emb[:2]) + model.means_.mean(0) * model.scale_ + model.offset_
    sides = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).double()
    theta = model.transform(doubt, attn[:2], sides)
    speaks = model.heads_[:, 0] - model.heads_[:, 1]
    assert float(theta[0] @ speaks) > float(theta[1] @ speaks)
    softer = model.transform(doubt, attn[:2], torch.tensor([[0.6, 0.4], [0.4, 0.6]]).double())
    assert float(theta[0] @ speaks) > float(softer[0] @ speaks)
    without = model.transform(doubt, attn[:1].repeat(2, 1))
    torch.testing.assert_close(without[0], without[1])


def test_twins_are_drawn_together():
    emb, attn, probs, _ = planted()
    emb = emb + 2 * torch.from_numpy(np.random.default_rng(2).normal(size=emb.shape))
    twin = emb + 1.5 * torch.randn(emb.shape, generator=torch.Generator().manual_seed(3), dtype=emb.dtype)
    model = PACE(n_concepts=K, max_iter=5, stability=30.0, alpha=1.0).fit(emb, attn, probs, twin, attn)
    assert float(model.beta_.min()) > 0
    apart = (model.transform(emb, attn, probs) - model.transform(twin, attn, probs)).norm(dim=1).mean()
    pairs = model.transform(emb, attn, probs, twin, attn), model.transform(twin, attn, probs, emb, attn)
    assert float((pairs[0] - pairs[1]).norm(dim=1).mean()) < 0.9 * float(apart)


def test_the_twin_of_a_single_image_and_a_twin_without_weight_are_left_out():
    emb, attn, probs, _ = planted()
    one = PACE(n_concepts=K, max_iter=3).fit(emb[:1], attn[:1], probs[:1], twin_of(emb)[:1], attn[:1])
    assert not one.beta_.any() and one.bounds_[-1]["s"] == 0
    off = PACE(n_concepts=K, max_iter=3, stability=0).fit(emb, attn, probs, twin_of(emb), attn)
    torch.testing.assert_close(off.means_, PACE(n_concepts=K, max_iter=3).fit(emb, attn, probs).means_)


def test_images_do_not_depend_on_their_neighbours():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=4, batch_size=7).fit(emb, attn, probs)
    whole = PACE(n_concepts=K, max_iter=4).fit(emb, attn, probs)
    torch.testing.assert_close(model.means_, whole.means_)
    theta = model.transform(emb, attn, probs, twin_of(emb), attn)
    torch.testing.assert_close(model.transform(emb[3:5], attn[3:5], probs[3:5], twin_of(emb)[3:5], attn[3:5]),
                               theta[3:5])  # fmt: skip
    torch.testing.assert_close(model.transform(emb.flip(0), attn.flip(0), probs.flip(0)).flip(0),
                               model.transform(emb, attn, probs))  # fmt: skip
    plain = PACE(n_concepts=K, max_iter=4).fit(emb.numpy(), attn.numpy(), probs.numpy())
    torch.testing.assert_close(plain.means_, whole.means_)


def test_nearest_patches_are_those_of_the_smallest_mahalanobis_distance():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=4, batch_size=9).fit(emb, attn, probs)
    places, x = model.nearest_patches(emb, 4), model.standardize(emb)
    for k in range(K):
        away = x - model.means_[k]
        distance = torch.einsum("mjd,de,mje->mj", away, torch.linalg.inv(model.covariances_[k]), away)
        best = distance.flatten().argsort()[:4]
        assert places[k].tolist() == [[int(i) // J, int(i) % J] for i in best]


def test_principal_components():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=3, reduce_dim=2).fit(emb, attn, probs)
    x = model.standardize(emb)
    assert x.shape == (M, J, 2) and model.covariances_.shape == (K, 2, 2)
    scaled = ((emb - emb.mean((0, 1))) / emb.flatten(0, 1).std(0, unbiased=False)).flatten(0, 1)
    expected = torch.linalg.eigvalsh(scaled.T @ scaled / len(scaled)).flip(0)[:2]
    torch.testing.assert_close(x.flatten(0, 1).var(0, unbiased=False), expected)


# Numbers that go wrong ---------------------------------------------------------------------------------------------


def test_far_patches_underflow_to_no_nan():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=4).fit(emb, attn, probs)
    far = model.explain(emb * 1e4, attn, probs)
    assert torch.isfinite(far.phi).all() and torch.allclose(far.phi.sum(2), torch.ones(M, J).double())
    assert float(vb.update_phi(torch.full((1, 1, 2), -1e9).double(), torch.ones(1, 1).double(),
                               torch.ones(1, 2).double())[0, 0, 0]) == 0.5  # fmt: skip


def test_a_singular_covariance_is_raised_to_the_floor():
    emb, attn, probs, _ = planted()
    flat = emb.clone()
    flat[..., 1] = flat[..., 0]  # two dimensions that say the same
    flat[..., 2] = 5.0  # one that says nothing
    model = PACE(n_concepts=K, max_iter=5, cov_floor=0.03).fit(flat, attn, probs)
    assert float(torch.linalg.eigvalsh(model.covariances_).min()) == pytest.approx(0.03)
    assert torch.isfinite(model.transform(flat, attn, probs)).all()
    same = PACE(n_concepts=2, max_iter=2).fit(torch.ones(3, 4, 2).double(), torch.ones(3, 4), probs[:3])
    assert torch.isfinite(same.transform(torch.ones(3, 4, 2).double(), torch.ones(3, 4))).all()


def test_an_empty_concept_starts_anew_at_the_worst_explained_patch():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=3).fit(emb, attn, probs)
    assert model.reseeded_ == 0
    model.means_[1] = 1e3  # where no patch is
    odd = emb.clone()
    odd[4, 5] = -30.0
    data = model._known(odd, torch.ones(M, J), probs, None, None)
    gammas, phibars = [model._even(data)], [torch.full((M, K), 1 / K).double()]
    sums = model._pass(data, gammas, phibars)[0]
    lonely = model.means_.clone()
    model._move_gaussians(sums, reseed=False)
    torch.testing.assert_close(model.means_[1], lonely[1])
    model._move_gaussians(sums, reseed=True)
    torch.testing.assert_close(model.means_[1], data.emb[4, 5])
    torch.testing.assert_close(model.covariances_[1], torch.eye(D).double())
    assert model.reseeded_ == 1


# Tokens of transformers --------------------------------------------------------------------------------------------


def test_tokens_of_a_vision_transformer():
    model, pixels = build("vit"), example("vit")["pixel_values"]
    model(pixels, output_attentions=True, output_hidden_states=True)  # transformers leaves hooks of its own
    before = state_hash(model)
    implementation = model.config._attn_implementation
    emb, attn, probs = vit_tokens(model, pixels)
    assert state_hash(model) == before and model.config._attn_implementation == implementation
    assert emb.shape == (3, 4, 32) and attn.shape == (3, 4) and not emb.requires_grad
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(pixels, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(emb, whole.hidden_states[-1][:, 1:])
    torch.testing.assert_close(attn, whole.attentions[-1].mean(1)[:, 0, 1:])
    torch.testing.assert_close(probs, whole.logits.softmax(1))
    first = vit_tokens(model, pixels, 0)
    torch.testing.assert_close(first.emb, whole.hidden_states[1][:, 1:])
    torch.testing.assert_close(first.attn, vit_tokens(model, pixels, -3).attn)


def family(name: str) -> torch.nn.Module:
    """A tiny vision transformer with tokens beside the class token."""
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
              "num_labels": 3}  # fmt: skip
    torch.manual_seed(0)
    if name == "deit":
        return transformers.DeiTForImageClassificationWithTeacher(
            transformers.DeiTConfig(intermediate_size=24, **common)
        ).eval()
    if name == "registers":
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=3, mlp_ratio=2, **common)
        return transformers.Dinov2WithRegistersForImageClassification(config).eval()
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                                     window_size=4, num_labels=3)  # fmt: skip
    return transformers.SwinForImageClassification(config).eval()


@pytest.mark.parametrize("name, extra", [("deit", 2), ("registers", 4)])
def test_tokens_beside_the_class_token_are_no_patches(name, extra):
    model, pixels = family(name), example("vit")["pixel_values"]
    emb, attn, _ = vit_tokens(model, pixels)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(pixels, output_attentions=True, output_hidden_states=True)
    assert emb.shape[1] == 16 and whole.hidden_states[-1].shape[1] == 16 + extra
    torch.testing.assert_close(emb, whole.hidden_states[-1][:, extra:])
    torch.testing.assert_close(attn, whole.attentions[-1].mean(1)[:, 0, extra:])


def test_a_model_without_a_class_token_gets_even_attention_and_a_warning():
    with pytest.warns(UserWarning, match="no class token"):
        emb, attn, _ = vit_tokens(family("swin"), example("vit")["pixel_values"])
    torch.testing.assert_close(attn, torch.full(emb.shape[:2], 1 / emb.shape[1]))


def test_models_without_attention_are_refused():
    with pytest.raises(InputError, match="no transformers model"):
        vit_tokens(build("plain"), torch.rand(2, 3, 16, 16))
    with pytest.raises(InputError, match=r"blocks -3\.\.2"):
        vit_tokens(build("vit"), torch.rand(2, 3, 16, 16), 3)

    class Silent(transformers.ViTForImageClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.attentions = None
            return output

    with pytest.raises(InputError, match="attn_implementation='eager'"):
        vit_tokens(Silent(build("vit").config).eval(), torch.rand(2, 3, 16, 16))
    with pytest.raises(InputError, match="ResNet"):
        vit_tokens(build("resnet"), torch.rand(2, 3, 16, 16))


# Measures and perturbations ----------------------------------------------------------------------------------------


def test_desiderata_by_hand():
    train = np.array([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 2, 2], [0, 0, 3, 1]])
    test = np.array([[4.0, 0, 0, 0], [0, 0, 9, 0.02]])
    aug = np.array([[4.0, 3, 0, 0], [0, 0, 9, 0.02]])
    found = desiderata(train, [5, 5, 7, 7], torch.from_numpy(test), torch.tensor([5, 5]), aug)
    assert found["faithfulness"] == 0.5
    assert found["stability"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["sparsity"] == pytest.approx(6 / 8)  # 0.02 of 9.02 is below 0.1 / 4 as well


def test_a_perturbation_follows_from_seed_and_row():
    images = torch.rand(4, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    twins = perturb(images, random_state=3)
    assert twins.shape == images.shape and float(twins.min()) >= 0 and float(twins.max()) <= 1
    torch.testing.assert_close(perturb(images[:2], random_state=3), twins[:2])
    torch.testing.assert_close(perturb(images[2:], random_state=3, first_row=2), twins[2:])
    assert perturb(images[:, :1]).shape == (4, 1, 16, 20)
    assert not torch.equal(perturb(images, random_state=4), twins)
    nothing = {"flip": 0, "crop": (1, 1), "jitter": 0, "grey": 0, "blur": False}
    square = images[..., :16]
    torch.testing.assert_close(perturb(square, **nothing), square, atol=2e-6, rtol=0)
    torch.testing.assert_close(perturb(square, **{**nothing, "flip": 1}), square.flip(-1), atol=2e-6, rtol=0)
    grey = perturb(square, **{**nothing, "grey": 1})
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(grey[:, 0], (square * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1),
                               atol=2e-6, rtol=0)  # fmt: skip


def test_the_hue_turns_as_in_colorsys():
    from salience.concepts.pace.measures import _turn_hue

    image = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = _turn_hue(image, 0.08)
    for row in range(5):
        for column in range(6):
            h, s, v = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            np.testing.assert_allclose(found[:, row, column], colorsys.hsv_to_rgb((h + 0.08) % 1, s, v), atol=1e-9)


def test_the_blur_keeps_what_is_even_and_the_sum_of_what_is_not():
    from salience.concepts.pace.measures import _blur

    torch.testing.assert_close(_blur(torch.full((3, 9, 9), 0.4), 1.0), torch.full((3, 9, 9), 0.4))
    point = torch.zeros(3, 15, 15)
    point[:, 7, 7] = 1
    blurred = _blur(point, 1.2)
    assert float(blurred.sum()) == pytest.approx(3, abs=1e-5)
    assert float(blurred[0, 7, 8] / blurred[0, 7, 7]) == pytest.approx(math.exp(-1 / (2 * 1.2**2)), rel=1e-5)


# Bad input ---------------------------------------------------------------------------------------------------------


def spoiled(name: str):
    """What `fit` is given, with one thing wrong."""
    emb, attn, probs, _ = planted()
    if name == "nan":
        emb[3, 2, 1] = torch.nan
    elif name == "patches":
        attn = attn[:, 1:]
    elif name == "negative":
        attn[5, 0] = -1
    elif name == "none":
        attn[5] = 0
    elif name == "sum":
        probs[7] *= 1.5
    elif name == "logits":
        probs[7] = torch.tensor([3.0, -2.0])
    elif name == "rows":
        probs = probs[1:]
    elif name == "whole":
        emb = emb.long()
    elif name == "matrix":
        emb = emb[0]
    elif name == "empty":
        emb, attn, probs = emb[:0], attn[:0], probs[:0]
    return emb, attn, probs


@pytest.mark.parametrize(
    "name, error, said",
    [
        ("nan", DataError, "emb: image 3"),
        ("patches", InputError, "12 patches"),
        ("negative", DataError, "image 5"),
        ("none", DataError, "image 5"),
        ("sum", DataError, "row 7 sums to 1.5"),
        ("logits", DataError, "softmax"),
        ("rows", InputError, "29 rows for 30"),
        ("whole", InputError, "floats of 3 dimensions"),
        ("matrix", InputError, "floats of 3 dimensions"),
        ("empty", NothingToDo, "no patches"),
    ],
)
def test_what_fit_refuses(name, error, said):
    with pytest.raises(error, match=said):
        PACE(n_concepts=K).fit(*spoiled(name))


@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"n_concepts": 0}, "n_concepts"),
        ({"n_concepts": M * J + 1}, "only 360 patches"),
        ({"alpha": 0}, "alpha"),
        ({"cov_floor": 0.0}, "cov_floor"),
        ({"faithfulness": -1}, "faithfulness"),
        ({"stability": math.nan}, "stability"),
        ({"max_iter": 0}, "max_iter"),
        ({"e_steps": 2.5}, "e_steps"),
        ({"batch_size": True}, "batch_size"),
        ({"reduce_dim": 5}, "1..4"),
        ({"attention_scale": "j"}, "attention_scale"),
        ({"attention_scale": -2}, "attention_scale"),
    ],
)
def test_options_out_of_range(parameters, said):
    emb, attn, probs, _ = planted()
    with pytest.raises(InputError, match=said):
        PACE(**{"n_concepts": K, **parameters}).fit(emb, attn, probs)


def test_what_the_fitted_and_the_measures_refuse():
    emb, attn, probs, _ = planted()
    model = PACE(n_concepts=K, max_iter=1).fit(emb, attn, probs)
    theta, classes, images = np.ones((4, 3)), [0, 1, 0, 1], torch.rand(2, 3, 8, 8)
    cases = [
        (lambda: PACE(n_concepts=K).fit(emb, attn, None), InputError, "probs"),
        (lambda: model.fit(emb, attn, probs, emb), InputError, "both"),
        (lambda: model.fit(emb, attn, probs, emb[1:], attn[1:]), InputError, "emb_aug"),
        (lambda: model.transform(emb[..., :2], attn), InputError, "fitted on 4"),
        (lambda: model.transform(emb, attn, torch.full((M, 4), 0.25)), InputError, "4 classes"),
        (lambda: desiderata(theta, classes, theta, classes, theta[1:]), InputError, "fit"),
        (lambda: desiderata(theta, classes, theta, classes[1:], theta), InputError, "fit"),
        (lambda: desiderata(-theta, classes, theta, classes, theta), DataError, "theta_train"),
        (lambda: desiderata(theta, [1, 1, 1, 1], theta, classes, theta), DataError, "class 1 throughout"),
        (lambda: desiderata(theta, classes, 0 * theta, classes, theta), DataError, "image 0"),
        (lambda: desiderata(theta[0], classes, theta, classes, theta), InputError, "matrix"),
        (lambda: perturb(images * 2), InputError, "before normalising"),
        (lambda: perturb(images[:, :2]), InputError, "3 or 1"),
        (lambda: perturb(images, crop=(0, 1)), InputError, "crop"),
    ]  # fmt: skip
    for call, error, said in cases:
        with pytest.raises(error, match=said):
            call()
