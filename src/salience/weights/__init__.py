"""The weights room: which layers, weights and deltas matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.weights.bn_only.gammas import GammaReport, dead_channels, gamma_report, init_bn, zero_small_gammas
    from salience.weights.bn_only.resnet import CifarResNet
    from salience.weights.bn_only.select import ParamSelection, hold_frozen, select_params, train_subset
    from salience.weights.darex.adamr import AdamR
    from salience.weights.darex.delta_file import add_delta, load_delta, save_delta
    from salience.weights.darex.deltas import dare, importance_delta, lora_deltas
    from salience.weights.darex.diagnosis import DeltaStats, delta_stats, recommend
    from salience.weights.darex.directories import check_pair, merge_directories, prune_directory
    from salience.weights.darex.pruner import DeltaPruner
    from salience.weights.darex.rescaling import analytic_q, deviation_bound
    from salience.weights.evaluation import Comparison, Evaluation, compare
    from salience.weights.ifm.complexity import Complexity, feature_complexity
    from salience.weights.ifm.equivalence import Equivalence, LayerEquivalence, equivalence_report
    from salience.weights.ifm.merging import IFMResult, channel_distance, iterative_feature_merging
    from salience.weights.rsq.directories import QuantizedDirectory, quantize_directory
    from salience.weights.rsq.grids import Grid, Scales, round_to_nearest
    from salience.weights.rsq.importance import TokenImportance
    from salience.weights.rsq.packing import load_packed, save_packed
    from salience.weights.rsq.quantizer import QuantResult, RSQQuantizer
    from salience.weights.rsq.rotating import rotate_model
    from salience.weights.rsq.solving import Solution, gptq_solve, reconstruction_error, weighted_hessian
    from salience.weights.sparseland.accounting import SparsityReport, measure_latency, sparsity_report, taxonomy
    from salience.weights.sparseland.callback import SparsityCallback
    from salience.weights.sparseland.densities import allocate, prunable
    from salience.weights.sparseland.masking import (
        SRSTE,
        apply_masks,
        densities_of,
        finalize,
        mask_from_scores,
        parametrize_masks,
        random_masks,
        shuffle_masks,
        synflow_masks,
    )
    from salience.weights.sparseland.scoring import (
        score_grasp,
        score_magnitude,
        score_random,
        score_snip,
        score_synflow,
        score_wanda,
    )
    from salience.weights.sparseland.structured import PrunedChannels, prune_channels
    from salience.weights.sparseland.tickets import Ticket, lottery_ticket
    from salience.weights.sparseland.training import SparseTrainer
    from salience.weights.weight_matching.alignment import (
        AlignmentResult,
        distance_reduction,
        singular_alignment,
        taylor_barrier,
    )
    from salience.weights.weight_matching.matching import (
        Matching,
        match_activations,
        match_straight_through,
        match_weights,
    )
    from salience.weights.weight_matching.merging import (
        BarrierResult,
        barrier,
        interpolate,
        merge_many,
        recalibrate_norms,
    )
    from salience.weights.weight_matching.spec import PermutationSpec, apply_permutation, infer_spec

# A file never bears the name of something exported: importing the file would put the module in its place.
_WHERE: dict[str, str] = {
    "AdamR": "darex.adamr",
    "AlignmentResult": "weight_matching.alignment",
    "BarrierResult": "weight_matching.merging",
    "CifarResNet": "bn_only.resnet",
    "Comparison": "evaluation",
    "Complexity": "ifm.complexity",
    "DeltaPruner": "darex.pruner",
    "DeltaStats": "darex.diagnosis",
    "Equivalence": "ifm.equivalence",
    "Evaluation": "evaluation",
    "GammaReport": "bn_only.gammas",
    "Grid": "rsq.grids",
    "IFMResult": "ifm.merging",
    "LayerEquivalence": "ifm.equivalence",
    "Matching": "weight_matching.matching",
    "ParamSelection": "bn_only.select",
    "PermutationSpec": "weight_matching.spec",
    "PrunedChannels": "sparseland.structured",
    "QuantResult": "rsq.quantizer",
    "QuantizedDirectory": "rsq.directories",
    "RSQQuantizer": "rsq.quantizer",
    "SRSTE": "sparseland.masking",
    "Scales": "rsq.grids",
    "Solution": "rsq.solving",
    "SparseTrainer": "sparseland.training",
    "SparsityCallback": "sparseland.callback",
    "SparsityReport": "sparseland.accounting",
    "Ticket": "sparseland.tickets",
    "TokenImportance": "rsq.importance",
    "add_delta": "darex.delta_file",
    "allocate": "sparseland.densities",
    "analytic_q": "darex.rescaling",
    "apply_masks": "sparseland.masking",
    "apply_permutation": "weight_matching.spec",
    "barrier": "weight_matching.merging",
    "channel_distance": "ifm.merging",
    "check_pair": "darex.directories",
    "compare": "evaluation",
    "dare": "darex.deltas",
    "dead_channels": "bn_only.gammas",
    "delta_stats": "darex.diagnosis",
    "densities_of": "sparseland.masking",
    "deviation_bound": "darex.rescaling",
    "distance_reduction": "weight_matching.alignment",
    "equivalence_report": "ifm.equivalence",
    "feature_complexity": "ifm.complexity",
    "finalize": "sparseland.masking",
    "gamma_report": "bn_only.gammas",
    "gptq_solve": "rsq.solving",
    "hold_frozen": "bn_only.select",
    "importance_delta": "darex.deltas",
    "infer_spec": "weight_matching.spec",
    "init_bn": "bn_only.gammas",
    "interpolate": "weight_matching.merging",
    "iterative_feature_merging": "ifm.merging",
    "load_delta": "darex.delta_file",
    "load_packed": "rsq.packing",
    "lora_deltas": "darex.deltas",
    "lottery_ticket": "sparseland.tickets",
    "mask_from_scores": "sparseland.masking",
    "match_activations": "weight_matching.matching",
    "match_straight_through": "weight_matching.matching",
    "match_weights": "weight_matching.matching",
    "measure_latency": "sparseland.accounting",
    "merge_directories": "darex.directories",
    "merge_many": "weight_matching.merging",
    "parametrize_masks": "sparseland.masking",
    "prunable": "sparseland.densities",
    "prune_channels": "sparseland.structured",
    "prune_directory": "darex.directories",
    "quantize_directory": "rsq.directories",
    "random_masks": "sparseland.masking",
    "recalibrate_norms": "weight_matching.merging",
    "recommend": "darex.diagnosis",
    "reconstruction_error": "rsq.solving",
    "rotate_model": "rsq.rotating",
    "round_to_nearest": "rsq.grids",
    "save_delta": "darex.delta_file",
    "save_packed": "rsq.packing",
    "score_grasp": "sparseland.scoring",
    "score_magnitude": "sparseland.scoring",
    "score_random": "sparseland.scoring",
    "score_snip": "sparseland.scoring",
    "score_synflow": "sparseland.scoring",
    "score_wanda": "sparseland.scoring",
    "select_params": "bn_only.select",
    "shuffle_masks": "sparseland.masking",
    "singular_alignment": "weight_matching.alignment",
    "sparsity_report": "sparseland.accounting",
    "synflow_masks": "sparseland.masking",
    "taxonomy": "sparseland.accounting",
    "taylor_barrier": "weight_matching.alignment",
    "train_subset": "bn_only.select",
    "weighted_hessian": "rsq.solving",
    "zero_small_gammas": "bn_only.gammas",
}
__all__ = [
    "SRSTE",
    "AdamR",
    "AlignmentResult",
    "BarrierResult",
    "CifarResNet",
    "Comparison",
    "Complexity",
    "DeltaPruner",
    "DeltaStats",
    "Equivalence",
    "Evaluation",
    "GammaReport",
    "Grid",
    "IFMResult",
    "LayerEquivalence",
    "Matching",
    "ParamSelection",
    "PermutationSpec",
    "PrunedChannels",
    "QuantResult",
    "QuantizedDirectory",
    "RSQQuantizer",
    "Scales",
    "Solution",
    "SparseTrainer",
    "SparsityCallback",
    "SparsityReport",
    "Ticket",
    "TokenImportance",
    "add_delta",
    "allocate",
    "analytic_q",
    "apply_masks",
    "apply_permutation",
    "barrier",
    "channel_distance",
    "check_pair",
    "compare",
    "dare",
    "dead_channels",
    "delta_stats",
    "densities_of",
    "deviation_bound",
    "distance_reduction",
    "equivalence_report",
    "feature_complexity",
    "finalize",
    "gamma_report",
    "gptq_solve",
    "hold_frozen",
    "importance_delta",
    "infer_spec",
    "init_bn",
    "interpolate",
    "iterative_feature_merging",
    "load_delta",
    "load_packed",
    "lora_deltas",
    "lottery_ticket",
    "mask_from_scores",
    "match_activations",
    "match_straight_through",
    "match_weights",
    "measure_latency",
    "merge_directories",
    "merge_many",
    "parametrize_masks",
    "prunable",
    "prune_channels",
    "prune_directory",
    "quantize_directory",
    "random_masks",
    "recalibrate_norms",
    "recommend",
    "reconstruction_error",
    "rotate_model",
    "round_to_nearest",
    "save_delta",
    "save_packed",
    "score_grasp",
    "score_magnitude",
    "score_random",
    "score_snip",
    "score_synflow",
    "score_wanda",
    "select_params",
    "shuffle_masks",
    "singular_alignment",
    "sparsity_report",
    "synflow_masks",
    "taxonomy",
    "taylor_barrier",
    "train_subset",
    "weighted_hessian",
    "zero_small_gammas",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
