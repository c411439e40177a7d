"""PACE: concepts of a data set, of each image and of each patch, as one Bayesian mixture model.

    theta_m ~ Dirichlet(alpha),  z_mj ~ Cat(theta_m),  e_mj ~ N(mu_z, Sigma_z),  counted a_mj times
    y_m ~ softmax(H^T zbar_m)                          the model's output, zbar_m = mean_j z_mj
    (m, m') a pair ~ exp(beta . zbar_m zbar_m') / sum_{f != m} exp(beta . zbar_m zbar_f)

`e_mj` is what a vision transformer makes of patch j of image m, and `a_mj` how much its class token attends to it.

Source: Wang, Tan and Wang, "Probabilistic Conceptual Explainers: Trustworthy Conceptual Explanations for Vision
Foundation Models", ICML 2024 (arXiv 2406.12649), sections 3 and 4. The published code differs from it (it divides the
exponent by 100, and its attention cancels) and was read for defaults alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from salience.concepts.pace import variational as vb
from salience.concepts.pace.checks import Given, check_options, given
from salience.concepts.pace.moments import Moments
from salience.errors import InputError

_START_PATCHES = 20_000  # that k-means begins on
_ASCENT_STEPS = 10  # of H and beta in an M step
_ASCENT_RATE = 2.0  # one over the largest curvature of either term, as phibar lies in the simplex

Array = Float[Tensor, "..."] | Float[np.ndarray, "..."]


@dataclass
class PaceExplanation:
    """Concepts of some images.

    Attributes
    ----------
    theta : Tensor (m, k)
        How much of each concept an image holds; rows sum to 1.
    gamma : Tensor (m, k)
        Of the Dirichlet that theta is the mean of; the larger its sum, the surer is theta.
    phi : Tensor (m, j, k)
        How much each patch shows each concept; sums to 1 over k.
    """

    theta: Float[Tensor, "m k"]
    gamma: Float[Tensor, "m k"]
    phi: Float[Tensor, "m j k"]


class PACE(BaseEstimator):
    """Explain a vision transformer by a mixture of Gaussians over its patch embeddings, fitted by variational EM.

        L = L_e + faithfulness L_f + stability L_s

    `L_e` is the bound of the patches, `L_f` that of the model's outputs, `L_s` that images and their perturbed twins
    hold the same concepts. Everything is computed in float64 on the device of what comes in, a block of images at
    a time.

    Parameters
    ----------
    n_concepts : int
        K.
    alpha : float
        Of the Dirichlet prior: below 1, images hold few concepts.
    reduce_dim : int, optional
        Principal components of the standardised embeddings to work in; by default all dimensions. Covariances are
        full, so that hundreds of dimensions need thousands of patches for each concept.
    faithfulness, stability : float
        Weights of the terms; 0 leaves one out.
    max_iter : int
        Passes over the images, an E and an M step each.
    e_steps : int
        Updates of phi and gamma in an E step.
    attention_scale : "J", float or None
        What each image's attention is scaled to sum to: its number of patches, as in the text; a number; or None to
        take counts as they come.
    cov_floor : float
        Least eigenvalue of a covariance, of standardised embeddings.
    printed_form : bool
        Leave the log-determinant and the prior outside the count, as equation 10 is printed; the bound may then fall.
    batch_size : int
        Images at once.
    random_state : int
        Of the k-means start.

    Attributes
    ----------
    means_ : Tensor (k, d)
        In the space of `standardize`, as are the covariances.
    covariances_ : Tensor (k, d, d)
    weights_ : Tensor (k,)
        Share of the attention that falls on patches of each concept.
    heads_ : Tensor (k, n)
        H: what each concept says of each class.
    beta_ : Tensor (k,)
    bounds_ : list of dict
        The bound and its parts after each E step, as in `elbo`.
    reseeded_ : int
        How often an empty concept was put on the patch that was explained worst.
    offset_, scale_, rotation_ : Tensor (d,), (d,), (d, reduced) or None
        Of `standardize`.
    phibar_ : Tensor (m, k)
        Mean phi of the images it was fitted on.

    Notes
    -----
    Source: arXiv 2406.12649, sections 3 and 4 [V]. Derived from the bound [D]: the count stands before the
    log-determinant and `E[log theta]` too, and eigenvalues below the floor are raised to it, which is the constrained
    maximum. Reconstructed where the text says nothing [R]: embeddings are standardised; concepts begin at k-means
    centres with the identity as covariance; the twin's phi follows from its own patches and the pair, not from the
    label; H and beta begin at 0 and climb 10 steps of the length that their curvature allows; a concept of less than
    one patch starts anew at the worst-explained one.
    """

    def __init__(
        self,
        *,
        n_concepts: int = 100,
        alpha: float = 0.1,
        reduce_dim: int | None = None,
        faithfulness: float = 1.0,
        stability: float = 1.0,
        max_iter: int = 20,
        e_steps: int = 10,
        attention_scale: Any = "J",
        cov_floor: float = 1e-2,
        printed_form: bool = False,
        batch_size: int = 256,
        random_state: int = 0,
    ) -> None:
        self.n_concepts, self.alpha, self.reduce_dim = n_concepts, alpha, reduce_dim
        self.faithfulness, self.stability, self.max_iter, self.e_steps = faithfulness, stability, max_iter, e_steps
        self.attention_scale, self.cov_floor, self.printed_form = attention_scale, cov_floor, printed_form
        self.batch_size, self.random_state = batch_size, random_state

    def fit(
        self, emb: Array, attn: Array, probs: Array, emb_aug: Array | None = None, attn_aug: Array | None = None
    ) -> PACE:
        """Find the concepts.

        Parameters
        ----------
        emb : Tensor or array (m, j, d)
            Patch embeddings, as `vit_tokens` gives them.
        attn : Tensor or array (m, j)
            Attention to each patch, at least 0.
        probs : Tensor or array (m, n)
            The model's own class probabilities, not labels.
        emb_aug, attn_aug : optional
            The same of perturbed twins, row by row; see `perturb`. Without them, or with one image alone, the
            stability term is off.

        Raises
        ------
        InputError
            Shapes that do not fit, an option out of range, or more concepts or components than patches allow.
        DataError
            Values that are not finite, negative attention, or probabilities that do not sum to 1.
        NothingToDo
            No images or no patches.
        """
        check_options(self)
        if probs is None:
            raise InputError("probs: give the model's class probabilities (m, n); concepts are to explain them")
        data = given(emb, attn, probs, emb_aug, attn_aug)
        self._measure(data.emb)
        data = self._ready(data)
        self._start(data)
        gammas = [self._even(data) for _ in _views(data)]
        phibars = [torch.full_like(gamma, 1 / self.n_concepts) for gamma in gammas]
        self.bounds_, self.reseeded_ = [], 0
        for number in range(self.max_iter):
            sums, parts = self._pass(data, gammas, phibars)
            self.bounds_.append(self._named(parts))
            self._move_gaussians(sums, reseed=number < self.max_iter - 1)
            self._climb(data.probs, phibars)
        self.phibar_ = phibars[0]
        return self

    def explain(
        self,
        emb: Array,
        attn: Array,
        probs: Array | None = None,
        emb_aug: Array | None = None,
        attn_aug: Array | None = None,
    ) -> PaceExplanation:
        """Concepts of images and of their patches: the E step alone, with the concepts held fixed.

        Parameters
        ----------
        emb, attn
            As in `fit`.
        probs : Tensor or array (m, n), optional
            What the model predicts is observed here too; without it the faithfulness term is off.
        emb_aug, attn_aug : optional
            Perturbed twins, left out with one image alone; the others of the pair's likelihood are the images of `fit`.

        Returns
        -------
        PaceExplanation
        """
        data = self._known(emb, attn, probs, emb_aug, attn_aug)
        found, gaussians = [], self._gaussians()
        for rows in _blocks(data, self.batch_size):
            block = data.take(rows)
            views = self._view(block, [self._even(block) for _ in _views(block)], gaussians)
            own = torch.zeros(len(block.emb), len(self.phibar_), dtype=torch.float64, device=data.emb.device)
            found.append(self._local(views, block.probs, self.phibar_, own, gaussians)[0])
        gamma, phi = torch.cat([one.gamma for one in found]), torch.cat([one.phi for one in found])
        return PaceExplanation(gamma / gamma.sum(1, keepdim=True), gamma, phi)

    def transform(
        self,
        emb: Array,
        attn: Array,
        probs: Array | None = None,
        emb_aug: Array | None = None,
        attn_aug: Array | None = None,
    ) -> Float[Tensor, "m k"]:
        """How much of each concept each image holds; as `explain`."""
        return self.explain(emb, attn, probs, emb_aug, attn_aug).theta

    def elbo(
        self, emb: Array, attn: Array, probs: Array, emb_aug: Array | None = None, attn_aug: Array | None = None
    ) -> dict[str, float]:
        """The bound on these images after an E step: ``total``, and its parts ``e``, ``f`` and ``s`` in nats.

        ``total = e + faithfulness f + stability s``; a term that is off counts 0.
        """
        data = self._known(emb, attn, probs, emb_aug, attn_aug)
        gammas = [self._even(data) for _ in _views(data)]
        phibars = [torch.full_like(gamma, 1 / self.n_concepts) for gamma in gammas]
        return self._named(self._pass(data, gammas, phibars)[1])

    def standardize(self, emb: Array) -> Float[Tensor, "m j d"]:
        """Embeddings as the concepts see them: standardised by those of `fit`, and rotated to `reduce_dim`."""
        check_is_fitted(self)
        x = torch.as_tensor(emb).to(self.offset_)
        if x.shape[-1] != len(self.offset_):
            raise InputError(f"emb: has {x.shape[-1]} dimensions; the concepts were fitted on {len(self.offset_)}")
        x = (x - self.offset_) / self.scale_
        return x if self.rotation_ is None else x @ self.rotation_

    def nearest_patches(self, emb: Array, count: int = 8) -> Int[Tensor, "k count 2"]:
        """What each concept looks like: image and patch of the embeddings nearest to its mean (Mahalanobis)."""
        gaussians, x = self._gaussians(), self.standardize(emb)
        density = torch.cat([gaussians.log_density(part) for part in x.split(self.batch_size)]).flatten(0, 1)
        nearest = density.topk(min(count, len(density)), dim=0).indices.T
        return torch.stack([nearest // x.shape[1], nearest % x.shape[1]], -1)

    # What comes in ------------------------------------------------------------------------------------------------

    def _measure(self, emb: Tensor) -> None:
        """Mean, deviation and principal axes of the embeddings."""
        x, (m, j, d) = emb.flatten(0, 1), emb.shape
        if self.n_concepts > m * j:
            raise InputError(f"n_concepts: got {self.n_concepts}, but there are only {m * j} patches")
        if self.reduce_dim is not None and self.reduce_dim > min(d, m * j):
            raise InputError(f"reduce_dim: got {self.reduce_dim}; {m * j} patches of {d} dimensions allow "
                             f"1..{min(d, m * j)}")  # fmt: skip
        self.offset_ = x.mean(0)
        spread = x.std(0, unbiased=False)
        self.scale_ = torch.where(spread > 1e-12 * x.abs().amax(0).clamp(min=1), spread, 1.0)
        self.rotation_ = None
        if self.reduce_dim is not None:
            z = (x - self.offset_) / self.scale_
            self.rotation_ = torch.linalg.eigh(z.T @ z).eigenvectors.flip(1)[:, : self.reduce_dim]

    def _known(self, emb: Any, attn: Any, probs: Any, emb_aug: Any, attn_aug: Any) -> Given:
        check_is_fitted(self)
        data = given(emb, attn, probs, emb_aug, attn_aug)
        if data.probs is not None and data.probs.shape[1] != self.heads_.shape[1]:
            raise InputError(f"probs: has {data.probs.shape[1]} classes; the concepts were fitted on "
                             f"{self.heads_.shape[1]}")  # fmt: skip
        return self._ready(data)

    def _ready(self, data: Given) -> Given:
        """Standardised embeddings and attention as counts; twins only where they are used."""

        def counts(attention: Tensor) -> Tensor:
            if self.attention_scale is None:
                return attention
            total = attention.shape[1] if self.attention_scale == "J" else self.attention_scale
            return attention / attention.sum(1, keepdim=True) * total

        data = data._replace(emb=self.standardize(data.emb), attn=counts(data.attn))
        if data.emb_aug is None or data.attn_aug is None or self.stability == 0:
            return data._replace(emb_aug=None, attn_aug=None)
        return data._replace(emb_aug=self.standardize(data.emb_aug), attn_aug=counts(data.attn_aug))

    def _start(self, data: Given) -> None:
        """K-means centres, unit covariances, and no word from H and beta yet."""
        x, k = data.emb.flatten(0, 1), self.n_concepts
        rng = np.random.default_rng(self.random_state)
        some = np.sort(rng.permutation(len(x))[: max(_START_PATCHES, 10 * k)])
        clusters = KMeans(k, n_init=3, random_state=self.random_state).fit(x[torch.from_numpy(some)].cpu().numpy())
        self.means_ = torch.from_numpy(clusters.cluster_centers_).to(x)
        self.covariances_ = torch.eye(x.shape[1]).to(x).repeat(k, 1, 1)
        self.weights_ = torch.full((k,), 1 / k).to(x)
        assert data.probs is not None
        self.heads_, self.beta_ = torch.zeros(k, data.probs.shape[1]).to(x), torch.zeros(k).to(x)

    # E step ---------------------------------------------------------------------------------------------------------

    def _gaussians(self) -> vb.Gaussians:
        return vb.Gaussians(self.means_, torch.linalg.cholesky(self.covariances_))

    def _even(self, data: Given) -> Float[Tensor, "m k"]:
        """Gamma of an image of which nothing is known but how much attention there is."""
        return self.alpha + (data.attn.sum(1, keepdim=True) / self.n_concepts).repeat(1, self.n_concepts)

    def _view(self, block: Given, gammas: list[Tensor], gaussians: vb.Gaussians) -> list[vb.Patches]:
        return [vb.Patches(gaussians.log_density(emb), attn, gamma)
                for (emb, attn), gamma in zip(_views(block), gammas, strict=True)]  # fmt: skip

    def _local(
        self,
        views: list[vb.Patches],
        probs: Tensor | None,
        others: Float[Tensor, "f k"],
        own: Float[Tensor, "m f"],
        gaussians: vb.Gaussians,
    ) -> list[vb.Local]:
        """Phi and gamma of a block of images and of their twins."""

        def pull(i: int, phibars: list[Tensor]) -> Tensor | None:
            if i == 1:
                return self.stability * self.beta_ * phibars[0]  # of the pair; the label is the image's
            total = None if probs is None else self.faithfulness * vb.faithfulness_pull(phibars[0], probs, self.heads_)
            if len(views) == 1:
                return total
            pair = self.stability * vb.stability_pull(phibars[0], phibars[1], others, own, self.beta_)
            return pair if total is None else total + pair

        printed = gaussians.log_det if self.printed_form else None
        return vb.e_step(views, self.alpha, self.e_steps, pull, printed=printed)

    def _pass(self, data: Given, gammas: list[Tensor], phibars: list[Tensor]) -> tuple[Moments, Float[Tensor, " 3"]]:
        """An E step over all images: `gammas` and `phibars` (m, k) of each view are brought up to date in place.

        Returns what the M step needs, and the three parts of the bound.
        """
        sums, parts = Moments(self.n_concepts, data.emb), torch.zeros(3, dtype=torch.float64, device=data.emb.device)
        gaussians = self._gaussians()
        for rows in _blocks(data, self.batch_size):
            block = data.take(rows)
            views = self._view(block, [gamma[rows] for gamma in gammas], gaussians)
            own = torch.zeros(len(block.emb), len(data.emb)).to(data.emb)
            own[torch.arange(len(own)), torch.arange(len(data.emb))[rows]] = -torch.inf
            others = phibars[0].clone()
            found = self._local(views, block.probs, others, own, gaussians)
            for i, one in enumerate(found):
                gammas[i][rows], phibars[i][rows] = one.gamma, one.phibar
            parts[0] += sum(vb.mixture_bound(one, view.log_density, view.attention, self.alpha).sum()
                            for one, view in zip(found, views, strict=True))  # fmt: skip
            if block.probs is not None:
                parts[1] += vb.faithfulness(found[0].phibar, block.probs, self.heads_).sum()
            if len(found) == 2:
                parts[2] += vb.stability(found[0].phibar, found[1].phibar, others, own, self.beta_).sum()
            sums.add(block.emb, block.attn, found[0].phi, views[0].log_density)
        return sums, parts

    def _named(self, parts: Float[Tensor, " 3"]) -> dict[str, float]:
        e, f, s = parts.tolist()
        return {"total": e + self.faithfulness * f + self.stability * s, "e": e, "f": f, "s": s}

    # M step ---------------------------------------------------------------------------------------------------------

    def _move_gaussians(self, sums: Moments, *, reseed: bool) -> None:
        """``mu_k = sum phi a e / sum phi a``, and Sigma_k likewise; empty concepts to the worst-explained patches."""
        full = sums.counts >= sums.counts.sum() / sums.patches  # at least one patch of mean attention
        n = sums.counts[full, None]
        means = sums.first[full] / n
        covariances = sums.second[full] / n[..., None] - means[:, :, None] * means[:, None]
        values, vectors = torch.linalg.eigh(covariances)
        values = values.clamp(min=self.cov_floor)
        self.means_[full], self.weights_ = means, sums.counts / sums.counts.sum()
        self.covariances_[full] = (vectors * values[:, None]) @ vectors.mT
        empty = (~full).nonzero()[:, 0][: len(sums.worst)]
        if reseed and len(empty):
            self.means_[empty] = sums.worst[: len(empty)]
            self.covariances_[empty] = torch.eye(self.means_.shape[1]).to(self.means_)
            self.reseeded_ += len(empty)

    def _climb(self, probs: Float[Tensor, "m n"] | None, phibars: list[Tensor]) -> None:
        """H and beta by gradient ascent on the mean of `L_f` and `L_s`, both concave."""
        phibar, m = phibars[0], len(phibars[0])
        for _ in range(_ASCENT_STEPS):
            if self.faithfulness > 0 and probs is not None:
                self.heads_ = self.heads_ + _ASCENT_RATE * phibar.T @ (probs - (phibar @ self.heads_).softmax(1)) / m
            if self.stability > 0 and len(phibars) == 2:
                away = torch.zeros_like(self.beta_)
                for rows in _blocks(phibar, self.batch_size):
                    own = torch.zeros(len(phibar[rows]), m).to(phibar)
                    own[torch.arange(len(own)), torch.arange(m)[rows]] = -torch.inf
                    chosen = ((phibar[rows] * self.beta_) @ phibar.T + own).softmax(1)
                    away += (phibar[rows] * (chosen @ phibar)).sum(0)
                self.beta_ = self.beta_ + _ASCENT_RATE * ((phibar * phibars[1]).sum(0) - away) / m


def _views(data: Given) -> list[tuple[Tensor, Tensor]]:
    """The images, and their twins where there are some."""
    own = [(data.emb, data.attn)]
    return own if data.emb_aug is None or data.attn_aug is None else [*own, (data.emb_aug, data.attn_aug)]


def _blocks(data: Any, size: int) -> Iterator[slice]:
    n = len(data.emb) if isinstance(data, Given) else len(data)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
