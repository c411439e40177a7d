"""The features room: which inputs and columns matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.features.baselines import centre_maps, edge_maps, random_smooth_maps
    from salience.features.bee.bandit import LogisticThompson
    from salience.features.bee.explain import BEE, BEEResult
    from salience.features.bee.families import baseline_families
    from salience.features.bee.path import path_map
    from salience.features.map_measures import HIGHER_IS_BETTER, perturbation_curve, score_maps

# A file never bears the name of something exported: importing the file would put the module in its place.
_WHERE: dict[str, str] = {
    "centre_maps": "baselines", "edge_maps": "baselines", "random_smooth_maps": "baselines",
    "LogisticThompson": "bee.bandit", "BEE": "bee.explain", "BEEResult": "bee.explain",
    "baseline_families": "bee.families", "path_map": "bee.path",
    "HIGHER_IS_BETTER": "map_measures", "perturbation_curve": "map_measures", "score_maps": "map_measures",
}  # fmt: skip
__all__ = [
    "BEE",
    "HIGHER_IS_BETTER",
    "BEEResult",
    "LogisticThompson",
    "baseline_families",
    "centre_maps",
    "edge_maps",
    "path_map",
    "perturbation_curve",
    "random_smooth_maps",
    "score_maps",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
