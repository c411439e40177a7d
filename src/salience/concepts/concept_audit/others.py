"""The other explanation methods under audit: TCAV on given vectors, unit-concept overlap, basis decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import interpolate

from salience.concepts.concept_audit.linear import CAV, features_of
from salience.errors import InputError

IOU = 0.04  # below it a unit is of no concept, as in Network Dissection


class Decomposition(NamedTuple):
    """``w = sum_i coef_i v_i + residual`` for each class, with v_i the unit vectors of the concepts.

    `coef` is (classes, c), `residual` (classes, p), and `share` (classes,) the part of ``|w|`` that the residual is.
    """

    coef: Float[np.ndarray, "classes c"]
    residual: Float[np.ndarray, "classes p"]
    share: Float[np.ndarray, " classes"]


def directional_derivatives(gradients: Float[np.ndarray, "n p"], cavs: Mapping[str, CAV]) -> Float[np.ndarray, "n c"]:
    """How fast a class's logit rises along each concept's unit vector: the sensitivity that TCAV counts the signs of.

        S_i(x) = dg_k(h)/dh . v_i,    TCAV_k,i = share of the images of class k with S_i > 0

    Parameters
    ----------
    gradients : array (n, p)
        Of each image's class logit by the layer's features; of a map, summed over the positions.
    cavs : dict of str to CAV

    Returns
    -------
    array (n, c)

    Notes
    -----
    Source: Kim et al., "Interpretability Beyond Feature Attribution", ICML 2018 (arXiv 1711.11279), equations 1 and 2.
    At the last layer, behind which all is linear, S is the same for all images of a class.
    """
    return features_of("gradients", gradients) @ unit_vectors(cavs).T


def unit_concept_iou(
    activations: Float[np.ndarray, "n p *positions"],
    masks: Bool[np.ndarray, "n c *places"],
    quantile: float = 0.995,
) -> Float[np.ndarray, "p c"]:
    """Overlap of where a unit is highly active and where a concept is, over all images.

        IoU_u,c = sum_x |M_u(x) and L_c(x)| / sum_x |M_u(x) or L_c(x)|
        M_u = [ A_u > t_u ],    P(A_u > t_u) = 1 - quantile

    Parameters
    ----------
    activations : array (n, p) or (n, p, height, width)
        Maps are scaled to the size of the masks.
    masks : array (n, c) or (n, c, height, width) of bool
        Where each concept is; of whole images, whether it is there.
    quantile : float in (0, 1)
        Of whole images there are few, so a lower one such as 0.95 is called for.

    Returns
    -------
    array (p, c)

    Raises
    ------
    InputError
        Shapes that do not fit, NaN, or a quantile out of range.

    Notes
    -----
    Source: Bau et al., "Network Dissection", CVPR 2017 (arXiv 1704.05796), section 2.2 (there a threshold for IoU of
    0.04 makes a unit a detector). Whole images in place of pixels: ours.
    """
    values, truth = torch.as_tensor(np.asarray(activations, dtype=np.float64)), np.asarray(masks, dtype=bool)
    if values.ndim != truth.ndim or values.ndim not in (2, 4) or len(values) != len(truth):
        raise InputError(f"activations {tuple(values.shape)} and masks {truth.shape}: must both be (n, ...) or "
                         "(n, ..., height, width), of the same images")  # fmt: skip
    if not torch.isfinite(values).all():
        raise InputError("activations: hold NaN or infinite values")
    if not 0 < quantile < 1:
        raise InputError(f"quantile: got {quantile}; it must lie between 0 and 1")
    if values.ndim == 4 and values.shape[2:] != truth.shape[2:]:
        values = interpolate(values, size=truth.shape[2:], mode="bilinear", align_corners=False)
    flat = _by_unit(values).numpy()
    concept = _by_unit(torch.from_numpy(truth)).numpy().astype(np.float64)
    active = (flat > np.quantile(flat, quantile, axis=1, keepdims=True)).astype(np.float64)
    both = active @ concept.T
    either = active.sum(1)[:, None] + concept.sum(1)[None] - both
    return both / np.maximum(either, 1)


def unit_concepts(iou: Float[np.ndarray, "p c"], least: float = IOU) -> list[int | None]:
    """The concept of each unit: that of the largest overlap, None below `least`."""
    return [int(row.argmax()) if row.max() >= least else None for row in iou]


def basis_decomposition(
    weights: Float[np.ndarray, "classes p"], cavs: Mapping[str, CAV], n_terms: int = 10
) -> Decomposition:
    """Write each class's vector as a sum of concept vectors and a residual, one concept after the other.

        w_k = sum_i s_ki v_i + r_k,    s_ki >= 0

    At each step the concept comes in with which the residual gets shortest when all coefficients are fitted anew.

    Parameters
    ----------
    weights : array (classes, p)
        Of the last layer.
    cavs : dict of str to CAV
        At that layer's features.
    n_terms : int
        Concepts of a class at most; fewer where no further one helps.

    Returns
    -------
    Decomposition

    Raises
    ------
    InputError
        Shapes that do not fit.

    Notes
    -----
    Source: Zhou, Sun, Bau, Torralba, "Interpretable Basis Decomposition for Visual Explanation", ECCV 2018.
    Reconstructed: the brief names the greedy decomposition and the residual; that coefficients are not negative is from
    memory of that paper.
    """
    w, v = features_of("weights", weights), unit_vectors(cavs)
    if w.shape[1] != v.shape[1]:
        raise InputError(f"weights: have {w.shape[1]} features, the concept vectors {v.shape[1]}; give the layer's own")
    coef = np.zeros((len(w), len(v)))
    for k, target in enumerate(w):
        chosen: list[int] = []
        length = float(np.linalg.norm(target))
        for _ in range(min(n_terms, len(v))):
            tries = [(nnls(v[[*chosen, i]].T, target), i) for i in range(len(v)) if i not in chosen]
            (values, left), best = min(tries, key=lambda one: one[0][1])
            if left >= length * (1 - 1e-9):
                break
            chosen.append(best)
            length, coef[k, chosen] = left, values
    residual = w - coef @ v
    norms = np.linalg.norm(w, axis=1)
    return Decomposition(coef, residual, np.linalg.norm(residual, axis=1) / np.where(norms > 0, norms, 1))


def unit_vectors(cavs: Mapping[str, CAV]) -> Float[np.ndarray, "c p"]:
    """The concepts' vectors, of length 1."""
    if not cavs:
        raise InputError("cavs: there is none")
    vectors = np.stack([cav.coef for cav in cavs.values()])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)


def _by_unit(values: Tensor) -> Tensor:
    """(n, units, ...) -> (units, n * positions)."""
    return values.movedim(1, 0).flatten(1)
