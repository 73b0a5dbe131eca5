"""From a budget to a noise multiplier, and ε along a planned run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from lipdp.accounting.accountants import checked_delta, get_accountant, merged, prepared, spent
from lipdp.accounting.events import Event, as_relation, require_positive
from lipdp.accounting.numerics import Counts
from lipdp.accounting.relation import Relation
from lipdp.accounting.rough import rough_epsilon
from lipdp.accounting.waiting import announced
from lipdp.errors import AccountingError, CalibrationError, ParameterError

_LARGEST = 1e4
_SLACK = 0.005  # ε(σ) may lie this far below the target, relative
_RANGE = (math.log(0.01), math.log(1e6))  # log σ


def calibrate(
    *,
    target_epsilon: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: str = "prv",
    relation: Relation | str = Relation.ADD_OR_REMOVE_ONE,
    extra_events: Sequence[Event] = (),
    truncation: float = 0.0,
) -> float:
    """The noise multiplier σ with `0.995·target ≤ ε(σ) ≤ target`.

    ε decreases in σ. The search starts where the central limit would have it, `q²T(e^{1/σ²} − 1) = μ²` with μ the
    Gaussian mechanism of (target, δ), goes to where a rough account meets the target, and on from there to the exact
    one, both by secants in (log σ, log ε) that are kept inside a bracket. The accountant asked for confirms the answer.

    Args:
        target_epsilon: the budget, > 0 and up to 10,000, beyond which nothing is guaranteed; extra events included.
        sampling_rate: q in (0, 1].
        steps: T ≥ 1.
        delta: δ in (0, 1).
        accountant: "prv", "pld" or "rdp"; `epsilon` with the same one then confirms the result.
        relation: the neighbouring relation, or its value.
        extra_events: other releases of the run, held fixed, under the same relation.
        truncation: of the steps; see `Event`.

    Raises:
        CalibrationError: no σ reaches the target; the message says why.
        ParameterError, UnknownNameError: an argument outside its range.

    >>> from lipdp import epsilon
    >>> sigma = calibrate(target_epsilon=1.0, sampling_rate=0.01, steps=200, delta=1e-5)
    >>> 0.995 <= epsilon(noise_multiplier=sigma, sampling_rate=0.01, steps=200, delta=1e-5) <= 1.0
    True
    """
    target_epsilon, delta = _checked_target(target_epsilon, delta)
    step = Event(1.0, sampling_rate, steps, as_relation(relation), truncation=truncation)
    if step.steps == 0:
        raise ParameterError("steps=0: at least one step is needed to calibrate its noise")
    strategy = get_accountant(accountant)
    used = 1.0 if sampling_rate == 1.0 else -math.expm1(steps * math.log1p(-sampling_rate))
    alone = strategy.epsilon(extra_events, delta).epsilon
    if alone > target_epsilon:
        raise CalibrationError(
            f"the extra events alone cost ε={alone:.4g}, more than the target {target_epsilon:g}: no noise makes up for"
            " it"
        )
    if delta >= used and not extra_events:
        raise CalibrationError(
            f"δ={delta:g} is not below {used:g}, the probability that a given record is used in any of the {steps}"
            " steps: ε is then 0 at every noise multiplier; δ should be well below 1/(number of records)"
        )

    def cost(bound: Callable[[list[Event]], float], sigma: float) -> float:
        try:
            return bound([replace(step, noise_multiplier=sigma), *extra_events])
        except AccountingError:
            return math.inf

    mu = gaussian_mu(target_epsilon, delta)
    guess = math.log1p((mu / sampling_rate) ** 2 / steps) ** -0.5
    slope: Callable[[], float] = _usual_slope
    if sampling_rate < 1.0:  # where the central limit may be far off
        rough = partial(cost, partial(rough_epsilon, delta=delta, near=target_epsilon))
        guess, slope = _rough_start(rough, guess, target_epsilon / (1.0 + strategy.excess))
    exact = partial(cost, lambda events: spent(accountant, merged(events), delta).epsilon)
    with announced(f"the search for σ over {steps:,} steps"):
        return smallest_noise_multiplier(exact, guess, target_epsilon, slope=slope)


def _checked_target(epsilon: float, delta: float) -> tuple[float, float]:
    """The budget itself, or ParameterError; CalibrationError where ε is too large for a guarantee."""
    require_positive("target_epsilon", epsilon)
    if epsilon > _LARGEST:
        raise CalibrationError(f"the target ε={epsilon:g} is too large: above {_LARGEST:g} nothing is guaranteed")
    return float(epsilon), checked_delta(delta)


def _usual_slope() -> float:
    """Of log ε against log σ, until it is known."""
    return -1.2


def _rough_start(cost: Callable[[float], float], guess: float, target: float) -> tuple[float, Callable[[], float]]:
    """Where to begin: a σ near the one sought, and the slope of log ε against log σ there, computed if asked for."""
    try:
        sigma = smallest_noise_multiplier(cost, guess, target * (1.0 - _SLACK / 2.0), slack=1e-3)
    except CalibrationError:  # out of its reach, which says nothing about the accountant's
        return guess, _usual_slope

    def slope() -> float:
        here, beside = cost(sigma), cost(1.02 * sigma)
        return math.log(beside / here) / math.log(1.02) if 0.0 < beside < here < math.inf else _usual_slope()

    return sigma, slope


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ of the Gaussian mechanism with `Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ) = δ` (Balle & Wang 2018)."""
    epsilon, delta = _checked_target(epsilon, delta)

    def excess(mu: float) -> float:
        return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))) - delta

    return float(brentq(excess, 1e-12, 100.0 + 3.0 * math.sqrt(epsilon)))


def smallest_noise_multiplier(
    cost: Callable[[float], float],
    guess: float,
    target: float,
    *,
    slope: Callable[[], float] = _usual_slope,
    slack: float = _SLACK,
) -> float:
    """The σ, about the smallest, with `(1 − slack)·target ≤ cost(σ) ≤ target`; ε = `cost(σ)`.

    Args:
        cost: decreasing.
        guess, slope: where the search begins, and about how log ε goes with log σ there.
        target, slack: of ε.
    """
    goal = math.log(target * (1.0 - slack / 2.0))
    low, high = _RANGE[0] - 1.0, _RANGE[1] + 1.0  # log σ: every tried one ≤ low costs too much, ≥ high too little
    x, last = min(max(math.log(guess), _RANGE[0]), _RANGE[1]), None
    while high - low > 1e-7:
        sigma = math.exp(x)
        value = cost(sigma)
        if target * (1.0 - slack) <= value <= target:
            return sigma
        gap = (math.log(value) if value > 0.0 else -math.inf) - goal
        if value > target:
            low = x
        else:
            high = x
        if low == _RANGE[1]:
            raise CalibrationError(f"even σ={sigma:.3g} costs ε={value:.4g}: the target {target:g} is too small")
        if high == _RANGE[0]:
            raise CalibrationError(f"even σ={sigma:.3g} costs only ε={value:.4g}: the target {target:g} is too large")
        if last is None:
            steepness = slope()
        elif math.isfinite(gap - last[1]):
            steepness = min(max((gap - last[1]) / (x - last[0]), -20.0), -0.3)
        last = (x, gap)
        x = min(max(x - min(max(gap / steepness, -1.0), 1.0), _RANGE[0]), _RANGE[1])
        if not low < x < high:
            x = (low + high) / 2.0
    raise CalibrationError(f"ε jumps over [{target * (1.0 - slack):.6g}, {target:.6g}] at σ={math.exp(low):.6g}")


class EpsilonCurve:
    """ε after any part of a planned run, quick enough for a progress bar.

    What all the steps have in common is computed once, with ε at the end of the plan to within 1 %; a call then costs
    one composition (a few ms to some 100 ms). Every answer is an upper bound, never above ε at the end.

    Args:
        plan: the events of the run, in order.
        delta: δ in (0, 1).
        accountant: "prv", "pld" or "rdp"; `used` and `note` say which one answers and why.

    >>> curve = EpsilonCurve([Event(1.0, 0.01, 1000)], 1e-5)
    >>> curve(0), curve(100) < curve(1000), curve.used
    (0.0, True, 'prv')
    """

    def __init__(self, plan: Sequence[Event], delta: float, accountant: str = "prv") -> None:
        self._plan = tuple(plan)
        self._merged = merged(plan)
        self.steps = sum(event.steps for event in plan)
        self.used, self.note, self._end = get_accountant(accountant).name, "", 0.0
        self._bound: Callable[[Counts], float] = lambda counts: 0.0
        if self._merged:
            self.used, self.note, self._end, self._bound = prepared(
                accountant, self._merged, checked_delta(delta), tolerance=0.01
            )

    def __call__(self, steps: int) -> float:
        """An upper bound on the ε of the first `steps` steps of the plan; ParameterError beyond its end."""
        if not 0 <= steps <= self.steps:
            raise ParameterError(f"steps={steps}: the plan has {self.steps}")
        if steps == 0:
            return 0.0
        counts = dict.fromkeys((event.single for event in self._merged), 0)
        left = steps
        for event in self._plan:
            taken = min(left, event.steps)
            if taken:
                counts[event.single] += event.with_steps(taken).compositions
            left -= taken
        try:
            return min(self._bound(tuple(counts.values())), self._end)
        except AccountingError:
            return self._end
