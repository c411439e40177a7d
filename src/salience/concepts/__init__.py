"""The concepts room: which concepts a network uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.concepts.concept_audit.explaining import (
        Capacity,
        LinearExplanation,
        baseline_explanation,
        capacity_path,
    )
    from salience.concepts.concept_audit.learning import LearnReport, learnability
    from salience.concepts.concept_audit.linear import CAV, fit_cav, fit_cavs, normalized_ap, predicted_concepts
    from salience.concepts.concept_audit.others import (
        Decomposition,
        basis_decomposition,
        directional_derivatives,
        unit_concept_iou,
    )
    from salience.concepts.concept_audit.reading import read_probe
    from salience.concepts.concept_audit.shift import ConceptData, ProbeReport, probe_shift
    from salience.concepts.concept_audit.study import UserStudyKit
    from salience.concepts.concept_audit.verdict import AuditReport, ProbeSet, audit
    from salience.concepts.concept_curves import concept_deletion, concept_insertion
    from salience.concepts.concept_model import ConceptModel, ConceptScores
    from salience.concepts.craft.crops import Crops, make_crops
    from salience.concepts.craft.estimator import Craft, nonnegative_layers
    from salience.concepts.extractors import ConceptExtractor, NMFConcepts
    from salience.concepts.importance import gradient_input, sobol_importance, tcav
    from salience.concepts.nonnegative import Factorization, nmf, nnls
    from salience.concepts.sensitivity import sobol_design, sobol_total, total_indices

_WHERE: dict[str, str] = {
    **dict.fromkeys(("LearnReport", "learnability"), "concept_audit.learning"),
    **dict.fromkeys(("Capacity", "LinearExplanation", "baseline_explanation", "capacity_path"),
                    "concept_audit.explaining"),
    **dict.fromkeys(("CAV", "fit_cav", "fit_cavs", "normalized_ap", "predicted_concepts"), "concept_audit.linear"),
    **dict.fromkeys(("Decomposition", "basis_decomposition", "directional_derivatives", "unit_concept_iou"),
                    "concept_audit.others"),
    "read_probe": "concept_audit.reading",
    **dict.fromkeys(("ConceptData", "ProbeReport", "probe_shift"), "concept_audit.shift"),
    "UserStudyKit": "concept_audit.study",
    **dict.fromkeys(("AuditReport", "ProbeSet", "audit"), "concept_audit.verdict"),
    "concept_deletion": "concept_curves", "concept_insertion": "concept_curves",
    "ConceptModel": "concept_model", "ConceptScores": "concept_model",
    "Crops": "craft.crops", "make_crops": "craft.crops",
    "Craft": "craft.estimator", "nonnegative_layers": "craft.estimator",
    "ConceptExtractor": "extractors", "NMFConcepts": "extractors",
    "gradient_input": "importance", "sobol_importance": "importance", "tcav": "importance",
    "Factorization": "nonnegative", "nmf": "nonnegative", "nnls": "nonnegative",
    "sobol_design": "sensitivity", "sobol_total": "sensitivity", "total_indices": "sensitivity",
}  # fmt: skip
__all__ = [
    "CAV",
    "AuditReport",
    "Capacity",
    "ConceptData",
    "ConceptExtractor",
    "ConceptModel",
    "ConceptScores",
    "Craft",
    "Crops",
    "Decomposition",
    "Factorization",
    "LearnReport",
    "LinearExplanation",
    "NMFConcepts",
    "ProbeReport",
    "ProbeSet",
    "UserStudyKit",
    "audit",
    "baseline_explanation",
    "basis_decomposition",
    "capacity_path",
    "concept_deletion",
    "concept_insertion",
    "directional_derivatives",
    "fit_cav",
    "fit_cavs",
    "gradient_input",
    "learnability",
    "make_crops",
    "nmf",
    "nnls",
    "nonnegative_layers",
    "normalized_ap",
    "predicted_concepts",
    "probe_shift",
    "read_probe",
    "sobol_design",
    "sobol_importance",
    "sobol_total",
    "tcav",
    "total_indices",
    "unit_concept_iou",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
