"""The measures of the field on arrays: no models, no files."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.measure.curves import Curve, curve
    from salience.measure.detection import OSCR, Detection, aupr, auroc, detection_report, fpr_at_tpr, oscr
    from salience.measure.paired import (
        Interval,
        PairedDifference,
        bootstrap_interval,
        difference_over_draws,
        paired_difference,
    )
    from salience.measure.ranking import (
        hit_at_k,
        kendall,
        ndcg_at_k,
        precision_at_k,
        recall_at_k,
        reciprocal_rank,
        spearman,
        target_ranks,
    )
    from salience.measure.similarity import cosine, kl_divergence, linear_cka, mmd_squared, rsa, total_variation

_WHERE = {
    "Curve": "curves", "curve": "curves",
    "Detection": "detection", "OSCR": "detection", "aupr": "detection", "auroc": "detection",
    "detection_report": "detection", "fpr_at_tpr": "detection", "oscr": "detection",
    "Interval": "paired", "PairedDifference": "paired", "bootstrap_interval": "paired",
    "difference_over_draws": "paired", "paired_difference": "paired",
    "hit_at_k": "ranking", "kendall": "ranking", "ndcg_at_k": "ranking", "precision_at_k": "ranking",
    "recall_at_k": "ranking", "reciprocal_rank": "ranking", "spearman": "ranking", "target_ranks": "ranking",
    "cosine": "similarity", "kl_divergence": "similarity", "linear_cka": "similarity",
    "mmd_squared": "similarity", "rsa": "similarity", "total_variation": "similarity",
}  # fmt: skip
__all__ = [
    "OSCR",
    "Curve",
    "Detection",
    "Interval",
    "PairedDifference",
    "aupr",
    "auroc",
    "bootstrap_interval",
    "cosine",
    "curve",
    "detection_report",
    "difference_over_draws",
    "fpr_at_tpr",
    "hit_at_k",
    "kendall",
    "kl_divergence",
    "linear_cka",
    "mmd_squared",
    "ndcg_at_k",
    "oscr",
    "paired_difference",
    "precision_at_k",
    "recall_at_k",
    "reciprocal_rank",
    "rsa",
    "spearman",
    "target_ranks",
    "total_variation",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
