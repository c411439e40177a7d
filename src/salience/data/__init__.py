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
    from salience.data.desmil.dependence import hsic, interest_dependence, rff
    from salience.data.desmil.extractors import ComiRecDR, ComiRecSA, MultiInterest
    from salience.data.desmil.recommender import DESMIL
    from salience.data.desmil.sequences import history_and_truth, ood_sequences, recall_ndcg_hit
    from salience.data.desmil.weighting import StableWeights
    from salience.data.dsir.features import HashedNgrams
    from salience.data.dsir.resample import gumbel_topk
    from salience.data.dsir.weights import DSIR, kl_reduction
    from salience.data.gais.estimator import GAIS
    from salience.data.gais.hashing import lsh_edges
    from salience.data.gais.measures import evaluate_selection, tune_gais
    from salience.data.gais.minibatches import minibatch_edges
    from salience.data.gais.network import GraphAttention
    from salience.data.inset.baselines import DeepSetSelector, PGMSelector, RandomSelector, SetTransformerSelector
    from salience.data.inset.exact import ExactDistribution, exact_distribution
    from salience.data.inset.examples import anomaly_sets, gaussian_sets, registry_sets, top_value_sets, two_moons_sets
    from salience.data.inset.model import INSET
    from salience.data.inset.recognition import RecognitionNet
    from salience.data.inset.selector import SubsetExamples, SubsetSelector, pad_sets
    from salience.data.inset.training import SelectorHistory, fit_selector, mean_jaccard
    from salience.data.inset.utility import SetUtility
    from salience.data.instance_baselines import condensed_neighbours, drop3, edited_neighbours, stratified_random
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
    from salience.data.pir.judges import chat_judge, model_judge
    from salience.data.pir.pruning import comparator, efficiency, pattern_stats, prune_steps
    from salience.data.pir.refiner import PIR
    from salience.data.pir.scoring import AnswerScorer
    from salience.data.pir.steps import Judgement, Step, classify_steps, segment_reasoning
    from salience.data.pir.traces import TraceRefinement, refine_traces
    from salience.data.rcal.classifier import RCALHead
    from salience.data.rcal.contrast import contrastive_loss, moco_pretrain
    from salience.data.rcal.gaussians import ClassGaussians, calibrate_tail, label_trust, robust_gaussians
    from salience.data.rcal.noise import ShotAccuracy, flip_labels, long_tail, shot_accuracy
    from salience.data.rcal.trainer import RCALTrainer, calibrated_gaussians
    from salience.data.rcal.views import strong_view, weak_view
    from salience.data.row_baselines import deita_filter, k_center_greedy, kmeans_medoids, qdit
    from salience.data.row_selection import RowSelection, select_rows
    from salience.data.text_clusters import ClusterSelection, select_text_clusters
    from salience.data.text_selection import AlreadyDone, TextSelection, score_text, select_text

_WHERE: dict[str, str] = {
    "DSIR": "dsir.weights", "kl_reduction": "dsir.weights", "HashedNgrams": "dsir.features",
    "gumbel_topk": "dsir.resample",
    "HeuristicClassifier": "baselines", "lexical_overlap": "baselines", "mean_log_count": "baselines",
    "GAIS": "gais.estimator", "GraphAttention": "gais.network", "lsh_edges": "gais.hashing",
    "minibatch_edges": "gais.minibatches", "evaluate_selection": "gais.measures", "tune_gais": "gais.measures",
    "condensed_neighbours": "instance_baselines", "drop3": "instance_baselines",
    "edited_neighbours": "instance_baselines", "stratified_random": "instance_baselines",
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
    "ClassGaussians": "rcal.gaussians", "RCALHead": "rcal.classifier", "RCALTrainer": "rcal.trainer",
    "ShotAccuracy": "rcal.noise", "calibrate_tail": "rcal.gaussians", "calibrated_gaussians": "rcal.trainer",
    "contrastive_loss": "rcal.contrast", "flip_labels": "rcal.noise", "label_trust": "rcal.gaussians",
    "long_tail": "rcal.noise", "moco_pretrain": "rcal.contrast", "robust_gaussians": "rcal.gaussians",
    "shot_accuracy": "rcal.noise", "strong_view": "rcal.views", "weak_view": "rcal.views",
    "SubsetSelector": "inset.selector", "SubsetExamples": "inset.selector", "pad_sets": "inset.selector",
    "INSET": "inset.model", "SetUtility": "inset.utility", "RecognitionNet": "inset.recognition",
    "RandomSelector": "inset.baselines", "DeepSetSelector": "inset.baselines",
    "SetTransformerSelector": "inset.baselines", "PGMSelector": "inset.baselines", "fit_selector": "inset.training",
    "mean_jaccard": "inset.training", "SelectorHistory": "inset.training", "exact_distribution": "inset.exact",
    "ExactDistribution": "inset.exact", "two_moons_sets": "inset.examples", "gaussian_sets": "inset.examples",
    "anomaly_sets": "inset.examples", "registry_sets": "inset.examples", "top_value_sets": "inset.examples",
    "hsic": "desmil.dependence", "interest_dependence": "desmil.dependence", "rff": "desmil.dependence",
    "ComiRecDR": "desmil.extractors", "ComiRecSA": "desmil.extractors", "MultiInterest": "desmil.extractors",
    "DESMIL": "desmil.recommender", "StableWeights": "desmil.weighting", "history_and_truth": "desmil.sequences",
    "ood_sequences": "desmil.sequences", "recall_ndcg_hit": "desmil.sequences",
    "PIR": "pir.refiner", "AnswerScorer": "pir.scoring", "Step": "pir.steps", "Judgement": "pir.steps",
    "segment_reasoning": "pir.steps", "classify_steps": "pir.steps", "chat_judge": "pir.judges",
    "model_judge": "pir.judges", "prune_steps": "pir.pruning", "comparator": "pir.pruning",
    "pattern_stats": "pir.pruning", "efficiency": "pir.pruning", "refine_traces": "pir.traces",
    "TraceRefinement": "pir.traces",
    "DBRLabels": "nrr_dd.labels", "DistilledSet": "nrr_dd.distilled", "HardLabels": "nrr_dd.labels",
    "NRRDD": "nrr_dd.distilling", "SoftLabels": "nrr_dd.labels", "View": "nrr_dd.views", "Views": "nrr_dd.views",
    "bn_distance": "nrr_dd.refinement", "class_activation_map": "nrr_dd.activation", "dbr_loss": "nrr_dd.labels",
    "discover_patches": "nrr_dd.discovery", "refine_noncritical": "nrr_dd.refinement",
    "train_student": "nrr_dd.labels",
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
}  # fmt: skip
__all__ = [
    "DESMIL",
    "DSIR",
    "GAIS",
    "INSET",
    "NRRDD",
    "PIR",
    "ActiveRun",
    "AdaptSelector",
    "AlreadyDone",
    "AnswerScorer",
    "BiasLoss",
    "ClassGaussians",
    "ClusterChoice",
    "ClusterSelection",
    "ComiRecDR",
    "ComiRecSA",
    "DBRLabels",
    "DeepSetSelector",
    "DistilledSet",
    "Diversity",
    "ExactDistribution",
    "GradientFeatures",
    "GraphAttention",
    "HardLabels",
    "HashedNgrams",
    "HeuristicClassifier",
    "IterativeSelector",
    "Judgement",
    "KMQSelector",
    "LinearMTRL",
    "LossReweighter",
    "MultiInterest",
    "PGMSelector",
    "RCALHead",
    "RCALTrainer",
    "RandomProjection",
    "RandomSelector",
    "RecognitionNet",
    "Refinement",
    "RowSelection",
    "SelectorHistory",
    "SequenceLosses",
    "SetTransformerSelector",
    "SetUtility",
    "SharedTrunk",
    "ShotAccuracy",
    "Signals",
    "SkipBlock",
    "SkipblockNet",
    "SoftLabels",
    "StableWeights",
    "Step",
    "StreamSelection",
    "StreamStep",
    "SubsetExamples",
    "SubsetSelector",
    "TaskRelevance",
    "TaskSelection",
    "TextSelection",
    "TraceRefinement",
    "TrainerBiasLoss",
    "TrainerReweighting",
    "TrunkMTRL",
    "View",
    "Views",
    "WeightDiagnostics",
    "active_mtrl",
    "allocate_samples",
    "anomaly_sets",
    "balanced_budget",
    "bn_distance",
    "calibrate_tail",
    "calibrated_gaussians",
    "ccs_sample",
    "chat_judge",
    "choose_k",
    "choose_score",
    "class_activation_map",
    "classify_steps",
    "comparator",
    "condensed_neighbours",
    "contrastive_loss",
    "dbr_loss",
    "deita_filter",
    "discover_patches",
    "diversity_report",
    "diversity_scores",
    "drop3",
    "edited_neighbours",
    "efficiency",
    "evaluate_selection",
    "exact_distribution",
    "feature_variance",
    "fit_selector",
    "flip_labels",
    "forgetting",
    "gaussian_sets",
    "gradient_features",
    "gumbel_topk",
    "history_and_truth",
    "hsic",
    "in_layers",
    "interest_dependence",
    "k_center_greedy",
    "kl_reduction",
    "kmeans_medoids",
    "label_trust",
    "lexical_overlap",
    "long_tail",
    "loss_weights",
    "lsh_edges",
    "mean_jaccard",
    "mean_log_count",
    "measure_samples",
    "minibatch_edges",
    "moco_pretrain",
    "model_judge",
    "ood_sequences",
    "pad_sets",
    "pattern_stats",
    "per_sequence_loss",
    "perplexity_scorer",
    "prune_redundant",
    "prune_steps",
    "qdit",
    "recall_ndcg_hit",
    "refine",
    "refine_noncritical",
    "refine_traces",
    "registry_sets",
    "relative_gain",
    "reward_scorer",
    "rff",
    "robust_gaussians",
    "sample_scores",
    "score_entropy",
    "score_gap",
    "score_text",
    "segment_reasoning",
    "select_rows",
    "select_stream",
    "select_tasks",
    "select_text",
    "select_text_clusters",
    "selection_report",
    "shot_accuracy",
    "stratified_random",
    "strong_view",
    "task_relevance",
    "top_value_sets",
    "train_student",
    "tune_gais",
    "two_moons_sets",
    "weak_view",
    "weight_diagnostics",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
