"""From events to ε: three interchangeable accountants, each returning an upper bound or handing on to the next."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from lipdp.accounting.events import Event, as_relation
from lipdp.accounting.numerics import (
    COARSE_ORDERS,
    FINE_ORDERS,
    LOW_ORDERS,
    MAX_POINTS,
    Counts,
    delta_left,
    failures_named,
    finite,
    rdp_epsilon,
)
from lipdp.accounting.privacy_loss import DIRECTIONS, Array, loss_deviation, loss_distribution, smallest_interval
from lipdp.accounting.prv_grid import Composer, mesh_and_points
from lipdp.accounting.relation import Relation
from lipdp.accounting.waiting import announced
from lipdp.errors import AccountingError, ParameterError, UnknownNameError

logger = logging.getLogger(__name__)

_TOLERANCE = 0.005  # how far above ε the answer may lie, relative
_MAX_STEPS = 1_000_000  # of the grid's composition: about ten seconds


@dataclass(frozen=True)
class Spent:
    """An upper bound on ε and where it comes from.

    `accountant` is the one whose bound this is; it differs from `requested` when that one failed, `note` then says why.
    """

    epsilon: float
    delta: float
    requested: str
    accountant: str
    note: str = ""

    def __float__(self) -> float:
        return self.epsilon


class Accountant(ABC):
    """A way to bound the ε of composed events from above. Stateless; see `get_accountant`.

    Attributes:
        name: how it is asked for.
        fallback: who answers where it fails.
        excess: about how far its bound lies above ε, relative; where a search begins depends on it, no bound does.
    """

    name: ClassVar[str]
    fallback: ClassVar[str | None]
    excess: ClassVar[float]

    @abstractmethod
    def prepare(self, events: tuple[Event, ...], delta: float, tolerance: float) -> Callable[[Counts], float]:
        """Do the work common to all numbers of steps up to those of `events`.

        Args:
            events: distinct, under one relation, each with steps ≥ 1.
            delta: δ in (0, 1).
            tolerance: how far above ε at the full numbers of steps the answers may be, relative to it.

        Returns:
            From numbers of steps, one for each event and none above the event's, to an upper bound on ε.

        Raises:
            AccountingError: these events are beyond the accountant's numerical reach; also raised by what it returns.
        """

    def epsilon(self, events: Sequence[Event], delta: float) -> Spent:
        """An upper bound on the ε of all the events, in any order; 0 when they have no steps.

        If this accountant fails numerically the next in line (prv, pld, rdp) answers; that is logged, and noted in the
        result. Results are cached.

        Args:
            events: what was released, all under one relation.
            delta: δ in (0, 1).

        Raises:
            ParameterError: δ outside (0, 1), or events under different relations.
            AccountingError: no accountant reaches a finite bound.

        >>> get_accountant("pld").epsilon([Event(2.0, 0.01, 500), Event(1.0, 0.01, 100)], 1e-5).accountant
        'pld'
        """
        found = spent(self.name, merged(events), checked_delta(delta))
        if found.accountant != self.name:
            logger.warning("ε comes from the %s accountant, not from %s (%s)", found.accountant, self.name, found.note)
        return found


def merged(events: Sequence[Event]) -> tuple[Event, ...]:
    """Equal mechanisms brought together: ε does not depend on their order, and fewer are composed and cached."""
    if len({event.relation for event in events}) > 1:
        raise ParameterError("the events have different relations; one ε needs one relation")
    steps: dict[Event, int] = {}
    for event in events:
        steps[event.single] = steps.get(event.single, 0) + event.compositions
    ordered = sorted(steps, key=lambda event: (event.noise_multiplier, event.sampling_rate))
    return tuple(event.with_steps(steps[event]) for event in ordered if steps[event])


def checked_delta(delta: float) -> float:
    """δ itself, or ParameterError."""
    if not (isinstance(delta, Real) and 0.0 < delta < 1.0):
        raise ParameterError(f"delta={delta!r}: a probability in (0, 1) is needed, well below 1/(number of records)")
    return float(delta)


def prepared(
    name: str, events: tuple[Event, ...], delta: float, tolerance: float
) -> tuple[str, str, float, Callable[[Counts], float]]:
    """The first accountant from `name` on that bounds `events`: its name, why not earlier ones, ε, and its function."""
    failures: list[str] = []
    candidate: str | None = name
    while candidate is not None:
        accountant = get_accountant(candidate)
        try:
            with announced(f"ε of {sum(event.steps for event in events):,} steps by the {candidate} accountant"):
                function = accountant.prepare(events, delta, tolerance)
                bound = function(tuple(event.steps for event in events))
        except AccountingError as error:
            failures.append(f"{candidate}: {error}")
            candidate = accountant.fallback
        else:
            return candidate, "; ".join(failures), bound, function
    raise AccountingError(f"no accountant bounds ε at δ={delta:g} ({'; '.join(failures)})")


@lru_cache(maxsize=4096)
def spent(name: str, events: tuple[Event, ...], delta: float) -> Spent:
    """`Accountant.epsilon` for arguments already checked and merged, and without a word, as a search for σ takes it."""
    if not events:
        return Spent(0.0, delta, name, name)
    used, note, bound, _ = prepared(name, events, delta, _TOLERANCE)
    return Spent(bound, delta, name, used, note)


class RDPAccountant(Accountant):
    """Rényi moments (dp-accounting). Quick and always possible, but looser.

    It is 5 to 30 % above an ε of a few units, and several times a small ε.

    `ε = min_α D_α + log(1 − 1/α) − log(δα)/(α−1)`, with `D_α` the sum over the steps.

    Sources: Mironov (2017); Canonne, Kamath & Steinke (2020), proposition 12.
    """

    name: ClassVar[str] = "rdp"
    fallback: ClassVar[str | None] = None
    excess: ClassVar[float] = 0.1

    def prepare(self, events: tuple[Event, ...], delta: float, tolerance: float) -> Callable[[Counts], float]:
        """See `Accountant.prepare`."""
        del tolerance
        return lambda counts: rdp_epsilon(events, counts, delta, FINE_ORDERS)


class PLDAccountant(Accountant):
    """Privacy loss distributions on a grid, rounded up ("connect the dots"), composed by FFT (dp-accounting).

    The grid never makes ε smaller; an interval h adds up to h²/4 to the variance of each step's loss. h is a twentieth
    of that loss's std, which makes ε 0.03 % too large or less (measured), unless that would take too many points.

    Sources: Koskela, Jälkö & Honkela (2020); Doroshenko et al. (2022).
    """

    name: ClassVar[str] = "pld"
    fallback: ClassVar[str | None] = "rdp"
    excess: ClassVar[float] = 0.0003

    def prepare(self, events: tuple[Event, ...], delta: float, tolerance: float) -> Callable[[Counts], float]:
        """See `Accountant.prepare`."""
        del tolerance
        usable = delta_left(delta, events)
        if sum(event.steps for event in events) > _MAX_STEPS:
            raise AccountingError(f"the grid takes minutes for more than {_MAX_STEPS:,} steps")
        with failures_named():
            losses = self._losses(events, usable)

        def bound(counts: Counts) -> float:
            with failures_named():
                return finite(_composed(losses, counts).get_epsilon_for_delta(usable))

        return bound

    def deltas(self, events: tuple[Event, ...], epsilons: Array, delta: float) -> Array:
        """Upper bounds on δ at each ε ≥ 0 (increasing), and what float64 rounding can add; the grid is fit for `delta`.

        Raises:
            AccountingError: δ is within float64 rounding, or beyond numerical reach.
        """
        usable = delta_left(delta, events)
        with failures_named():
            total = _composed(self._losses(events, usable), tuple(event.steps for event in events))
            found = np.asarray(total.get_delta_for_epsilon(list(epsilons)), dtype=np.float64)
        return np.minimum(found + (delta - usable), 1.0)

    @staticmethod
    def _losses(events: tuple[Event, ...], usable: float) -> list[Any]:
        steps = [event.steps for event in events]
        variance = np.average([loss_deviation(event) ** 2 for event in events], weights=steps)
        interval = max(min(0.05 * math.sqrt(variance), 0.01), *(smallest_interval(event) for event in events))
        for orders in (LOW_ORDERS, COARSE_ORDERS):  # few orders bound ε from above; often that is enough
            widest = rdp_epsilon(events, tuple(steps), usable, orders)
            if widest / MAX_POINTS <= interval:
                break
        interval = max(interval, widest / MAX_POINTS)
        return [loss_distribution(event, interval) for event in events]


def _composed(losses: Sequence[Any], counts: Counts) -> Any:
    """The loss distribution of `counts` steps of each."""
    parts = [loss.self_compose(n) for loss, n in zip(losses, counts, strict=True) if n]
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return total


class PRVAccountant(Accountant):
    """Privacy random variables (prv-accountant). Returns the upper error bound. The default.

    The sum of the T losses, truncated to [−L, L], is computed on a grid of interval h by FFT. Theorem 5.5 of the
    source: with `h = e/sqrt(T/2·log(12/d))`, the curve δ(ε) is off by at most e in ε and d in δ, provided that L leaves
    out little enough. Here d = δ/1000 and e is `tolerance` times ε, found by repeating with a better guess of ε.

    L, instead of the source's `3 + …`, which makes the grid needlessly wide when ε is small: for any c > 0,
    `P(|Y| ≥ ε + c) ≤ 2·δ(ε)/(1 − e^{−c})`, as where `Y ≥ ε + c` at least the fraction `1 − e^{−c}` of the mass counts
    in δ(ε), likewise below for the opposite pair, whose Rényi bound is the same. So
    `L = e + c + ε_Rényi(d·(1−e^{−c})/8)` for the sum, and at least `c + ε_Rényi(d·(1−e^{−c})/(16·T))` for each step,
    leave out at most d/4 + d/8; coupling the grid's losses with the true ones leaves out 2·d/6 (Hoeffding), which is
    d/4 + d/8 + d/3 < d in all.

    Source: Gopi, Lee & Wutschitz (2021).
    """

    name: ClassVar[str] = "prv"
    fallback: ClassVar[str | None] = "pld"
    excess: ClassVar[float] = 0.0055

    def prepare(self, events: tuple[Event, ...], delta: float, tolerance: float) -> Callable[[Counts], float]:
        """See `Accountant.prepare`."""
        counts = tuple(event.steps for event in events)
        usable = delta_left(delta, events)
        ceiling = guess = rdp_epsilon(events, counts, usable, COARSE_ORDERS)
        if ceiling == 0.0:
            return lambda counts: 0.0
        for _ in range(8):
            mesh_and_points(events, usable, tolerance * guess * 1.06)  # at least what the last grid needs: fail early
            bound = self._bound(events, usable, 0.05 * guess)
            upper = bound(counts)
            if upper > ceiling * 1.06:
                raise AccountingError(f"ε={upper:.6g} exceeds the Rényi bound {ceiling:.6g}")
            if upper == 0.0:
                return bound
            if guess <= 2.0 * upper:
                return self._bound(events, usable, tolerance * upper)
            guess = upper
        raise AccountingError(f"no stable grid near ε={guess:.3g}")

    @staticmethod
    def _bound(events: tuple[Event, ...], delta: float, error: float) -> Callable[[Counts], float]:
        composers = [Composer(events, kind, delta, error) for kind in DIRECTIONS[events[0].relation]]
        return lambda counts: max(composer.epsilon(counts) for composer in composers)


_ACCOUNTANTS: dict[str, Accountant] = {
    accountant.name: accountant for accountant in (PRVAccountant(), PLDAccountant(), RDPAccountant())
}


def get_accountant(name: str) -> Accountant:
    """The accountant called "prv", "pld" or "rdp".

    Raises:
        UnknownNameError: another name.

    >>> get_accountant("prv").name
    'prv'
    """
    try:
        return _ACCOUNTANTS[name]
    except (KeyError, TypeError):
        raise UnknownNameError("accountant", name, _ACCOUNTANTS) from None


def epsilon(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: str = "prv",
    relation: Relation | str = Relation.ADD_OR_REMOVE_ONE,
) -> float:
    """An upper bound on the ε of `steps` noisy steps.

    Args:
        noise_multiplier: the σ, relative to the sensitivity under `relation` (see `Event`).
        sampling_rate: q in (0, 1].
        steps: T ≥ 0; 0 gives ε = 0.
        delta: δ in (0, 1).
        accountant: "prv" (0.5 to 0.6 % above ε), "pld" or "rdp" (looser); if it fails numerically the next one answers,
            which is logged (`get_accountant(name).epsilon(...)` returns which one did).
        relation: the neighbouring relation, or its value.

    Raises:
        ParameterError, UnknownNameError, AccountingError: see `Accountant.epsilon`.

    >>> f"{epsilon(noise_multiplier=1.0, sampling_rate=0.01, steps=1000, delta=1e-5):.2f}"
    '1.84'
    """
    event = Event(noise_multiplier, sampling_rate, steps, as_relation(relation))
    return get_accountant(accountant).epsilon([event], delta).epsilon
