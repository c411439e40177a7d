"""The data room: which training samples, steps and tasks matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.data.baselines import HeuristicClassifier, lexical_overlap, mean_log_count
    from salience.data.dsir.features import HashedNgrams
    from salience.data.dsir.resample import gumbel_topk
    from salience.data.dsir.weights import DSIR, kl_reduction
    from salience.data.text_selection import AlreadyDone, TextSelection, score_text, select_text

_WHERE: dict[str, str] = {
    "DSIR": "dsir.weights", "kl_reduction": "dsir.weights", "HashedNgrams": "dsir.features",
    "gumbel_topk": "dsir.resample",
    "HeuristicClassifier": "baselines", "lexical_overlap": "baselines", "mean_log_count": "baselines",
    "select_text": "text_selection", "score_text": "text_selection", "TextSelection": "text_selection",
    "AlreadyDone": "text_selection",
}  # fmt: skip
__all__ = [
    "DSIR",
    "AlreadyDone",
    "HashedNgrams",
    "HeuristicClassifier",
    "TextSelection",
    "gumbel_topk",
    "kl_reduction",
    "lexical_overlap",
    "mean_log_count",
    "score_text",
    "select_text",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
