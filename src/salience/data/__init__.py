"""The data room: which training samples, steps and tasks matter."""

from salience._lazy import exports

_WHERE: dict[str, str] = {
    "DSIR": "dsir.weights", "kl_reduction": "dsir.weights", "HashedNgrams": "dsir.features",
    "gumbel_topk": "dsir.resample",
    "HeuristicClassifier": "baselines", "lexical_overlap": "baselines", "mean_log_count": "baselines",
    "select_text": "text_selection", "score_text": "text_selection", "TextSelection": "text_selection",
}  # fmt: skip
__all__ = list(_WHERE)
__getattr__, __dir__ = exports(__name__, _WHERE)
