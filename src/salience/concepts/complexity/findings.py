"""What a study of a network's features found: plain data, and the rank correlations that it is told in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

from salience.concepts.complexity.decoding import Decodability
from salience.concepts.complexity.dictionary import FeatureDictionary, FeatureImportance
from salience.concepts.complexity.flow import ResidualFlow


class RankCorrelation(NamedTuple):
    """Spearman's correlation over n features, with a 95 % bootstrap interval; NaN for fewer than three or constants."""

    value: float
    low: float
    high: float
    n: int


@dataclass
class Epoch:
    """Features learned anew at a checkpoint.

    Attributes
    ----------
    name : str
    mean, top : float
        Mean complexity of all of them, and of the 1 % (one at least) that matter most.
    against_importance : RankCorrelation
        Of complexity and importance.
    agreement : float
        Share of held-out predictions that are those of the finished network.
    """

    name: str
    mean: float
    top: float
    against_importance: RankCorrelation
    agreement: float


@dataclass
class ComplexityReport:
    """What `ComplexityStudy` found about k features.

    Attributes
    ----------
    dictionary : FeatureDictionary
    complexity : Decodability
        Over the layers; `score` is K.
    shuffled : Decodability
        The control: the same features with their images exchanged.
    importance : FeatureImportance
        On the held-out images, of the predicted class.
    readable : boolean array (k,)
        Features that can be read from the penultimate layer with R^2 above 0.5. The others are rare codes, which get
        a high complexity and a low importance for free.
    correlations : dict of str to RankCorrelation
        "importance" and, with checkpoints, "time to decode", each also as "..., readable features"; and
        "importance, shuffled features", the control.
    train_features, features : array (n, k), (m, k)
        Codes of the two parts.
    agreement : float
        Share of held-out predictions that survive being written in features.
    companions : dict of str to array (k,)
        "redundancy", "localisation", "share of images", and with noise "shaken by noise of …".
    support : (array of counts, array of relative accuracies)
    flow : dict of str to ResidualFlow
        By measure; empty in a network without residual blocks.
    time : Decodability or None
        Over checkpoints; `score` is A.
    epochs : list of Epoch
        Empty without checkpoints.
    notes : list of str
    """

    dictionary: FeatureDictionary
    complexity: Decodability
    shuffled: Decodability
    importance: FeatureImportance
    readable: Bool[np.ndarray, " k"]
    correlations: dict[str, RankCorrelation]
    train_features: Float[np.ndarray, "n k"]
    features: Float[np.ndarray, "m k"]
    agreement: float
    companions: dict[str, Float[np.ndarray, " k"]]
    support: tuple[Int[np.ndarray, " steps"], Float[np.ndarray, " steps"]]
    flow: dict[str, ResidualFlow] = field(default_factory=dict)
    time: Decodability | None = None
    epochs: list[Epoch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def order(self) -> Int[np.ndarray, " live"]:
        """Live features from the simplest to the most complex."""
        live = np.flatnonzero(self.complexity.live)
        return live[np.argsort(self.complexity.score[live], kind="stable")]


def rank_correlation(a: Any, b: Any, random_state: int = 0, resamples: int = 2000) -> RankCorrelation:
    """Spearman's correlation of two scores of the same features, with a 95 % percentile bootstrap over features."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return RankCorrelation(np.nan, np.nan, np.nan, len(a))
    draws = np.random.default_rng(random_state).integers(0, len(a), (resamples, len(a)))
    values = _spearman(a[draws], b[draws])
    low, high = np.nanquantile(values, [0.025, 0.975])
    return RankCorrelation(float(_spearman(a[None], b[None])[0]), float(low), float(high), len(a))


def _spearman(a: Float[np.ndarray, "r n"], b: Float[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    ranks = [scipy.stats.rankdata(each, axis=1) for each in (a, b)]
    x, y = (each - each.mean(1, keepdims=True) for each in ranks)
    size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.where(size > 0, (x * y).sum(1) / np.where(size > 0, size, 1), np.nan)
