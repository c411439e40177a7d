"""The data room: which training samples, steps and tasks matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.data.baselines import HeuristicClassifier, lexical_overlap, mean_log_count
    from salience.data.dsir.features import HashedNgrams
    from salience.data.dsir.resample import gumbel_topk
    from salience.data.dsir.weights import DSIR, kl_reduction
    from salience.data.kmq.clustering import choose_k
    from salience.data.kmq.gaps import perplexity_scorer, reward_scorer, score_gap
    from salience.data.kmq.iterate import IterativeSelector, Refinement, refine
    from salience.data.kmq.selector import KMQSelector, selection_report
    from salience.data.row_baselines import deita_filter, k_center_greedy, kmeans_medoids, qdit
    from salience.data.row_selection import RowSelection, select_rows
    from salience.data.text_clusters import ClusterSelection, select_text_clusters
    from salience.data.text_selection import AlreadyDone, TextSelection, score_text, select_text

_WHERE: dict[str, str] = {
    "DSIR": "dsir.weights", "kl_reduction": "dsir.weights", "HashedNgrams": "dsir.features",
    "gumbel_topk": "dsir.resample",
    "HeuristicClassifier": "baselines", "lexical_overlap": "baselines", "mean_log_count": "baselines",
    "KMQSelector": "kmq.selector", "selection_report": "kmq.selector", "choose_k": "kmq.clustering",
    "IterativeSelector": "kmq.iterate", "Refinement": "kmq.iterate", "refine": "kmq.iterate",
    "score_gap": "kmq.gaps", "perplexity_scorer": "kmq.gaps", "reward_scorer": "kmq.gaps",
    "deita_filter": "row_baselines", "k_center_greedy": "row_baselines", "kmeans_medoids": "row_baselines",
    "qdit": "row_baselines", "select_rows": "row_selection", "RowSelection": "row_selection",
    "select_text_clusters": "text_clusters", "ClusterSelection": "text_clusters",
    "select_text": "text_selection", "score_text": "text_selection", "TextSelection": "text_selection",
    "AlreadyDone": "text_selection",
}  # fmt: skip
__all__ = [
    "DSIR",
    "AlreadyDone",
    "ClusterSelection",
    "HashedNgrams",
    "HeuristicClassifier",
    "IterativeSelector",
    "KMQSelector",
    "Refinement",
    "RowSelection",
    "TextSelection",
    "choose_k",
    "deita_filter",
    "gumbel_topk",
    "k_center_greedy",
    "kl_reduction",
    "kmeans_medoids",
    "lexical_overlap",
    "mean_log_count",
    "perplexity_scorer",
    "qdit",
    "refine",
    "reward_scorer",
    "score_gap",
    "score_text",
    "select_rows",
    "select_text",
    "select_text_clusters",
    "selection_report",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
