"""The data room: which training samples, steps and tasks matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.data.baselines import HeuristicClassifier, lexical_overlap, mean_log_count
    from salience.data.bias_loss.diversity import Diversity, diversity_report, diversity_scores
    from salience.data.bias_loss.skipblock import SkipBlock, SkipblockNet
    from salience.data.bias_loss.trainer import TrainerBiasLoss
    from salience.data.bias_loss.variance import feature_variance
    from salience.data.bias_loss.weighted import BiasLoss
    from salience.data.dsir.features import HashedNgrams
    from salience.data.dsir.resample import gumbel_topk
    from salience.data.dsir.weights import DSIR, kl_reduction
    from salience.data.kmq.clustering import choose_k
    from salience.data.kmq.gaps import perplexity_scorer, reward_scorer, score_gap
    from salience.data.kmq.iterate import IterativeSelector, Refinement, refine
    from salience.data.kmq.selector import KMQSelector, selection_report
    from salience.data.lasso_task_selection.active import ActiveRun, active_mtrl
    from salience.data.lasso_task_selection.allocation import allocate_samples
    from salience.data.lasso_task_selection.linear import LinearMTRL
    from salience.data.lasso_task_selection.relevance import TaskRelevance, task_relevance
    from salience.data.lasso_task_selection.selection import TaskSelection, select_tasks
    from salience.data.lasso_task_selection.trunk import SharedTrunk, TrunkMTRL
    from salience.data.loss_reweighting.reweighter import LossReweighter
    from salience.data.loss_reweighting.sequences import SequenceLosses, per_sequence_loss
    from salience.data.loss_reweighting.trainer import TrainerReweighting
    from salience.data.loss_reweighting.weighting import WeightDiagnostics, loss_weights, weight_diagnostics
    from salience.data.nrr_dd.activation import class_activation_map
    from salience.data.nrr_dd.discovery import discover_patches
    from salience.data.nrr_dd.distilled import DistilledSet
    from salience.data.nrr_dd.distilling import NRRDD
    from salience.data.nrr_dd.labels import DBRLabels, HardLabels, SoftLabels, dbr_loss, train_student
    from salience.data.nrr_dd.refinement import bn_distance, refine_noncritical
    from salience.data.nrr_dd.views import View, Views
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
    "task_relevance": "lasso_task_selection.relevance", "TaskRelevance": "lasso_task_selection.relevance",
    "allocate_samples": "lasso_task_selection.allocation", "LinearMTRL": "lasso_task_selection.linear",
    "active_mtrl": "lasso_task_selection.active", "ActiveRun": "lasso_task_selection.active",
    "SharedTrunk": "lasso_task_selection.trunk", "TrunkMTRL": "lasso_task_selection.trunk",
    "select_tasks": "lasso_task_selection.selection", "TaskSelection": "lasso_task_selection.selection",
    "BiasLoss": "bias_loss.weighted", "Diversity": "bias_loss.diversity", "SkipBlock": "bias_loss.skipblock",
    "SkipblockNet": "bias_loss.skipblock", "TrainerBiasLoss": "bias_loss.trainer",
    "diversity_report": "bias_loss.diversity", "diversity_scores": "bias_loss.diversity",
    "feature_variance": "bias_loss.variance",
    "LossReweighter": "loss_reweighting.reweighter", "SequenceLosses": "loss_reweighting.sequences",
    "TrainerReweighting": "loss_reweighting.trainer", "WeightDiagnostics": "loss_reweighting.weighting",
    "loss_weights": "loss_reweighting.weighting", "per_sequence_loss": "loss_reweighting.sequences",
    "weight_diagnostics": "loss_reweighting.weighting",
    "DBRLabels": "nrr_dd.labels", "DistilledSet": "nrr_dd.distilled", "HardLabels": "nrr_dd.labels",
    "NRRDD": "nrr_dd.distilling", "SoftLabels": "nrr_dd.labels", "View": "nrr_dd.views", "Views": "nrr_dd.views",
    "bn_distance": "nrr_dd.refinement", "class_activation_map": "nrr_dd.activation", "dbr_loss": "nrr_dd.labels",
    "discover_patches": "nrr_dd.discovery", "refine_noncritical": "nrr_dd.refinement",
    "train_student": "nrr_dd.labels",
}  # fmt: skip
__all__ = [
    "DSIR",
    "NRRDD",
    "ActiveRun",
    "AlreadyDone",
    "BiasLoss",
    "ClusterSelection",
    "DBRLabels",
    "DistilledSet",
    "Diversity",
    "HardLabels",
    "HashedNgrams",
    "HeuristicClassifier",
    "IterativeSelector",
    "KMQSelector",
    "LinearMTRL",
    "LossReweighter",
    "Refinement",
    "RowSelection",
    "SequenceLosses",
    "SharedTrunk",
    "SkipBlock",
    "SkipblockNet",
    "SoftLabels",
    "TaskRelevance",
    "TaskSelection",
    "TextSelection",
    "TrainerBiasLoss",
    "TrainerReweighting",
    "TrunkMTRL",
    "View",
    "Views",
    "WeightDiagnostics",
    "active_mtrl",
    "allocate_samples",
    "bn_distance",
    "choose_k",
    "class_activation_map",
    "dbr_loss",
    "deita_filter",
    "discover_patches",
    "diversity_report",
    "diversity_scores",
    "feature_variance",
    "gumbel_topk",
    "k_center_greedy",
    "kl_reduction",
    "kmeans_medoids",
    "lexical_overlap",
    "loss_weights",
    "mean_log_count",
    "per_sequence_loss",
    "perplexity_scorer",
    "qdit",
    "refine",
    "refine_noncritical",
    "reward_scorer",
    "score_gap",
    "score_text",
    "select_rows",
    "select_tasks",
    "select_text",
    "select_text_clusters",
    "selection_report",
    "task_relevance",
    "train_student",
    "weight_diagnostics",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
