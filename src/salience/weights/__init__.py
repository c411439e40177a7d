"""The weights room: which layers, weights and deltas matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.weights.bn_only.gammas import GammaReport, dead_channels, gamma_report, init_bn, zero_small_gammas
    from salience.weights.bn_only.resnet import CifarResNet
    from salience.weights.bn_only.select import ParamSelection, hold_frozen, select_params, train_subset
    from salience.weights.ifm.complexity import Complexity, feature_complexity
    from salience.weights.ifm.equivalence import Equivalence, LayerEquivalence, equivalence_report
    from salience.weights.ifm.merging import IFMResult, channel_distance, iterative_feature_merging
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

# A file never bears the name of something exported: importing the file would put the module in its place.
_WHERE: dict[str, str] = {
    "CifarResNet": "bn_only.resnet",
    "Complexity": "ifm.complexity",
    "Equivalence": "ifm.equivalence",
    "GammaReport": "bn_only.gammas",
    "IFMResult": "ifm.merging",
    "LayerEquivalence": "ifm.equivalence",
    "ParamSelection": "bn_only.select",
    "PrunedChannels": "sparseland.structured",
    "SRSTE": "sparseland.masking",
    "SparseTrainer": "sparseland.training",
    "SparsityCallback": "sparseland.callback",
    "SparsityReport": "sparseland.accounting",
    "Ticket": "sparseland.tickets",
    "allocate": "sparseland.densities",
    "apply_masks": "sparseland.masking",
    "channel_distance": "ifm.merging",
    "dead_channels": "bn_only.gammas",
    "densities_of": "sparseland.masking",
    "equivalence_report": "ifm.equivalence",
    "feature_complexity": "ifm.complexity",
    "finalize": "sparseland.masking",
    "gamma_report": "bn_only.gammas",
    "hold_frozen": "bn_only.select",
    "init_bn": "bn_only.gammas",
    "iterative_feature_merging": "ifm.merging",
    "lottery_ticket": "sparseland.tickets",
    "mask_from_scores": "sparseland.masking",
    "measure_latency": "sparseland.accounting",
    "parametrize_masks": "sparseland.masking",
    "prunable": "sparseland.densities",
    "prune_channels": "sparseland.structured",
    "random_masks": "sparseland.masking",
    "score_grasp": "sparseland.scoring",
    "score_magnitude": "sparseland.scoring",
    "score_random": "sparseland.scoring",
    "score_snip": "sparseland.scoring",
    "score_synflow": "sparseland.scoring",
    "score_wanda": "sparseland.scoring",
    "select_params": "bn_only.select",
    "shuffle_masks": "sparseland.masking",
    "sparsity_report": "sparseland.accounting",
    "synflow_masks": "sparseland.masking",
    "taxonomy": "sparseland.accounting",
    "train_subset": "bn_only.select",
    "zero_small_gammas": "bn_only.gammas",
}
__all__ = [
    "SRSTE",
    "CifarResNet",
    "Complexity",
    "Equivalence",
    "GammaReport",
    "IFMResult",
    "LayerEquivalence",
    "ParamSelection",
    "PrunedChannels",
    "SparseTrainer",
    "SparsityCallback",
    "SparsityReport",
    "Ticket",
    "allocate",
    "apply_masks",
    "channel_distance",
    "dead_channels",
    "densities_of",
    "equivalence_report",
    "feature_complexity",
    "finalize",
    "gamma_report",
    "hold_frozen",
    "init_bn",
    "iterative_feature_merging",
    "lottery_ticket",
    "mask_from_scores",
    "measure_latency",
    "parametrize_masks",
    "prunable",
    "prune_channels",
    "random_masks",
    "score_grasp",
    "score_magnitude",
    "score_random",
    "score_snip",
    "score_synflow",
    "score_wanda",
    "select_params",
    "shuffle_masks",
    "sparsity_report",
    "synflow_masks",
    "taxonomy",
    "train_subset",
    "zero_small_gammas",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
