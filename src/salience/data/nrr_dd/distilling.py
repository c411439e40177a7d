"""All stages: from a teacher and its training images to a distilled set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from salience.data.nrr_dd.activation import check_images
from salience.data.nrr_dd.discovery import Order, discover_patches, take
from salience.data.nrr_dd.distilled import DistilledSet, Labels, on_grid
from salience.data.nrr_dd.labels import DBRLabels, HardLabels, SoftLabels
from salience.data.nrr_dd.refinement import refine_noncritical
from salience.data.nrr_dd.views import Views, draw_seeds
from salience.errors import InputError
from salience.model.at import logits_of, training_mode

_CHECKED = 500  # images that the teacher is tried on


class NRRDD:
    """Compress labelled images into a few per class: keep the pixels that matter, rewrite those that do not.

    `distill` runs `discover` (patches that show the class and leave the teacher unsure), `refine` (the rest of the
    pixels learns to speak for the class) and `label` (what the teacher says of the views that students will see).

    Parameters
    ----------
    teacher : torch.nn.Module
        An image classifier trained on these images, best with batch normalisation.
    ipc : int
        Images per class.
    mean, std : sequence of float
        By which images are normalised, per channel of values in 0..1. Pixels are held in the range that they give, and
        rounded to 8 bits, so that a student reads from files what the teacher saw.
    factor, crops, top, pool, scale, order, drop_wrong
        See `discover_patches`.
    eps, steps, lr, alpha_bn, recompute_every
        See `refine_noncritical`.
    knowledge : {"dbr", "soft", "hard"}
        Two distances for each view of each image; probabilities of all classes; nothing.
    views : int
        Views of an image that are labelled. A student that trains longer sees them again.
    flip, mix
        See `Views`.
    alpha, p
        See `dbr_loss`.
    temperature : float
        Of soft labels.
    random_state : int

    Raises
    ------
    InputError
        In the methods: an option out of range, images that do not fit, or a teacher that is about as good as chance.

    Notes
    -----
    Source: arXiv 2503.18267. Which constants the authors take is unread; the defaults are proposals of ours, those of
    stage 1 and of the views are RDED's.
    """

    def __init__(
        self,
        teacher: nn.Module,
        ipc: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        factor: int = 1,
        crops: int = 5,
        top: int | None = 1,
        pool: int = 300,
        scale: tuple[float, float] | None = None,
        order: Order = "low",
        drop_wrong: bool = False,
        eps: float = 0.6,
        steps: int = 1000,
        lr: float = 0.1,
        alpha_bn: float = 0.05,
        recompute_every: int | None = None,
        knowledge: Literal["dbr", "soft", "hard"] = "dbr",
        views: int = 300,
        flip: bool = True,
        mix: Literal["cutmix", "mixup"] = "cutmix",
        alpha: float = 3.0,
        p: Literal[1, 2] = 1,
        temperature: float = 1.0,
        random_state: int = 0,
    ) -> None:
        self.teacher, self.ipc, self.mean, self.std = teacher, ipc, tuple(mean), tuple(std)
        self.factor, self.crops, self.top, self.pool, self.scale = factor, crops, top, pool, scale
        self.order, self.drop_wrong = order, drop_wrong
        self.eps, self.steps, self.lr, self.alpha_bn, self.recompute_every = eps, steps, lr, alpha_bn, recompute_every
        self.knowledge, self.views, self.flip, self.mix = knowledge, views, flip, mix
        self.alpha, self.p, self.temperature, self.random_state = alpha, p, temperature, random_state

    def distill(self, images: Any, labels: Int[Tensor, " n"], class_names: Sequence[str] | None = None) -> DistilledSet:
        """All stages.

        Parameters
        ----------
        images : (n, channel, height, width) Tensor, or a Dataset such as `read_images` gives
            Normalised by `mean` and `std`.
        labels : (n,) int Tensor
            As the teacher counts its classes.
        class_names : sequence of str, optional
            Of the labels 0, 1, …; the numbers by default.
        """
        x, y = self.discover(images, labels)
        return self.label(self.refine(x, y), y, class_names)

    def discover(self, images: Any, labels: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Stage 1: images of real patches, and their classes."""
        labels = torch.as_tensor(labels)
        if len(labels) != len(images) or not len(labels) or labels.is_floating_point() or int(labels.min()) < 0:
            raise InputError(f"labels: one class, 0 or more, for each of the {len(images)} images is needed")
        self._check_teacher(images, labels)
        x, y = discover_patches(
            self.teacher, images, labels, self.ipc, self.factor, crops=self.crops, top=self.top, pool=self.pool,
            scale=self.scale, order=self.order, drop_wrong=self.drop_wrong, generator=self._generator(0),
        )  # fmt: skip
        return on_grid(x, self.mean, self.std), y

    def refine(
        self, x: Float[Tensor, "n channel height width"], y: Int[Tensor, " n"]
    ) -> Float[Tensor, "n channel height width"]:
        """Stage 2: the same images with their non-critical pixels rewritten."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        refined = refine_noncritical(
            self.teacher, x, y, eps=self.eps, steps=self.steps, lr=self.lr, alpha_bn=self.alpha_bn,
            recompute_every=self.recompute_every, low=-mean / std, high=(1 - mean) / std,
        )  # fmt: skip
        return torch.where(refined == x, x, on_grid(refined, self.mean, self.std))

    def label(
        self,
        x: Float[Tensor, "n channel height width"],
        y: Int[Tensor, " n"],
        class_names: Sequence[str] | None = None,
        tiles: int | None = None,
    ) -> DistilledSet:
        """Stage 3: ask the teacher about all views of the images; `tiles` is 1 for images that are no mosaics."""
        check_images(x, y)
        views = Views(
            draw_seeds(self.views, self._generator(1)), self.factor if tiles is None else tiles, 1 / self.factor,
            self.flip, self.mix,
        )  # fmt: skip
        labels: Labels
        if self.knowledge == "dbr":
            labels = DBRLabels.from_teacher(self.teacher, x, y, views, alpha=self.alpha, p=self.p)
        elif self.knowledge == "soft":
            labels = SoftLabels.from_teacher(self.teacher, x, y, views, temperature=self.temperature)
        elif self.knowledge == "hard":
            labels = HardLabels(views, self._logits(x[:1]).shape[1])
        else:
            raise InputError(f"knowledge: got {self.knowledge!r}; it must be 'dbr', 'soft' or 'hard'")
        names = [str(label) for label in range(int(y.max()) + 1)] if class_names is None else class_names
        return DistilledSet(x, y, labels, self.mean, self.std, tuple(names))

    def _generator(self, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(2 * self.random_state + use)

    def _logits(self, x: Tensor) -> Tensor:
        with training_mode(self.teacher, False), torch.no_grad():
            return logits_of(self.teacher(x))

    def _check_teacher(self, images: Any, labels: Tensor) -> None:
        """Refuse a teacher that knows next to nothing: what it finds critical would be noise."""
        rows = torch.linspace(0, len(labels) - 1, min(_CHECKED, len(labels))).round().long()
        rows = labels.argsort(stable=True)[rows]  # evenly over the classes
        hits, classes = 0, 0
        for part in rows.split(64):
            x = take(images, part)
            if x.shape[1] != len(self.mean) or len(self.mean) != len(self.std):
                raise InputError(
                    f"mean and std: {len(self.mean)} and {len(self.std)} channels, the images have {x.shape[1]}"
                )
            logits = self._logits(x)
            hits, classes = hits + int((logits.argmax(1).cpu() == labels[part].cpu()).sum()), logits.shape[1]
        accuracy, chance = hits / len(rows), 1 / max(classes, 2)
        if accuracy < chance + 0.1 * (1 - chance) or math.isnan(accuracy):
            raise InputError(
                f"teacher: right on {accuracy:.0%} of {len(rows)} of these images, where chance is {chance:.0%}; give "
                "a network trained on them, and images normalised as it takes them"
            )
