"""Which explanation may I trust on my model? Every method on the user's own images, against maps that know nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from jaxtyping import Float, Int
from torch import Tensor, nn

from salience.errors import InputError
from salience.features.normgrad.checks import randomization_check, weight_layers
from salience.features.study.bench import FEWEST, BenchResult, ExplainabilityBench, better_than_control
from salience.features.study.suite import CONTROLS, KINDS, MapFunction

RANDOMISED = 0.5  # correlation with the maps of random weights from which on a map shows the picture, not the model
_RANDOMISED_ON = 32  # images: a correlation near 1 or near 0 shows in few


@dataclass(frozen=True)
class MapTrust:
    """What was found out about one method.

    Attributes
    ----------
    method, kind : str
    means : dict of str to float
        Mean of each measure.
    over_random, over_heuristic : dict of str to (mean, low, high, images)
        How much better than random smooth maps, and than the better of centre and edges, turned so that positive is
        better; intervals are NaN on too few images.
    randomised : float
        Rank correlation of the sizes of its maps with those of the same network with random weights; NaN where not
        asked for, or where every map of either is flat.
    """

    method: str
    kind: str
    means: dict[str, float]
    over_random: dict[str, tuple[float, float, float, int]]
    over_heuristic: dict[str, tuple[float, float, float, int]]
    randomised: float

    @property
    def level(self) -> str:
        """ "yes", "with care", "no", or "unknown" with too few images."""
        if all(np.isnan(low) for _, low, _, _ in self.over_random.values()):
            return "unknown"
        won = [low > 0 for _, low, _, _ in self.over_random.values()]
        if not any(won) or self.randomised >= RANDOMISED:
            return "no"
        return "yes" if all(won) else "with care"

    @property
    def words(self) -> str:
        """The verdict in plain words."""
        won = [name for name, (_, low, _, _) in self.over_random.items() if low > 0]
        lost = [name for name, (_, _, high, _) in self.over_random.items() if high < 0]
        if self.level == "unknown":
            text = f"too few images to tell; give {FEWEST} or more"
        elif not won:
            text = "no better than a random map here"
        elif len(won) == len(self.over_random):
            text = "better than a random map by every measure"
        else:
            text = f"better than a random map by {', '.join(won)} alone"
        if lost:
            text += f"; worse by {', '.join(lost)}"
        if won and not any(low > 0 for _, low, _, _ in self.over_heuristic.values()):
            text += "; no better than what needs no model (centre, edges)"
        if self.randomised >= RANDOMISED:
            text += "; hardly changes when the weights are drawn anew: it shows the picture, not the model"
        return text


@dataclass
class TrustReport:
    """Verdicts on every method, best first, and what they rest on.

    Attributes
    ----------
    verdicts : list of MapTrust
    controls : dict of str to MapTrust
        The same for random, centre and edges.
    result : BenchResult
    confidence : dict of str to float
        Measure to its correlation with the model's confidence, mean over the methods.
    notes : list of str
    """

    verdicts: list[MapTrust]
    controls: dict[str, MapTrust]
    result: BenchResult
    confidence: dict[str, float]
    notes: list[str] = field(default_factory=list)


def trust_report(
    model: nn.Module,
    images: Float[Tensor, "n channels height width"],
    classes: Int[Tensor, " n"],
    methods: Mapping[str, MapFunction],
    measures: Sequence[str] = ("insertion", "deletion"),
    *,
    randomise: bool = True,
    steps: int = 20,
    fill: float | Tensor = 0.0,
    batch_size: int = 64,
    random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrustReport:
    """Run methods on images and say which can be trusted.

    A method is trusted ("yes") when its whole interval lies above random smooth maps by every measure and its maps
    change when the network's weights are drawn anew; "with care" when by some measure; else not.

    Parameters
    ----------
    model : torch.nn.Module
    images : Tensor (n, channels, height, width)
    classes : Tensor (n,)
        The class to explain of each.
    methods : mapping of str to callable
        Such as `attribution_suite`, with all three controls.
    measures : sequence of str
        Of `BETTER`, without those that need boxes.
    randomise : bool
        Compare with the maps of random weights.
    steps, fill, batch_size, random_state
        As in `ExplainabilityBench`.
    progress : callable, optional
        ``progress(stage, done, total)``.

    Raises
    ------
    InputError
        A control is missing, or as in `ExplainabilityBench`.
    """
    missing = [name for name in CONTROLS if name not in methods]
    if missing or not set(methods) - set(CONTROLS):
        raise InputError(f"methods: give at least one method and the controls {', '.join(CONTROLS)}; got {[*methods]}")
    bench = ExplainabilityBench(
        {"model": model}, lambda _: methods, measures, steps=steps, fill=fill, batch_size=batch_size,
        random_state=random_state,
    )  # fmt: skip
    result = bench.run(images, classes, progress=progress)
    randomised = dict.fromkeys(methods, float("nan"))
    if randomise:
        for done, (name, maps) in enumerate(methods.items()):
            if progress is not None:
                progress("random weights", done, len(methods))
            randomised[name] = _randomised(model, maps, images[:_RANDOMISED_ON], batch_size, random_state)
    against = {name: better_than_control(result, "model", control=name, random_state=random_state) for name in CONTROLS}
    found = {name: _trust(name, measures, result, against, randomised[name]) for name in methods}
    order = {"yes": 0, "with care": 1, "no": 2, "unknown": 3}
    verdicts = sorted(
        (found[name] for name in methods if name not in CONTROLS),
        key=lambda one: (order[one.level], -_margin(one)),
    )
    bias = result.confidence_bias()
    confidence = {}
    for measure in measures:
        own = [bias["model", name, measure] for name in methods if name not in CONTROLS]
        known = [value for value in own if np.isfinite(value)]
        if known:
            confidence[measure] = float(np.mean(known))
    return TrustReport(
        verdicts, {name: found[name] for name in CONTROLS}, result, confidence, list(result.warnings)
    )  # fmt: skip


class _Named(Attribution):
    """A function of the suite as an Attribution, which the randomisation check takes."""

    def __init__(self, model: nn.Module, maps: MapFunction) -> None:
        super().__init__(model)
        self.maps = maps

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        return self.maps(inputs, target)[:, None]


def _randomised(model: nn.Module, maps: MapFunction, images: Tensor, batch_size: int, seed: int) -> float:
    lowest = weight_layers(model)[:1]  # a cascade down to it draws all weights anew
    if not lowest:
        return float("nan")
    found = randomization_check(
        _Named(model, maps), images, layers=lowest, batch_size=batch_size, generator=torch.Generator().manual_seed(seed)
    )
    return found[lowest[0]].spearman_of_size


def _trust(name: str, measures: Sequence[str], result: BenchResult, against: Mapping, randomised: float) -> MapTrust:
    means = {}
    for measure in measures:
        values = result.scores["model", name, measure]
        means[measure] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    over_random = {m: against["random"][name, m] for m in measures if (name, m) in against["random"]}
    # The harder of the two heuristics, measure by measure.
    over_heuristic = {
        m: min((against[h][name, m] for h in ("centre", "edges")), key=lambda one: one[0])
        for m in measures if (name, m) in against["centre"]
    }  # fmt: skip
    return MapTrust(name, KINDS.get(name, "own"), means, over_random, over_heuristic, randomised)


def _margin(one: MapTrust) -> float:
    means = [mean for mean, _, _, _ in one.over_random.values() if np.isfinite(mean)]
    return float(np.mean(means)) if means else float("-inf")
