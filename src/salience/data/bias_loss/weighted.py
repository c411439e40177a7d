"""Cross-entropy in which samples with varied features count more."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.data.bias_loss.variance import feature_variance
from salience.errors import InputError

_FLAT = 1e-6  # variances that differ by less, relative to the largest, tell no samples apart


class BiasLoss(nn.Module):
    """Mean cross-entropy of a batch, weighted by the variance of each sample's features.

        v_i = (sigma^2_i - min sigma^2) / (max sigma^2 - min sigma^2),   z_i = e^{alpha v_i} - beta
        L = 1/N sum_i z_i CE(o_i, y_i)

    Samples of which the network extracts little (blank, faded, cropped to nothing) weigh least: 0.70 against 1.05 at
    the defaults. No gradient flows through z. The mean weight is about 0.8, so a fair comparison scales cross-entropy
    by it, too. In evaluation mode the loss is the plain cross-entropy.

    Parameters
    ----------
    alpha : float
        At least 0; tuned in the paper, 0.3 in its code.
    beta : float
        Below 1, or weights could be negative; 0.3 in the paper's code.
    mode : {"local", "global"}
        "local" takes minimum and maximum over the batch, as the paper defines it. "global" is the default of the
        published code: from the smallest variance seen in training so far, over the range of the *batch*, so that v
        may exceed 1.
    reduction : {"mean", "sum", "none"}
    weight : (classes,) Tensor, optional
        Of classes; as in `torch.nn.functional.cross_entropy`, the mean divides by their sum.
    label_smoothing : float
    ignore_index : int
        Samples with this target are in neither the minimum nor the mean.
    across_processes : bool
        Take minimum and maximum over the batches of all processes of distributed training.

    Attributes
    ----------
    last_weights : (batch,) Tensor
        z of the last training call; 0 for ignored samples.
    least : float Tensor, shape ()
        Smallest variance seen in training, a buffer (mode "global").

    Raises
    ------
    InputError
        A parameter out of range; at calls, shapes that do not fit, or features that are not finite.

    Notes
    -----
    Where all variances of a batch are equal, v is 0; the published code gives NaN. Targets may be probabilities
    (mixup); variances are then those of the mixed image.
    """

    least: Tensor
    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.3,
        mode: Literal["local", "global"] = "local",
        reduction: Literal["mean", "sum", "none"] = "mean",
        *,
        weight: Float[Tensor, " classes"] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        across_processes: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= alpha < math.inf:
            raise InputError(f"alpha: got {alpha!r}; it must be at least 0, or varied samples would count less")
        if not -math.inf < beta < 1:
            raise InputError(f"beta: got {beta!r}; it must be below 1, or weights could be negative")
        if mode not in ("local", "global"):
            raise InputError(f"mode: got {mode!r}; it must be 'local' or 'global'")
        if reduction not in ("mean", "sum", "none"):
            raise InputError(f"reduction: got {reduction!r}; it must be 'mean', 'sum' or 'none'")
        if not 0 <= label_smoothing <= 1:
            raise InputError(f"label_smoothing: got {label_smoothing!r}; it must lie in [0, 1]")
        self.alpha, self.beta, self.mode, self.reduction = alpha, beta, mode, reduction
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.across_processes = across_processes
        self.register_buffer("weight", weight)
        self.register_buffer("least", torch.tensor(math.inf))
        self.last_weights: Tensor | None = None

    def forward(
        self,
        features: Float[Tensor, "batch ..."],
        logits: Float[Tensor, "batch classes"],
        target: Shaped[Tensor, "batch ..."],
    ) -> Tensor:
        """The loss of a batch: a scalar, or one number per sample with reduction "none".

        Parameters
        ----------
        features : (batch, …) Tensor
            Of the last stage before pooling (see `salience.model.capture`).
        logits : (batch, classes) Tensor
        target : (batch,) int Tensor, or (batch, classes) Tensor of probabilities
        """
        if logits.ndim != 2 or len(target) != len(logits):
            raise InputError(
                f"logits and target: shapes {tuple(logits.shape)} and {tuple(target.shape)}; (batch, classes) and "
                "(batch,) are needed"
            )
        if len(features) != len(logits):
            raise InputError(f"features: of {len(features)} samples, but there are {len(logits)} rows of logits")
        losses = cross_entropy(
            logits, target, self.weight, ignore_index=self.ignore_index, reduction="none",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        counted = target != self.ignore_index if target.ndim == 1 else torch.ones_like(losses, dtype=torch.bool)
        if self.training:
            weights = self._weights(features, counted)
            self.last_weights = weights
            losses = losses * weights.to(losses.dtype)
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        if self.weight is not None and target.ndim == 1:
            return losses.sum() / self.weight[target[counted]].sum()
        return losses.sum() / counted.sum().clamp(min=1)

    def extra_repr(self) -> str:
        """The parameters, for `print`."""
        return f"alpha={self.alpha}, beta={self.beta}, mode={self.mode!r}"

    @torch.no_grad()
    def _weights(self, features: Tensor, counted: Tensor) -> Tensor:
        variance = feature_variance(features)
        ends = torch.stack([variance.where(counted, math.inf).min(), -variance.where(counted, -math.inf).max()])
        if self.across_processes and dist.is_available() and dist.is_initialized():
            dist.all_reduce(ends, dist.ReduceOp.MIN)
        low, high = ends[0], -ends[1]
        base = low
        if self.mode == "global":
            self.least.copy_(torch.minimum(self.least, low.to(self.least)))
            base = self.least.to(variance)
        if not bool(high - low > _FLAT * high):  # one sample, equal ones, or none that counts
            scaled = torch.zeros_like(variance)
        else:
            scaled = (variance - base) / (high - low)
        weights = torch.exp(self.alpha * scaled) - self.beta
        if not bool(weights[counted].isfinite().all()):
            raise InputError(
                "mode: 'global' divides by the range of the batch's variances, which is tiny here, so that weights "
                "overflow; use mode='local' or larger batches"
            )
        return weights.where(counted, 0.0)
