"""The concepts room: which concepts a network uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.concepts.concept_curves import concept_deletion, concept_insertion
    from salience.concepts.concept_model import ConceptModel, ConceptScores
    from salience.concepts.craft.crops import Crops, make_crops
    from salience.concepts.craft.estimator import Craft, nonnegative_layers
    from salience.concepts.extractors import ConceptExtractor, NMFConcepts
    from salience.concepts.importance import gradient_input, sobol_importance, tcav
    from salience.concepts.nonnegative import Factorization, nmf, nnls
    from salience.concepts.pace.estimator import PACE, PaceExplanation
    from salience.concepts.pace.measures import desiderata, perturb
    from salience.concepts.pace.tokens import PatchTokens, vit_tokens
    from salience.concepts.sensitivity import sobol_design, sobol_total, total_indices

_WHERE: dict[str, str] = {
    "concept_deletion": "concept_curves", "concept_insertion": "concept_curves",
    "ConceptModel": "concept_model", "ConceptScores": "concept_model",
    "Crops": "craft.crops", "make_crops": "craft.crops",
    "Craft": "craft.estimator", "nonnegative_layers": "craft.estimator",
    "ConceptExtractor": "extractors", "NMFConcepts": "extractors",
    "gradient_input": "importance", "sobol_importance": "importance", "tcav": "importance",
    "Factorization": "nonnegative", "nmf": "nonnegative", "nnls": "nonnegative",
    "PACE": "pace.estimator", "PaceExplanation": "pace.estimator",
    "desiderata": "pace.measures", "perturb": "pace.measures",
    "PatchTokens": "pace.tokens", "vit_tokens": "pace.tokens",
    "sobol_design": "sensitivity", "sobol_total": "sensitivity", "total_indices": "sensitivity",
}  # fmt: skip
__all__ = [
    "PACE",
    "ConceptExtractor",
    "ConceptModel",
    "ConceptScores",
    "Craft",
    "Crops",
    "Factorization",
    "NMFConcepts",
    "PaceExplanation",
    "PatchTokens",
    "concept_deletion",
    "concept_insertion",
    "desiderata",
    "gradient_input",
    "make_crops",
    "nmf",
    "nnls",
    "nonnegative_layers",
    "perturb",
    "sobol_design",
    "sobol_importance",
    "sobol_total",
    "tcav",
    "total_indices",
    "vit_tokens",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
