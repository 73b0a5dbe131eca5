"""Values that a public list knows: categories and classes as files and people write them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lipdp.errors import ParameterError

OTHER, ABSENT = -1, -2
"""The place of a value that the list does not have, and of one that is missing."""

_ABSENT = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"})


class Listed:
    """Looks values up in a public list, one by one. Every value has an answer.

    Text is compared without the spaces around it. A number of the list is found as a number and as the text of one, so
    that 1, 1.0 and "1" are the same; a truth value also as "True", "true" or "TRUE". What the list has is never
    missing.
    """

    def __init__(self, values: Iterable[Any], what: str = "values") -> None:
        self.values = tuple(values) if isinstance(values, (list, tuple)) else ()
        self._texts: dict[str, int] = {}
        self._numbers: dict[float, int] = {}
        fine = bool(self.values)
        for place, value in enumerate(self.values):
            if isinstance(value, bool):
                fine &= self._add(self._texts, place, str(value), str(value).lower(), str(value).upper())
            elif isinstance(value, str):
                fine &= self._add(self._texts, place, value.strip())
            else:
                fine &= isinstance(value, (int, float)) and math.isfinite(value)
                fine = fine and self._add(self._numbers, place, float(value))
        if not fine:
            raise ParameterError(f"{what} = {values!r}: a list of different texts or numbers is needed")

    @staticmethod
    def _add(known: dict[Any, int], place: int, *keys: Any) -> bool:
        new = not any(key in known for key in keys)
        known.update(dict.fromkeys(keys, place))
        return new

    def __call__(self, column: Iterable[Any]) -> npt.NDArray[np.int64]:
        """The place of each value in the list, `OTHER` or `ABSENT`."""
        return np.fromiter(map(self.place, column), dtype=np.int64)

    def place(self, value: Any) -> int:
        """Of one value."""
        if value is None:
            return ABSENT
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, (str, bool, np.bool_)):
            text = str(value).strip()
            found = self._texts.get(text, OTHER)
            if found == OTHER and self._numbers:
                found = self._numbers.get(_number(value), OTHER)
            return ABSENT if found == OTHER and text in _ABSENT else found
        number = _number(value)
        found = self._numbers.get(number, OTHER)
        if found == OTHER and self._texts:
            whole = number.is_integer()
            found = self._texts.get(str(int(number)) if whole else str(value), OTHER)
        return ABSENT if found == OTHER and number != number else found


def _number(value: Any) -> float:
    try:
        if isinstance(value, (complex, np.complexfloating)):  # one in a column makes all of them complex
            return float(value.real) if value.imag == 0 else math.nan
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def as_numbers(column: Any) -> npt.NDArray[np.float64]:
    """A column as float64; an entry that is no number is NaN.

    >>> as_numbers(np.array(["2", None, "many", True], dtype=object)).tolist()
    [2.0, nan, nan, 1.0]
    """
    try:
        if not isinstance(column, np.ndarray) or column.dtype.kind not in "cO":
            return np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        pass
    return np.array([_number(value) for value in column], dtype=np.float64)


def is_missing(value: Any) -> bool:
    """Whether a cell says that there is no value, rather than holding one that is wrong.

    >>> [is_missing(cell) for cell in (None, " ", "NA", "?", 0)]
    [True, True, True, False, False]
    """
    if isinstance(value, str):
        return value.strip() in _ABSENT
    return value is None or _number(value) != _number(value)


def listing(values: Sequence[Any], most: int = 8) -> str:
    """The first values of a list, in words.

    >>> listing(["a", 2], 1)
    "'a', … (2)"
    """
    shown = ", ".join(map(repr, values[:most]))
    return shown if len(values) <= most else f"{shown}, … ({len(values)})"
