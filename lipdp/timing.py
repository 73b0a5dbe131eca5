"""Naming the parts of a step for whoever times them; nobody does by default."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Timer(Protocol):
    """`with timer("noise"): …` says that what follows is that part of the step. Parts may lie within parts."""

    def __call__(self, part: str) -> AbstractContextManager[Any]: ...


class Untimed:
    """Times nothing, at the cost of one call.

    >>> with UNTIMED("noise"):
    ...     pass
    """

    _NOTHING = nullcontext()

    def __call__(self, part: str) -> AbstractContextManager[Any]:
        """A context that does nothing."""
        return self._NOTHING


UNTIMED = Untimed()


class Clock:
    """What the parts of a step name themselves to; whoever times them sets `timer`.

    >>> with Clock()("noise"):
    ...     pass
    """

    def __init__(self) -> None:
        self.timer: Timer = UNTIMED

    def __call__(self, part: str) -> AbstractContextManager[Any]:
        """See `Timer`."""
        return self.timer(part)
