"""The concepts room: which concepts a network uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.concepts.attributions import concept_importance, mean_importance
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
    from salience.concepts.seminmf import SemiNMFConcepts
    from salience.concepts.sensitivity import sobol_design, sobol_total, total_indices
    from salience.concepts.sparse_autoencoder import SAEConcepts

_WHERE: dict[str, str] = {
    "concept_importance": "attributions", "mean_importance": "attributions",
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
    "sobol_design": "sensitivity", "sobol_total": "sensitivity", "total_indices": "sensitivity",
}  # fmt: skip
__all__ = [
    "ConceptExtractor",
    "ConceptModel",
    "ConceptScores",
    "Craft",
    "Crops",
    "ExtractionReport",
    "Factorization",
    "ImportanceReport",
    "KMeansConcepts",
    "NMFConcepts",
    "PCAConcepts",
    "RandomConcepts",
    "SAEConcepts",
    "SemiNMFConcepts",
    "Strategy",
    "StrategyGraph",
    "concept_deletion",
    "concept_importance",
    "concept_insertion",
    "dictionary_distance",
    "draw_graph",
    "extraction_report",
    "frechet",
    "gradient_input",
    "importance_report",
    "make_crops",
    "mean_importance",
    "nmf",
    "nnls",
    "nonnegative_layers",
    "out_of_distribution",
    "sobol_design",
    "sobol_importance",
    "sobol_total",
    "strategy_graph",
    "tcav",
    "total_indices",
    "wasserstein",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
