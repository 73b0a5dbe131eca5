"""What a run will do and cost, decided once: q, T, the relation, σ, the event of a step and the predicted ε."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

from scipy.special import betainc

from lipdp.accounting.accountants import Spent, get_accountant
from lipdp.accounting.calibration import calibrate, gaussian_mu
from lipdp.accounting.events import Event, require_positive
from lipdp.accounting.plan_table import HEADER, aligned, plan_rows
from lipdp.accounting.relation import Relation
from lipdp.errors import ParameterError, ResumeError, UnknownNameError

if TYPE_CHECKING:
    from typing import Self

SAMPLINGS: Mapping[str, Relation] = {"poisson": Relation.ADD_OR_REMOVE_ONE, "fixed_size": Relation.REPLACE_ONE}
"""How batches are drawn, and the relation under which that amplifies."""

UNITS = ("record", "owner")
"""What a step draws and ε protects: a record, or an owner with all records."""


def protected(unit: str, count: int) -> str:
    """Whom a run protects, in words.

    >>> protected("record", 1437)
    'each of the 1,437 training records, input and label'
    """
    owners = "owners of training records, with all their" if unit == "owner" else "training"
    return f"each of the {count:,} {owners} records, input and label"


def in_bands(bands: int, most: int | None = None) -> str:
    """What σ, q and T lack where noise is correlated, or batches are cut: read alone they would give another ε."""
    return ("" if bands == 1 else f" in {bands} bands") + ("" if most is None else f", at most {most:,} a batch")


def truncation(dataset_size: int, sampling_rate: float, truncated_batch_size: int) -> float:
    """P(Bin(N, q) ≥ C): how likely as many are drawn as take part at most.

    scipy's tail is good to 1e-9, for which it is rounded up.

    >>> truncation(1000, 0.1, 150) < 1e-6
    True
    """
    return min(
        1.0, float(betainc(truncated_batch_size, dataset_size - truncated_batch_size + 1, sampling_rate)) * (1 + 1e-6)
    )


@dataclass(frozen=True)
class Subsampling:
    """How the random batches of a run are drawn.

    Attributes:
        sampling_rate: q in (0, 1], the probability of a unit to be in a batch.
        steps: T ≥ 1.
        sampling: "poisson" or "fixed_size".
        bands: b, over how many steps noise is correlated and batches take turns; 1: neither.
        truncation: the probability that a batch is cut; see `Event`.

    Raises:
        ParameterError, UnknownNameError: a value outside its range, b q > 1, or bands with batches of a fixed size.

    >>> Subsampling.of(1000, 100, epochs=3)
    Subsampling(sampling_rate=0.1, steps=30, sampling='poisson', bands=1, truncation=0.0)
    """

    sampling_rate: float
    steps: int
    sampling: str = "poisson"
    bands: int = 1
    truncation: float = 0.0

    def __post_init__(self) -> None:
        if self.sampling not in tuple(SAMPLINGS):
            raise UnknownNameError("sampling", self.sampling, SAMPLINGS)
        Event(1.0, self.sampling_rate, whole("steps", self.steps))  # refuses a q out of range
        if whole("bands", self.bands) * self.sampling_rate > 1 + 1e-9:
            most = int(1 / self.sampling_rate)
            raise ParameterError(
                f"bands={self.bands} at q = {self.sampling_rate:.4g}: each step draws from one of b groups, at the rate"
                f" b q, and that is more than 1. Take at most {most} bands, or smaller batches"
            )
        self.event(1.0)  # refuses bands and truncation with batches of a fixed size

    @classmethod
    def at(
        cls, sampling_rate: float, *, steps: int | None = None, epochs: float | None = None, sampling: str = "poisson",
        bands: int = 1,
    ) -> Subsampling:  # fmt: skip
        """At a rate q, for T steps or for a number of passes over the data: T = epochs / q, rounded.

        Raises:
            ParameterError: both or none of them; and as above.
        """
        if (steps is None) == (epochs is None):
            given = "neither steps= nor epochs= was given" if steps is None else f"steps={steps} and epochs={epochs}"
            raise ParameterError(f"{given}: give one of them, the other follows")
        if epochs is not None:
            require_positive("epochs", epochs)
            steps = max(1, round(epochs / cls(sampling_rate, 1, sampling).sampling_rate))
        return cls(sampling_rate, whole("steps", steps), sampling, bands)

    @classmethod
    def of(
        cls, units: int, expected_batch_size: int, *, steps: int | None = None, epochs: float | None = None,
        sampling: str = "poisson", bands: int = 1, truncated_batch_size: int | None = None,
    ) -> Subsampling:  # fmt: skip
        """B of N units: q = B/N. The rest as `at`.

        Args:
            truncated_batch_size: C ≥ B, the most that take part of those drawn; None: all.

        Raises:
            ParameterError: B outside 1 … N, or C outside B … N; and as above.
        """
        batch, units = whole("expected_batch_size", expected_batch_size), whole("dataset_size", units)
        if batch > units:
            raise ParameterError(f"expected_batch_size={batch}: a whole number in 1 … N = {units} is needed")
        drawn = cls.at(batch / units, steps=steps, epochs=epochs, sampling=sampling, bands=bands)
        if truncated_batch_size is None:
            return drawn
        most = whole("truncated_batch_size", truncated_batch_size)
        if sampling != "poisson" or bands > 1:
            raise ParameterError(
                "truncated_batch_size is proven for sampling='poisson' and bands=1 alone; leave it out"
            )
        if not batch <= most <= units:
            raise ParameterError(
                f"truncated_batch_size={most}: a whole number from B = {batch} to N = {units} is needed; about"
                f" {min(units, math.ceil(batch + 5 * math.sqrt(batch)))} cuts a batch in a million"
            )
        return drawn.truncated(units, most)

    def truncated(self, units: int, most: int | None) -> Subsampling:
        """The same of N units, with at most C in a batch; None: with all that are drawn."""
        return self if most is None else replace(self, truncation=truncation(units, self.sampling_rate, most))

    @property
    def relation(self) -> Relation:
        """Between which data sets ε holds."""
        return SAMPLINGS[self.sampling]

    def event(self, noise_multiplier: float) -> Event:
        """All T steps, as accountants take them."""
        rate = min(1.0, self.bands * self.sampling_rate)
        return Event(noise_multiplier, rate, self.steps, self.relation, self.bands, self.truncation)

    def noise_multiplier(
        self, *, epsilon: float, delta: float, accountant: str = "prv", beside: Sequence[Event] = ()
    ) -> float:
        """The least σ with ε(σ) ≤ `epsilon` at δ, with the events `beside` the steps; see `calibrate`."""
        event = self.event(1.0)
        return calibrate(
            target_epsilon=epsilon,
            sampling_rate=event.sampling_rate,
            steps=event.compositions,
            delta=delta,
            accountant=accountant,
            relation=self.relation,
            extra_events=beside,
            truncation=self.truncation,
        )

    def mu(self, noise_multiplier: float) -> float:
        """About the μ of the Gaussian mechanism that all steps together are like; √T/σ exactly for q = 1.

        Source: Bu et al. (2020), the central limit: `q √(T (e^{1/σ²} − 1))`.
        """
        event = self.event(noise_multiplier)
        if event.sampling_rate == 1:
            return math.sqrt(event.compositions) / noise_multiplier
        return event.sampling_rate * math.sqrt(event.compositions * math.expm1(min(noise_multiplier**-2, 500.0)))


@dataclass(frozen=True)
class Measurement:
    """A sum over all records that is released once, beside the steps, with Gaussian noise.

    Attributes:
        name: what is measured.
        noise_multiplier: its σ > 0, relative to the sensitivity of the sum under the plan's relation.

    >>> Measurement("histogram", 20.0).event(Relation.ADD_OR_REMOVE_ONE).steps
    1
    """

    name: str
    noise_multiplier: float

    def event(self, relation: Relation) -> Event:
        """As accountants take it: one step that every record takes part in."""
        return Event(self.noise_multiplier, 1.0, 1, relation)


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """The public constants of one run that its ε depends on, decided once and frozen.

    Computed once, by `PrivacyPlan.of`; the engine executes it, and whoever shows, saves or accounts the run reads it
    there. It is saved with every checkpoint and compared at every resume.

    Attributes:
        dataset_size: N, the number of units, a public constant.
        expected_batch_size: B = q N, the divisor of the noisy sum.
        steps: T, the most steps the run may take.
        noise_multiplier: the σ of everything one step releases.
        measurements: what is released once beside the steps, of all units; part of the same ε.
        sampling: "poisson" or "fixed_size", which decides the relation.
        bands: b, over how many steps noise is correlated and batches take turns; 1: neither.
        truncated_batch_size: C, the most records of a batch, which is filled up to C rows; None: all that are drawn.
        unit: what one step draws and ε protects: a "record", or an "owner" with all records.
        accountant: whose ε is reported: "prv", "pld" or "rdp".
        target_epsilon, target_delta: what was asked for, if it was.
        allocation: how the noise is shared among the parameters.
        gate: the gate at the logits, as text.
        seeded: the draws can be repeated by whoever knows the seed, so the run is NOT private.
        secure: batches and noise come from a cipher (`SecureGaussianNoise`).

    Raises:
        ParameterError, UnknownNameError: a value outside its range.

    >>> plan = PrivacyPlan.of(
    ...     dataset_size=1000, expected_batch_size=100, steps=30, target_epsilon=2.0, target_delta=1e-5)
    >>> plan.sampling_rate, plan.relation.value, 1.9 < plan.predicted.epsilon <= 2.0
    (0.1, 'add_or_remove_one', True)
    """

    dataset_size: int
    expected_batch_size: int
    steps: int
    noise_multiplier: float
    measurements: tuple[Measurement, ...] = ()
    sampling: str = "poisson"
    bands: int = 1
    truncated_batch_size: int | None = None
    unit: str = "record"
    accountant: str = "prv"
    target_epsilon: float | None = None
    target_delta: float | None = None
    allocation: str = "per_layer"
    gate: str = ""
    seeded: bool = False
    secure: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UnknownNameError("unit", self.unit, UNITS)
        get_accountant(self.accountant)
        if len({m.name for m in self.measurements}) < len(self.measurements):
            raise ParameterError("two measurements have one name; give each a name of its own")
        if self.measurements and self.bands > 1:
            raise ParameterError(f"bands={self.bands} beside measurements is not proven: take bands=1")
        if self.truncated_batch_size is not None and self.unit != "record":
            raise ParameterError("truncated_batch_size: batches of owners have no fixed number of rows; leave it out")
        event = self.subsampling.event(self.noise_multiplier)
        plain = {"dataset_size": int(self.dataset_size), "expected_batch_size": int(self.expected_batch_size)}
        for measurement in self.measurements:
            measurement.event(event.relation)  # refuses a σ out of range
        for name, value in {**plain, "steps": event.steps, "noise_multiplier": event.noise_multiplier}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        *,
        dataset_size: int,
        expected_batch_size: int,
        steps: int | None = None,
        epochs: float | None = None,
        sampling: str = "poisson",
        bands: int = 1,
        truncated_batch_size: int | None = None,
        unit: str = "record",
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        accountant: str = "prv",
        shares: Mapping[str, float] | None = None,
    ) -> Self:
        """Decide T from the number of passes over the data, and σ from the target, where they are not given.

        Args:
            shares: measurements by name, and the share of the budget of each, as a share of μ²: Gaussian mechanisms
                compose as μ² = Σ μ_i². The steps have the rest.

        Raises:
            CalibrationError: no σ reaches the target.
            ParameterError: neither σ nor a target with its δ, both or none of steps and epochs, a value out of range.
        """
        drawn = Subsampling.of(
            dataset_size,
            expected_batch_size,
            steps=steps,
            epochs=epochs,
            sampling=sampling,
            bands=bands,
            truncated_batch_size=truncated_batch_size,
        )
        shares = shares or {}
        measurements: tuple[Measurement, ...] = ()
        left, given = 1 - _all_of(shares), noise_multiplier
        if target_epsilon is not None and target_delta is not None:
            if shares:
                measurements = _measured(shares, gaussian_mu(target_epsilon, target_delta))
            beside = [m.event(drawn.relation) for m in measurements]
            target = {"epsilon": target_epsilon, "delta": target_delta}
            sigma = given or drawn.noise_multiplier(**target, accountant=accountant, beside=beside)
        elif given is not None:
            sigma = given
            if shares:
                measurements = _measured(shares, drawn.mu(sigma) / math.sqrt(left))
        else:
            raise ParameterError(
                "neither a noise multiplier nor a target ε with its δ was given; give noise_multiplier, or both"
                " target_epsilon and target_delta"
            )
        return cls(
            dataset_size=dataset_size,
            expected_batch_size=expected_batch_size,
            steps=drawn.steps,
            noise_multiplier=sigma,
            measurements=measurements,
            sampling=sampling,
            bands=bands,
            truncated_batch_size=truncated_batch_size,
            unit=unit,
            accountant=accountant,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
        )

    @property
    def samples(self) -> int:
        """The cost B·T: units drawn in all steps, in expectation."""
        return self.expected_batch_size * self.steps

    @cached_property
    def subsampling(self) -> Subsampling:
        """How the steps draw."""
        n, batch, most = self.dataset_size, self.expected_batch_size, self.truncated_batch_size
        return Subsampling.of(
            n, batch, steps=self.steps, sampling=self.sampling, bands=self.bands, truncated_batch_size=most
        )

    @property
    def sampling_rate(self) -> float:
        """q = B/N."""
        return self.subsampling.sampling_rate

    @property
    def relation(self) -> Relation:
        """Between which data sets ε holds."""
        return self.subsampling.relation

    @property
    def event(self) -> Event:
        """The account of all T steps."""
        return self.subsampling.event(self.noise_multiplier)

    @property
    def events(self) -> list[Event]:
        """The account of the whole run: the measurements, which come first, and the steps."""
        return [*(m.event(self.relation) for m in self.measurements), self.event]

    @cached_property
    def step_event(self) -> Event:
        """The account of one step."""
        return self.event.with_steps(1)

    @cached_property
    def predicted(self) -> Spent:
        """ε of the whole run at the target's δ.

        Raises:
            ParameterError: no δ was given.
        """
        if self.target_delta is None:
            raise ParameterError("this plan has no δ: give target_delta, at which ε is to be predicted")
        return get_accountant(self.accountant).epsilon(self.events, self.target_delta)

    def __str__(self) -> str:
        """The table: what was decided, and why."""
        return aligned([HEADER, *plan_rows(self)])

    @property
    def summary(self) -> str:
        """In one line, for people."""
        unit = self.unit
        return (
            f"T = {self.steps} steps, B = {self.expected_batch_size} of N = {self.dataset_size:,} {unit}s,"
            f" q = {self.sampling_rate:.4g}"
            f"{in_bands(self.bands, self.truncated_batch_size)},"
            f" σ = {self.noise_multiplier:.4g} ({self.relation.words} {unit})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints; those that follow too."""
        measured = [asdict(m) for m in self.measurements]
        return {
            **asdict(self),
            "measurements": measured,
            "sampling_rate": self.sampling_rate,
            "relation": self.relation.value,
        }

    def check_same(self, saved: Any) -> None:
        """Refuse a resume under another plan.

        Raises:
            ResumeError: names every value that differs.
        """
        if not isinstance(saved, Mapping):
            raise ResumeError(
                "the run to resume states no privacy plan: its files were edited, or another program wrote them"
            )
        now = self.as_dict()
        different = [n for n, value in now.items() if saved.get(n) != value]
        if different or set(saved) - set(now):
            listed = "; ".join(f"{n} was {saved.get(n)!r}, is now {now[n]!r}" for n in different)
            raise ResumeError(
                f"the run to resume has another privacy plan ({listed or 'unknown fields'}); ε would be wrong. Resume"
                " with the same settings, or start a new run"
            )


def _measured(shares: Mapping[str, float], mu: float) -> tuple[Measurement, ...]:
    """Each with its share of μ²."""
    return tuple(Measurement(name, 1 / (mu * math.sqrt(share))) for name, share in shares.items())


def _all_of(shares: Mapping[str, float]) -> float:
    """What all shares take together; ParameterError where they leave nothing."""
    total = sum(shares.values())
    if not all(share > 0 for share in shares.values()) or not total < 1:
        raise ParameterError(f"shares={dict(shares)}: numbers > 0 with a sum below 1 are needed")
    return total


def whole(name: str, value: Any) -> int:
    """The number itself, or ParameterError where it is not a whole one of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ParameterError(f"{name}={value!r}: a whole number of at least 1 is needed")
    return int(value)


def default_delta(records: int) -> float:
    """1e-5, or the largest power of ten below 1/N where that is smaller.

    >>> default_delta(60_000), default_delta(600_000)
    (1e-05, 1e-06)
    """
    return min(1e-5, 10.0 ** -len(str(records)))
