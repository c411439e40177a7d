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
    from salience.weights.ist.ablation import layer_ablation
    from salience.weights.ist.callback import ISTCallback
    from salience.weights.ist.tuning import ImportanceSparseTuning
    from salience.weights.peft_survey.adapters import BottleneckAdapter
    from salience.weights.peft_survey.attaching import TunedModel, attach, extra_loss, prepare_optimizer
    from salience.weights.peft_survey.bench import BenchRow, BenchTable, peft_bench, recommend_peft
    from salience.weights.peft_survey.cards import REGISTRY, MethodCard, peft_methods
    from salience.weights.peft_survey.hybrid import MAMAdapter, UniPELT, gate_values
    from salience.weights.peft_survey.selective import FreezeSelector, GradientMask
    from salience.weights.peft_survey.stored import load_adapter, merge_adapter, save_adapter
    from salience.weights.peft_survey.visual_prompt import VisualPrompt
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
    "BenchRow": "peft_survey.bench",
    "BenchTable": "peft_survey.bench",
    "BottleneckAdapter": "peft_survey.adapters",
    "CifarResNet": "bn_only.resnet",
    "Comparison": "evaluation",
    "Complexity": "ifm.complexity",
    "DeltaPruner": "darex.pruner",
    "DeltaStats": "darex.diagnosis",
    "Equivalence": "ifm.equivalence",
    "Evaluation": "evaluation",
    "FreezeSelector": "peft_survey.selective",
    "GammaReport": "bn_only.gammas",
    "GradientMask": "peft_survey.selective",
    "IFMResult": "ifm.merging",
    "ISTCallback": "ist.callback",
    "ImportanceSparseTuning": "ist.tuning",
    "LayerEquivalence": "ifm.equivalence",
    "MAMAdapter": "peft_survey.hybrid",
    "Matching": "weight_matching.matching",
    "MethodCard": "peft_survey.cards",
    "ParamSelection": "bn_only.select",
    "PermutationSpec": "weight_matching.spec",
    "PrunedChannels": "sparseland.structured",
    "REGISTRY": "peft_survey.cards",
    "SRSTE": "sparseland.masking",
    "SparseTrainer": "sparseland.training",
    "SparsityCallback": "sparseland.callback",
    "SparsityReport": "sparseland.accounting",
    "Ticket": "sparseland.tickets",
    "TunedModel": "peft_survey.attaching",
    "UniPELT": "peft_survey.hybrid",
    "VisualPrompt": "peft_survey.visual_prompt",
    "add_delta": "darex.delta_file",
    "allocate": "sparseland.densities",
    "analytic_q": "darex.rescaling",
    "apply_masks": "sparseland.masking",
    "apply_permutation": "weight_matching.spec",
    "attach": "peft_survey.attaching",
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
    "extra_loss": "peft_survey.attaching",
    "feature_complexity": "ifm.complexity",
    "finalize": "sparseland.masking",
    "gamma_report": "bn_only.gammas",
    "gate_values": "peft_survey.hybrid",
    "hold_frozen": "bn_only.select",
    "importance_delta": "darex.deltas",
    "infer_spec": "weight_matching.spec",
    "init_bn": "bn_only.gammas",
    "interpolate": "weight_matching.merging",
    "iterative_feature_merging": "ifm.merging",
    "load_adapter": "peft_survey.stored",
    "layer_ablation": "ist.ablation",
    "load_delta": "darex.delta_file",
    "lora_deltas": "darex.deltas",
    "lottery_ticket": "sparseland.tickets",
    "mask_from_scores": "sparseland.masking",
    "match_activations": "weight_matching.matching",
    "match_straight_through": "weight_matching.matching",
    "match_weights": "weight_matching.matching",
    "measure_latency": "sparseland.accounting",
    "merge_adapter": "peft_survey.stored",
    "merge_directories": "darex.directories",
    "merge_many": "weight_matching.merging",
    "parametrize_masks": "sparseland.masking",
    "peft_bench": "peft_survey.bench",
    "peft_methods": "peft_survey.cards",
    "prepare_optimizer": "peft_survey.attaching",
    "prunable": "sparseland.densities",
    "prune_channels": "sparseland.structured",
    "prune_directory": "darex.directories",
    "random_masks": "sparseland.masking",
    "recalibrate_norms": "weight_matching.merging",
    "recommend": "darex.diagnosis",
    "recommend_peft": "peft_survey.bench",
    "save_adapter": "peft_survey.stored",
    "save_delta": "darex.delta_file",
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
    "zero_small_gammas": "bn_only.gammas",
}
__all__ = [
    "REGISTRY",
    "SRSTE",
    "AdamR",
    "AlignmentResult",
    "BarrierResult",
    "BenchRow",
    "BenchTable",
    "BottleneckAdapter",
    "CifarResNet",
    "Comparison",
    "Complexity",
    "DeltaPruner",
    "DeltaStats",
    "Equivalence",
    "Evaluation",
    "FreezeSelector",
    "GammaReport",
    "GradientMask",
    "IFMResult",
    "ISTCallback",
    "ImportanceSparseTuning",
    "LayerEquivalence",
    "MAMAdapter",
    "Matching",
    "MethodCard",
    "ParamSelection",
    "PermutationSpec",
    "PrunedChannels",
    "SparseTrainer",
    "SparsityCallback",
    "SparsityReport",
    "Ticket",
    "TunedModel",
    "UniPELT",
    "VisualPrompt",
    "add_delta",
    "allocate",
    "analytic_q",
    "apply_masks",
    "apply_permutation",
    "attach",
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
    "extra_loss",
    "feature_complexity",
    "finalize",
    "gamma_report",
    "gate_values",
    "hold_frozen",
    "importance_delta",
    "infer_spec",
    "init_bn",
    "interpolate",
    "iterative_feature_merging",
    "layer_ablation",
    "load_adapter",
    "load_delta",
    "lora_deltas",
    "lottery_ticket",
    "mask_from_scores",
    "match_activations",
    "match_straight_through",
    "match_weights",
    "measure_latency",
    "merge_adapter",
    "merge_directories",
    "merge_many",
    "parametrize_masks",
    "peft_bench",
    "peft_methods",
    "prepare_optimizer",
    "prunable",
    "prune_channels",
    "prune_directory",
    "random_masks",
    "recalibrate_norms",
    "recommend",
    "recommend_peft",
    "save_adapter",
    "save_delta",
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
    "zero_small_gammas",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
