"""The features room: which inputs and columns matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.features.attribution import LogitsModel, attribute_batches, default_layers, spatial_layers
    from salience.features.blackbox_surrogate.explainer import Explanation, HighDimExplainer, fidelity_of
    from salience.features.blackbox_surrogate.networks import (
        CAEClassifier,
        CodeClassifier,
        ConvAutoencoder,
        SANClassifier,
        SelfAttentionNet,
    )
    from salience.features.blackbox_surrogate.probe import Importance, comprehensiveness, probe_importance, sufficiency
    from salience.features.blackbox_surrogate.rules import Condition, Counterfactual, Rule
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
    "Explanation": "blackbox_surrogate.explainer", "HighDimExplainer": "blackbox_surrogate.explainer",
    "fidelity_of": "blackbox_surrogate.explainer",
    "CAEClassifier": "blackbox_surrogate.networks", "CodeClassifier": "blackbox_surrogate.networks",
    "ConvAutoencoder": "blackbox_surrogate.networks", "SANClassifier": "blackbox_surrogate.networks",
    "SelfAttentionNet": "blackbox_surrogate.networks",
    "Importance": "blackbox_surrogate.probe", "comprehensiveness": "blackbox_surrogate.probe",
    "probe_importance": "blackbox_surrogate.probe", "sufficiency": "blackbox_surrogate.probe",
    "Condition": "blackbox_surrogate.rules", "Counterfactual": "blackbox_surrogate.rules",
    "Rule": "blackbox_surrogate.rules",
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
    "CAEClassifier",
    "ClassSensitivity",
    "CodeClassifier",
    "Condition",
    "ConvAutoencoder",
    "Counterfactual",
    "Explanation",
    "GradCAM",
    "Gradient",
    "HighDimExplainer",
    "Importance",
    "LayerSaliency",
    "LinearApproximation",
    "LogitsModel",
    "MetaSaliency",
    "NormGrad",
    "OutRankSelector",
    "PointingGame",
    "Randomised",
    "RankReport",
    "Rule",
    "SANClassifier",
    "SelfAttentionNet",
    "attribute_batches",
    "ca_mutual_info",
    "class_sensitivity",
    "comprehensiveness",
    "default_layers",
    "fidelity_of",
    "fuse",
    "normalise",
    "probe_importance",
    "randomization_check",
    "rank_table",
    "spatial_layers",
    "sufficiency",
    "weight_layers",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
