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

# A file never bears the name of something exported: importing the file would put the module in its place.
_WHERE: dict[str, str] = {
    "AdamR": "darex.adamr",
    "CifarResNet": "bn_only.resnet",
    "Comparison": "evaluation",
    "DeltaPruner": "darex.pruner",
    "DeltaStats": "darex.diagnosis",
    "Evaluation": "evaluation",
    "GammaReport": "bn_only.gammas",
    "ParamSelection": "bn_only.select",
    "add_delta": "darex.delta_file",
    "analytic_q": "darex.rescaling",
    "check_pair": "darex.directories",
    "compare": "evaluation",
    "dare": "darex.deltas",
    "dead_channels": "bn_only.gammas",
    "delta_stats": "darex.diagnosis",
    "deviation_bound": "darex.rescaling",
    "gamma_report": "bn_only.gammas",
    "hold_frozen": "bn_only.select",
    "importance_delta": "darex.deltas",
    "init_bn": "bn_only.gammas",
    "load_delta": "darex.delta_file",
    "lora_deltas": "darex.deltas",
    "merge_directories": "darex.directories",
    "prune_directory": "darex.directories",
    "recommend": "darex.diagnosis",
    "save_delta": "darex.delta_file",
    "select_params": "bn_only.select",
    "train_subset": "bn_only.select",
    "zero_small_gammas": "bn_only.gammas",
}
__all__ = [
    "AdamR",
    "CifarResNet",
    "Comparison",
    "DeltaPruner",
    "DeltaStats",
    "Evaluation",
    "GammaReport",
    "ParamSelection",
    "add_delta",
    "analytic_q",
    "check_pair",
    "compare",
    "dare",
    "dead_channels",
    "delta_stats",
    "deviation_bound",
    "gamma_report",
    "hold_frozen",
    "importance_delta",
    "init_bn",
    "load_delta",
    "lora_deltas",
    "merge_directories",
    "prune_directory",
    "recommend",
    "save_delta",
    "select_params",
    "train_subset",
    "zero_small_gammas",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
