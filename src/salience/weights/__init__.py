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

# A file never bears the name of something exported: importing the file would put the module in its place.
_WHERE: dict[str, str] = {
    "CifarResNet": "bn_only.resnet",
    "GammaReport": "bn_only.gammas",
    "ParamSelection": "bn_only.select",
    "dead_channels": "bn_only.gammas",
    "gamma_report": "bn_only.gammas",
    "hold_frozen": "bn_only.select",
    "init_bn": "bn_only.gammas",
    "select_params": "bn_only.select",
    "train_subset": "bn_only.select",
    "zero_small_gammas": "bn_only.gammas",
}
__all__ = [
    "CifarResNet",
    "GammaReport",
    "ParamSelection",
    "dead_channels",
    "gamma_report",
    "hold_frozen",
    "init_bn",
    "select_params",
    "train_subset",
    "zero_small_gammas",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
