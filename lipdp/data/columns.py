"""Columns of a table as inputs of a model: a fixed map of each cell by itself, with an answer for every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lipdp.data.listed import ABSENT, OTHER, Listed, as_numbers, is_missing, listing
from lipdp.errors import ParameterError

Floats = npt.NDArray[np.float64]
LARGEST = float(np.finfo(np.float32).max)


def scaled(values: Floats, low: float, high: float) -> Floats:
    """[low, high] onto [−1, 1], what lies outside clipped; NaN stays NaN.

    >>> scaled(np.array([0.0, 30.0, np.inf]), 0.0, 120.0).tolist()
    [-1.0, -0.5, 1.0]
    """
    return 2 * (np.clip(values, low, high) - low) / (high - low) - 1


@dataclass(frozen=True)
class Number:
    """A number x of the public range [lower, upper] becomes 2 (clip(x) − lower)/(upper − lower) − 1 in [−1, 1].

    What is missing, or no number, counts as `missing`, a public number; by default the middle of the range, or 0 where
    the column has none. With `indicator` a further input says so by 1. Without a range numbers stay as they are.

    >>> Number("age", 0, 120, indicator=True).encode(["30", "", "999"]).tolist()
    [[-0.5, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """

    name: str
    lower: float | None = None
    upper: float | None = None
    missing: float | None = None
    indicator: bool = False

    def __post_init__(self) -> None:
        if (self.lower is None) != (self.upper is None):
            raise ParameterError("only one of lower and upper; give both, or neither to have the range measured")
        if not all(value is None or _is_number(value) for value in (self.lower, self.upper, self.missing)):
            raise ParameterError("lower, upper and missing are finite numbers")
        if self.lower is not None and self.upper is not None:
            if not self.lower < self.upper:
                raise ParameterError(f"lower = {self.lower:g}, upper = {self.upper:g}: lower < upper is needed")
            if self.missing is not None and not self.lower <= self.missing <= self.upper:
                raise ParameterError(
                    f"missing = {self.missing:g}: a number from lower = {self.lower:g} to upper = {self.upper:g} is"
                    " needed; indicator = true tells missing values from others"
                )
        if not isinstance(self.indicator, bool):
            raise ParameterError(f"indicator = {self.indicator!r}: true or false is needed")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs it makes."""
        return (self.name, f"{self.name} is missing") if self.indicator else (self.name,)

    @property
    def text(self) -> str:
        """What it is, in words."""
        said = f"number, {self.lower:g} to {self.upper:g}" if self.is_bounded else "number, range measured privately"
        rule = "" if self.missing is None else f"missing counts as {self.missing:g}"
        rule = rule or ("missing as the middle" if self.is_bounded else "missing as 0")
        return f"{said}; {rule}{', with an indicator' if self.indicator else ''}"

    @property
    def is_bounded(self) -> bool:
        """Whether its inputs lie in [−1, 1]."""
        return self.lower is not None

    def encode(self, cells: Sequence[Any]) -> Floats:
        """(n, inputs), finite: each cell by itself, with an answer for every cell."""
        values = as_numbers(cells)
        missing = np.isnan(values)
        if self.missing is not None:
            values = np.where(missing, self.missing, values)
        if self.lower is not None and self.upper is not None:
            values = scaled(values, self.lower, self.upper)
        column = np.nan_to_num(values.clip(-LARGEST, LARGEST), nan=0.0)
        return np.stack([column, missing.astype(np.float64)] if self.indicator else [column], axis=1)

    def check(self, cells: Sequence[Any]) -> str | None:
        """What shows in the first records that the column is of another kind; None: nothing."""
        held = [cell for cell in cells if not is_missing(cell)]
        none = len(held) > 1 and bool(np.isnan(as_numbers(held)).all())
        return "holds no numbers: make it a category, with a public list, or ignore it" if none else None


@dataclass(frozen=True)
class Category:
    """A category becomes an input for each in the public list, 1 for its own.

    One that the list does not have is 0 in all of them, or with `other` 1 in a further one. What is missing counts as
    `missing`, a category of the list, or as one that the list does not have. With `indicator` a last input says so.
    """

    name: str
    categories: Sequence[Any] = ()
    missing: Any = None
    other: bool = False
    indicator: bool = False

    def __post_init__(self) -> None:
        known = self._known
        if self.missing is not None and known.place(self.missing) < 0:
            raise ParameterError(f"missing = {self.missing!r} is none of its categories")
        if not (isinstance(self.other, bool) and isinstance(self.indicator, bool)):
            raise ParameterError("other and indicator are true or false")

    @property
    def _known(self) -> Listed:
        return Listed(self.categories, "categories")

    @property
    def inputs(self) -> tuple[str, ...]:
        further = (["other"] if self.other else []) + (["is missing"] if self.indicator else [])
        return (*(f"{self.name} = {value}" for value in self.categories), *(f"{self.name} {one}" for one in further))

    @property
    def text(self) -> str:
        rule = "others have an input" if self.other else "others are 0 in all"
        rule += "" if self.missing is None else f"; missing counts as {self.missing!r}"
        return f"category, {listing(self.categories, 4)}; {rule}{', with an indicator' if self.indicator else ''}"

    @property
    def is_bounded(self) -> bool:
        return True

    def encode(self, cells: Sequence[Any]) -> Floats:
        known = self._known
        places = known(cells)
        missing = places == ABSENT
        if self.missing is not None:
            places = np.where(missing, known.place(self.missing), places)
        places = np.where(places < 0, len(self.categories), places)
        one_hot = np.zeros((len(places), len(self.categories) + 1))
        one_hot[np.arange(len(places)), places] = 1.0
        parts = [one_hot if self.other else one_hot[:, :-1]]
        return np.concatenate([*parts, missing[:, None].astype(np.float64)] if self.indicator else parts, axis=1)

    def check(self, cells: Sequence[Any]) -> str | None:
        places = self._known(cells)
        none = int((places == OTHER).sum()) > 1 and not bool((places >= 0).any())
        return f"has none of its categories {listing(self.categories)}" if none else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


Column: TypeAlias = Number | Category
"""A column as inputs of a model."""
