"""How many different features the layers of a network have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from salience.errors import InputError
from salience.scores import Scores
from salience.weights.ifm.merging import Rule, iterative_feature_merging

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Complexity:
    """Widths that feature merging leaves, over a grid of thresholds.

    Parameters
    ----------
    betas : tuple of float
    original : dict of str to int
        Width of each group of channels.
    widths : dict of str to tuple of int
        n_l(beta): what is left of it, one per beta.
    params : tuple of int
        Entries of the whole network, one per beta.
    """

    betas: tuple[float, ...]
    original: dict[str, int]
    widths: dict[str, tuple[int, ...]]
    params: tuple[int, ...]

    def fraction(self, group: str | None = None) -> tuple[float, ...]:
        """Share of the channels that is left for each beta, of one group or of all together."""
        names = self.original if group is None else [group]
        whole = sum(self.original[name] for name in names)
        return tuple(sum(self.widths[name][i] for name in names) / whole for i in range(len(self.betas)))

    def scores(self, beta: float) -> Scores:
        """The share that is left as `Scores` of layers: larger means more distinct features in the layer."""
        if beta not in self.betas:
            raise InputError(f"beta: got {beta}; measured were {', '.join(map(str, self.betas))}")
        at = self.betas.index(beta)
        shares = {name: self.widths[name][at] / width for name, width in self.original.items()}
        return Scores(list(shares.values()), list(shares), "layer", {"method": "ifm", "beta": beta})

    def to_pandas(self) -> pd.DataFrame:
        """One row per group and beta: group, beta, width, left, fraction."""
        import pandas as pd

        rows = [
            (name, beta, width, left, left / width)
            for name, width in self.original.items()
            for beta, left in zip(self.betas, self.widths[name])
        ]
        return pd.DataFrame(rows, columns=["group", "beta", "width", "left", "fraction"])


def feature_complexity(
    model: nn.Module,
    betas: Sequence[float] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
    *,
    example: Any = None,
    groups: Sequence[str] | None = None,
    rule: Rule = "mean_in",
    fold_norm: bool = True,
) -> Complexity:
    """Estimate the feature complexity of each layer: the width that feature merging leaves at each threshold.

    Supported: as of `iterative_feature_merging`.

    Parameters
    ----------
    model : torch.nn.Module
        Unchanged.
    betas : sequence of float
        Thresholds in [0, 1); each is run from the original network.
    example, groups, rule, fold_norm
        As of `iterative_feature_merging`.

    Returns
    -------
    Complexity

    Raises
    ------
    InputError
        No thresholds, one out of range, or as `iterative_feature_merging`.

    References
    ----------
    Chen, Zhou, Yan, arXiv 2310.06756, section 4.
    """
    if not betas:
        raise InputError("betas: there are none")
    bad = [beta for beta in betas if not 0 <= beta < 1 or math.isnan(beta)]
    if bad:
        raise InputError(f"betas: got {bad[0]!r}; each must lie in [0, 1)")
    results = [
        iterative_feature_merging(model, example=example, beta=beta, groups=groups, rule=rule, fold_norm=fold_norm)
        for beta in betas
    ]
    first = results[0].widths
    return Complexity(
        tuple(betas),
        {name: before for name, (before, _) in first.items()},
        {name: tuple(result.widths[name][1] for result in results) for name in first},
        tuple(result.params[1] for result in results),
    )
