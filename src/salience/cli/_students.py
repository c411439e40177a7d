"""Students of `compress dataset`: drawn anew, trained on each set of images, compared on the same held-out images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats

from salience.errors import InputError
from salience.measure.paired import PairedDifference
from salience.weights.evaluation import Comparison

if TYPE_CHECKING:
    import torch

    from salience.data import DistilledSet


@dataclass(frozen=True)
class StudentComparison(Comparison):
    """A comparison of training sets, each by several students.

    Parameters
    ----------
    draws : dict of str to list of (n,) float
        Correct or not for each image, student by student; the scores are their means.
    """

    draws: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def gain(self, name: str, over: str) -> PairedDifference:
        """As of `Comparison`, the interval widened by how far the mean over as many other students may lie.

        ``t s / sqrt(k)``, with s the standard deviation of the difference over the k pairs of students.
        """
        found = super().gain(name, over)
        ours, theirs = self.draws[name], self.draws[over]
        pairs = [float(ours[i % len(ours)].mean() - theirs[i % len(theirs)].mean())
                 for i in range(max(len(ours), len(theirs)))]  # fmt: skip
        if len(pairs) < 2:
            return found
        reach = float(scipy.stats.t.ppf(0.975, len(pairs) - 1) * np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
        low = found.mean - math.hypot(found.mean - found.low, reach)
        return found._replace(low=low, high=found.mean + math.hypot(found.high - found.mean, reach))


def compare_students(
    sets: dict[str, list[DistilledSet]],
    make: Callable[[int], torch.nn.Module],
    test: tuple[torch.Tensor, torch.Tensor],
    *,
    epochs: int,
    seed: int,
    step: Callable[[str], None],
) -> StudentComparison:
    """Train one student on each set of a list, and try all on the same images.

    Parameters
    ----------
    sets : dict of str to list of DistilledSet
        By the name that is shown; student i of every name starts from the same weights.
    make : callable
        A fresh student from a seed.
    test : images and labels
    epochs, seed : int
    step : callable
        Told what happens now.
    """
    import torch

    from salience.data import train_student

    draws: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    for name, each in sets.items():
        for number, one in enumerate(each):
            step(f"student {number + 1} of {len(each)} on: {name}")
            student = make(1000 * seed + number)
            generator = torch.Generator().manual_seed(1000 * seed + number)
            batch = max(2, min(50, max(10, len(one.x) // 4)))
            train_student(student, one.x, one.y, one.labels, epochs=epochs, batch_size=batch, generator=generator)
            draws[name].append(correct(student, *test))
    scores = {name: np.mean(each, axis=0) for name, each in draws.items()}
    return StudentComparison("accuracy", True, scores, seed, draws=draws)


def correct(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Whether each image is classified as it should be."""
    import torch

    from salience.model import logits_of, map_batches, training_mode

    with training_mode(model, False), torch.no_grad():
        predicted = map_batches(lambda part: logits_of(model(part)).argmax(1), x, batch_size=64)
    return (predicted == y).double().numpy()


def fresh(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same architecture with its weights drawn anew.

    Raises
    ------
    InputError
        The network has parameters outside of layers that can draw theirs anew, which would hand on the teacher's.
    """
    import torch

    kept = [name for name, layer in model.named_modules() if list(layer.parameters(False)) and not _redraws(layer)]
    if kept:
        raise InputError(
            f"teacher: the weights of {kept[0] or type(model).__name__} cannot be drawn anew for a student; name what "
            "builds one with --student package.module:factory"
        )
    student = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in student.modules():
            if _redraws(layer):
                layer.reset_parameters()  # type: ignore[operator]
    return student.requires_grad_(True)


def _redraws(layer: Any) -> bool:
    return callable(getattr(layer, "reset_parameters", None))
