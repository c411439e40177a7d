"""The measures of the field on arrays: no models, no files."""

from salience._lazy import exports

_WHERE = {
    "Curve": "curves", "curve": "curves",
    "Detection": "detection", "OSCR": "detection", "aupr": "detection", "auroc": "detection",
    "detection_report": "detection", "fpr_at_tpr": "detection", "oscr": "detection",
    "Interval": "paired", "PairedDifference": "paired", "bootstrap_interval": "paired",
    "paired_difference": "paired",
    "hit_at_k": "ranking", "kendall": "ranking", "ndcg_at_k": "ranking", "precision_at_k": "ranking",
    "recall_at_k": "ranking", "reciprocal_rank": "ranking", "spearman": "ranking", "target_ranks": "ranking",
    "cosine": "similarity", "kl_divergence": "similarity", "linear_cka": "similarity",
    "mmd_squared": "similarity", "rsa": "similarity", "total_variation": "similarity",
}  # fmt: skip
__all__ = list(_WHERE)
__getattr__, __dir__ = exports(__name__, _WHERE)
