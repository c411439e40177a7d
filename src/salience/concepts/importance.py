"""How much concepts matter to a class: attribution of ``u -> g(decode(u))_c``, one row of k numbers an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from salience.concepts.concept_model import (
    Codes,
    ConceptModel,
    Images,
    Masked,
    chosen_logits,
    classes_of,
    logits_of_codes,
)
from salience.concepts.sensitivity import sobol_design, total_indices
from salience.errors import InputError
from salience.features.attribution import device_of, target_scores
from salience.model.batches import map_batches


def sobol_importance(
    concepts: ConceptModel,
    codes: Codes,
    images: Images,
    target: Any,
    *,
    n_design: int = 32,
    estimator: str = "jansen",
    sampler: str = "halton",
    random_state: int | None = None,
    batch_size: int = 256,
) -> Float[np.ndarray, "n k"]:
    """Total Sobol index of each concept's code, for each image.

        Y(m) = g(decode(u * m))_c,    m in [0, 1]^k,    S_Ti = E[Var(Y | all of m but m_i)] / Var(Y)

    A mask has one value for a concept at all positions. The index has no sign: a concept that speaks against the class
    counts like one that speaks for it (`gradient_input` tells which).

    Parameters
    ----------
    concepts : ConceptModel
    codes : Tensor (n, ..., k)
        Of `concepts.encode(images)`.
    images : Tensor (n, channel, height, width)
    target : int or Tensor (n,)
        The class, whose logit is followed.
    n_design, estimator, sampler
        See `sobol_design` and `total_indices`; an image costs ``n_design * (k + 2)`` passes behind the layer.
    random_state : int, optional
        Give every image a scrambled design of its own, so that the spread over images holds the error of the designs.
        By default all images share the plain one.
    batch_size : int
        Masks at once; halved when memory runs out. With each batch one row also goes through the layers in front.

    Returns
    -------
    array (n, k)

    Raises
    ------
    InputError
        Shapes that do not fit, a class that is not there, or as in `sobol_design`.

    Notes
    -----
    Source: section 3.2 of CRAFT (arXiv 2211.10154); defaults as in the authors' code.
    """
    check_rows(codes, images)
    k = codes.shape[-1]
    classes = classes_of(target, len(codes))
    totals = np.empty((len(codes), k))
    for i, own in enumerate(codes):
        if i == 0 or random_state is not None:
            seed = None if random_state is None else int(np.random.SeedSequence([random_state, i]).generate_state(1)[0])
            masks = torch.from_numpy(sobol_design(k, n_design, sampler, random_state=seed)).to(codes)
            masks = masks.view(len(masks), *(1,) * (own.ndim - 1), k)
        logits = logits_of_codes(concepts, Masked(own, masks), images[i : i + 1], batch_size)
        totals[i] = total_indices(chosen_logits(logits, int(classes[i])).double().numpy(), k, estimator)
    return totals


def gradient_input(
    concepts: ConceptModel, codes: Codes, images: Images, target: Any, *, batch_size: int = 64
) -> Float[np.ndarray, "n k"]:
    """Gradient x code, summed over the positions; its sign says whether a concept speaks for the class.

        phi_i(u) = sum_positions u_i dg_c/du_i

    Parameters as in `sobol_importance`.
    """
    return _gradients(concepts, codes, images, target, batch_size)[0]


def tcav(
    concepts: ConceptModel, codes: Codes, images: Images, target: Any, *, batch_size: int = 64
) -> Float[np.ndarray, "n k"]:
    """1 where the class's logit rises along the concept's vector, else 0; the mean over images is the TCAV score.

        [ sum_positions dg_c/da . V_i > 0 ]

    Parameters as in `sobol_importance`. Source: Kim et al., "Interpretability Beyond Feature Attribution", ICML 2018
    (arXiv 1711.11279), equation 2.
    """
    return (_gradients(concepts, codes, images, target, batch_size)[1] > 0).astype(np.float64)


def _gradients(
    concepts: ConceptModel, codes: Codes, images: Images, target: Any, batch_size: int
) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Sums over the positions of code x gradient, and of the gradient."""
    check_rows(codes, images)
    device, classes = device_of(concepts.model), classes_of(target, len(codes))

    def some(rows: range) -> tuple[Tensor, Tensor]:
        where = slice(rows.start, rows.stop)
        with torch.enable_grad():
            u = codes[where].detach().to(device).requires_grad_()
            logits = concepts(u, images[where].to(device))
            gradient = torch.autograd.grad(target_scores(logits, classes[where].to(logits.device)).sum(), u)[0]
        parts = (u.detach() * gradient, gradient)
        return tuple(part.flatten(1, -2).sum(1) if part.ndim > 2 else part for part in parts)  # type: ignore[return-value]

    products, gradients = map_batches(some, range(len(codes)), batch_size=batch_size)
    return products.double().numpy(), gradients.double().numpy()


def check_rows(codes: Codes, images: Images) -> None:
    """An `InputError` if codes and images are not of the same number."""
    if len(codes) != len(images) or not len(codes):
        raise InputError(
            f"codes and images: have {len(codes)} and {len(images)} rows; they must be as many, at least 1"
        )
