"""The features room: which inputs and columns matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.features.attribution import LogitsModel, attribute_batches, default_layers, spatial_layers
    from salience.features.baselines import CentreMap, EdgeMap, RandomSmoothMap
    from salience.features.bee.bandit import LogisticThompson
    from salience.features.bee.explain import BEE, BEEResult
    from salience.features.bee.families import baseline_families
    from salience.features.bee.path import path_map
    from salience.features.map_measures import HIGHER_IS_BETTER, perturbation_curve, score_maps
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
    from salience.features.study.adversarial import adversarial_fit, pgd_attack
    from salience.features.study.bench import BenchResult, ExplainabilityBench, better_than_control
    from salience.features.study.localisation import best_threshold, energy_inside, localised, pointing
    from salience.features.study.perturbing import CAM, RISE, MeaningfulPerturbation
    from salience.features.study.suite import attribution_suite
    from salience.features.study.trust import MapTrust, TrustReport, trust_report

_WHERE: dict[str, str] = {
    "LogitsModel": "attribution", "attribute_batches": "attribution", "default_layers": "attribution",
    "spatial_layers": "attribution",
    "CentreMap": "baselines", "EdgeMap": "baselines", "RandomSmoothMap": "baselines",
    "LogisticThompson": "bee.bandit",
    "BEE": "bee.explain", "BEEResult": "bee.explain",
    "baseline_families": "bee.families",
    "path_map": "bee.path",
    "HIGHER_IS_BETTER": "map_measures", "perturbation_curve": "map_measures", "score_maps": "map_measures",
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
    "adversarial_fit": "study.adversarial", "pgd_attack": "study.adversarial",
    "BenchResult": "study.bench", "ExplainabilityBench": "study.bench", "better_than_control": "study.bench",
    "best_threshold": "study.localisation", "energy_inside": "study.localisation", "localised": "study.localisation",
    "pointing": "study.localisation",
    "CAM": "study.perturbing", "MeaningfulPerturbation": "study.perturbing", "RISE": "study.perturbing",
    "attribution_suite": "study.suite",
    "MapTrust": "study.trust", "TrustReport": "study.trust", "trust_report": "study.trust",
}  # fmt: skip
__all__ = [
    "BEE",
    "CAM",
    "HIGHER_IS_BETTER",
    "RISE",
    "BEEResult",
    "BenchResult",
    "CentreMap",
    "ClassSensitivity",
    "EdgeMap",
    "ExplainabilityBench",
    "GradCAM",
    "Gradient",
    "LayerSaliency",
    "LinearApproximation",
    "LogisticThompson",
    "LogitsModel",
    "MapTrust",
    "MeaningfulPerturbation",
    "MetaSaliency",
    "NormGrad",
    "OutRankSelector",
    "PointingGame",
    "RandomSmoothMap",
    "Randomised",
    "RankReport",
    "TrustReport",
    "adversarial_fit",
    "attribute_batches",
    "attribution_suite",
    "baseline_families",
    "best_threshold",
    "better_than_control",
    "ca_mutual_info",
    "class_sensitivity",
    "default_layers",
    "energy_inside",
    "fuse",
    "localised",
    "normalise",
    "path_map",
    "perturbation_curve",
    "pgd_attack",
    "pointing",
    "randomization_check",
    "rank_table",
    "score_maps",
    "spatial_layers",
    "trust_report",
    "weight_layers",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
