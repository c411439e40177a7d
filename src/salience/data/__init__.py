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
    from salience.data.gais.estimator import GAIS
    from salience.data.gais.hashing import lsh_edges
    from salience.data.gais.measures import evaluate_selection, tune_gais
    from salience.data.gais.minibatches import minibatch_edges
    from salience.data.gais.network import GraphAttention
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
}  # fmt: skip
__all__ = [
    "DESMIL",
    "DSIR",
    "GAIS",
    "INSET",
    "NRRDD",
    "PIR",
    "ActiveRun",
    "AlreadyDone",
    "AnswerScorer",
    "BiasLoss",
    "ClassGaussians",
    "ClusterSelection",
    "ComiRecDR",
    "ComiRecSA",
    "DBRLabels",
    "DeepSetSelector",
    "DistilledSet",
    "Diversity",
    "ExactDistribution",
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
    "SkipBlock",
    "SkipblockNet",
    "SoftLabels",
    "StableWeights",
    "Step",
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
    "bn_distance",
    "calibrate_tail",
    "calibrated_gaussians",
    "chat_judge",
    "choose_k",
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
    "gaussian_sets",
    "gumbel_topk",
    "history_and_truth",
    "hsic",
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
    "minibatch_edges",
    "moco_pretrain",
    "model_judge",
    "ood_sequences",
    "pad_sets",
    "pattern_stats",
    "per_sequence_loss",
    "perplexity_scorer",
    "prune_steps",
    "qdit",
    "recall_ndcg_hit",
    "refine",
    "refine_noncritical",
    "refine_traces",
    "registry_sets",
    "reward_scorer",
    "rff",
    "robust_gaussians",
    "score_gap",
    "score_text",
    "segment_reasoning",
    "select_rows",
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
