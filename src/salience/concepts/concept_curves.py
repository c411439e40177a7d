"""Do important concepts carry the prediction? Deletion and insertion in the space of concepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salience.concepts.concept_model import Codes, ConceptModel, Images, Masked, classes_of, logits_of_codes
from salience.concepts.importance import check_rows
from salience.errors import InputError
from salience.features.attribution import target_classes
from salience.measure.curves import Curve, curve

_BATCH = 256  # masked codes at once; halved when memory runs out


def concept_deletion(
    concepts: ConceptModel,
    codes: Codes,
    images: Images,
    target: Any,
    importance: Float[np.ndarray, "*n k"],
    *,
    score: str = "probability",
) -> Curve:
    """Set concepts to 0 from the most to the least important, and follow the class: the lower the area, the better.

    Parameters
    ----------
    concepts : ConceptModel
    codes : Tensor (n, ..., k)
        Best of images that neither the dictionary nor the importance has seen.
    images : Tensor (n, channel, height, width)
    target : int or Tensor (n,)
        The class.
    importance : array (k,) or (n, k)
        One order for all images, or one for each.
    score : {"probability", "logit"}
        What is followed; the probability is that of the softmax.

    Returns
    -------
    Curve
        Of k steps for each image.

    Raises
    ------
    InputError
        Shapes that do not fit, importance that is not finite, or no such score.

    Notes
    -----
    Source: section 4.3 of CRAFT (arXiv 2211.10154).
    """
    return _follow("deletion", concepts, codes, images, target, importance, score)


def concept_insertion(
    concepts: ConceptModel,
    codes: Codes,
    images: Images,
    target: Any,
    importance: Float[np.ndarray, "*n k"],
    *,
    score: str = "probability",
) -> Curve:
    """Give concepts back, beginning with none: the higher the area, the better. Parameters as in `concept_deletion`."""
    return _follow("insertion", concepts, codes, images, target, importance, score)


def follow_orders(
    concepts: ConceptModel,
    codes: Codes,
    images: Images,
    target: Any,
    importances: Float[np.ndarray, "m k"],
    *,
    mode: str,
    score: str = "probability",
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, "m n points"]]:
    """Follow every image under each of m orders; what orders share is computed once.

    Parameters as in `concept_deletion`, with a row of `importances` for each order.

    Returns
    -------
    changed : array (points,)
    scores : array (m, n, points)
    """
    values, (n, k) = np.asarray(importances, dtype=np.float64), (len(codes), codes.shape[-1])
    if values.ndim != 2 or values.shape[1] != k:
        raise InputError(f"importances: must have shape (m, {k}); got {values.shape}")
    # Samples are (image, order), image after image, so that a batch is of one image.
    found = _curve(mode, concepts, codes, images, target, np.tile(values, (n, 1)), score)
    return found.changed, found.scores.reshape(n, len(values), -1).swapaxes(0, 1)


def _follow(mode: str, concepts: ConceptModel, codes: Codes, images: Images, target: Any, importance: Any,
            score: str) -> Curve:  # fmt: skip
    values, shape = np.asarray(importance, dtype=np.float64), (len(codes), codes.shape[-1])
    if values.shape not in (shape, shape[1:]):
        raise InputError(f"importance: must have shape {shape[1:]} or {shape}; got {values.shape}")
    return _curve(mode, concepts, codes, images, target, np.broadcast_to(values, shape), score)


def _curve(mode: str, concepts: ConceptModel, codes: Codes, images: Images, target: Any, importance: np.ndarray,
           score: str) -> Curve:  # fmt: skip
    """Curves of n * m samples, of which m follow one another for each of the n images."""
    check_rows(codes, images)
    if not np.isfinite(importance).all():
        raise InputError("importance: holds NaN or infinite values")
    if score not in ("probability", "logit"):
        raise InputError(f"score: got {score!r}; it must be 'probability' or 'logit'")
    classes, repeats, k = classes_of(target, len(codes)), len(importance) // len(codes), codes.shape[-1]

    def follow(keep: Bool[np.ndarray, "batch units"], rows: Int[np.ndarray, " batch"]) -> np.ndarray:
        i = int(rows[0]) // repeats  # batches are of one image: what goes around the layer is computed once for it
        unique, back = np.unique(keep, axis=0, return_inverse=True)
        masks = torch.from_numpy(unique).to(codes).view(len(unique), *(1,) * (codes.ndim - 2), k)
        logits = logits_of_codes(concepts, Masked(codes[i], masks), images[i : i + 1], _BATCH).double()
        values: Tensor = logits if score == "logit" else logits.softmax(1)
        return values.gather(1, target_classes(logits, int(classes[i]))[:, None])[:, 0].numpy()[back.ravel()]

    order = np.argsort(-importance, axis=1, kind="stable")
    return curve(follow, order, mode=mode, batch_size=repeats * (k + 1))
