"""The concepts room: which concepts a network uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
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
    from salience.concepts.concept_curves import concept_deletion, concept_insertion
    from salience.concepts.concept_model import ConceptModel, ConceptScores
    from salience.concepts.craft.crops import Crops, make_crops
    from salience.concepts.craft.estimator import Craft, nonnegative_layers
    from salience.concepts.extractors import ConceptExtractor, NMFConcepts
    from salience.concepts.importance import gradient_input, sobol_importance, tcav
    from salience.concepts.nonnegative import Factorization, nmf, nnls
    from salience.concepts.sensitivity import sobol_design, sobol_total, total_indices

_WHERE: dict[str, str] = {
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
    "ConceptExtractor": "extractors", "NMFConcepts": "extractors",
    "gradient_input": "importance", "sobol_importance": "importance", "tcav": "importance",
    "Factorization": "nonnegative", "nmf": "nonnegative", "nnls": "nonnegative",
    "sobol_design": "sensitivity", "sobol_total": "sensitivity", "total_indices": "sensitivity",
}  # fmt: skip
__all__ = [
    "ComplexityReport",
    "ComplexityStudy",
    "ConceptExtractor",
    "ConceptModel",
    "ConceptScores",
    "Craft",
    "Crops",
    "Decodability",
    "Factorization",
    "FeatureDictionary",
    "FeatureImportance",
    "LayerActivations",
    "NMFConcepts",
    "RankCorrelation",
    "ResidualFlow",
    "block_layers",
    "concept_deletion",
    "concept_insertion",
    "feature_cka",
    "feature_complexity",
    "feature_importance",
    "gradient_input",
    "hoyer",
    "layer_activations",
    "learn_dictionary",
    "linear_head",
    "make_crops",
    "meta_features",
    "nmf",
    "nnls",
    "noise_sensitivity",
    "nonnegative_layers",
    "rank_correlation",
    "redundancy",
    "residual_flow",
    "residual_paths",
    "same_order",
    "sobol_design",
    "sobol_importance",
    "sobol_total",
    "split_signs",
    "support_features",
    "tcav",
    "time_to_decode",
    "total_indices",
    "v_information",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
