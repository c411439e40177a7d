"""BEE: a map fitted to the measure it will be judged by, by exploring and exploiting families of baselines.

Path-integrated attribution needs a baseline, and no single one serves every image and every measure. BEE draws
baselines from five families in activation space; a contextual bandit learns, from the image and for one measure,
which family to draw from; of T maps drawn, the best under that measure is returned.

Source: Barkan, Elisha, Weill and Koenigstein, "BEE: Metric-Adapted Explanations via Baseline
Exploration-Exploitation", AAAI 2025 (arXiv 2412.17512). The steps follow the reference code, the abstract and a
published summary; the body of the paper was not available. Marks as in `families`: [C] code, [D] ours.
"""

from __future__ import annotations

import bisect
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from captum.attr import Attribution
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor, nn

from salience.errors import InputError, NothingToDo, nearest
from salience.features.attribution import target_classes
from salience.features.bee.bandit import LogisticThompson
from salience.features.bee.families import baseline_families
from salience.features.bee.path import Integrand, enlarged, grid_of, path_map, with_grid
from salience.features.map_measures import HIGHER_IS_BETTER, score_maps, unit_range
from salience.model.at import logits_of, run, training_mode
from salience.model.batches import map_batches
from salience.model.split import Split

# metric(model, images (n, c, h, w), maps (n, h, w), targets (n,)) -> n scores, higher is better
Metric = Callable[[nn.Module, Tensor, Tensor, Tensor], Any]
_GRID: dict[str, Any] = {"steps": 10, "until": 0.9}  # the shares of the reference code [C]
BANK = 100  # training images whose activations are kept [C]


class BEEResult(NamedTuple):
    """The best map of one image, and how it was found.

    Attributes
    ----------
    map : Tensor (height, width)
        From 0 to 1.
    score : float
        Of the map under the measure that chose it.
    family, layer : str
        Where it came from.
    target : int
        The explained class.
    families : array (draws,) of str
        Family of every draw.
    scores : array (draws,)
        Best score over the layers of every draw; NaN where the measure is not defined.
    all_metrics : dict of str to float
        Every other measure of the same map: choosing by one measure says nothing of the others.
    """

    map: Float[Tensor, "height width"]
    score: float
    family: str
    layer: str
    target: int
    families: np.ndarray
    scores: Float[np.ndarray, " draws"]
    all_metrics: dict[str, float]


class BEE(Attribution):
    """Metric-adapted maps: the best of several, from baselines that a bandit has learned to draw.

    Parameters
    ----------
    forward_func : torch.nn.Module
        Image classifier that returns logits, alone or in a `ModelOutput`. It is evaluated in evaluation mode
        and left as it was.
    layer : str or sequence of str
        Layers whose activations are integrated, as in `model.named_modules()`; of several, the best map is
        kept. Convolutional maps, or the tokens of a vision transformer's block.
    metric : str or callable
        A name of `HIGHER_IS_BETTER`, or ``metric(model, images, maps, targets)`` that gives one score per map,
        higher is better.
    families : sequence of str, optional
        Names of `baseline_families`; all five by default.
    context : callable, optional
        ``context(images) -> (n, d)`` features for the bandit; by default what the model's output layer sees
        [D]. They are standardised, divided by the root of d and joined by a 1.
    draws : int
        T: maps drawn per image; 100 in the reference code [C].
    finetune : bool
        Let the bandit learn on from the draws of each image that is explained, after `fit`; each image starts from
        what `fit` left.
    n_steps : int
        Steps of the path; 4 in the reference code [C].
    integrand : {"relu_grad_act", "grad_act", "ig"}
        See `path_map`.
    reward : {"history", "image"}
        A pull's reward is the rank of its score in 0..1, among all scores seen so far [C], or among fresh
        draws of all families on the same image [D].
    train_draws : int
        Training images that one map of family "train" is the mean over; 100 in the reference code.
    multi_label, fill, internal_batch_size
        As in `score_maps`. The last bounds the memory of every pass.
    random_state : int
        Of all draws. What is drawn for an image depends on it and on the image alone.

    Attributes
    ----------
    bandit_ : LogisticThompson
        After `fit`.
    pulled_ : list of str
        Families pulled in `fit`, in order.
    history_ : list of float
        Scores seen in `fit`, rising.
    """

    def __init__(
        self,
        forward_func: nn.Module,
        layer: str | Sequence[str],
        *,
        metric: str | Metric = "insertion",
        families: Sequence[str] | None = None,
        context: Callable[[Tensor], Tensor] | None = None,
        draws: int = 100,
        finetune: bool = False,
        n_steps: int = 4,
        integrand: Integrand = "relu_grad_act",
        reward: Literal["history", "image"] = "history",
        train_draws: int = 1,
        multi_label: bool = False,
        fill: float | Tensor = 0.0,
        internal_batch_size: int = 64,
        random_state: int = 0,
    ) -> None:
        super().__init__(forward_func)
        self.layers = [layer] if isinstance(layer, str) else list(layer)
        self.families = list(baseline_families) if families is None else list(families)
        if isinstance(metric, str) and metric not in HIGHER_IS_BETTER:
            raise InputError(f"metric: got {metric!r}; {nearest(metric, HIGHER_IS_BETTER)}")
        for family in self.families:
            if family not in baseline_families:
                raise InputError(f"families: got {family!r}; {nearest(family, baseline_families)}")
        if not self.families or not self.layers:
            raise InputError("families and layer: give at least one of each")
        if reward not in ("history", "image"):
            raise InputError(f"reward: got {reward!r}; it must be 'history' or 'image'")
        self._splits = {name: Split(forward_func, name) for name in self.layers}
        self.metric, self.context, self.draws, self.finetune = metric, context, draws, finetune
        self.n_steps, self.integrand = n_steps, integrand
        self.reward, self.train_draws, self.multi_label, self.fill = reward, train_draws, multi_label, fill
        self.internal_batch_size, self.random_state = internal_batch_size, random_state
        self._higher = HIGHER_IS_BETTER[metric] if isinstance(metric, str) else True
        self._banks: dict[str, Tensor] = {}
        self.history_: list[float] = []
        self.pulled_: list[str] = []

    predicts = True  # without a target the predicted class is explained

    @property
    def model(self) -> nn.Module:
        return self.forward_func

    # ---- the pretrained phase --------------------------------------------------------------------------

    def fit(
        self, inputs: Any, target: Sequence[int] | Int[Tensor, " n"] | None = None, *, progress: bool = False
    ) -> BEE:
        """Learn which families to draw from, by one pull on each image.

        On each image every family is drawn once; the pulled one's score is ranked, and the bandit is told of
        a success with the rank as its probability (for `pic`: where the measure itself says so).

        Parameters
        ----------
        inputs : Tensor (n, channels, height, width), or a dataset
            Images that will not be explained later. A dataset may give ``(image, label)``.
        target : sequence of int or Tensor (n,), optional
            Classes to explain; the predicted ones by default [C].
        progress : bool
            Draw a progress bar.

        Raises
        ------
        NothingToDo
            There are no images.
        InputError
            Shapes do not fit, or no context can be found.
        """
        count = len(inputs)
        if count == 0:
            raise NothingToDo("inputs: there is no image to learn from")
        rng = np.random.default_rng([self.random_state, 0])
        with training_mode(self.model, False):
            self._fill_banks([_image(inputs, int(i)) for i in rng.permutation(count)[:BANK]])
            features = torch.cat([self._features(_image(inputs, i)) for i in range(count)])
            self._mean = features.mean(0)
            deviation = features.std(0, correction=0)
            self._scale = torch.where(deviation > 0, deviation, 1.0)
            self.bandit_ = LogisticThompson(len(self.families), features.shape[1] + 1, random_state=rng)
            self.history_, self.pulled_ = [], []
            for i in track(range(count), "learning from images", disable=not progress):
                self._pull(_image(inputs, i), features[i], None if target is None else int(target[i]), rng)
        return self

    def _pull(self, x: Tensor, features: Tensor, target: int | None, rng: np.random.Generator) -> None:
        phi = self._phi(features)
        arm = self.bandit_.choose(phi)
        names = np.array(self.families)
        scores = self._drawn(x, self._targets(x, target)[0], names, _torch_generator(rng))[1]
        best, known = self._best_over_layers(scores), np.isfinite(scores).any(1)
        for score in best[known]:
            bisect.insort(self.history_, float(score))
        self.pulled_.append(self.families[arm])
        if known[arm]:
            others = self.history_ if self.reward == "history" else sorted(best[known].tolist())
            self.bandit_.update(arm, phi, self._success(best[arm], others, rng))

    def _success(self, score: float, others: list[float], rng: np.random.Generator) -> int:
        if self.metric == "pic":
            return 1 if score > 0 else -1
        below, up_to = bisect.bisect_left(others, score), bisect.bisect_right(others, score)
        rank = (below + up_to - 1) / 2 / (len(others) - 1) if len(others) > 1 else 0.5
        return 1 if rng.random() < (rank if self._higher else 1 - rank) else -1

    # ---- explaining ------------------------------------------------------------------------------------

    def attribute(
        self,
        inputs: Float[Tensor, "batch channels height width"],
        target: int | Sequence[int] | Int[Tensor, " batch"] | None = None,
        additional_forward_args: Any = None,
        *,
        draws: int | None = None,
        finetune: bool | None = None,
    ) -> Float[Tensor, "batch 1 height width"]:
        """The best map of each image, from 0 to 1; see `explain`, which also tells how it was found.

        `additional_forward_args` must be None: paths lead through the activations of images alone.
        """
        if additional_forward_args is not None:
            raise InputError("additional_forward_args: BEE explains models that take images alone")
        results = self.explain(inputs, target, draws=draws, finetune=finetune, all_metrics=False)
        return torch.stack([result.map for result in results])[:, None].to(inputs)

    def explain(
        self,
        inputs: Float[Tensor, "batch channels height width"],
        target: int | Sequence[int] | Int[Tensor, " batch"] | None = None,
        *,
        draws: int | None = None,
        finetune: bool | None = None,
        all_metrics: bool = True,
    ) -> list[BEEResult]:
        """Draw maps of each image and keep the best under the measure.

        Parameters
        ----------
        inputs : Tensor (batch, channels, height, width)
        target : int, sequence of int or Tensor (batch,), optional
            Classes to explain; the predicted ones by default.
        draws : int, optional
            Maps drawn per image instead of the T of the constructor. Before `fit` families are drawn with equal
            chance.
        finetune : bool, optional
            Instead of that of the constructor.
        all_metrics : bool
            Also score the chosen map by every other measure.

        Raises
        ------
        InputError
            Shapes do not fit, an option is out of range, or `finetune` before `fit`.
        """
        draws = self.draws if draws is None else draws
        finetune = self.finetune if finetune is None else finetune
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise InputError(f"draws: got {draws!r}; it must be an integer of at least 1")
        if inputs.ndim != 4 or len(inputs) == 0:
            raise InputError(f"inputs: have shape {tuple(inputs.shape)}; (batch, channels, height, width) is needed")
        if finetune and not self.pulled_:
            raise InputError("finetune: there is nothing learned to go on from; call fit first")
        images = inputs.detach()
        with training_mode(self.model, False):
            classes = self._targets(images, target)
            return [
                self._explained(x[None], label, draws, finetune, all_metrics)
                for x, label in zip(images, classes, strict=True)
            ]

    def _explained(self, x: Tensor, label: int, draws: int, finetune: bool, all_metrics: bool) -> BEEResult:
        rng = np.random.default_rng([self.random_state, 1, zlib.crc32(x.cpu().float().numpy().tobytes())])
        if finetune:
            names, maps, scores = self._finetuned(x, label, draws, rng)
        else:
            names = self._policy(x, draws, rng)
            maps, scores = self._drawn(x, label, names, _torch_generator(rng))
        best = self._best_over_layers(scores)
        worst = -np.inf if self._higher else np.inf
        filled = np.where(np.isfinite(best), best, worst)
        draw = int(filled.argmax() if self._higher else filled.argmin())
        at = scores[draw] if np.isfinite(best[draw]) else np.zeros(len(self.layers))
        place = int(np.nanargmax(at) if self._higher else np.nanargmin(at))
        chosen = unit_range(maps[draw, place][None])
        others = {name: self._scored(x, chosen, label, name)[0] for name in HIGHER_IS_BETTER} if all_metrics else {}
        return BEEResult(
            chosen[0], float(best[draw]), str(names[draw]), self.layers[place], label, names, best,
            {name: float(value) for name, value in others.items()},
        )  # fmt: skip

    def _policy(self, x: Tensor, draws: int, rng: np.random.Generator) -> np.ndarray:
        """Families of `draws` draws, by what was learned; with equal chance before `fit`."""
        if not self.pulled_:
            return np.array(self._usable())[rng.integers(len(self._usable()), size=draws)]
        bandit = self.bandit_.copy(rng)
        phi = self._phi(self._features(x)[0])
        return np.array([self.families[bandit.choose(phi)] for _ in range(draws)])

    def _finetuned(self, x: Tensor, label: int, draws: int, rng: np.random.Generator) -> tuple:
        bandit, history = self.bandit_.copy(rng), list(self.history_) if self.reward == "history" else []
        phi, generator = self._phi(self._features(x)[0]), _torch_generator(rng)
        names, maps, scores = [], [], []
        for _ in range(draws):
            arm = bandit.choose(phi)
            names.append(self.families[arm])
            drawn, score = self._drawn(x, label, np.array(names[-1:]), generator)
            maps.append(drawn)
            scores.append(score)
            (best,) = self._best_over_layers(score)
            if np.isfinite(best):
                bisect.insort(history, float(best))
                bandit.update(arm, phi, self._success(best, history, rng))
        return np.array(names), torch.cat(maps), np.concatenate(scores)

    def best_of(self, images: Tensor, maps: Tensor, target: Any = None) -> Float[Tensor, "batch height width"]:
        """Of several maps of each image the best under this measure, as `explain` would choose: equal trials.

        Parameters
        ----------
        images : Tensor (batch, channels, height, width)
        maps : Tensor (batch, draws, height, width)
            From anywhere, such as random ones.
        target : optional
            As in `explain`.
        """
        with training_mode(self.model, False):
            classes = self._targets(images, target)
            chosen = []
            for x, own, label in zip(images, maps, classes, strict=True):
                scores = self._scored(x[None], own, label, self.metric)
                known = np.where(np.isfinite(scores), scores, -np.inf if self._higher else np.inf)
                chosen.append(own[int(known.argmax() if self._higher else known.argmin())])
        return torch.stack(chosen)

    # ---- maps and scores -------------------------------------------------------------------------------

    def _drawn(self, x: Tensor, label: int, names: np.ndarray, generator: torch.Generator) -> tuple[Tensor, np.ndarray]:
        """Maps (draws, layers, height, width) from fresh baselines of the named families, and their scores."""
        maps = []
        for layer, split in self._splits.items():
            with torch.no_grad():
                a = split.encode(x)
            grid = grid_of(a, x)[0]
            repeats = torch.tensor([self.train_draws if name == "train" else 1 for name in names])
            owner = torch.arange(len(names)).repeat_interleave(repeats)
            baselines = torch.empty((len(owner), *grid.shape), dtype=grid.dtype, device=grid.device)
            of_row = names[owner.numpy()]
            for family in self.families:
                rows = torch.from_numpy(of_row == family)
                if rows.any():
                    draw = baseline_families[family]
                    baselines[rows.to(grid.device)] = draw(grid, int(rows.sum()), generator, self._banks.get(layer))
            path = path_map(
                split, x, label, a.expand(len(owner), *a.shape[1:]), with_grid(a, baselines), n_steps=self.n_steps,
                integrand=self.integrand, internal_batch_size=self.internal_batch_size,
            )  # fmt: skip
            mean = torch.zeros((len(names), *path.shape[1:]), dtype=torch.float64)
            mean.index_add_(0, owner, path.double().cpu())
            maps.append(enlarged(mean / repeats[:, None, None], (x.shape[2], x.shape[3])))
        stacked = torch.stack(maps, 1)
        return stacked, self._scored(x, stacked.flatten(0, 1), label, self.metric).reshape(stacked.shape[:2])

    def _scored(self, x: Tensor, maps: Tensor, label: int, metric: str | Metric) -> Float[np.ndarray, " maps"]:
        images, labels = x.expand(len(maps), *x.shape[1:]), torch.full((len(maps),), label)
        maps = unit_range(maps)
        if isinstance(metric, str):
            return score_maps(
                self.model, images, maps, labels, metric, **_GRID, fill=self.fill, multi_label=self.multi_label,
                generator=torch.Generator().manual_seed(self.random_state),
                internal_batch_size=self.internal_batch_size,
            )  # fmt: skip
        scores = np.asarray(metric(self.model, images, maps, labels), dtype=np.float64)
        if scores.shape != (len(maps),):
            raise InputError(f"metric: returned shape {scores.shape}; one score per map is needed, ({len(maps)},)")
        return scores

    def _best_over_layers(self, scores: np.ndarray) -> np.ndarray:
        worst = -np.inf if self._higher else np.inf
        filled = np.where(np.isfinite(scores), scores, worst)
        best = filled.max(1) if self._higher else filled.min(1)
        return np.where(np.isfinite(best), best, np.nan)

    def _targets(self, images: Tensor, target: Any) -> list[int]:
        with torch.no_grad():
            logits = map_batches(lambda x: logits_of(run(self.model, x)), images, batch_size=self.internal_batch_size)
        return target_classes(logits, target).tolist()

    # ---- context and bank ------------------------------------------------------------------------------

    def _features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found = (self.context or self._penultimate)(x)
        if found.ndim != 2 or len(found) != len(x):
            raise InputError(f"context: gave shape {tuple(found.shape)}; one row of features per image is needed")
        return found.detach().double().cpu()

    def _penultimate(self, x: Tensor) -> Tensor:
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        seen: list[Tensor] = []
        handle = linear[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0])) if linear else None
        try:
            logits = logits_of(run(self.model, x))
        finally:
            if handle is not None:
                handle.remove()
        if not seen or linear[-1].out_features != logits.shape[1]:
            raise InputError(
                f"context: {type(self.model).__name__} has no linear output layer to take features from; give "
                "context=, a function of the images that returns one row of features each"
            )
        return seen[-1].flatten(1)

    def _phi(self, features: Tensor) -> Float[np.ndarray, " dim"]:
        standard = ((features - self._mean) / self._scale).clamp(-10, 10) / len(features) ** 0.5
        return np.append(standard.numpy(), 1.0)

    def _fill_banks(self, images: list[Tensor]) -> None:
        if "train" in self.families:
            for layer, split in self._splits.items():
                with torch.no_grad():
                    self._banks[layer] = torch.cat([grid_of(split.encode(x), x).cpu() for x in images])

    def _usable(self) -> list[str]:
        usable = [name for name in self.families if name != "train" or self._banks]
        if not usable:
            raise InputError("families: 'train' needs activations of training images; call fit first")
        if len(usable) < len(self.families):
            warnings.warn("family 'train' is left out: it has no activations before fit", stacklevel=6)
        return usable


def _image(inputs: Any, i: int) -> Float[Tensor, "1 channels height width"]:
    item = inputs[i]
    image = item[0] if isinstance(item, tuple | list) else item
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise InputError("inputs: must give images (channels, height, width), alone or as (image, label)")
    return image.detach()[None]


def _torch_generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))
