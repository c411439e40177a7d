"""The features room: which inputs and columns matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.features.attribution import LogitsModel, attribute_batches, default_layers, spatial_layers
    from salience.features.normgrad.checks import (
        ClassSensitivity,
        PointingGame,
        Randomised,
        class_sensitivity,
        randomization_check,
        weight_layers,
    )
    from salience.features.normgrad.fusion import fuse, normalise
    from salience.features.normgrad.meta import MetaSaliency
    from salience.features.normgrad.saliency import GradCAM, Gradient, LayerSaliency, LinearApproximation, NormGrad
    from salience.features.outrank.mutual_info import ca_mutual_info
    from salience.features.outrank.ranking import rank_table
    from salience.features.outrank.report import RankReport
    from salience.features.outrank.selector import OutRankSelector

_WHERE: dict[str, str] = {
    "LogitsModel": "attribution", "attribute_batches": "attribution", "default_layers": "attribution",
    "spatial_layers": "attribution",
    "ClassSensitivity": "normgrad.checks", "PointingGame": "normgrad.checks", "Randomised": "normgrad.checks",
    "class_sensitivity": "normgrad.checks", "randomization_check": "normgrad.checks",
    "weight_layers": "normgrad.checks",
    "fuse": "normgrad.fusion", "normalise": "normgrad.fusion",
    "MetaSaliency": "normgrad.meta",
    "GradCAM": "normgrad.saliency", "Gradient": "normgrad.saliency", "LayerSaliency": "normgrad.saliency",
    "LinearApproximation": "normgrad.saliency", "NormGrad": "normgrad.saliency",
    "ca_mutual_info": "outrank.mutual_info",
    "rank_table": "outrank.ranking",
    "RankReport": "outrank.report",
    "OutRankSelector": "outrank.selector",
}  # fmt: skip
__all__ = [
    "ClassSensitivity",
    "GradCAM",
    "Gradient",
    "LayerSaliency",
    "LinearApproximation",
    "LogitsModel",
    "MetaSaliency",
    "NormGrad",
    "OutRankSelector",
    "PointingGame",
    "Randomised",
    "RankReport",
    "attribute_batches",
    "ca_mutual_info",
    "class_sensitivity",
    "default_layers",
    "fuse",
    "normalise",
    "randomization_check",
    "rank_table",
    "spatial_layers",
    "weight_layers",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
