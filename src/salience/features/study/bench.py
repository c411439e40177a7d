"""The runner of the study: models x methods x measures on the same images, and what may be read off the result.

Source: Nourelahi, Kotthoff, Chen and Nguyen, "How explainable are adversarially-robust CNNs?", 2022 (arXiv
2205.13042). The abstract was read and the measures checked against public code; the paper's own lists of models
and methods are from memory. The control maps, the normalised areas and the guard against collapsed models are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.integrate import trapezoid
from scipy.stats import rankdata
from torch import Tensor, nn

from salience.errors import InputError, nearest
from salience.features.map_measures import HIGHER_IS_BETTER, perturbation_curve, score_maps
from salience.features.study.localisation import best_threshold, energy_inside, localised, pointing
from salience.features.study.suite import CONTROLS, KINDS, MapFunction
from salience.measure import paired_difference
from salience.model.at import logits_of, run, training_mode
from salience.model.batches import map_batches

BOXED = {"pointing": True, "localisation": True, "energy": True}  # measures that need the object's box
NORMALISED = {"insertion, normalised": True, "deletion, normalised": False}
BETTER = {**HIGHER_IS_BETTER, **NORMALISED, **BOXED}  # True where higher is better
FEWEST = 30  # images below which no interval or p-value is given
_HELD_OUT = 0.25  # share of the images on which the threshold of the localisation is sought
_SPAN = 0.05  # least difference of whole and blank probability to normalise by


class Difference(NamedTuple):
    """Robust minus plain model: mean of a measure over images; interval and p-value NaN on too few of them."""

    pair: tuple[str, str]
    method: str
    kind: str
    measure: str
    mean: float
    low: float
    high: float
    p_value: float
    n: int


@dataclass
class BenchResult:
    """Every score of every image, and the analyses of the study.

    Attributes
    ----------
    scores : dict of (model, method, measure) to array (n,)
        NaN where a measure is not defined.
    maps : dict of (model, method) to Tensor (n, height, width)
    confidence : dict of model to array (n,)
        Probability of the explained class of the clean image.
    correct : dict of model to bool array (n,)
    accuracy : dict of (model, set) to float
        "clean", and every other set given.
    curves : dict of (model, method, mode) to array (steps + 1,)
        Mean insertion and deletion curves.
    warnings : list of str
    """

    scores: dict[tuple[str, str, str], Float[np.ndarray, " n"]]
    maps: dict[tuple[str, str], Float[Tensor, "n height width"]]
    confidence: dict[str, Float[np.ndarray, " n"]]
    correct: dict[str, Bool[np.ndarray, " n"]]
    accuracy: dict[tuple[str, str], float]
    curves: dict[tuple[str, str, str], Float[np.ndarray, " points"]]
    warnings: list[str] = field(default_factory=list)

    @property
    def common(self) -> Bool[np.ndarray, " n"]:
        """Images that every model classifies correctly."""
        return np.logical_and.reduce(list(self.correct.values()))

    def table(self, common: bool = False) -> list[dict[str, Any]]:
        """Mean of every score, a record each; over the images that all models get right if `common`."""
        rows = self._rows(common)
        return [
            {"model": model, "method": method, "kind": KINDS.get(method, "own"), "measure": measure,
             "mean": _mean(values[rows]), "images": int(np.isfinite(values[rows]).sum())}
            for (model, method, measure), values in self.scores.items()
        ]  # fmt: skip

    def robust_minus_plain(
        self, pairs: Mapping[str, str], common: bool = False, random_state: int = 0
    ) -> list[Difference]:
        """Paired over the same images, for ``{robust: plain}`` of one architecture each."""
        rows, found = self._rows(common), []
        for robust, plain in pairs.items():
            for name in (robust, plain):
                if name not in self.correct:
                    raise InputError(f"pairs: there is no model {name!r}; {nearest(name, self.correct)}")
            for (model, method, measure), a in self.scores.items():
                if model != robust:
                    continue
                b = self.scores[plain, method, measure]
                known = rows & np.isfinite(a) & np.isfinite(b)
                what = ((robust, plain), method, KINDS.get(method, "own"), measure)
                if known.sum() < FEWEST:
                    mean = _mean((a - b)[known])
                    found.append(Difference(*what, mean, np.nan, np.nan, np.nan, int(known.sum())))
                    continue
                difference = paired_difference(a[known], b[known], random_state=random_state)
                found.append(
                    Difference(
                        *what, difference.mean, difference.low, difference.high, difference.p_value, difference.n
                    )
                )
        return found

    def method_ranks(self, common: bool = False) -> dict[str, float]:
        """Mean rank of each method over models and measures; 1 is best. Scores of equal mean share a rank."""
        means = {(row["model"], row["method"], row["measure"]): row["mean"] for row in self.table(common)}
        methods = list(dict.fromkeys(method for _, method, _ in means))
        ranks: dict[str, list[float]] = {method: [] for method in methods}
        for model, measure in dict.fromkeys((model, measure) for model, _, measure in means):
            own = [m for m in methods if np.isfinite(means.get((model, m, measure), np.nan))]
            values = np.array([means[model, m, measure] for m in own]) * (-1 if BETTER[measure] else 1)
            for method, rank in zip(own, rankdata(values)):
                ranks[method].append(float(rank))
        return dict(sorted(((m, _mean(np.array(r))) for m, r in ranks.items()), key=lambda item: item[1]))

    def confidence_bias(self, common: bool = False) -> dict[tuple[str, str, str], float]:
        """Correlation of a score with the model's confidence over images, by (model, method, measure).

        And, as model "across models", of the mean score with the mean confidence, where there are three or more.
        Near 1 the measure tells how sure a model is, not how good its maps are: do not compare models by it.
        """
        rows, found = self._rows(common), {}
        for (model, method, measure), values in self.scores.items():
            found[model, method, measure] = _correlation(values[rows], self.confidence[model][rows])
        models = list(self.correct)
        if len(models) >= 3:
            for method, measure in dict.fromkeys((m, k) for _, m, k in self.scores):
                own = [name for name in models if (name, method, measure) in self.scores]
                means = np.array([_mean(self.scores[name, method, measure][rows]) for name in own])
                sure = np.array([self.confidence[name][rows].mean() for name in own])
                found["across models", method, measure] = _correlation(means, sure)
        return found

    def pareto(self, measure: str = "pointing", common: bool = False) -> list[str]:
        """Models that no other beats in all of clean accuracy, mean accuracy on the other sets, and `measure`."""
        table = self.table(common)
        points = {}
        for name in self.correct:
            values = [
                r["mean"] for r in table if r["model"] == name and r["measure"] == measure and r["kind"] != "control"
            ]
            if not values:
                raise InputError(f"measure: {measure!r} was not run; {nearest(measure, {r['measure'] for r in table})}")
            others = [share for (model, which), share in self.accuracy.items() if model == name and which != "clean"]
            worth = _mean(np.array(values)) * (1 if BETTER[measure] else -1)
            points[name] = np.array([self.accuracy[name, "clean"], _mean(np.array(others)) if others else 0.0, worth])
        return [
            name for name, own in points.items()
            if not any((other >= own).all() and (other > own).any() for other in points.values())
        ]  # fmt: skip

    def to_markdown(self, common: bool = False) -> str:
        """A table of models and methods by measures."""
        table = self.table(common)
        measures = list(dict.fromkeys(row["measure"] for row in table))
        means = {(row["model"], row["method"], row["measure"]): row["mean"] for row in table}
        lines = ["| model | method | " + " | ".join(measures) + " |", "|" + " --- |" * (2 + len(measures))]
        for model, method in dict.fromkeys((row["model"], row["method"]) for row in table):
            cells = [means.get((model, method, measure), np.nan) for measure in measures]
            lines.append(
                f"| {model} | {method} | " + " | ".join(f"{c:.3f}" if np.isfinite(c) else "–" for c in cells) + " |"
            )
        return "\n".join(lines)

    def _rows(self, common: bool) -> Bool[np.ndarray, " n"]:
        return self.common if common else np.ones(len(next(iter(self.correct.values()))), dtype=bool)


class ExplainabilityBench:
    """Score methods on models, paired: same images, classes and settings for every model.

    Parameters
    ----------
    models : mapping of str to torch.nn.Module
        Of one input size. One is enough for everything but comparisons of models.
    methods : callable
        ``methods(model)`` gives ``{name: function(images, classes) -> maps}``, such as `attribution_suite`.
    measures : sequence of str
        Of `BETTER`; those of `BOXED` need boxes.
    steps : int
        Of insertion and deletion.
    fill : float or Tensor (channels,)
        What replaces a removed pixel, in the scale of the images.
    multi_label : bool
        Probabilities are sigmoids.
    batch_size : int
        Images per pass at most; halved when memory runs out.
    random_state : int

    Raises
    ------
    InputError
        No model, or an unknown measure.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        methods: Callable[[nn.Module], Mapping[str, MapFunction]],
        measures: Sequence[str] = ("insertion", "deletion", "pointing", "localisation"),
        *,
        steps: int = 20,
        fill: float | Tensor = 0.0,
        multi_label: bool = False,
        batch_size: int = 64,
        random_state: int = 0,
    ) -> None:
        if not models:
            raise InputError("models: give at least one")
        for measure in measures:
            if measure not in BETTER:
                raise InputError(f"measures: got {measure!r}; {nearest(measure, BETTER)}")
        self.models, self.methods, self.measures = dict(models), methods, list(measures)
        self.steps, self.fill, self.multi_label = steps, fill, multi_label
        self.batch_size, self.random_state = batch_size, random_state

    def run(
        self,
        images: Float[Tensor, "n channels height width"],
        targets: Int[Tensor, " n"],
        boxes: Int[Tensor, "n 4"] | np.ndarray | None = None,
        *,
        other_sets: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> BenchResult:
        """Explain the target of each image by each model and method, and score the maps.

        Parameters
        ----------
        images : Tensor (n, channels, height, width)
        targets : Tensor (n,)
            The class to explain, the same for every model; usually the true one. A model counts as correct where
            it predicts it (multi-label: gives it 0.5 or more).
        boxes : (n, 4), optional
            Of the object of that class: ``x0, y0, x1, y1``, the end excluded.
        other_sets : mapping of str to (images, targets), optional
            Further sets for the accuracy: shifted, corrupted, attacked.
        progress : callable, optional
            ``progress(stage, done, total)``.

        Raises
        ------
        InputError
            Boxes are missing or outside the image, or models of other input sizes.
        """
        needed = [measure for measure in self.measures if measure in BOXED]
        if needed and boxes is None:
            raise InputError(f"boxes: {', '.join(needed)} need the box of the object in each image")
        result = BenchResult({}, {}, {}, {}, {}, {})
        for name, model in self.models.items():
            chance, right, predicted = self._predictions(name, model, images, targets)
            result.confidence[name], result.correct[name] = chance, right
            result.accuracy[name, "clean"] = float(right.mean())
            for which, (others, labels) in (other_sets or {}).items():
                result.accuracy[name, which] = float(self._predictions(name, model, others, labels)[1].mean())
            share = np.bincount(predicted).max() / len(predicted)
            classes = len(np.unique(targets.cpu().numpy()))
            if classes > 2 and share > 0.9:
                result.warnings.append(
                    f"{name} predicts one class for {share:.0%} of the images: it has collapsed, and its scores follow "
                    "its constant confidence"
                )
        suites = {name: self.methods(model) for name, model in self.models.items()}
        jobs = [(name, method) for name, suite in suites.items() for method in suite]
        for done, (name, method) in enumerate(jobs):
            if progress is not None:
                progress(f"{name}: {method}", done, len(jobs))
            maps = suites[name][method](images, targets).detach().float()
            result.maps[name, method] = maps.cpu()
            self._score(result, name, method, images, targets, boxes, maps)
        if len(self.models) > 1 and result.common.sum() < FEWEST:
            result.warnings.append(
                f"only {int(result.common.sum())} images are classified correctly by all models; comparisons on those "
                f"come without intervals below {FEWEST}"
            )
        return result

    def _score(self, result: BenchResult, name: str, method: str, images, targets, boxes, maps: Tensor) -> None:
        model, key = self.models[name], (name, method)
        areas = {measure.split(",")[0] for measure in self.measures} & {"insertion", "deletion"}
        for mode in sorted(areas, reverse=True):
            share, heights = perturbation_curve(
                model, images, maps, targets, mode, steps=min(self.steps, maps[0].numel()), fill=self.fill,
                multi_label=self.multi_label, internal_batch_size=self.batch_size,
            )  # fmt: skip
            result.curves[(*key, mode)] = heights.mean(0)
            blank, whole = (heights[:, 0], heights[:, -1]) if mode == "insertion" else (heights[:, -1], heights[:, 0])
            area, span = trapezoid(heights, share, axis=1), whole - blank
            if mode in self.measures:
                result.scores[(*key, mode)] = area
            if f"{mode}, normalised" in self.measures:
                known = np.abs(span) >= _SPAN
                normalised = np.divide(area - blank, span, out=np.full_like(area, np.nan), where=known)
                result.scores[(*key, f"{mode}, normalised")] = normalised
        for measure in self.measures:
            if measure in HIGHER_IS_BETTER and measure not in areas:
                result.scores[(*key, measure)] = score_maps(
                    model, images, maps, targets, measure, steps=min(self.steps, maps[0].numel()), fill=self.fill,
                    multi_label=self.multi_label, internal_batch_size=self.batch_size,
                    generator=torch.Generator().manual_seed(self.random_state),
                )  # fmt: skip
        if boxes is not None:
            self._point(result, key, boxes, maps)

    def _point(self, result: BenchResult, key: tuple[str, str], boxes: Any, maps: Tensor) -> None:
        if "pointing" in self.measures:
            found = pointing(maps, boxes)
            result.scores[(*key, "pointing")] = found.hits.astype(float)
            if found.flat.any():
                result.warnings.append(f"{key[0]}, {key[1]}: {int(found.flat.sum())} flat maps count as misses")
        if "localisation" in self.measures:
            held = max(1, int(_HELD_OUT * len(maps)))
            threshold = best_threshold(maps[:held], boxes[:held])
            right = localised(maps, boxes, threshold).astype(float)
            right[:held] = np.nan  # the threshold was sought there
            result.scores[(*key, "localisation")] = right
        if "energy" in self.measures:
            result.scores[(*key, "energy")] = energy_inside(maps, _masks(boxes, maps.shape[1], maps.shape[2]))

    def _predictions(self, name: str, model: nn.Module, images: Tensor, targets: Tensor) -> tuple:
        def one(index: Tensor) -> Tensor:
            return logits_of(run(model, images[index.to(images.device)])).double()

        try:
            with training_mode(model, False), torch.no_grad():
                logits = map_batches(one, torch.arange(len(images)), batch_size=self.batch_size)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"models: {name} cannot take images of shape {tuple(images.shape[1:])}: {error}; all models of a bench "
                "take the same images"
            ) from error
        labels = targets.cpu()
        if logits.ndim != 2 or int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
            raise InputError(
                f"targets: lie in {int(labels.min())}..{int(labels.max())}; {name} has {tuple(logits.shape[1:])} logits"
            )
        chances = logits.sigmoid() if self.multi_label else logits.softmax(1)
        own, predicted = chances.gather(1, labels[:, None])[:, 0], logits.argmax(1)
        right = own >= 0.5 if self.multi_label else predicted == labels
        return own.numpy(), right.numpy(), predicted.numpy()


def better_than_control(
    result: BenchResult, model: str, *, control: str = "random", random_state: int = 0
) -> dict[tuple[str, str], tuple[float, float, float, int]]:
    """How much better than a map that knows nothing: (method, measure) to (mean, low, high, images).

    Positive is better, whichever way the measure runs. Without `FEWEST` images the interval is NaN.
    """
    found = {}
    methods = [method for name, method in result.maps if name == model and method not in CONTROLS]
    measures = dict.fromkeys(measure for name, _, measure in result.scores if name == model)
    for method, measure in itertools.product(methods, measures):
        a, b = result.scores[model, method, measure], result.scores[model, control, measure]
        known, sign = np.isfinite(a) & np.isfinite(b), 1 if BETTER[measure] else -1
        if known.sum() < FEWEST:
            found[method, measure] = (sign * _mean((a - b)[known]), np.nan, np.nan, int(known.sum()))
            continue
        mean, low, high, _, n = paired_difference(sign * a[known], sign * b[known], random_state=random_state)
        found[method, measure] = (mean, low, high, n)
    return found


def _masks(boxes: Any, height: int, width: int) -> Tensor:
    x0, y0, x1, y1 = torch.as_tensor(np.asarray(boxes)).T[..., None]
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows, inside_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    return inside_rows[:, :, None] & inside_columns[:, None]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
