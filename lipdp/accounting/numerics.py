"""What the accountants compute with: named failures, orders, the Rényi bound, and what float64 leaves of δ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from dp_accounting.rdp import compute_epsilon

from lipdp.accounting.events import Event
from lipdp.accounting.privacy_loss import renyi
from lipdp.errors import AccountingError

Counts = tuple[int, ...]
MAX_POINTS = 2**21  # of a grid, all events together: about a second and 200 MB
LOW_ORDERS = (1.5, 2, 3, 5, 8, 16, 32)  # some of the coarse ones
COARSE_ORDERS = (1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
FINE_ORDERS = (*(1 + k / 10 for k in range(1, 100)), *range(11, 65), 80, 96, 128, 192, 256, 384, 512, 768, 1024)


@contextmanager
def failures_named() -> Iterator[None]:
    """Whatever a third-party accountant raises or warns of while it computes becomes an AccountingError."""
    try:
        with warnings.catch_warnings(), np.errstate(over="warn", invalid="warn", divide="warn"):
            warnings.simplefilter("error")
            for outdated in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", outdated)
            yield
    except AccountingError:
        raise
    except (ArithmeticError, AssertionError, IndexError, MemoryError, RuntimeError, ValueError, Warning) as error:
        raise AccountingError(f"{type(error).__name__}: {error}") from error


def finite(value: Any) -> float:
    """The number, not below 0; AccountingError if it is not finite."""
    result = float(value)
    if not math.isfinite(result):
        raise AccountingError(f"ε came out as {result}")
    return max(0.0, result)


def delta_left(delta: float, events: tuple[Event, ...]) -> float:
    """δ less what float64 rounding can add up to over the composition, `T·2⁻⁵²`; the Fourier accountants use this.

    Measured at q = 1, where ε is known: their errors in δ stay below a seventh of it.
    """
    rounding = sum(event.steps for event in events) * 2.0**-52
    if rounding > delta / 2:
        raise AccountingError(f"δ={delta:g} is within float64 rounding ({rounding:.1g}) for so many steps")
    return delta - rounding


def rdp_epsilon(events: Sequence[Event], counts: Counts, delta: float, orders: tuple[float, ...]) -> float:
    """The bound by Rényi moments of these orders."""
    with failures_named():
        divergence = sum(n * renyi(event.with_steps(1), orders) for event, n in zip(events, counts, strict=True))
        return finite(compute_epsilon(orders, divergence, delta)[0])
