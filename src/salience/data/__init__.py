"""The data room: which training samples, steps and tasks matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.data.baselines import HeuristicClassifier, lexical_overlap, mean_log_count
    from salience.data.dsir.features import HashedNgrams
    from salience.data.dsir.resample import gumbel_topk
    from salience.data.dsir.weights import DSIR, kl_reduction
    from salience.data.lasso_task_selection.active import ActiveRun, active_mtrl
    from salience.data.lasso_task_selection.allocation import allocate_samples
    from salience.data.lasso_task_selection.linear import LinearMTRL
    from salience.data.lasso_task_selection.relevance import TaskRelevance, task_relevance
    from salience.data.lasso_task_selection.selection import TaskSelection, select_tasks
    from salience.data.lasso_task_selection.trunk import SharedTrunk, TrunkMTRL
    from salience.data.text_selection import AlreadyDone, TextSelection, score_text, select_text

_WHERE: dict[str, str] = {
    "DSIR": "dsir.weights", "kl_reduction": "dsir.weights", "HashedNgrams": "dsir.features",
    "gumbel_topk": "dsir.resample",
    "HeuristicClassifier": "baselines", "lexical_overlap": "baselines", "mean_log_count": "baselines",
    "select_text": "text_selection", "score_text": "text_selection", "TextSelection": "text_selection",
    "AlreadyDone": "text_selection",
    "task_relevance": "lasso_task_selection.relevance", "TaskRelevance": "lasso_task_selection.relevance",
    "allocate_samples": "lasso_task_selection.allocation", "LinearMTRL": "lasso_task_selection.linear",
    "active_mtrl": "lasso_task_selection.active", "ActiveRun": "lasso_task_selection.active",
    "SharedTrunk": "lasso_task_selection.trunk", "TrunkMTRL": "lasso_task_selection.trunk",
    "select_tasks": "lasso_task_selection.selection", "TaskSelection": "lasso_task_selection.selection",
}  # fmt: skip
__all__ = [
    "DSIR",
    "ActiveRun",
    "AlreadyDone",
    "HashedNgrams",
    "HeuristicClassifier",
    "LinearMTRL",
    "SharedTrunk",
    "TaskRelevance",
    "TaskSelection",
    "TextSelection",
    "TrunkMTRL",
    "active_mtrl",
    "allocate_samples",
    "gumbel_topk",
    "kl_reduction",
    "lexical_overlap",
    "mean_log_count",
    "score_text",
    "select_tasks",
    "select_text",
    "task_relevance",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
