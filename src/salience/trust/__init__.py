"""The trust room: which predictions can be trusted."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.trust.dsl.estimate import DSLResult
    from salience.trust.dsl.estimator import DSL
    from salience.trust.dsl.sampling import LabelingSample, UnitLabels, aggregate_labels, sample_for_labeling
    from salience.trust.dsl.table import dsl_regression, prevalence

_WHERE: dict[str, str] = {
    "DSL": "dsl.estimator", "DSLResult": "dsl.estimate", "dsl_regression": "dsl.table", "prevalence": "dsl.table",
    "LabelingSample": "dsl.sampling", "UnitLabels": "dsl.sampling", "aggregate_labels": "dsl.sampling",
    "sample_for_labeling": "dsl.sampling",
}  # fmt: skip
__all__ = [
    "DSL",
    "DSLResult",
    "LabelingSample",
    "UnitLabels",
    "aggregate_labels",
    "dsl_regression",
    "prevalence",
    "sample_for_labeling",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
