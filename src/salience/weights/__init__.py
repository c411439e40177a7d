"""The weights room: which layers, weights and deltas matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.weights.bn_only.gammas import (
        GammaReport,
        dead_channels,
        gamma_report,
        init_bn,
        zero_small_gammas,
    )
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
    "DeltaPruner": "darex.pruner",
    "DeltaStats": "darex.diagnosis",
    "Evaluation": "evaluation",
    "GammaReport": "bn_only.gammas",
    "Matching": "weight_matching.matching",
    "ParamSelection": "bn_only.select",
    "PermutationSpec": "weight_matching.spec",
    "add_delta": "darex.delta_file",
    "analytic_q": "darex.rescaling",
    "apply_permutation": "weight_matching.spec",
    "barrier": "weight_matching.merging",
    "check_pair": "darex.directories",
    "compare": "evaluation",
    "dare": "darex.deltas",
    "dead_channels": "bn_only.gammas",
    "delta_stats": "darex.diagnosis",
    "deviation_bound": "darex.rescaling",
    "distance_reduction": "weight_matching.alignment",
    "gamma_report": "bn_only.gammas",
    "hold_frozen": "bn_only.select",
    "importance_delta": "darex.deltas",
    "infer_spec": "weight_matching.spec",
    "init_bn": "bn_only.gammas",
    "interpolate": "weight_matching.merging",
    "load_delta": "darex.delta_file",
    "lora_deltas": "darex.deltas",
    "match_activations": "weight_matching.matching",
    "match_straight_through": "weight_matching.matching",
    "match_weights": "weight_matching.matching",
    "merge_directories": "darex.directories",
    "merge_many": "weight_matching.merging",
    "prune_directory": "darex.directories",
    "recalibrate_norms": "weight_matching.merging",
    "recommend": "darex.diagnosis",
    "save_delta": "darex.delta_file",
    "select_params": "bn_only.select",
    "singular_alignment": "weight_matching.alignment",
    "taylor_barrier": "weight_matching.alignment",
    "train_subset": "bn_only.select",
    "zero_small_gammas": "bn_only.gammas",
}
__all__ = [
    "AdamR",
    "AlignmentResult",
    "BarrierResult",
    "CifarResNet",
    "Comparison",
    "DeltaPruner",
    "DeltaStats",
    "Evaluation",
    "GammaReport",
    "Matching",
    "ParamSelection",
    "PermutationSpec",
    "add_delta",
    "analytic_q",
    "apply_permutation",
    "barrier",
    "check_pair",
    "compare",
    "dare",
    "dead_channels",
    "delta_stats",
    "deviation_bound",
    "distance_reduction",
    "gamma_report",
    "hold_frozen",
    "importance_delta",
    "infer_spec",
    "init_bn",
    "interpolate",
    "load_delta",
    "lora_deltas",
    "match_activations",
    "match_straight_through",
    "match_weights",
    "merge_directories",
    "merge_many",
    "prune_directory",
    "recalibrate_norms",
    "recommend",
    "save_delta",
    "select_params",
    "singular_alignment",
    "taylor_barrier",
    "train_subset",
    "zero_small_gammas",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
