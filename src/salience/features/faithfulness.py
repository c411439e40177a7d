"""Do maps point at what the model uses? Insertion and deletion on images, against maps that look at no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from salience.errors import InputError
from salience.features.attribution import device_of, evaluating, target_classes
from salience.measure.curves import Curve, curve
from salience.measure.paired import Interval, PairedDifference, bootstrap_interval, paired_difference
from salience.model.at import logits_of
from salience.model.batches import map_batches

_BLUR = 0.15  # standard deviation as a share of the longer side: a digit or a bird is a smudge then


class Faithfulness(NamedTuple):
    """The probability of a class while pixels come and go.

    Attributes
    ----------
    insertion, deletion : Curve
        From the most important pixels on: put into the blurred image, and blurred away.
    """

    insertion: Curve
    deletion: Curve

    @property
    def score(self) -> Float[np.ndarray, " n"]:
        """Area under insertion minus area under deletion of each image, in -1..1; the higher, the better."""
        return self.insertion.area - self.deletion.area


def insertion_deletion(
    model: nn.Module,
    images: Float[Tensor, "n channel height width"],
    maps: Float[Tensor, "n height width"],
    classes: Int[Tensor, " n"],
    *,
    steps: int = 20,
    batch_size: int = 64,
) -> Faithfulness:
    """Put pixels into a blurred image, and take them out of the image, in the order of a map.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier; in evaluation mode meanwhile.
    images : Tensor (n, channel, height, width)
        As the model takes them.
    maps : Tensor (n, height, width)
        The higher, the earlier a pixel comes or goes.
    classes : Tensor (n,)
        Whose probability (softmax) is followed.
    steps : int
        Of equal numbers of pixels. Each costs a forward pass an image and a curve.
    batch_size : int
        Images at once; halved when memory runs out.

    Returns
    -------
    Faithfulness

    Raises
    ------
    InputError
        Shapes that do not fit, maps that are not finite, or a class that is not there.

    Notes
    -----
    Source: Petsiuk, Das and Saenko, 2018 (arXiv 1806.07421), section 4.2. There deletion leaves grey and insertion
    begins with a blurred image; here both use the blurred one, which adds no edges of its own.
    """
    n, _, height, width = images.shape
    if maps.shape != (n, height, width):
        raise InputError(f"maps: have shape {tuple(maps.shape)}; the images make it {(n, height, width)}")
    if not bool(torch.isfinite(maps).all()):
        raise InputError("maps: hold NaN or infinite values")
    device = device_of(model)
    pictures, blank = images.cpu(), blurred(images)
    order = np.argsort(-maps.flatten(1).cpu().numpy(), axis=1, kind="stable")

    def score(keep: Bool[np.ndarray, "batch units"], rows: Int[np.ndarray, " batch"]) -> np.ndarray:
        def some(part: range) -> Tensor:
            own = torch.from_numpy(rows[part.start : part.stop])
            mask = torch.from_numpy(keep[part.start : part.stop]).view(-1, 1, height, width)
            mixed = torch.where(mask, pictures[own], blank[own]).to(device)
            logits = logits_of(model(mixed))
            wanted = target_classes(logits, classes[own].to(logits.device))
            logits = logits.mean((2, 3)) if logits.ndim == 4 else logits
            return logits.double().softmax(1).gather(1, wanted[:, None])[:, 0]

        return map_batches(some, range(len(rows)), batch_size=batch_size).numpy()

    with evaluating(model), torch.no_grad():
        parts = [curve(score, order, min(steps, height * width), mode=mode, batch_size=batch_size)
                 for mode in ("insertion", "deletion")]  # fmt: skip
    return Faithfulness(*parts)


def blurred(images: Float[Tensor, "n channel height width"]) -> Float[Tensor, "n channel height width"]:
    """Images of which only the large patches of colour are left, on the CPU."""
    sigma = _BLUR * max(images.shape[2:])
    values = images.detach().cpu().float().numpy()
    return torch.from_numpy(gaussian_filter(values, (0, 0, sigma, sigma), mode="nearest")).to(images.dtype)


@dataclass(frozen=True)
class MapProof:
    """How a method's maps did on the user's images.

    Attributes
    ----------
    method : str
    insertion, deletion : float
        Mean areas.
    score : Interval
        Insertion minus deletion, mean over images.
    over_random : PairedDifference
        Of the score, over random smooth maps on the same images.
    heuristic : str
        The better of the heuristics.
    over_heuristic : PairedDifference
    randomised : float or None
        Rank correlation with the maps of the same network with random weights; None where not asked for.
    """

    method: str
    insertion: float
    deletion: float
    score: Interval
    over_random: PairedDifference
    heuristic: str
    over_heuristic: PairedDifference
    randomised: float | None = None

    @property
    def better(self) -> bool:
        """Whether the whole interval of the difference to random smooth maps is above 0."""
        return self.over_random.low > 0

    @property
    def words(self) -> str:
        """The verdict in plain words."""
        if self.over_random.high < 0:
            text = "worse than random here"
        elif not self.better:
            text = "no better than random here"
        elif self.over_heuristic.low > 0:
            text = f"points at what the model uses: better than random and than {self.heuristic}"
        else:
            text = f"better than random, but no better than {self.heuristic}"
        if self.randomised is not None and abs(self.randomised) > 0.8:
            text += "; hardly changes when the weights are drawn anew"
        return text


RANDOM = "random smooth map"


def map_proofs(
    runs: Mapping[str, Faithfulness],
    baselines: Mapping[str, Faithfulness],
    randomised: Mapping[str, float],
    *,
    random_state: int,
) -> dict[str, MapProof]:
    """Compare methods with baselines on the same images.

    Parameters
    ----------
    runs : mapping of str to Faithfulness
        Of the methods.
    baselines : mapping of str to Faithfulness
        Of `RANDOM`, and of at least one heuristic.
    randomised : mapping of str to float
        Correlation with the maps of random weights, of the methods for which it is known.
    random_state : int
        Of the intervals.
    """
    heuristics = {name: float(run.score.mean()) for name, run in baselines.items() if name != RANDOM}
    best = max(heuristics, key=lambda name: heuristics[name])
    return {
        name: MapProof(
            method=name,
            insertion=float(run.insertion.area.mean()),
            deletion=float(run.deletion.area.mean()),
            score=bootstrap_interval(run.score, random_state=random_state),
            over_random=paired_difference(run.score, baselines[RANDOM].score, random_state=random_state),
            heuristic=best,
            over_heuristic=paired_difference(run.score, baselines[best].score, random_state=random_state),
            randomised=randomised.get(name),
        )
        for name, run in runs.items()
    }


def record(proof: MapProof) -> dict[str, Any]:
    """A proof as plain data."""

    def finite(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return {
        "method": proof.method, "insertion": proof.insertion, "deletion": proof.deletion,
        "score": finite(proof.score.mean), "images": proof.score.n,
        "over_random": [finite(v) for v in proof.over_random[:3]], "heuristic": proof.heuristic,
        "over_heuristic": [finite(v) for v in proof.over_heuristic[:3]],
        "correlation_with_random_weights": None if proof.randomised is None else finite(proof.randomised),
        "better_than_random": proof.better, "verdict": proof.words,
    }  # fmt: skip
