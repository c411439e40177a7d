"""Stage 3: what the teacher says of the views, as two distances an image or as soft labels, and training by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot

from salience.data.nrr_dd.activation import BATCH, check_classes, check_images
from salience.data.nrr_dd.views import View, Views
from salience.errors import InputError
from salience.model.at import logits_of, training_mode
from salience.model.batches import map_batches
from salience.model.fitting import History, fit

LEAST_LOG = -50.0  # log-probabilities are cut here: a teacher that is certain and wrong would give infinite distances


def dbr_loss(
    logits: Float[Tensor, "batch classes"],
    y: Int[Tensor, " batch"],
    y_aug: Float[Tensor, "batch classes"],
    d_org: Float[Tensor, " batch"],
    d_aug: Float[Tensor, " batch"],
    alpha: float = 1.0,
    p: Literal[1, 2] = 1,
) -> Float[Tensor, ""]:
    """Distance-based representative loss: cross-entropy, and the teacher's two distances as the student's own.

        L = CE(S, y_aug) + alpha ( |CE(S, y) - d_org|^p + |CE(S, y_aug) - d_aug|^p ),    mean over the batch

    Parameters
    ----------
    logits : (batch, classes) Tensor
        Of the student, for the mixed images.
    y : (batch,) int Tensor
        Class of each image before mixing.
    y_aug : (batch, classes) Tensor
        Mixed one-hot label.
    d_org, d_aug : (batch,) Tensor
        Cross-entropy of the teacher on the same mixed images, to y and to y_aug, in nats.
    alpha : float
    p : {1, 2}

    Raises
    ------
    InputError
        `alpha` below 0 or another `p`.

    Notes
    -----
    Source: section 3.4. Which distance and which weight the authors take is unread; both are proposals of ours.
    """
    if not 0 <= alpha < math.inf or p not in (1, 2):
        raise InputError(f"alpha and p: got {alpha!r} and {p!r}; at least 0, and 1 or 2")
    logs = log_softmax(logits, 1).clamp(min=LEAST_LOG)
    own = -logs.gather(1, y[:, None])[:, 0]
    mixed = -(logs * y_aug).sum(1)
    apart = (own - d_org).abs().pow(p) + (mixed - d_aug).abs().pow(p)
    return (cross_entropy(logits, y_aug, reduction="none") + alpha * apart).mean()


@dataclass(frozen=True)
class DBRLabels:
    """Two distances for each view of each image.

        d_org = CE(T(x_mix), y),    d_aug = CE(T(x_mix), y_aug)

    Parameters
    ----------
    views : Views
        Makes the same x_mix for the student.
    classes : int
    d_org, d_aug : (n, views) Tensor
        In nats.
    alpha, p
        See `dbr_loss`.
    """

    views: Views
    classes: int
    d_org: Float[Tensor, "n views"]
    d_aug: Float[Tensor, "n views"]
    alpha: float = 1.0
    p: Literal[1, 2] = 1

    @classmethod
    def from_teacher(
        cls, model: nn.Module, x: Tensor, y: Tensor, views: Views, *, alpha: float = 1.0, p: Literal[1, 2] = 1
    ) -> DBRLabels:
        """Ask the teacher, in evaluation mode, about every view."""
        org, aug, classes = [], [], 0
        for number in range(len(views)):
            view = views.view(x, y, number)
            logits = _logits(model, view)
            classes = logits.shape[1]
            logs = log_softmax(logits, 1).clamp(min=LEAST_LOG)
            org.append(-logs.gather(1, view.y[:, None])[:, 0])
            aug.append(-(logs * view.mixed(classes)).sum(1))
        return cls(views, classes, torch.stack(org, 1), torch.stack(aug, 1), alpha, p)

    @property
    def nbytes(self) -> int:
        """Bytes of what a student needs beside the images and their classes."""
        return 4 * (self.d_org.numel() + self.d_aug.numel()) + 8 * len(self.views)

    def targets(self, view: View, number: int) -> Float[Tensor, "n width"]:
        """What `loss` is given: own class, mixed label and the two distances, side by side."""
        column = number % len(self.views)
        distances = torch.stack([self.d_org[:, column], self.d_aug[:, column]], 1)
        return torch.cat([one_hot(view.y, self.classes), view.mixed(self.classes), distances], 1)

    def loss(self, output: object, targets: Float[Tensor, "batch width"]) -> Tensor:
        """`dbr_loss` of a batch."""
        own, mixed, distances = targets.split([self.classes, self.classes, 2], 1)
        return dbr_loss(
            logits_of(output), own.argmax(1), mixed, distances[:, 0], distances[:, 1], self.alpha, self.p
        )  # fmt: skip


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's probabilities for each view of each image, which the student follows by KL divergence.

        q = softmax(T(x_mix) / temperature),    L = KL(q, softmax(S(x_mix) / temperature))

    Parameters
    ----------
    views : Views
    q : (n, views, classes) Tensor
    temperature : float
    """

    views: Views
    q: Float[Tensor, "n views classes"]
    temperature: float = 1.0

    @classmethod
    def from_teacher(
        cls, model: nn.Module, x: Tensor, y: Tensor, views: Views, *, temperature: float = 1.0
    ) -> SoftLabels:
        """Ask the teacher, in evaluation mode, about every view."""
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature: got {temperature!r}; it must be above 0")
        logits = [_logits(model, views.view(x, y, number)) for number in range(len(views))]
        return cls(views, torch.softmax(torch.stack(logits, 1) / temperature, 2), temperature)

    @property
    def nbytes(self) -> int:
        """Bytes of what a student needs beside the images and their classes."""
        return 4 * self.q.numel() + 8 * len(self.views)

    def targets(self, view: View, number: int) -> Float[Tensor, "n classes"]:
        """The probabilities of one view."""
        return self.q[:, number % len(self.views)]

    def loss(self, output: object, targets: Float[Tensor, "batch classes"]) -> Tensor:
        """KL divergence of a batch, the mean over its images."""
        return kl_div(log_softmax(logits_of(output) / self.temperature, 1), targets, reduction="batchmean")


@dataclass(frozen=True)
class HardLabels:
    """No teacher: cross-entropy with the mixed one-hot label."""

    views: Views
    classes: int

    @property
    def nbytes(self) -> int:
        """Bytes of what a student needs beside the images and their classes."""
        return 8 * len(self.views)

    def targets(self, view: View, number: int) -> Float[Tensor, "n classes"]:
        """The mixed one-hot label."""
        return view.mixed(self.classes)

    def loss(self, output: object, targets: Float[Tensor, "batch classes"]) -> Tensor:
        """Cross-entropy of a batch."""
        return cross_entropy(logits_of(output), targets)


def train_student(
    student: nn.Module,
    x: Float[Tensor, "n channel height width"],
    y: Int[Tensor, " n"],
    labels: DBRLabels | SoftLabels | HardLabels,
    *,
    epochs: int = 300,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 50,
    generator: torch.Generator,
) -> History:
    """Train a network in place on distilled images alone: AdamW, cosine decay, one view of each image an epoch.

    Parameters
    ----------
    student : torch.nn.Module
        Any classifier that takes images of this size; the teacher is not needed.
    x, y : Tensor
        The distilled images, just as they were when the labels were made, and their classes.
    labels : DBRLabels, SoftLabels or HardLabels
    epochs, lr, weight_decay, batch_size
        Weight decay acts on weights of at least two dimensions.
    generator : torch.Generator
        Draws the order of the images.

    Raises
    ------
    InputError
        Images and labels that do not fit, or as in `salience.model.fit`.

    Notes
    -----
    Source: RDED's published training; its cosine ends at half the rate, this one at 0.
    """
    check_images(x, y)
    if len(x) < 2:
        raise InputError("images: a single one cannot be mixed; distil at least two")
    matrices = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],  # type: ignore[arg-type]
        lr,
        weight_decay=weight_decay,
    )
    size = min(batch_size, len(x))
    if len(x) % size == 1:
        size += 1  # batch normalisation needs two
    history = History()
    for epoch in range(epochs):
        view = labels.views.view(x, y, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        done = fit(
            student, view.x, labels.targets(view, epoch), loss=labels.loss, optimizer=optimizer, epochs=1,
            generator=generator, batch_size=size, drop_last=False,
        )  # fmt: skip
        history.loss += done.loss
        history.steps += done.steps
    return history


def _logits(model: nn.Module, view: View) -> Float[Tensor, "n classes"]:
    with training_mode(model, False), torch.no_grad():
        logits = map_batches(lambda part: logits_of(model(part)).float(), view.x, batch_size=BATCH).to(view.x.device)
    check_classes(view.y, logits)
    return logits
