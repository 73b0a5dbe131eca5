"""What ε at one δ does not say: how often an attacker can be right, and the Gaussian mechanism that is no safer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtr

from lipdp.accounting.accountants import PLDAccountant, merged
from lipdp.accounting.events import Event
from lipdp.accounting.privacy_loss import Array
from lipdp.errors import ParameterError

_FLOOR = 1e-10
_POINTS = 2000
_PRECISION = 1e-4


@dataclass(frozen=True)
class TradeOff:
    r"""Upper bounds on the whole curve δ(ε) of a run, and what follows from them for every attack.

    Whoever tells two neighbours apart with a share α of false alarms is right about the other at most

        TPR(α) = min_ε min( e^ε α + δ(ε), 1 − e^{−ε} (1 − δ(ε) − α) )

    of the time. Every ε gives a bound, so the least of those on a grid is one too. Bounds on δ from above make this one
    larger, never smaller.

    Attributes:
        epsilons: (n,) increasing, from 0 on.
        deltas: (n,) upper bounds on δ there; the last is at most `floor`.
        floor: the δ₀ up to which `mu` holds.

    Source: Wasserman & Zhou (2010); Dong, Roth & Su (2022), proposition 6.
    """

    epsilons: Array
    deltas: Array
    floor: float

    def tpr(self, fpr: float) -> float:
        """The largest true-positive rate of any attack at this false-positive rate, rounded up.

        Args:
            fpr: α in (0, 1).

        >>> curve = trade_off([Event(1.0, 1.0, 1)])
        >>> round(curve.tpr(0.01), 3)  # Φ(Φ⁻¹(0.01) + 1)
        0.092
        """
        if not 0.0 < fpr < 1.0:
            raise ParameterError(f"a false-positive rate of {fpr!r} was given; one in (0, 1) is needed")
        growth = np.exp(np.minimum(self.epsilons, 700.0))
        bounds = np.minimum(growth * fpr + self.deltas, 1.0 - (1.0 - self.deltas - fpr) / growth)
        return float(min(1.0, bounds.min()))

    @property
    def mu(self) -> float:
        """The least μ, rounded up, for which the run is μ-GDP up to δ₀ = `floor`: `δ(ε) ≤ δ_μ(ε) + δ₀` at all ε ≥ 0.

        δ_μ is the curve of the Gaussian mechanism of noise multiplier 1/μ. Both fall, so between two points of the grid
        it is enough that δ at the first is at most δ_μ at the second.

        Source: Dong, Roth & Su (2022), corollary 1; Gomez et al. (2025) on GDP as the one number to report.
        """
        low, high = 0.0, 1.0
        while not self._below(high):
            low, high = high, 2.0 * high
        while high - low > _PRECISION * high:
            middle = (low + high) / 2.0
            low, high = (low, middle) if self._below(middle) else (middle, high)
        return high

    def _below(self, mu: float) -> bool:
        at = self.epsilons[1:]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # at/μ = ∞ for a μ near 0: δ_μ = 0 there
            far = at / mu
        gaussian = ndtr(mu / 2.0 - far) - np.exp(at + log_ndtr(-mu / 2.0 - far))
        return bool(np.all(self.deltas[:-1] <= np.maximum(gaussian, 0.0) + self.floor))


def trade_off(events: Sequence[Event], *, floor: float = _FLOOR) -> TradeOff:
    """The trade-off of all the events, by their privacy loss distribution.

    Args:
        events: what was released, at least one step, under one relation.
        floor: δ₀, below which the curve is not followed.

    Raises:
        ParameterError: no steps. AccountingError: δ₀ is within float64 rounding for so many steps, or out of reach.

    >>> round(trade_off([Event(2.0, 1.0, 4)]).mu, 2)  # four steps at σ = 2 are one at σ = 1
    1.0
    """
    distinct = merged(events)
    if not distinct:
        raise ParameterError("there are no steps, so nothing was released; give at least one event")
    account = PLDAccountant()
    last = account.prepare(distinct, floor / 2.0, 0.0)(tuple(event.steps for event in distinct))
    epsilons = np.linspace(0.0, last * 1.001 + 1e-6, _POINTS)
    return TradeOff(epsilons, account.deltas(distinct, epsilons, floor / 2.0), floor)
