"""How varied the features of a sample are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from salience.errors import InputError


def feature_variance(features: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Variance of each sample's features over all their entries together.

        sigma^2_i = sum_t (T_it - mean_i)^2 / (CHW - 1)

    Parameters
    ----------
    features : (batch, channels, height, width) or (batch, tokens, width) or (batch, width) Tensor
        What the last convolutional stage (or block of a transformer) gives, before pooling.

    Returns
    -------
    (batch,) Tensor
        float32 (float64 for such features), outside the graph.

    Raises
    ------
    InputError
        No samples, one entry per sample, whole numbers, or a NaN or infinite feature; the sample is named.
    """
    if features.ndim < 2 or not features.is_floating_point():
        raise InputError(
            f"features: got {features.dtype} of shape {tuple(features.shape)}; (batch, channels, height, width) or "
            "(batch, tokens, width) is needed"
        )
    if not len(features):
        raise InputError("features: there are no samples")
    flat = features.detach().flatten(1)
    if flat.shape[1] < 2:
        raise InputError("features: one entry per sample has no variance; take a layer before pooling")
    if flat.dtype != torch.float64:
        flat = flat.float()  # squares overflow in half precision
    variance = flat.var(dim=1)
    bad = ~variance.isfinite()
    if bool(bad.any()):
        raise InputError(
            f"features: of sample {int(bad.nonzero()[0])} in the batch are not finite ({int(bad.sum())} such samples)"
        )
    return variance
