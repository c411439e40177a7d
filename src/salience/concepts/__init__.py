"""The concepts room: which concepts a network uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.concepts.attributions import concept_importance, mean_importance
    from salience.concepts.complexity.decoding import Decodability, feature_complexity, time_to_decode, v_information
    from salience.concepts.complexity.dictionary import (
        FeatureDictionary,
        FeatureImportance,
        feature_importance,
        hoyer,
        learn_dictionary,
        meta_features,
        split_signs,
        support_features,
    )
    from salience.concepts.complexity.findings import ComplexityReport, RankCorrelation, rank_correlation
    from salience.concepts.complexity.flow import (
        ResidualFlow,
        feature_cka,
        noise_sensitivity,
        redundancy,
        residual_flow,
        residual_paths,
    )
    from salience.concepts.complexity.layers import (
        LayerActivations,
        block_layers,
        layer_activations,
        linear_head,
        same_order,
    )
    from salience.concepts.complexity.study import ComplexityStudy
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
    from salience.concepts.extractors import (
        ConceptExtractor,
        KMeansConcepts,
        NMFConcepts,
        PCAConcepts,
        RandomConcepts,
    )
    from salience.concepts.holistic.extraction import (
        ExtractionReport,
        dictionary_distance,
        extraction_report,
        frechet,
        out_of_distribution,
        wasserstein,
    )
    from salience.concepts.holistic.faithfulness import ImportanceReport, importance_report
    from salience.concepts.holistic.strategies import Strategy, StrategyGraph, draw_graph, strategy_graph
    from salience.concepts.importance import gradient_input, sobol_importance, tcav
    from salience.concepts.nonnegative import Factorization, nmf, nnls
    from salience.concepts.pace.estimator import PACE, PaceExplanation
    from salience.concepts.pace.measures import desiderata, perturb
    from salience.concepts.pace.tokens import PatchTokens, vit_tokens
    from salience.concepts.seminmf import SemiNMFConcepts
    from salience.concepts.sensitivity import sobol_design, sobol_total, total_indices
    from salience.concepts.sparse_autoencoder import SAEConcepts

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
    "concept_importance": "attributions", "mean_importance": "attributions",
    "Decodability": "complexity.decoding", "feature_complexity": "complexity.decoding",
    "time_to_decode": "complexity.decoding", "v_information": "complexity.decoding",
    "FeatureDictionary": "complexity.dictionary", "FeatureImportance": "complexity.dictionary",
    "feature_importance": "complexity.dictionary", "hoyer": "complexity.dictionary",
    "learn_dictionary": "complexity.dictionary", "meta_features": "complexity.dictionary",
    "split_signs": "complexity.dictionary", "support_features": "complexity.dictionary",
    "ResidualFlow": "complexity.flow", "feature_cka": "complexity.flow", "noise_sensitivity": "complexity.flow",
    "redundancy": "complexity.flow", "residual_flow": "complexity.flow", "residual_paths": "complexity.flow",
    "LayerActivations": "complexity.layers", "block_layers": "complexity.layers",
    "layer_activations": "complexity.layers", "linear_head": "complexity.layers", "same_order": "complexity.layers",
    "ComplexityReport": "complexity.findings", "ComplexityStudy": "complexity.study",
    "RankCorrelation": "complexity.findings", "rank_correlation": "complexity.findings",
    "concept_deletion": "concept_curves", "concept_insertion": "concept_curves",
    "ConceptModel": "concept_model", "ConceptScores": "concept_model",
    "Crops": "craft.crops", "make_crops": "craft.crops",
    "Craft": "craft.estimator", "nonnegative_layers": "craft.estimator",
    "ConceptExtractor": "extractors", "NMFConcepts": "extractors", "KMeansConcepts": "extractors",
    "PCAConcepts": "extractors", "RandomConcepts": "extractors",
    "ExtractionReport": "holistic.extraction", "extraction_report": "holistic.extraction",
    "dictionary_distance": "holistic.extraction", "wasserstein": "holistic.extraction",
    "frechet": "holistic.extraction", "out_of_distribution": "holistic.extraction",
    "ImportanceReport": "holistic.faithfulness", "importance_report": "holistic.faithfulness",
    "Strategy": "holistic.strategies", "StrategyGraph": "holistic.strategies",
    "draw_graph": "holistic.strategies", "strategy_graph": "holistic.strategies",
    "gradient_input": "importance", "sobol_importance": "importance", "tcav": "importance",
    "Factorization": "nonnegative", "nmf": "nonnegative", "nnls": "nonnegative",
    "SemiNMFConcepts": "seminmf", "SAEConcepts": "sparse_autoencoder",
    "PACE": "pace.estimator", "PaceExplanation": "pace.estimator",
    "desiderata": "pace.measures", "perturb": "pace.measures",
    "PatchTokens": "pace.tokens", "vit_tokens": "pace.tokens",
    "sobol_design": "sensitivity", "sobol_total": "sensitivity", "total_indices": "sensitivity",
}  # fmt: skip
__all__ = [
    "CAV",
    "PACE",
    "AuditReport",
    "Capacity",
    "ComplexityReport",
    "ComplexityStudy",
    "ConceptData",
    "ConceptExtractor",
    "ConceptModel",
    "ConceptScores",
    "Craft",
    "Crops",
    "Decodability",
    "Decomposition",
    "ExtractionReport",
    "Factorization",
    "FeatureDictionary",
    "FeatureImportance",
    "ImportanceReport",
    "KMeansConcepts",
    "LayerActivations",
    "LearnReport",
    "LinearExplanation",
    "NMFConcepts",
    "PCAConcepts",
    "PaceExplanation",
    "PatchTokens",
    "ProbeReport",
    "ProbeSet",
    "RandomConcepts",
    "RankCorrelation",
    "ResidualFlow",
    "SAEConcepts",
    "SemiNMFConcepts",
    "Strategy",
    "StrategyGraph",
    "UserStudyKit",
    "audit",
    "baseline_explanation",
    "basis_decomposition",
    "block_layers",
    "capacity_path",
    "concept_deletion",
    "concept_importance",
    "concept_insertion",
    "desiderata",
    "dictionary_distance",
    "directional_derivatives",
    "draw_graph",
    "extraction_report",
    "feature_cka",
    "feature_complexity",
    "feature_importance",
    "fit_cav",
    "fit_cavs",
    "frechet",
    "gradient_input",
    "hoyer",
    "importance_report",
    "layer_activations",
    "learn_dictionary",
    "learnability",
    "linear_head",
    "make_crops",
    "mean_importance",
    "meta_features",
    "nmf",
    "nnls",
    "noise_sensitivity",
    "nonnegative_layers",
    "normalized_ap",
    "out_of_distribution",
    "perturb",
    "predicted_concepts",
    "probe_shift",
    "rank_correlation",
    "read_probe",
    "redundancy",
    "residual_flow",
    "residual_paths",
    "same_order",
    "sobol_design",
    "sobol_importance",
    "sobol_total",
    "split_signs",
    "strategy_graph",
    "support_features",
    "tcav",
    "time_to_decode",
    "total_indices",
    "unit_concept_iou",
    "v_information",
    "vit_tokens",
    "wasserstein",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
