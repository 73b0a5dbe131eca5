"""ε to within a few percent in a few milliseconds, bound to neither side: where a search for σ begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.fft import fftshift, ifftshift, irfft, rfft

from lipdp.accounting.events import Event
from lipdp.accounting.privacy_loss import DIRECTIONS, step_loss

_POINTS = 2**16


def rough_epsilon(events: Sequence[Event], delta: float, *, near: float) -> float:
    """About the ε of the events at δ, where it is not far from `near`; infinite where it is more than eight times that,
    or where floats overflow.

    The losses of the first direction, each on the same grid of cells on [−L, L] with its mean kept, are summed by FFT.
    What is beyond L counts as an infinite loss.

    >>> round(rough_epsilon([Event(2.0, 1.0, 1)], 1e-5, near=2.0), 2)
    1.99
    """
    half = 8.0 * near + 0.5
    cells = (np.arange(_POINTS) / _POINTS - 0.5) * 2.0 * half
    with np.errstate(all="ignore"):
        masses, shift, log_finite = _sum(events, cells)
        losses = cells + shift
        first = int(np.searchsorted(losses, 0.0))
        losses, masses = losses[first:], masses[first:]
        above, scaled = (np.cumsum(m[::-1])[::-1] for m in (masses, masses * np.exp(-losses)))
        deltas = above - np.exp(losses) * scaled - math.expm1(log_finite)
    if not np.isfinite(deltas).all() or deltas.size == 0 or deltas[-1] > delta:
        return math.inf
    return float(np.interp(-delta, -np.minimum.accumulate(deltas), losses))


def _sum(events: Sequence[Event], cells: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
    """The masses of the sum of all losses in the cells, by how much they are to be shifted, and log P(finite)."""
    mesh = cells[1] - cells[0]
    edges = np.append(cells, -cells[0]) - mesh / 2.0
    total, shift, log_finite = np.ones(_POINTS // 2 + 1, dtype=np.complex128), 0.0, 0.0
    mean, variance = 0.0, 0.0
    for event in events:
        loss = step_loss(event, DIRECTIONS[event.relation][0])
        below = loss.cdf(edges)
        masses = np.diff(below)
        center = loss.mean()
        mean += event.steps * center
        # sums by numpy, since those of BLAS depend on the number of threads
        variance += event.steps * float((masses * (cells - center) ** 2).sum())
        total *= rfft(ifftshift(masses)) ** event.steps
        shift += event.steps * min(max(center - float((masses * cells).sum()), -mesh / 2.0), mesh / 2.0)
        log_finite += event.steps * math.log(max(float(below[-1]), 1e-300))
    if not mean + 8.0 * math.sqrt(variance) < -cells[0]:  # it would come in again on the other side
        log_finite = -math.inf
    return fftshift(irfft(total, _POINTS)), shift, log_finite
