"""How good an importance of concepts is: deletion, insertion and fidelity in the space of concepts.

Source: Fel et al., NeurIPS 2023 (arXiv 2306.07304), section 4, from memory; fidelity as in Bhatt, Weller and Moura,
"Evaluating and Aggregating Feature-based Model Explanations", IJCAI 2020 (arXiv 2005.00631), definition 3, with
Xplique's numbers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from salience.concepts.attributions import masked_logits
from salience.concepts.concept_curves import concept_deletion, concept_insertion
from salience.concepts.concept_model import Codes, ConceptModel, Images, classes_of
from salience.errors import InputError
from salience.measure._checks import at_least
from salience.measure.curves import Curve

CORRELATIONS = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}


@dataclass(frozen=True)
class ImportanceReport:
    """Measures of an importance, image by image.

    Attributes
    ----------
    deletion, insertion : Curve
        The class's logit while concepts go, or come, from the most important on; area low, or high, is good.
    mu_fidelity : array (n,)
        Correlation over random sets of concepts of what the logit loses with what the importance says; high is good.
    constant : boolean array (n,)
        Images whose fidelity is 0 for want of anything that varies: no codes, or the same importance for all.
    """

    deletion: Curve
    insertion: Curve
    mu_fidelity: Float[np.ndarray, " n"]
    constant: Bool[np.ndarray, " n"]


def importance_report(
    concepts: ConceptModel,
    codes: Codes,
    images: Images,
    target: Any,
    importance: Float[np.ndarray, "*n k"],
    *,
    n_subsets: int = 200,
    share: float = 0.2,
    correlation: str = "spearman",
    batch_size: int = 256,
    random_state: int = 0,
) -> ImportanceReport:
    """C-Deletion, C-Insertion and C-muFidelity of an importance, on logits.

        muFidelity = corr_S( g(u) - g(u with u_i = 0 for i in S),  sum_{i in S} phi_i )

    Logits, and not probabilities: a concept that speaks against the class then counts when it goes, and an importance
    without a sign takes it out too early.

    Parameters
    ----------
    concepts : ConceptModel
    codes : Tensor (n, ..., k)
        Best of images that neither the dictionary nor the importance has seen.
    images : Tensor (n, channel, height, width)
    target : int or Tensor (n,)
    importance : array (k,) or (n, k)
        For all images, or of each.
    n_subsets : int
        Sets S, the same for all images.
    share : float
        Chance of a concept to be in S.
    correlation : {"spearman", "pearson"}
    batch_size : int
        Sets at once; halved when memory runs out.
    random_state : int
        Of the sets.

    Returns
    -------
    ImportanceReport

    Raises
    ------
    InputError
        An option out of range, shapes that do not fit, or importance that is not finite.

    Warns
    -----
    UserWarning
        The fidelity of some images is not defined, and 0.
    """
    if correlation not in CORRELATIONS:
        raise InputError(f"correlation: got {correlation!r}; it must be 'spearman' or 'pearson'")
    if not 0 < share < 1:
        raise InputError(f"share: got {share}; it must be above 0 and below 1")
    at_least("n_subsets", n_subsets, 2)
    deletion = concept_deletion(concepts, codes, images, target, importance, score="logit")
    insertion = concept_insertion(concepts, codes, images, target, importance, score="logit")
    n, k = len(codes), codes.shape[-1]
    classes = classes_of(target, n)
    values = np.broadcast_to(np.asarray(importance, dtype=np.float64), (n, k))
    out = np.random.default_rng(random_state).random((n_subsets, k)) < share
    fidelity, constant = np.zeros(n), np.zeros(n, dtype=bool)
    for i in range(n):
        kept = masked_logits(concepts, codes[i], images[i : i + 1], int(classes[i]), (~out).astype(float), batch_size)
        lost, said = deletion.scores[i, 0] - kept, out @ values[i]
        constant[i] = _same(lost, deletion.scores[i, 0]) or _same(said, np.abs(said).max())
        if not constant[i]:
            fidelity[i] = CORRELATIONS[correlation](lost, said).statistic
    if constant.any():
        warnings.warn(f"the fidelity of {int(constant.sum())} of {n} images is 0: their logit or their importance does "
                      "not vary over the sets of concepts", stacklevel=2)  # fmt: skip
    return ImportanceReport(deletion, insertion, fidelity, constant)


def _same(values: Float[np.ndarray, " m"], size: float) -> bool:
    """Whether values differ by no more than rounding in single precision."""
    return float(np.ptp(values)) <= 1e-6 * abs(size)
