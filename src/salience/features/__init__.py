"""The features room: which inputs and columns matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.features.blackbox_surrogate.explainer import Explanation, HighDimExplainer, fidelity_of
    from salience.features.blackbox_surrogate.networks import (
        CAEClassifier,
        CodeClassifier,
        ConvAutoencoder,
        SANClassifier,
        SelfAttentionNet,
    )
    from salience.features.blackbox_surrogate.probe import (
        Importance,
        comprehensiveness,
        probe_importance,
        sufficiency,
    )
    from salience.features.blackbox_surrogate.rules import Condition, Counterfactual, Rule

_BLACKBOX = "blackbox_surrogate"
_WHERE: dict[str, str] = {
    **dict.fromkeys(("Explanation", "HighDimExplainer", "fidelity_of"), f"{_BLACKBOX}.explainer"),
    **dict.fromkeys(
        ("CAEClassifier", "CodeClassifier", "ConvAutoencoder", "SANClassifier", "SelfAttentionNet"),
        f"{_BLACKBOX}.networks",
    ),
    **dict.fromkeys(("Importance", "comprehensiveness", "probe_importance", "sufficiency"), f"{_BLACKBOX}.probe"),
    **dict.fromkeys(("Condition", "Counterfactual", "Rule"), f"{_BLACKBOX}.rules"),
}
__all__ = [
    "CAEClassifier",
    "CodeClassifier",
    "Condition",
    "ConvAutoencoder",
    "Counterfactual",
    "Explanation",
    "HighDimExplainer",
    "Importance",
    "Rule",
    "SANClassifier",
    "SelfAttentionNet",
    "comprehensiveness",
    "fidelity_of",
    "probe_importance",
    "sufficiency",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
