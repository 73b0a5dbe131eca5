"""The grid on which `PRVAccountant` composes losses: its mesh, its width, and the composition."""

from __future__ import annotations

import math

from prv_accountant.composers import Heterogeneous
from prv_accountant.discretisers import CellCentred
from prv_accountant.domain import Domain
from prv_accountant.privacy_random_variables import PrivacyRandomVariableTruncated
from scipy.fft import next_fast_len

from lipdp.accounting.events import Event
from lipdp.accounting.numerics import COARSE_ORDERS, MAX_POINTS, Counts, failures_named, finite, rdp_epsilon
from lipdp.accounting.privacy_loss import StepLoss, step_loss
from lipdp.errors import AccountingError

_DELTA_ERROR = 1e-3  # the share of δ given up to the numerical errors of PRV


def mesh_and_points(events: tuple[Event, ...], delta: float, error: float) -> tuple[float, int]:
    """h and the number of grid points that cover [−L, L], as in `PRVAccountant`; AccountingError if too many."""
    counts = tuple(event.steps for event in events)
    lost = delta * _DELTA_ERROR
    mesh = error / math.sqrt(sum(counts) / 2.0 * math.log(12.0 / lost))
    margin = min(3.0, rdp_epsilon(events, counts, delta, COARSE_ORDERS))
    mass = lost * -math.expm1(-margin) / 8.0
    total = rdp_epsilon(events, counts, mass, COARSE_ORDERS) + error
    single = max(rdp_epsilon([event], (1,), mass / (2 * sum(counts)), COARSE_ORDERS) for event in events)
    points = 2 * next_fast_len(math.ceil((margin + max(total, single)) / mesh) + 2, real=True)
    if points * len(events) > MAX_POINTS:
        raise AccountingError(f"the grid would need {points * len(events):.2g} points")
    return mesh, points


class _Truncated(PrivacyRandomVariableTruncated):
    """A loss within [−L, L]. The mean is the whole loss's: the mass outside is below 2e-4·δ/T."""

    def mean(self) -> float:
        return self.prv.mean()


class Composer:
    """The losses of `events` in one direction, on a grid fit for an error of `error` in ε."""

    def __init__(self, events: tuple[Event, ...], kind: type[StepLoss], delta: float, error: float) -> None:
        self._delta, self._error = delta, error
        mesh, points = mesh_and_points(events, delta, error)
        with failures_named():
            half = (points / 2 - 1.5) * mesh
            domain = Domain.create_aligned(-half, half, mesh)
            truncated = [_Truncated(step_loss(event, kind), domain.t_min(), domain.t_max()) for event in events]
            self._composer = Heterogeneous([CellCentred().discretise(loss, domain) for loss in truncated])

    def epsilon(self, counts: Counts) -> float:
        """The upper bound for `counts` steps."""
        with failures_named():
            composed = self._composer.compute_composition(list(counts))
            return finite(composed.compute_epsilon(self._delta, self._delta * _DELTA_ERROR, self._error)[2])
