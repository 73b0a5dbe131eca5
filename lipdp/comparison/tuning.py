"""The search of `compare utility`: trial by trial towards settings whose neighbours on the grid are all worse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from lipdp.comparison.protocol import Grid

Settings = tuple[tuple[str, Any], ...]
Tried = Mapping[Settings, float]
"""Settings and their scores, in the order of the trials."""
Place = tuple[int, ...]
"""Settings by their indices in the grid, one for each axis."""


def proposal(grid: Grid, tried: Tried) -> Settings | None:
    """What to try next: the middle of the grid, then the untried settings closest to the best so far.

    Steps along one axis come first, and of these the one in the direction of the last success: k steps in one direction
    cost k trials. None once the whole grid is tried.

    >>> grid = {"lr": (0.1, 0.3, 1.0, 3.0, 10.0)}
    >>> first = proposal(grid, {})
    >>> second = proposal(grid, {first: 0.5})
    >>> first, second, proposal(grid, {first: 0.5, second: 0.6})
    ((('lr', 1.0),), (('lr', 3.0),), (('lr', 10.0),))
    """
    places = {_place(grid, settings): score for settings, score in tried.items()}
    best = before = tuple(len(values) // 2 for values in grid.values())
    for place, score in places.items():  # in the order of the trials: `before` is the best until `best` was found
        if score > places.get(best, -1.0):
            best, before = place, best

    def distance(place: Place) -> tuple[Any, ...]:
        steps = [there - here for there, here in zip(place, best, strict=True)]
        onwards = sum(step * (b - a) for step, b, a in zip(steps, best, before, strict=True))
        upwards_first = [-step for step in steps]  # of places that are alike otherwise
        return sum(step**2 for step in steps), -onwards, upwards_first

    left = (place for place in itertools.product(*map(range, map(len, grid.values()))) if place not in places)
    found = min(left, key=distance, default=None)
    return None if found is None else _settings(grid, found)


def winner(grid: Grid, tried: Tried) -> tuple[Settings, bool]:
    """The best settings in the interior of what was tried; where there are none, the best, and False: on the edge.

    Settings are in the interior if both their neighbours along every axis were tried, none is better, and one is worse.
    (Where all are alike, as where nothing learns, there is no optimum.) More trials take no settings out of it.

    >>> grid = {"lr": (0.1, 0.3, 1.0, 3.0, 10.0)}
    >>> winner(grid, {(("lr", lr),): score for lr, score in ((1.0, 0.5), (3.0, 0.7), (10.0, 0.6))})
    ((('lr', 3.0),), True)
    >>> winner(grid, {(("lr", lr),): score for lr, score in ((1.0, 0.5), (3.0, 0.7))})
    ((('lr', 3.0),), False)
    """
    scores = {_place(grid, settings): score for settings, score in tried.items()}

    def inside(settings: Settings) -> bool:
        # a neighbour that was not tried may be better
        around = [scores.get(place, math.inf) for place in _around(_place(grid, settings))]
        return max(around) <= tried[settings] and min(around) < tried[settings]

    interior = [settings for settings in tried if inside(settings)]
    return max(interior or tried, key=tried.__getitem__), bool(interior)


def _around(place: Place) -> list[Place]:
    """The neighbours along every axis; beyond the ends of the grid too, where nothing is ever tried."""
    return [(*place[:axis], place[axis] + step, *place[axis + 1 :]) for axis in range(len(place)) for step in (1, -1)]


def _place(grid: Grid, settings: Settings) -> Place:
    return tuple(values.index(dict(settings)[name]) for name, values in grid.items())


def _settings(grid: Grid, place: Place) -> Settings:
    return tuple((name, values[i]) for (name, values), i in zip(grid.items(), place, strict=True))
