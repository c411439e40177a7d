"""Checks that the measures share: each names the argument, what came, and what would be right."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from salience.errors import InputError

_SHAPES = {1: "(n,)", 2: "(n, m)"}


def finite(name: str, values: ArrayLike, ndim: int | None = None) -> NDArray[np.float64]:
    """`values` as a non-empty float64 array without NaN or infinity, of `ndim` dimensions if given."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise InputError(f"{name} must be an array of numbers; got {kind}: {error}") from error
    if ndim is not None and array.ndim != ndim:
        raise InputError(f"{name} must have shape {_SHAPES[ndim]}; got shape {array.shape}")
    if array.size == 0:
        raise InputError(f"{name} must not be empty; got shape {array.shape}")
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(
            f"{name} must be finite; {int(bad.sum())} of {array.size} values are NaN or infinite, "
            f"the first at index {first[0] if len(first) == 1 else first}"
        )
    return array


def truths(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """`values` as a boolean array of `shape`; 0 and 1 count as booleans, other numbers do not."""
    array = np.asarray(values)
    if array.shape != shape:
        raise InputError(f"{name} must have shape {shape}; got shape {array.shape}")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise InputError(f"{name} must hold only True and False (or 1 and 0); got dtype {array.dtype}")
    return array.astype(np.bool_)


def same_shape(name_a: str, a: np.ndarray, name_b: str, b: np.ndarray) -> None:
    """Refuse two arrays whose shapes differ."""
    if a.shape != b.shape:
        raise InputError(f"{name_a} and {name_b} must have the same shape; got {a.shape} and {b.shape}")


def at_least(name: str, value: object, low: int) -> None:
    """Refuse a whole number below `low`, and what is no whole number."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} must be a whole number of at least {low}; got {value!r}")
