"""Tables of category codes with known answers: real data beside noise columns, and planted signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata
from sklearn.datasets import load_breast_cancer, load_digits, load_wine

from salience.errors import InputError, nearest

_LOADERS = {"breast_cancer": load_breast_cancer, "digits": load_digits, "wine": load_wine}


@dataclass(frozen=True)
class Table:
    """Columns of category codes and a label.

    Attributes
    ----------
    codes : (n, columns) int32
        Codes from 0 on, per column.
    names : tuple of str
    kinds : tuple of str
        "real", "signal" or "noise" per column: what a good ranking has to find out.
    label : (n,) int64
    """

    codes: Int[np.ndarray, "n columns"]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    label: Int[np.ndarray, " n"]


def real(name: str, seed: int, *, bins: int = 16, noise: int = 30) -> Table:
    """A real table in quantile bins, with noise columns whose cardinality grows from 2 to half the rows.

    Columns with many values and no meaning are what plain mutual information falls for.

    Parameters
    ----------
    name : {"breast_cancer", "digits", "wine"}
        Data set of scikit-learn. Constant columns are left out.
    seed : int
        Of the noise columns and of the order of rows and columns.
    bins : int
        Quantile bins per column; equal values share a bin.
    noise : int
        Number of noise columns, cardinalities spaced evenly on a log scale.

    Raises
    ------
    InputError
        `name` is not known, or an option is out of range.
    """
    if name not in _LOADERS:
        raise InputError(f"name {name!r} is no table here; {nearest(name, _LOADERS)}")
    if bins < 2 or noise < 0:
        raise InputError(f"bins must be at least 2 and noise at least 0; got {bins!r} and {noise!r}")
    data = _LOADERS[name]()
    varies = np.ptp(data.data, axis=0) > 0
    columns = {
        str(column): _quantile_codes(values, bins)
        for column, values in zip(np.array(data.feature_names)[varies], data.data.T[varies])
    }
    kinds = ["real"] * len(columns) + ["noise"] * noise
    rng = np.random.default_rng(seed)
    cardinalities = np.rint(np.geomspace(2, len(data.data) // 2, noise)).astype(int)
    columns |= _noise_columns(rng, len(data.data), cardinalities.tolist())
    return _shuffled(rng, columns, kinds, data.target)


def planted(rows: int, seed: int, *, noise: Sequence[int] = (2, 2, 10, 100, 1000)) -> Table:
    """A table with three kinds of planted signal, none of which a lazy ranking finds for the right reason.

    - ``xor_a``, ``xor_b``: fair coins, label = a XOR b; each alone says nothing, together everything;
    - ``near_copy``: the label with 5 % of its values flipped;
    - ``weak``: the label with 45 % flipped (a 55/45 binary column), 0.005 nats of information.

    Parameters
    ----------
    rows : int
        Number of rows, at least 2.
    seed : int
    noise : sequence of int
        Cardinality of each noise column; names tell it, such as ``noise3_100``.

    Raises
    ------
    InputError
        An option is out of range.
    """
    if rows < 2 or any(cardinality < 1 for cardinality in noise):
        raise InputError(f"rows must be at least 2 and cardinalities at least 1; got {rows!r} and {noise!r}")
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 2, (2, rows))
    label = first ^ second
    columns = {
        "xor_a": first,
        "xor_b": second,
        "near_copy": label ^ (rng.random(rows) < 0.05),
        "weak": label ^ (rng.random(rows) < 0.45),
    }
    kinds = ["signal"] * len(columns) + ["noise"] * len(noise)
    columns |= _noise_columns(rng, rows, noise)
    return _shuffled(rng, columns, kinds, label)


def _quantile_codes(values: Float[np.ndarray, " n"], bins: int) -> Int[np.ndarray, " n"]:
    """Codes by rank; equal values share their middle rank, so that two values stay apart."""
    middle = (rankdata(values) - 0.5) / len(values)
    return np.unique((middle * bins).astype(np.int64), return_inverse=True)[1]  # no empty codes


def _noise_columns(rng: np.random.Generator, rows: int, cardinalities: Sequence[int]) -> dict[str, np.ndarray]:
    return {
        f"noise{number}_{cardinality}": rng.integers(0, cardinality, rows)
        for number, cardinality in enumerate(cardinalities)
    }


def _shuffled(
    rng: np.random.Generator, columns: dict[str, np.ndarray], kinds: Sequence[str], label: np.ndarray
) -> Table:
    """Rows and columns in random order: neither the order of a file nor a column's place may tell."""
    rows, places = rng.permutation(len(label)), rng.permutation(len(columns))
    codes = np.stack(list(columns.values()), axis=1).astype(np.int32)
    names = list(columns)
    return Table(
        codes[np.ix_(rows, places)],
        tuple(names[i] for i in places),
        tuple(kinds[i] for i in places),
        label[rows].astype(np.int64),
    )
