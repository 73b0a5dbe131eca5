"""From a budget and a compute limit to (B, σ, T), with the exact ε of everything that is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lipdp.accounting.accountants import get_accountant
from lipdp.accounting.plan import PrivacyPlan, Subsampling, whole
from lipdp.errors import CalibrationError, ParameterError
from lipdp.planning.tan import SWEET_SPOT, Move, eta_for, rule, tan_epsilon, tan_eta

NOISE_MULTIPLIER = 3.0
"""The σ a plan aims at: the middle of the sweet spot."""

STEPS = 2500
"""T where none is given, that of the published CIFAR-10 run. Utility asks for T, not privacy; see `plan simulate`."""

_QUICK = {"prv": "pld"}  # for the curves: an upper bound too, within 0.03 % of ε, and several times as quick
_CURVE = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 2.0, 4.0)  # B on the iso-budget curve, relative to the plan's
_BEHIND_THE_WALL = 0.5
_NOISES = (0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)  # σ at constant η


@dataclass(frozen=True)
class Budget:
    """The budget of a run: N records, (ε, δ) for *add or remove one record*, the accountant of the run to follow, and
    the most records of a batch, if it is truncated.

    Raises:
        ParameterError, UnknownNameError: a value outside its range.
    """

    records: int
    epsilon: float
    delta: float
    accountant: str = "prv"
    truncated_batch_size: int | None = None

    def __post_init__(self) -> None:
        whole("records", self.records)
        Subsampling.of(self.records, 1, steps=1, truncated_batch_size=self.truncated_batch_size)
        eta_for(self.epsilon, self.delta)
        get_accountant(self.accountant)

    @property
    def given(self) -> dict[str, Any]:
        """What every plan within it has."""
        limits = {"dataset_size": self.records, "truncated_batch_size": self.truncated_batch_size}
        return {**limits, "target_delta": self.delta, "accountant": self.accountant}

    @property
    def largest_batch(self) -> int:
        """The largest B: N, or that with C = B + 5 √B, which cuts a batch in a million."""
        most = self.truncated_batch_size
        return self.records if most is None else max(1, math.floor(((math.sqrt(25 + 4 * most) - 5) / 2) ** 2))

    def drawn(self, sampling_rate: float, steps: int) -> Subsampling:
        """T steps at a rate q that need not be that of a whole B."""
        return Subsampling(sampling_rate, steps).truncated(self.records, self.truncated_batch_size)


class Point(PrivacyPlan):
    """One setting (B, σ, T) on N records, of Poisson batches, with its exact ε at δ, an upper bound by `accountant`."""

    @property
    def delta(self) -> float:
        """δ."""
        return self.predicted.delta

    @property
    def epsilon(self) -> float:
        """Of the whole run."""
        return self.predicted.epsilon

    @property
    def eta(self) -> float:
        """The inverse of the total amount of noise."""
        return tan_eta(noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=self.steps)

    @property
    def tan_epsilon(self) -> float:
        """ε_TAN, to stand beside the exact one."""
        return tan_epsilon(self.eta, self.delta)

    @property
    def epochs(self) -> float:
        """The cost in passes over the data, q·T."""
        return self.samples / self.dataset_size

    @property
    def move(self) -> Move:
        """What the rule of the sweet spot says."""
        return rule(self.noise_multiplier, sampling_rate=self.sampling_rate)

    def figures(self) -> dict[str, Any]:
        """What `plan.json` holds of it; `accountant` is the one that answered."""
        return {
            "batch_size": self.expected_batch_size,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "delta": self.delta,
            "epsilon": self.epsilon,
            "accountant": self.predicted.accountant,
            "sampling_rate": self.sampling_rate,
            "eta": self.eta,
            "tan_epsilon": self.tan_epsilon,
            "signal_to_noise": self.expected_batch_size / self.noise_multiplier,
            "samples": self.samples,
            "epochs": self.epochs,
            "rule": self.move.reason,
        }


@dataclass(frozen=True)
class Plan:
    """A budget, the compute limit if any, the setting (B, σ, T) chosen, and settings to compare it with."""

    budget: Budget
    max_samples: int | None
    chosen: Point
    beside: tuple[Point, ...] = ()

    @cached_property
    def iso_budget(self) -> tuple[Point, ...]:
        """The plan among other B at the same T, each with the least σ that keeps the budget; B increasing."""
        quick = _quick(self.budget)
        batches = [round(self.chosen.expected_batch_size * factor) for factor in _CURVE]
        found = {point.expected_batch_size: point for point in iso_budget(quick, self.chosen.steps, batches)}
        found[self.chosen.expected_batch_size] = self.chosen
        return tuple(found[batch] for batch in sorted(found))

    @cached_property
    def constant_eta(self) -> tuple[tuple[float, float], ...]:
        """Pairs (σ, exact ε) at the plan's η and T, where B goes as σ: the noise wall."""
        return self._constant_eta(_NOISES, _quick(self.budget).accountant)

    @property
    def wall(self) -> tuple[tuple[float, float], ...]:
        """The pair at σ = 1/2 of `constant_eta`, where that is below the plan's σ."""
        if self.chosen.noise_multiplier <= _BEHIND_THE_WALL:
            return ()
        return self._constant_eta((_BEHIND_THE_WALL,), "pld")

    def _constant_eta(self, noise_multipliers: Sequence[float], accountant: str) -> tuple[tuple[float, float], ...]:
        return constant_eta(
            self.chosen.eta, steps=self.chosen.steps, delta=self.budget.delta, noise_multipliers=noise_multipliers,
            accountant=accountant, drawn=self.budget.drawn,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        budget = self.budget
        return {
            "records": budget.records,
            "target_epsilon": budget.epsilon,
            "delta": budget.delta,
            "truncated_batch_size": budget.truncated_batch_size,
            "relation": self.chosen.relation.value,
            "max_samples": self.max_samples,
            "chosen": self.chosen.figures(),
            "iso_budget": [point.figures() for point in self.iso_budget],
            "constant_eta": [{"noise_multiplier": sigma, "epsilon": epsilon} for sigma, epsilon in self.constant_eta],
            "beside": [point.figures() for point in self.beside],
        }


def evaluate(
    *, records: int, batch_size: int, noise_multiplier: float, steps: int, delta: float, accountant: str = "prv",
    truncated_batch_size: int | None = None,
) -> Point:  # fmt: skip
    """The exact account of one setting.

    >>> point = evaluate(records=50_000, batch_size=4096, noise_multiplier=3.0, steps=2500, delta=1e-5)
    >>> f"{point.epsilon:.2f} {point.tan_epsilon:.2f} {point.samples:,}"
    '6.61 7.48 10,240,000'
    """
    return Point(
        dataset_size=records, expected_batch_size=batch_size, steps=steps, truncated_batch_size=truncated_batch_size,
        noise_multiplier=noise_multiplier, target_delta=delta, accountant=accountant,
    )  # fmt: skip


def with_batch_size(budget: Budget, batch_size: int, steps: int) -> Point:
    """The setting that keeps the budget with this B and T: the least σ with ε ≤ target.

    Raises:
        CalibrationError: no σ reaches the target. ParameterError: B outside 1 … N.
    """
    return Point.of(**budget.given, expected_batch_size=batch_size, steps=steps, target_epsilon=budget.epsilon)


def with_noise_multiplier(budget: Budget, noise_multiplier: float, steps: int) -> Point:
    """The setting that keeps the budget with T steps and a noise multiplier near σ.

    At fixed T and ε, η is nearly constant where σ is large, so `B = N·η·σ·√(2/T)` with the η of ε_TAN is a good guess,
    and log σ goes as log B; secants from there meet σ to within 1 %, but for the rounding of B. Where B would exceed N
    it is N, and σ what the budget leaves; where batches are truncated, at most what C leaves room for.

    >>> point = with_noise_multiplier(Budget(50_000, 8.0, 1e-5), 3.0, 2500)
    >>> abs(point.noise_multiplier / 3.0 - 1) < 0.02, 7.96 <= point.epsilon <= 8.0
    (True, True)
    """
    quick = _quick(budget)
    goal, slope = math.log(noise_multiplier), 1.0
    x = math.log(budget.records * eta_for(budget.epsilon, budget.delta) * math.sqrt(2.0 / steps)) + goal
    gaps: dict[int, float] = {}  # B → log σ(B) − log σ
    for _ in range(8):
        batch = min(budget.largest_batch, max(1, round(math.exp(x))))
        if batch in gaps:
            break
        gap = math.log(with_batch_size(quick, batch, steps).noise_multiplier) - goal
        if gaps:
            last, before = next(reversed(gaps.items()))
            slope = min(max((gap - before) / math.log(batch / last), 0.1), 1.5)
        gaps[batch] = gap
        if abs(gap) < 0.01:
            break
        x = math.log(batch) - gap / slope
    return with_batch_size(budget, min(gaps, key=lambda batch: abs(gaps[batch])), steps)


def iso_budget(budget: Budget, steps: int, batch_sizes: Sequence[int]) -> tuple[Point, ...]:
    """The settings that keep the budget with T steps and these B. Leaves out B that no σ can keep."""
    points = []
    for batch in sorted({min(max(1, batch), budget.largest_batch) for batch in batch_sizes}):
        try:
            points.append(with_batch_size(budget, batch, steps))
        except CalibrationError:  # e.g. δ above the chance that a record is used at all: ε is 0 at every σ
            continue
    return tuple(points)


def constant_eta(
    eta: float,
    *,
    steps: int,
    delta: float,
    noise_multipliers: Sequence[float] = _NOISES,
    accountant: str = "pld",
    drawn: Callable[[float, int], Subsampling] = Subsampling,
) -> tuple[tuple[float, float], ...]:
    """Pairs (σ, exact ε) at constant total noise, `q = η·σ·√(2/T)`. Leaves out σ for which q would exceed 1.

    >>> below, above = constant_eta(0.9655, steps=2500, delta=1e-5, noise_multipliers=(0.4, 3.0))
    >>> below[1] > 5 * above[1]
    True
    """
    rates = [(sigma, eta * sigma * math.sqrt(2.0 / steps)) for sigma in noise_multipliers]
    account = get_accountant(accountant)
    return tuple((s, account.epsilon([drawn(q, steps).event(s)], delta).epsilon) for s, q in rates if q <= 1.0)


def plan(
    budget: Budget,
    *,
    steps: int | None = None,
    max_samples: int | None = None,
    beside: Sequence[tuple[int, float, int]] = (),
) -> Plan:
    """Choose (B, σ, T) for a budget.

    σ = 3 at T steps, if the limit on B·T allows; else as much of B as it allows while σ ≥ 2; else fewer steps, at
    σ = 2. A T that was given is kept: then σ may fall below 2, and the plan says so.

    Args:
        budget: N, ε, δ.
        steps: T; where none is given, at most `STEPS`.
        max_samples: the compute limit, B·T at most.
        beside: settings (B, σ, T) to compare with.

    Raises:
        CalibrationError: no σ reaches the target at these B and T.
        ParameterError: a value outside its range, or a limit that does not allow a single record a step.

    >>> found = plan(Budget(50_000, 8.0, 1e-5), steps=2500, max_samples=8_000_000).chosen
    >>> found.expected_batch_size, 2.0 < found.noise_multiplier < 2.3
    (3200, True)
    """
    for name, value in (("steps", steps), ("max_samples", max_samples)):
        if value is not None:
            whole(name, value)
    others = tuple(
        Point(**budget.given, expected_batch_size=batch, noise_multiplier=sigma, steps=count)
        for batch, sigma, count in beside
    )
    return Plan(budget, max_samples, _choose(budget, steps, max_samples), others)


def _choose(budget: Budget, steps: int | None, max_samples: int | None) -> Point:
    count = steps or STEPS
    best = with_noise_multiplier(budget, NOISE_MULTIPLIER, count)
    if max_samples is None or best.samples <= max_samples:
        return best
    allowed = min(max_samples // count, budget.largest_batch)
    if allowed:
        limited = with_batch_size(budget, allowed, count)
        if steps is not None or limited.noise_multiplier >= SWEET_SPOT[0]:
            return limited
    elif steps is not None:
        raise ParameterError(
            f"max_samples={max_samples} in {steps} steps is less than one record a step: allow more, or fewer steps"
        )
    return _fewer_steps(budget, best, max_samples)


def _fewer_steps(budget: Budget, start: Point, max_samples: int) -> Point:
    """At σ = 2 the cost is N·η·2·√(2T): the T that the limit allows, from the exact η, and then as much B as it allows.

    Where that B is more than N, every step takes all records (q = 1, no wall), as often as the limit allows.
    """
    sigma, eta = SWEET_SPOT[0], start.eta
    for _ in range(4):
        count = max(1, math.floor((max_samples / (budget.records * eta * sigma)) ** 2 / 2.0))
        batch = max_samples // count
        if batch >= budget.largest_batch:
            return with_batch_size(budget, budget.largest_batch, max_samples // budget.largest_batch)
        point = with_batch_size(budget, batch, count)
        if point.noise_multiplier >= sigma * 0.999:
            break
        eta = point.eta * sigma / point.noise_multiplier
    return point


def _quick(budget: Budget) -> Budget:
    """The same budget under an account of the same tightness that is quick enough for a curve."""
    return replace(budget, accountant=_QUICK.get(budget.accountant, budget.accountant))
