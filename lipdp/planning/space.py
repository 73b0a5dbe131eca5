"""What a search varies: ranges and choices, written as on the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lipdp.errors import ParameterError, UnknownNameError
from lipdp.training.config import SEARCHABLE, SETTINGS
from lipdp.training.settings import OPTIONS, read_value

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Range:
    """A number in [low, high], even in its logarithm if `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Scalar, ...]


Dimension = Range | Choice


def parse_space(texts: Iterable[str]) -> dict[str, Dimension]:
    """`name=low:high[:log]` and `name=a,b,c`, name a setting of `lipdp train`, `tau`, or e.g. `model_options.width`.

    Raises:
        ParameterError: not of that form, or a setting that a search leaves alone. UnknownNameError: no such setting.

    >>> parse_space(["lr=0.05:5:log", "gate=off,0.3"])
    {'lr': Range(low=0.05, high=5.0, log=True), 'gate': Choice(values=('off', 0.3))}
    """
    space: dict[str, Dimension] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        check_name(name)
        if name in space:
            raise ParameterError(f"--search {text!r}: {name} is searched already")
        space[name] = _dimension(text, values)
    if not space:
        raise ParameterError("nothing to search: give --search lr=0.05:5:log, or --search tau=8,16,32")
    return space


def check_name(name: str) -> None:
    """Whether a search may vary it; see `parse_space`."""
    head, dot, tail = name.partition(".")
    if head not in SETTINGS:
        raise UnknownNameError("setting", head, SEARCHABLE)
    if head not in SEARCHABLE:
        raise ParameterError(
            f"{name!r} cannot be searched: a simulation keeps the data and all that ε depends on, and the machine"
            f" changes no result; these can: {', '.join(sorted(SEARCHABLE))}"
        )
    options = SETTINGS[head].kind is OPTIONS
    if options != (bool(dot) and tail.isidentifier()):
        raise ParameterError(
            f"{name!r}: {f'name one option, as in {head}.width' if options else f'{head} has no parts'}"
        )


def merged(settings: Mapping[str, Any], drawn: Mapping[str, Scalar]) -> dict[str, Any]:
    """The settings with what was drawn in their place; a dotted name goes into the options."""
    result = dict(settings)
    for name, value in drawn.items():
        head, dot, tail = name.partition(".")
        result[head] = {**result.get(head, {}), tail: value} if dot else value
    return result


def _dimension(text: str, values: str) -> Dimension:
    low, colon, rest = values.partition(":")
    if not colon:
        choices = tuple(_scalar(text, item) for item in values.split(",") if item.strip())
        if len(set(map(repr, choices))) < max(1, len(choices)) or not choices:
            raise ParameterError(
                f"--search {text!r}: name=a,b,c with different values is needed, or name=low:high[:log]"
            )
        return Choice(choices)
    high, _, kind = rest.partition(":")
    try:
        found = Range(float(low), float(high), kind == "log")
    except ValueError as error:
        raise ParameterError(f"--search {text!r}: two numbers are needed, as in lr=0.05:5:log") from error
    if kind not in ("", "log") or not -math.inf < found.low < found.high < math.inf or (found.log and found.low <= 0):
        raise ParameterError(f"--search {text!r}: name=low:high[:log] with low < high is needed, and low > 0 for log")
    return found


def _scalar(text: str, item: str) -> Scalar:
    value = read_value(item.strip())
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise ParameterError(f"--search {text!r}: a choice is a number, a text, true, false or null")
    return value
