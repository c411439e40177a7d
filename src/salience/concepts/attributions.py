"""Any attribution of the concepts: phi(u) of ``u -> g(decode(u))_c``, a row of k numbers an image.

What is attributed is the network behind the layer as it reads the *written* activations, not the true ones: how much
concepts leave out has to be told beside it (`extraction_report`).

Source: Fel et al., NeurIPS 2023 (arXiv 2306.07304), section 4, from memory; each method as told beside it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from captum.attr import FeatureAblation, IntegratedGradients, KernelShap, NoiseTunnel, Saliency
from jaxtyping import Float
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from salience.concepts.concept_model import Codes, ConceptModel, Images, chosen_logits, classes_of, logits_of_codes
from salience.concepts.importance import Masked, check_rows, gradient_input, sobol_importance, tcav
from salience.errors import InputError, nearest
from salience.features.attribution import device_of, target_classes
from salience.measure.paired import Interval, bootstrap_interval
from salience.model.batches import map_batches

_AT_ONCE = 16  # noisy copies or coalitions of one image in a pass: draws must not depend on `batch_size`


def concept_importance(
    concepts: ConceptModel,
    codes: Codes,
    images: Images,
    target: Any,
    *,
    method: str = "gradient_input",
    batch_size: int = 64,
    random_state: int = 0,
    **options: Any,
) -> Float[np.ndarray, "n k"]:
    """Importance of each concept to a class, image by image, by any method.

    ==================== ==================================================== =============================
    method               phi_i(u)                                             at an affine g, w = V W_c
    ==================== ==================================================== =============================
    saliency             abs(dg/du_i)                                         abs(w_i)
    gradient_input       u_i dg/du_i                                          u_i w_i
    smoothgrad           mean of dg/du_i at noisy u                           w_i
    squaregrad           mean of its square                                   w_i^2
    vargrad              variance of it                                       0
    integrated_gradients u_i times the mean gradient from 0 to u              u_i w_i
    occlusion            g(u) - g(u with u_i = 0)                             u_i w_i
    tcav                 1 where dg/du_i > 0, else 0                          [w_i > 0]
    rise                 mean of g(u * m) over random masks with m_i = 1      u_i w_i / 2 + a constant
    sobol                total Sobol index, masks in 0..1                     in proportion to (u_i w_i)^2
    hsic                 dependence of g(u * m) on m_i                        rises with abs(u_i w_i)
    kernelshap           Shapley value                                        u_i w_i
    ==================== ==================================================== =============================

    The gradient methods and occlusion look at every position of spatial codes and add up; those that draw masks (rise,
    sobol, hsic, kernelshap) have one value for a concept at all positions.

    Parameters
    ----------
    concepts : ConceptModel
    codes : Tensor (n, ..., k)
        Of `concepts.encode(images)`.
    images : Tensor (n, channel, height, width)
    target : int or Tensor (n,)
        The class, whose logit is followed.
    method : str
        A name of the table.
    batch_size : int
        Rows at once; halved when memory runs out.
    random_state : int
        Of noise and masks; every image has draws of its own.
    options
        Of the method: ``n_samples``, ``noise`` (a share of the range of the image's codes) of smoothgrad, squaregrad
        and vargrad; ``n_steps`` of integrated_gradients; ``n_masks`` of rise, hsic; ``n_samples`` of kernelshap;
        ``n_design``, ``estimator``, ``sampler`` of sobol.

    Returns
    -------
    array (n, k)
        Their mean over images of one class is the concept's importance to it (`mean_importance`).

    Raises
    ------
    InputError
        No such method, option or class, or shapes that do not fit.

    Warns
    -----
    UserWarning
        Spatial codes have a single position: maps of concepts then show nothing.
    """
    if method not in METHODS:
        raise InputError(f"method: there is no {method!r}; {nearest(method, METHODS)}")
    check_rows(codes, images)
    if codes.ndim > 2 and codes[0, ..., 0].numel() == 1:
        warnings.warn("codes: have a single position, so concepts cannot be told apart by where they are", stacklevel=2)
    run, allowed = METHODS[method]
    for name, value in options.items():
        if name not in allowed:
            known = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            raise InputError(f"{name}: is no option of {method!r}; {known}")
        if isinstance(value, int | float) and value <= 0:
            raise InputError(f"{name}: got {value}; it must be above 0")
    classes = classes_of(target, len(codes))
    common = {"batch_size": batch_size} | ({"random_state": random_state} if method in _DRAWN else {})
    return run(concepts, codes, images, classes, **common, **options)


def mean_importance(importance: Float[np.ndarray, "n k"], target: Any, *, random_state: int = 0) -> list[Interval]:
    """Importance of each concept to a class: the mean over its images, with a 95 % bootstrap interval.

    Parameters
    ----------
    importance : array (n, k)
        Of `concept_importance`.
    target : int or Tensor (n,)
        What it was the importance to.
    random_state : int
        Of the intervals.

    Warns
    -----
    UserWarning
        Images of several classes: the mean then belongs to none of them.
    """
    values = np.asarray(importance, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise InputError(f"importance: must be finite, of shape (n, k); got shape {values.shape}")
    seen = classes_of(target, len(values)).unique().tolist()
    if len(seen) > 1:
        warnings.warn(f"target: images of {len(seen)} classes are averaged; take one class at a time", stacklevel=2)
    return [bootstrap_interval(column, random_state=random_state) for column in values.T]


# Gradients and occlusion: at every position ---------------------------------------------------------------------------


def summed(values: Float[Tensor, "n *positions k"]) -> Float[Tensor, "n k"]:
    """The sum over the positions."""
    return values.detach().flatten(1, -2).sum(1) if values.ndim > 2 else values.detach()


def _by_captum(
    concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, batch_size: int, attribute: Callable
) -> Float[np.ndarray, "n k"]:
    """Run ``attribute(codes, target=..., additional_forward_args=...)`` batch by batch, and sum over the positions."""
    device = device_of(concepts.model)

    def some(rows: range) -> Tensor:
        where = slice(rows.start, rows.stop)
        pixels = images[where].to(device)
        own = target_classes(_shape_of_logits(concepts, codes[where].to(device), pixels), classes[where].to(device))
        u = codes[where].detach().to(device).requires_grad_()
        return summed(attribute(u, target=own, additional_forward_args=(pixels,)))

    with torch.enable_grad():
        return map_batches(some, range(len(codes)), batch_size=batch_size).double().numpy()


def _shape_of_logits(concepts: ConceptModel, codes: Codes, images: Images) -> Tensor:
    """Logits (n, classes) to check classes against, of one image alone."""
    with torch.no_grad():
        return concepts(codes[:1], images[:1]).expand(len(codes), -1)


def _saliency(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, *, batch_size: int) -> np.ndarray:
    return _by_captum(concepts, codes, images, classes, batch_size, Saliency(concepts).attribute)


def _integrated(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, *, batch_size: int,
                n_steps: int = 32) -> np.ndarray:  # fmt: skip
    """Sundararajan et al., 2017, from codes of 0, by the midpoint rule."""
    path = IntegratedGradients(concepts)

    def attribute(u: Tensor, **rest: Any) -> Tensor:
        return path.attribute(u, n_steps=n_steps, method="riemann_middle", internal_batch_size=batch_size, **rest)

    return _by_captum(concepts, codes, images, classes, batch_size, attribute)


def _occlusion(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, *, batch_size: int) -> np.ndarray:
    """Zeiler and Fergus, 2014: one code at one position becomes 0."""
    gone = FeatureAblation(concepts)

    def attribute(u: Tensor, **rest: Any) -> Tensor:
        with torch.no_grad():
            return gone.attribute(u, perturbations_per_eval=max(1, batch_size // len(u)), **rest)

    return _by_captum(concepts, codes, images, classes, min(batch_size, len(codes)), attribute)


def _noisy(kind: str) -> Callable[..., np.ndarray]:
    """Smilkov et al., 2017 (smoothgrad, squaregrad: mean of squares, Hooker et al., 2019), Adebayo et al., 2018."""

    def run(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, *, batch_size: int,
            random_state: int, n_samples: int = 50, noise: float = 0.2) -> np.ndarray:  # fmt: skip
        tunnel = NoiseTunnel(Saliency(concepts))

        def one(i: int) -> Callable:
            spread = noise * float(codes[i].max() - codes[i].min())

            def attribute(u: Tensor, **rest: Any) -> Tensor:
                with _seeded(random_state, i):
                    return tunnel.attribute(u, nt_type=kind, nt_samples=n_samples, nt_samples_batch_size=_AT_ONCE,
                                            stdevs=max(spread, 1e-12), abs=False, **rest)  # fmt: skip

            return attribute

        return np.concatenate([_by_captum(concepts, codes[i : i + 1], images[i : i + 1], classes[i : i + 1], 1, one(i))
                               for i in range(len(codes))])  # fmt: skip

    return run


# Masks: one value for a concept at all positions ----------------------------------------------------------------------


def masked_logits(
    concepts: ConceptModel, codes: Float[Tensor, "*positions k"], image: Float[Tensor, "1 channel height width"],
    target: int, masks: Float[np.ndarray, "m k"], batch_size: int,
) -> Float[np.ndarray, " m"]:  # fmt: skip
    """The class's logit under each mask of an image's codes."""
    shaped = torch.from_numpy(masks).to(codes).view(len(masks), *(1,) * (codes.ndim - 1), codes.shape[-1])
    return chosen_logits(logits_of_codes(concepts, Masked(codes, shaped), image, batch_size), target).double().numpy()


def _kept_or_not(k: int, n_masks: int, random_state: int, image: int) -> Float[np.ndarray, "m k"]:
    """Masks of 0 and 1, either with chance 1/2; all there are, if no more than `n_masks`."""
    if 2**k <= n_masks:
        return np.array(list(itertools.product((0.0, 1.0), repeat=k)))
    return np.random.default_rng([random_state, image]).integers(0, 2, (n_masks, k)).astype(np.float64)


def _rise(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, *, batch_size: int, random_state: int,
          n_masks: int = 4000) -> np.ndarray:  # fmt: skip
    """Petsiuk et al., 2018: the mean logit of the masks that keep a concept."""
    found = np.empty((len(codes), codes.shape[-1]))
    for i, own in enumerate(codes):
        masks = _kept_or_not(codes.shape[-1], n_masks, random_state, i)
        logits = masked_logits(concepts, own, images[i : i + 1], int(classes[i]), masks, batch_size)
        found[i] = logits @ masks / np.maximum(masks.sum(0), 1)
    return found


def _hsic(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, *, batch_size: int, random_state: int,
          n_masks: int = 500) -> np.ndarray:  # fmt: skip
    """Novello et al., 2022 (arXiv 2206.06219): tr(K H L H) / (m - 1)^2, K Dirac, L Gaussian with median width.

    The centred Dirac kernel of a bit z is ``2 (z - mean)(z - mean)'``. That all masks are few (k small) does no harm.
    """
    found = np.zeros((len(codes), codes.shape[-1]))
    for i, own in enumerate(codes):
        masks = _kept_or_not(codes.shape[-1], n_masks, random_state, i)
        logits = masked_logits(concepts, own, images[i : i + 1], int(classes[i]), masks, batch_size)
        distances = pdist(logits[:, None])
        width = np.median(distances) or distances.mean()
        if width > 0:
            centred = masks - masks.mean(0)
            kernel = np.exp(-(squareform(distances) ** 2) / (2 * width**2))
            found[i] = 2 * (centred * (kernel @ centred)).sum(0) / (len(masks) - 1) ** 2
    return found


def _sobol(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, **options: Any) -> np.ndarray:
    return sobol_importance(concepts, codes, images, classes, **options)


def _kernelshap(concepts: ConceptModel, codes: Codes, images: Images, classes: Tensor, *, batch_size: int,
                random_state: int, n_samples: int = 200) -> np.ndarray:  # fmt: skip
    """Lundberg and Lee, 2017: a weighed linear fit of the logit to coalitions of concepts."""
    k = codes.shape[-1]
    if k < 2:
        return _occlusion(concepts, codes, images, classes, batch_size=batch_size)  # of one player, all there is
    players = torch.arange(k, device=device_of(concepts.model)).view(1, *(1,) * (codes.ndim - 2), k)
    players = players.expand(1, *codes.shape[1:])
    fitted = KernelShap(concepts)

    def one(i: int) -> Callable:
        def attribute(u: Tensor, **rest: Any) -> Tensor:
            with _seeded(random_state, i), torch.no_grad():
                return fitted.attribute(u, feature_mask=players, n_samples=n_samples, perturbations_per_eval=_AT_ONCE,
                                        return_input_shape=False, **rest)  # fmt: skip

        return attribute

    return np.concatenate([_by_captum(concepts, codes[i : i + 1], images[i : i + 1], classes[i : i + 1], 1, one(i))
                           for i in range(len(codes))])  # fmt: skip


@contextmanager
def _seeded(random_state: int, image: int) -> Any:
    """What captum draws follows from the seed and the image; numpy's and torch's own states stay as they were."""
    before = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        seed = int(np.random.SeedSequence([random_state, image]).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)


# Each method, and the options that are its own.
METHODS: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "saliency": (_saliency, ()),
    "gradient_input": (gradient_input, ()),
    "smoothgrad": (_noisy("smoothgrad"), ("n_samples", "noise")),
    "squaregrad": (_noisy("smoothgrad_sq"), ("n_samples", "noise")),
    "vargrad": (_noisy("vargrad"), ("n_samples", "noise")),
    "integrated_gradients": (_integrated, ("n_steps",)),
    "occlusion": (_occlusion, ()),
    "tcav": (tcav, ()),
    "rise": (_rise, ("n_masks",)),
    "sobol": (_sobol, ("n_design", "estimator", "sampler")),
    "hsic": (_hsic, ("n_masks",)),
    "kernelshap": (_kernelshap, ("n_samples",)),
}
_DRAWN = {"smoothgrad", "squaregrad", "vargrad", "rise", "sobol", "hsic", "kernelshap"}
