"""From raw columns to bounded numbers, by a public rule: bounds, category lists, and what a missing value is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from lipdp.data.columns import LARGEST, Category, Floats, Number
from lipdp.data.listed import Listed, as_numbers
from lipdp.errors import ParameterError, PrivacyLeakWarning, UnknownNameError, outside

MISSING = ("middle", "indicator")


@dataclass(frozen=True)
class ColumnRule:
    """The public rule of a table: each record is mapped by itself, and every record has an answer.

    Numbers and categories are those of a schema (`lipdp.data`), whose missing values count as the middle, 0, or as none
    of the list; with `missing="indicator"` a further column says of a number that it is missing, by 1.

    Guarantees: nothing is learnt. A record changes its own row alone and raises no error. With bounds, entries lie in
    [−1, 1] and rows have norm at most `norm_bound`.

    Args:
        bounds: column → (a, b) or None, for the columns that hold numbers. categories: column → list, for the others.
        missing: "middle" or "indicator".
        intercept: add a last column, 1.
    """

    bounds: Mapping[int, tuple[float, float] | None]
    categories: Mapping[int, Sequence[Any]]
    missing: str = "middle"
    intercept: bool = False

    @property
    def _columns(self) -> list[tuple[int, Number | Category]]:
        indicator = self.missing == "indicator"
        ends = ((j, *(pair or (None, None))) for j, pair in self.bounds.items())
        numbers = [(j, Number(f"{j}", low, high, indicator=indicator)) for j, low, high in ends]
        return [*numbers, *((j, Category(f"{j}", known)) for j, known in self.categories.items())]

    @property
    def width(self) -> int:
        """The columns that come out."""
        return sum(len(column.inputs) for _, column in self._columns) + self.intercept

    @property
    def norm_bound(self) -> float:
        """A bound on the norm of a row, where all numbers have bounds: 1 for each column that goes in, and the
        intercept.

        A missing number is 0 and its indicator 1, so the two of them have norm at most 1 as well.
        """
        return math.sqrt(len(self.bounds) + len(self.categories) + self.intercept)

    def __call__(self, x: Any) -> npt.NDArray[np.float32]:
        """Map a table (N, columns) to (N, width)."""
        parts = [column.encode(x[:, j]) for j, column in self._columns]
        return np.concatenate([*parts, np.ones((len(x), int(self.intercept)))], axis=1).astype(np.float32)


def read_bounds(
    bounds: Any, columns: Sequence[int], names: Sequence[Any] | None, count: int
) -> dict[int, tuple[float, float]]:
    """The public bounds as they may be given, for the columns that hold numbers.

    Args:
        bounds: b for [−b, b]; a pair for all columns; a pair for each, (count, 2); a mapping from columns to either.
        columns: those that need bounds. names: of all columns, if they have any. count: of all columns.

    Raises:
        ParameterError: not low < high, or a column without bounds.
    """
    if isinstance(bounds, Mapping):
        given = {index_of(key, names, count): value for key, value in bounds.items()}
        absent = [label_of(j, names) for j in columns if j not in given]
        if absent:
            raise ParameterError(f"bounds: the columns {absent} have none; give a public (low, high) for each")
        return {j: _pair(given[j], label_of(j, names)) for j in columns}
    if isinstance(bounds, Real):
        return dict.fromkeys(columns, _pair(bounds, "all columns"))
    try:
        table = np.asarray(bounds, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.zeros(0)
    if table.shape == (2,):
        return dict.fromkeys(columns, _pair(table, "all columns"))
    if table.shape == (count, 2):
        return {j: _pair(table[j], label_of(j, names)) for j in columns}
    raise ParameterError(
        f"bounds={bounds!r} for {count} columns: give a number, a pair (low, high), one pair a column, or a mapping"
    )


def _pair(value: Any, column: Any) -> tuple[float, float]:
    pair = (-value, value) if isinstance(value, Real) else tuple(value)
    if len(pair) != 2 or not -LARGEST <= pair[0] < pair[1] <= LARGEST:
        raise ParameterError(f"bounds of {column}: finite low < high are needed, got {value!r}")
    return float(pair[0]), float(pair[1])


def bounds_of_data(x: Any, columns: Sequence[int], what: str) -> dict[int, tuple[float, float]]:
    """The data's own range, which no ε covers: a warning says so."""
    warnings.warn(
        f"{what} were not given and are taken from the data: this fit is NOT covered by ε. Give public ones",
        PrivacyLeakWarning,
        stacklevel=outside(),
    )
    return {j: _range(as_numbers(x[:, j])) for j in columns}


def _range(values: Floats) -> tuple[float, float]:
    kept = np.clip(values[np.isfinite(values)], -LARGEST / 4, LARGEST / 4)
    low, high = (float(kept.min()), float(kept.max())) if len(kept) else (0.0, 1.0)
    return low, high if high > low else low + max(1.0, abs(low))


def read_categories(categories: Any, names: Sequence[Any] | None, count: int) -> dict[int, tuple[Any, ...]]:
    """The public lists by column."""
    if not isinstance(categories or {}, Mapping):
        raise ParameterError(f"categories={categories!r}: a mapping from columns to their public lists is needed")
    found = {}
    for key, values in (categories or {}).items():
        plain = tuple(value.item() if isinstance(value, np.generic) else value for value in values)
        found[index_of(key, names, count)] = Listed(plain, f"categories of {key!r}").values
    return dict(sorted(found.items()))


def index_of(key: Any, names: Sequence[Any] | None, count: int) -> int:
    """The place of a column, by its name or its number."""
    if names is not None and key in names:
        return list(names).index(key)
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool) and 0 <= key < count:
        return int(key)
    raise UnknownNameError("column", key, map(str, names if names is not None else range(count)))


def label_of(j: int, names: Sequence[Any] | None) -> Any:
    """A column's name, or its number."""
    return j if names is None else names[j]
