"""Do important concepts carry the prediction? Deletion and insertion in the space of concepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salience.concepts.concept_model import Codes, ConceptModel, Images, classes_of, logits_of_codes
from salience.concepts.importance import check_rows
from salience.errors import InputError
from salience.features.attribution import target_classes
from salience.measure.curves import Curve, curve


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


def _follow(mode: str, concepts: ConceptModel, codes: Codes, images: Images, target: Any, importance: Any,
            score: str) -> Curve:  # fmt: skip
    check_rows(codes, images)
    n, k = len(codes), codes.shape[-1]
    values = np.asarray(importance, dtype=np.float64)
    if values.shape not in ((k,), (n, k)) or not np.isfinite(values).all():
        raise InputError(f"importance: must be finite, of shape ({k},) or ({n}, {k}); got {values.shape}")
    if score not in ("probability", "logit"):
        raise InputError(f"score: got {score!r}; it must be 'probability' or 'logit'")
    order = np.argsort(-np.broadcast_to(values, (n, k)), axis=1, kind="stable")
    classes = classes_of(target, n)

    def follow(keep: Bool[np.ndarray, "batch units"], rows: Int[np.ndarray, " batch"]) -> np.ndarray:
        i = int(rows[0])  # batches are of one image: what goes around the layer is computed once for it
        mask = torch.from_numpy(keep).to(codes).view(len(keep), *(1,) * (codes.ndim - 2), k)
        logits = logits_of_codes(concepts, codes[i] * mask, images[i : i + 1], len(keep)).double()
        values: Tensor = logits if score == "logit" else logits.softmax(1)
        return values.gather(1, target_classes(logits, int(classes[i]))[:, None])[:, 0].numpy()

    return curve(follow, order, mode=mode, batch_size=k + 1)
