"""Checks of what callers give, shared by the parts of the method."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from salience.errors import InputError


def finite(name: str, values: ArrayLike, dims: int) -> np.ndarray:
    """The values as float64 with `dims` dimensions, or an error that names them."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}") from None
    if array.ndim != dims or not array.size:
        raise InputError(f"{name} must have {dims} dimension{'s' * (dims > 1)} and a value, not shape {array.shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        raise InputError(f"{name}{list(at)} is {array[at]}; all must be finite")
    return array


def prices(name: str, values: ArrayLike | None, count: int, *, least_zero: bool = False) -> Float[np.ndarray, " T"]:
    """One positive price for each of `count` tasks, 1 by default."""
    if values is None:
        return np.ones(count)
    array = _each(name, values, count)
    bad = np.flatnonzero(~(np.isfinite(array) & ((array >= 0) if least_zero else (array > 0))))
    if len(bad):
        limit = "not negative" if least_zero else "above 0"
        raise InputError(f"{name} of task {int(bad[0])} is {array[bad[0]]:g}; prices must be finite and {limit}")
    return array


def counts(name: str, values: ArrayLike, count: int) -> Int[np.ndarray, " T"]:
    """A whole number of at least 0 for each of `count` tasks."""
    array = _each(name, values, count)
    bad = np.flatnonzero(~((array >= 0) & (array == np.floor(array)) & np.isfinite(array)))
    if len(bad):
        raise InputError(f"{name} of task {int(bad[0])} is {array[bad[0]]:g}; a whole number of samples is needed")
    return array.astype(np.int64)


def _each(name: str, values: ArrayLike, count: int) -> Float[np.ndarray, " T"]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be numbers, not {values!r}") from None
    if array.shape not in ((), (count,)):
        raise InputError(f"{name} has shape {array.shape}; give one number, or one for each of {count} tasks")
    return np.broadcast_to(array, (count,)).copy()
