"""Sums over one block of weights, each in a single pass: at this size, passes over memory are what merging costs."""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Bool, Float32
from torch import Tensor


def add_scaled(
    result: Float32[Tensor, " n"],
    base: Float32[Tensor, " n"],
    tuned: Float32[Tensor, " n"],
    factor: float,
    mask: Bool[np.ndarray, " n"] | None = None,
) -> None:
    """Add ``factor * mask * (tuned - base)`` to `result`, in place; `result` may be `base` itself.

    What is not finite stays so, also where the mask drops it.

    Parameters
    ----------
    result, base, tuned : Tensor (n,)
        On the CPU.
    factor : float
    mask : bool array (n,), optional
        All of it by default.
    """
    arrays = result.numpy(), base.numpy(), tuned.numpy()
    if mask is None:
        _add(*arrays, np.float32(factor))
    else:
        _add_kept(*arrays, mask.view(np.uint8), np.float32(factor))


@numba.njit(nogil=True, cache=True)
def _add(result: np.ndarray, base: np.ndarray, tuned: np.ndarray, factor: np.float32) -> None:
    for i in range(len(result)):
        result[i] += (tuned[i] - base[i]) * factor


@numba.njit(nogil=True, cache=True)
def _add_kept(result: np.ndarray, base: np.ndarray, tuned: np.ndarray, mask: np.ndarray, factor: np.float32) -> None:
    for i in range(len(result)):
        result[i] += (tuned[i] - base[i]) * np.float32(mask[i]) * factor
