"""``y ~ x1 + x2``: which columns a regression is on.

Terms are joined by ``+``: a column, ``C(column)`` for one that holds categories (text does so anyway), ``a:b`` for the
product of two; ``- 1`` leaves the intercept out. Names with other characters than letters, digits, dots and underscores
stand in backticks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from salience.errors import DataError, InputError, nearest
from salience.io.whole import is_text, numbers_of, words_of

_NAME = r"(?:`[^`]+`|[^\W\d][\w.]*)"
_TERM = re.compile(rf"C\(\s*({_NAME})\s*\)|({_NAME})")
_MOST_LEVELS = 200


@dataclass(frozen=True)
class Formula:
    """A parsed formula.

    Attributes
    ----------
    outcome : str
    terms : tuple of tuples of str
        The columns whose product each term is.
    categories : frozenset of str
        Columns to be taken as categories.
    intercept : bool
    """

    outcome: str
    terms: tuple[tuple[str, ...], ...]
    categories: frozenset[str]
    intercept: bool

    @property
    def columns(self) -> list[str]:
        """Every regressor column once, in order."""
        return list(dict.fromkeys(name for term in self.terms for name in term))


def parse(formula: str) -> Formula:
    """Read a formula.

    Raises
    ------
    InputError
        It is no formula.
    """
    left, tilde, right = formula.partition("~")
    outcome = re.fullmatch(_NAME, left.strip())
    if not tilde or outcome is None or not right.strip():
        raise InputError(f"formula {formula!r} is not of the form 'outcome ~ column + column'")
    intercept, terms, categories = True, [], set()
    for sign, part in re.findall(r"([+-]?)\s*((?:`[^`]*`|[^+\-`])+)", right):
        part = part.strip()
        if part in ("0", "1"):
            intercept = (part == "1") == (sign != "-")
            continue
        if sign == "-":
            raise InputError(f"formula {formula!r}: only the intercept can be taken away, as in '- 1'")
        factors = []
        for factor in re.split(r":(?=(?:[^`]*`[^`]*`)*[^`]*$)", part):
            match = _TERM.fullmatch(factor.strip())
            if match is None:
                raise InputError(f"formula {formula!r}: {factor.strip()!r} is no column, C(column) or a:b")
            name = (match[1] or match[2]).strip("`")
            factors.append(name)
            if match[1]:
                categories.add(name)
        if tuple(factors) not in terms:
            terms.append(tuple(factors))
    return Formula(left.strip().strip("`"), tuple(terms), frozenset(categories), intercept)


class Regressors:
    """The regressors of a formula, built from a table and from values of the columns that need prediction.

    `keep` says which rows are used, and comes before `known` and `matrix`.

    Parameters
    ----------
    formula : Formula
    table : pyarrow Table
    predicted : collection of str
        Columns that need prediction, which are not read from the table.

    Attributes
    ----------
    whole : (n,) bool
        Rows with a value in every column that is read from the table.
    names : list of str
        Columns of the design; after `keep`.

    Raises
    ------
    InputError
        A column is missing, or a predicted one is to be taken as categories.
    """

    def __init__(self, formula: Formula, table: pa.Table, predicted: Collection[str]) -> None:
        self._formula, self._predicted = formula, list(predicted)
        self._columns: dict[str, np.ndarray] = {}  # words of categories, numbers of the others
        for name in formula.columns:
            if name in predicted:
                if name in formula.categories:
                    raise InputError(f"C({name}): a predicted column cannot be taken as categories")
                continue
            if name not in table.column_names:
                raise InputError(f"formula names {name!r}, which is no column ({nearest(name, table.column_names)})")
            words = name in formula.categories or is_text(table[name])
            self._columns[name] = words_of(table, name) if words else numbers_of(table, name)
        self.whole = np.ones(table.num_rows, dtype=bool)
        for values in self._columns.values():
            there = np.isfinite(values) if values.dtype == np.float64 else [word is not None for word in values]
            self.whole &= np.array(there, dtype=bool)

    def keep(self, rows: Bool[np.ndarray, " n"]) -> None:
        """Build the design of the rows where a mask holds: a category that occurs elsewhere only gets no column.

        Raises
        ------
        DataError
            A column to be taken as categories has fewer than 2 of them in these rows, or too many.
        """
        first = self._formula.terms[0] if self._formula.terms else ()
        self._fixed: dict[str, tuple[list[str], np.ndarray]] = {}
        for name, values in self._columns.items():
            if values.dtype == np.float64:
                self._fixed[name] = [name], values[rows][:, None]
            else:
                self._fixed[name] = _dummies(name, values[rows], not self._formula.intercept and first == (name,))
        self.names = self._build(dict.fromkeys(self._predicted, np.zeros(int(rows.sum()))))[0]

    def known(self) -> Float[np.ndarray, "n k"]:
        """The regressor columns that need no prediction."""
        parts = [values for _, values in self._fixed.values()]
        return np.hstack(parts) if parts else np.empty((0, 0))

    def matrix(self, predicted: Mapping[str, Float[np.ndarray, " n"]]) -> Float[np.ndarray, "n p"]:
        """The design without an intercept, with these values in the predicted columns."""
        return self._build(predicted)[1]

    def _build(self, predicted: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
        names: list[str] = []
        parts: list[np.ndarray] = []
        for term in self._formula.terms:
            labels: list[str] = [""]
            values = np.ones((0, 0))
            for name in term:
                own, block = self._fixed[name] if name in self._fixed else ([name], predicted[name][:, None])
                labels = [f"{a}:{b}" if a else b for a in labels for b in own]
                values = block if not values.size else (values[:, :, None] * block[:, None, :]).reshape(len(block), -1)
            names += labels
            parts.append(values)
        return names, np.hstack(parts) if parts else np.empty((0, 0))


def _dummies(name: str, words: np.ndarray, full: bool) -> tuple[list[str], np.ndarray]:
    """One column per level but the first (or all)."""
    levels = sorted(set(words))
    if len(levels) < 2:
        raise DataError(f"column {name!r} has {len(levels)} category; a regressor needs at least 2")
    if len(levels) > _MOST_LEVELS:
        raise DataError(
            f"column {name!r} has {len(levels):,} categories, more than {_MOST_LEVELS}: is it an identifier? Name it "
            "among the fixed effects, or leave it out"
        )
    shown = levels if full else levels[1:]
    values = np.stack([words == level for level in shown], axis=1).astype(np.float64)
    return [f"{name}[{level}]" for level in shown], values
