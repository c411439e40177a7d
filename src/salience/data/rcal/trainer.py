"""RCAL with an encoder that goes on learning: mixup, sampled points, and representations held near their anchors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.data.rcal.contrast import View, representation_width
from salience.data.rcal.gaussians import ClassGaussians, calibrate_tail, robust_gaussians
from salience.data.rcal.views import weak_view
from salience.errors import DataError, InputError
from salience.model.at import training_mode
from salience.model.batches import map_batches

TERMS = ("mix", "sampled", "ind")


def calibrated_gaussians(z: Any, y: Any, **settings: Any) -> ClassGaussians:
    """`robust_gaussians` with its settings, and then `calibrate_tail` with its defaults."""
    return calibrate_tail(robust_gaussians(z, y, **settings))


class RCALTrainer:
    """Train an encoder and a linear head on noisy, long-tailed labels, from contrastive representations.

        L = L_mix + L_sampled + beta L_ind
        L_mix     = mean_i [lam CE(y~_i) + (1 - lam) CE(y~_j)](head(f(lam x_i + (1 - lam) x_j)))
        L_sampled = mean of CE of the head on points (z, k) drawn from the calibrated Gaussians
        L_ind     = mean_i ||f(x_i) - z_i||^2

    z_i are the representations at the start (of the encoder from `moco_pretrain`, on the image as it is), which stay:
    they know no label, so that holding on to them keeps the encoder from learning wrong ones by heart. x_i is a weak
    view. Sampled points go into the head alone, never through the encoder.

    Parameters
    ----------
    encoder : torch.nn.Module
        Inputs (n, ...) to representations (n, m). It is left as it is; `fit` trains a copy.
    n_classes : int
        Labels are 0 to n_classes - 1.
    beta : float
        Of L_ind; 0.1 to 1 [R: the weights of the terms were not visible].
    mixup : float
        Both parameters of the Beta distribution of lam, one draw a batch; 0 leaves rows as they are [R].
    resample_every : int
        Epochs between draws of new points.
    calibrate : callable
        ``calibrate(z, y) -> ClassGaussians``; give the rate of wrong labels if you know it:
        ``partial(calibrated_gaussians, contamination=0.4)``.
    epochs, batch_size : int
    lr, weight_decay : float
        SGD with momentum 0.9 and a cosine schedule.
    view : callable
        ``view(batch, generator) -> batch``; `weak_view` shifts images and mirrors half of them.
    random_state : int

    Attributes
    ----------
    encoder_, head_ : torch.nn.Module
    gaussians_ : ClassGaussians
        Of the representations at the start; `inlier` says which labels were believed.
    history_ : list of dict
        Mean of each term of the loss, by epoch.

    Raises
    ------
    InputError
        A parameter out of range; at `fit`, shapes that do not fit.
    DataError
        A class without rows, or a loss that is no longer finite.

    Notes
    -----
    Source: arXiv 2211.10955. The squared distance in L_ind, the weights and the optimiser are reconstructed [R].
    """

    def __init__(
        self, encoder: nn.Module, n_classes: int, *, beta: float = 0.1, mixup: float = 1.0, resample_every: int = 1,
        calibrate: Callable[[Any, Any], ClassGaussians] = calibrated_gaussians, epochs: int = 100,
        batch_size: int = 128, lr: float = 0.02, weight_decay: float = 5e-4, view: View = weak_view,
        random_state: int = 0,
    ) -> None:  # fmt: skip
        if n_classes < 2 or min(resample_every, epochs) < 1 or batch_size < 2:
            raise InputError(
                f"n_classes, resample_every, epochs, batch_size: got {n_classes}, {resample_every}, {epochs}, "
                f"{batch_size}; at least 2, 1, 1, 2 is needed"
            )
        for name, value in (("beta", beta), ("mixup", mixup)):
            if not 0 <= value < np.inf:
                raise InputError(f"{name}: got {value!r}; a number of at least 0 is needed")
        self.encoder, self.n_classes, self.beta, self.mixup = encoder, n_classes, beta, mixup
        self.resample_every, self.calibrate, self.epochs, self.batch_size = (
            resample_every,
            calibrate,
            epochs,
            batch_size,
        )
        self.lr, self.weight_decay, self.view, self.random_state = lr, weight_decay, view, random_state

    def fit(self, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> RCALTrainer:
        """Recover the class Gaussians at the start, and train.

        Parameters
        ----------
        x : (n, ...) Tensor
        y : (n,) int Tensor
            Wrong in part.
        """
        self._check(x, y)
        generator = torch.Generator().manual_seed(self.random_state)
        self.encoder_ = copy.deepcopy(self.encoder)
        device = next(self.encoder_.parameters()).device
        anchors = self.represent(x)
        self.gaussians_ = self.calibrate(anchors.double().numpy(), y.cpu().numpy())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self.head_ = nn.Linear(representation_width(self.encoder_, x, device), self.n_classes).to(device)
            with training_mode(self.encoder_, True):
                self._train(x, y, anchors, generator)
        self.encoder_.eval()
        return self

    def represent(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n dim"]:
        """Representations of the images as they are."""
        device = next(self.encoder_.parameters()).device
        with training_mode(self.encoder_, False), torch.no_grad():
            return map_batches(lambda batch: self.encoder_(batch.to(device)), x, batch_size=self.batch_size)

    def logits(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n classes"]:
        """Outputs of the head."""
        if not hasattr(self, "head_"):
            raise InputError("RCALTrainer: nothing is trained yet; call fit first")
        with torch.no_grad():
            return self.head_(self.represent(x).to(self.head_.weight.device)).cpu()

    def predict(self, x: Float[Tensor, "n ..."]) -> Int[Tensor, " n"]:
        """The likeliest class of each row."""
        return self.logits(x).argmax(1)

    def _train(self, x: Tensor, y: Tensor, anchors: Tensor, generator: torch.Generator) -> None:
        device = self.head_.weight.device
        parameters = [*self.encoder_.parameters(), *self.head_.parameters()]
        optimizer = torch.optim.SGD(parameters, self.lr, momentum=0.9, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        rng = np.random.default_rng(self.random_state)
        self.history_: list[dict[str, float]] = []
        for epoch in range(self.epochs):
            if epoch % self.resample_every == 0:
                drawn, kinds = self.gaussians_.sample(random_state=rng)
                points, labels = torch.from_numpy(drawn).float().to(device), torch.from_numpy(kinds).to(device)
            seen = []
            for rows in torch.randperm(len(x), generator=generator).split(self.batch_size):
                images, targets = self.view(x[rows], generator).to(device), y[rows].to(device)
                virtual = torch.randint(len(points), (self.batch_size,), generator=generator).to(device)
                terms = (
                    self._mix(images, targets, rng, generator),
                    cross_entropy(self.head_(points[virtual]), labels[virtual]),
                    (self.encoder_(images) - anchors[rows].to(device)).square().sum(1).mean(),
                )
                optimizer.zero_grad()
                (terms[0] + terms[1] + self.beta * terms[2]).backward()
                optimizer.step()
                seen.append(torch.stack([term.detach() for term in terms]))
            schedule.step()
            self.history_.append(dict(zip(TERMS, torch.stack(seen).mean(0).tolist())))
            if not np.isfinite(list(self.history_[-1].values())).all():
                raise DataError(
                    f"x: the loss is not finite in epoch {epoch + 1}: {self.history_[-1]}; lower lr or beta"
                )

    def _mix(self, images: Tensor, targets: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        lam = float(rng.beta(self.mixup, self.mixup)) if self.mixup else 1.0
        other = torch.randperm(len(images), generator=generator).to(images.device)
        logits = self.head_(self.encoder_(lam * images + (1 - lam) * images[other]))
        return lam * cross_entropy(logits, targets) + (1 - lam) * cross_entropy(logits, targets[other])

    def _check(self, x: Tensor, y: Tensor) -> None:
        if y.ndim != 1 or y.dtype.is_floating_point or len(x) != len(y) or not len(y):
            raise InputError(
                f"y: {y.dtype} of shape {tuple(y.shape)}; one whole number for each of {len(x)} rows is needed"
            )
        if int(y.min()) < 0 or int(y.max()) >= self.n_classes:
            raise DataError(
                f"y: labels {int(y.min())} to {int(y.max())}; with n_classes={self.n_classes} they are 0 to "
                f"{self.n_classes - 1}"
            )
        missing = torch.nonzero(torch.bincount(y, minlength=self.n_classes) == 0).flatten().tolist()
        if missing:
            raise DataError(f"y: classes {missing} have no rows; RCAL needs some of every class")
