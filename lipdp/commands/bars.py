"""Bars of the commands that take their time: what is done, of how much, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@contextmanager
def step_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on a terminal, one a name; elsewhere a line where a name is done. Yields what is told: name, done, total."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def advance(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done)
            if done == total and not console.is_terminal:
                console.print(f"{name}: done")

        yield advance


class Pace:
    """The time left of a number of tasks that take about equally long.

    >>> pace = Pace()
    >>> pace(1, 4).startswith("1 of 4, about "), pace(4, 4)
    (True, '4 of 4')
    """

    def __init__(self) -> None:
        self._start, self._done = time.perf_counter(), 0

    def __call__(self, done: int, total: int) -> str:
        """`n of N`, and the time left as the tasks done here have it; those found done took none of it."""
        self._done += 1
        left = (time.perf_counter() - self._start) / self._done * (total - done)
        return f"{done} of {total}" + (f", about {duration(left)} left" if done < total else "")


def duration(seconds: float) -> str:
    """Seconds in the unit that people would take.

    >>> duration(40), duration(200), duration(9000)
    ('40 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
