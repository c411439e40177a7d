"""The data room: which training samples, steps and tasks matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.data.adapt_infinity.choosing import (
        balanced_budget,
        ccs_sample,
        choose_score,
        prune_redundant,
        score_entropy,
    )
    from salience.data.adapt_infinity.gradients import GradientFeatures, RandomProjection, gradient_features, in_layers
    from salience.data.adapt_infinity.measures import forgetting, relative_gain
    from salience.data.adapt_infinity.selector import AdaptSelector, ClusterChoice, Signals, StreamStep
    from salience.data.adapt_infinity.signals import measure_samples, sample_scores
    from salience.data.adapt_infinity.stream import StreamSelection, select_stream
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
    from salience.data.row_baselines import deita_filter, k_center_greedy, kmeans_medoids, qdit
    from salience.data.row_selection import RowSelection, select_rows
    from salience.data.text_clusters import ClusterSelection, select_text_clusters
    from salience.data.text_selection import AlreadyDone, TextSelection, score_text, select_text

_WHERE: dict[str, str] = {
    "balanced_budget": "adapt_infinity.choosing", "ccs_sample": "adapt_infinity.choosing",
    "choose_score": "adapt_infinity.choosing", "prune_redundant": "adapt_infinity.choosing",
    "score_entropy": "adapt_infinity.choosing", "GradientFeatures": "adapt_infinity.gradients",
    "RandomProjection": "adapt_infinity.gradients", "gradient_features": "adapt_infinity.gradients",
    "in_layers": "adapt_infinity.gradients", "forgetting": "adapt_infinity.measures",
    "relative_gain": "adapt_infinity.measures", "AdaptSelector": "adapt_infinity.selector",
    "ClusterChoice": "adapt_infinity.selector", "Signals": "adapt_infinity.selector",
    "StreamStep": "adapt_infinity.selector", "sample_scores": "adapt_infinity.signals",
    "measure_samples": "adapt_infinity.signals", "StreamSelection": "adapt_infinity.stream",
    "select_stream": "adapt_infinity.stream",
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
}  # fmt: skip
__all__ = [
    "DSIR",
    "ActiveRun",
    "AdaptSelector",
    "AlreadyDone",
    "BiasLoss",
    "ClusterChoice",
    "ClusterSelection",
    "Diversity",
    "GradientFeatures",
    "HashedNgrams",
    "HeuristicClassifier",
    "IterativeSelector",
    "KMQSelector",
    "LinearMTRL",
    "LossReweighter",
    "RandomProjection",
    "Refinement",
    "RowSelection",
    "SequenceLosses",
    "SharedTrunk",
    "Signals",
    "SkipBlock",
    "SkipblockNet",
    "StreamSelection",
    "StreamStep",
    "TaskRelevance",
    "TaskSelection",
    "TextSelection",
    "TrainerBiasLoss",
    "TrainerReweighting",
    "TrunkMTRL",
    "WeightDiagnostics",
    "active_mtrl",
    "allocate_samples",
    "balanced_budget",
    "ccs_sample",
    "choose_k",
    "choose_score",
    "deita_filter",
    "diversity_report",
    "diversity_scores",
    "feature_variance",
    "forgetting",
    "gradient_features",
    "gumbel_topk",
    "in_layers",
    "k_center_greedy",
    "kl_reduction",
    "kmeans_medoids",
    "lexical_overlap",
    "loss_weights",
    "mean_log_count",
    "measure_samples",
    "per_sequence_loss",
    "perplexity_scorer",
    "prune_redundant",
    "qdit",
    "refine",
    "relative_gain",
    "reward_scorer",
    "sample_scores",
    "score_entropy",
    "score_gap",
    "score_text",
    "select_rows",
    "select_stream",
    "select_tasks",
    "select_text",
    "select_text_clusters",
    "selection_report",
    "task_relevance",
    "weight_diagnostics",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
