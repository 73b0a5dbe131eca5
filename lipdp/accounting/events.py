"""What was released: homogeneous blocks of noisy steps, how noise multipliers add up, and the ledger of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any

from lipdp.accounting.relation import Relation
from lipdp.errors import ParameterError, UnknownNameError


@dataclass(frozen=True)
class Event:
    """`steps` equal steps, each one Gaussian mechanism on one random subsample.

    The maths: a step adds `N(0, s²I)` to a sum over the subsample whose terms have norm ≤ Δ, with
    `s = noise_multiplier · relation.sensitivity_factor · Δ`. The noise multiplier σ is thus always relative to how far
    neighbours move the sum:

    - `ADD_OR_REMOVE_ONE`: Poisson subsample, every record in it with probability q; `s = σ·Δ`.
    - `REPLACE_ONE`: a batch of `q·N` records without replacement; `s = σ·2Δ`.

    - `truncation` = t > 0: of a Poisson subsample at most a public number of records, picked at random, take part
      (`lipdp.batches.TruncatedPoissonSampler`); t is at least the probability that the others alone are so many.
    - `bands` = b > 1: cyclic Poisson sampling and noise correlated over b steps. A record is in
      one of b consecutive steps at most, with probability `sampling_rate` = b B/N there, and `steps` consecutive ones
      are `compositions` = ⌈steps/b⌉ of the first kind.

    With `q = 1` both are the Gaussian mechanism of `μ = 1/σ`. Under `REPLACE_ONE` dp-accounting 0.6 reads the same
    number in two ways: its RDP accountant takes `GaussianDpEvent.noise_multiplier` relative to the sensitivity (our σ),
    its PLD accountant relative to Δ (that is 2σ; given σ it would charge for a mechanism with half our noise).

    Args:
        noise_multiplier: the σ > 0 of everything that the step releases, see `joint_noise_multiplier`.
        sampling_rate: q in (0, 1].
        steps: a whole number ≥ 0; empty batches count.
        relation: a `Relation` or its value.
        bands: b ≥ 1.
        truncation: t in [0, 1], as above.

    Raises:
        ParameterError: a value outside its range; bands or truncation under another relation than the first, or both.
        UnknownNameError: no such relation.

    >>> Event(1.1, 0.01, 1000).relation.value
    'add_or_remove_one'
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    bands: int = 1
    truncation: float = 0.0

    def __post_init__(self) -> None:
        require_positive("noise_multiplier", self.noise_multiplier)
        if not isinstance(self.sampling_rate, Real) or not 0.0 < self.sampling_rate <= 1.0:
            raise ParameterError(f"sampling_rate={self.sampling_rate!r}: a probability in (0, 1] is needed")
        if not isinstance(self.steps, Integral) or isinstance(self.steps, bool) or self.steps < 0:
            raise ParameterError(f"steps={self.steps!r}: a whole number ≥ 0 is needed")
        if not isinstance(self.bands, Integral) or isinstance(self.bands, bool) or self.bands < 1:
            raise ParameterError(f"bands={self.bands!r}: a whole number ≥ 1 is needed")
        if self.bands > 1 and as_relation(self.relation) is not Relation.ADD_OR_REMOVE_ONE:
            raise ParameterError(f"bands={self.bands}: correlated noise is proven for sampling='poisson' alone")
        if not isinstance(self.truncation, Real) or not 0.0 <= self.truncation <= 1.0:
            raise ParameterError(f"truncation={self.truncation!r}: a probability is needed")
        if self.truncation and (self.bands > 1 or as_relation(self.relation) is not Relation.ADD_OR_REMOVE_ONE):
            raise ParameterError(f"truncation={self.truncation}: proven for sampling='poisson' and bands=1 alone")
        object.__setattr__(self, "truncation", float(self.truncation))
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sampling_rate", float(self.sampling_rate))
        object.__setattr__(self, "steps", int(self.steps))
        object.__setattr__(self, "relation", as_relation(self.relation))
        object.__setattr__(self, "bands", int(self.bands))

    @property
    def compositions(self) -> int:
        """How many mechanisms with fresh noise one record takes part in at most.

        >>> Event(1.0, 0.4, 9, bands=4).compositions
        3
        """
        return -(-self.steps // self.bands)

    @property
    def single(self) -> Event:
        """One of those mechanisms."""
        return replace(self, steps=1, bands=1)

    def with_steps(self, steps: int) -> Event:
        """The same step, taken `steps` times."""
        return replace(self, steps=steps)


def as_relation(relation: Relation | str) -> Relation:
    """The relation itself or the one of that value; UnknownNameError otherwise."""
    if relation not in tuple(Relation):
        raise UnknownNameError("relation", relation, [known.value for known in Relation])
    return Relation(relation)


def joint_noise_multiplier(*noise_multipliers: float) -> float:
    """The σ of several Gaussian releases made at once from one subsample: `1/σ² = Σ 1/σ_i²`.

    Release i divided by its noise std is a vector that neighbours move by `1/σ_i` and that has unit noise; all of them
    side by side are one such vector, moved by `sqrt(Σ 1/σ_i²)`. Being one mechanism on one subsample, it is amplified
    by sampling once: accounting the releases as if each had drawn its own subsample gives too small an ε.

    >>> round(joint_noise_multiplier(3.0, 4.0), 9)
    2.4

    Source: Andrew et al. (2021), theorem 1.
    """
    if not noise_multipliers:
        raise ParameterError("joint_noise_multiplier needs at least one noise multiplier")
    for sigma in noise_multipliers:
        require_positive("noise multiplier", sigma)
    return 1.0 / math.hypot(*(1.0 / sigma for sigma in noise_multipliers))


def remaining_noise_multiplier(joint: float, *others: float) -> float:
    """The σ left for one release so that, with `others`, it has the noise multiplier `joint`.

    Inverse of `joint_noise_multiplier`: `1/σ² = 1/joint² − Σ 1/σ_i²`. For adaptive quantiles, a count of `b_i − 1/2`
    with `b_i` in {0, 1} has sensitivity 1/2, so noise of std s on the count has noise multiplier 2s.

    Raises:
        ParameterError: the others alone have at most the noise multiplier `joint`, so nothing is left.

    >>> round(remaining_noise_multiplier(2.4, 4.0), 9)
    3.0

    Source: Andrew et al. (2021), theorem 1.
    """
    require_positive("joint", joint)
    if not others:
        return float(joint)
    spent = joint_noise_multiplier(*others)
    if spent <= joint:
        raise ParameterError(
            f"the other releases alone have noise multiplier {spent:.6g}, not more than the joint {joint:.6g}: "
            "give them more noise, or the whole step a larger noise multiplier"
        )
    return joint / math.sqrt((1.0 - joint / spent) * (1.0 + joint / spent))


class Ledger:
    """The steps a run has taken, in order; consecutive equal steps are kept as one event.

    Appending costs O(1), so that it can be done at every step. What a ledger begins with may be of several runs, so
    events with bands stay apart there: ⌈m/b⌉ + ⌈n/b⌉ may exceed ⌈(m + n)/b⌉.

    >>> ledger = Ledger()
    >>> for _ in range(3):
    ...     ledger.append(Event(1.0, 0.1, 1))
    >>> [(event.noise_multiplier, event.sampling_rate, event.steps) for event in ledger.events]
    [(1.0, 0.1, 3)]
    >>> Ledger.from_state(ledger.state_dict()).steps
    3
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events: list[Event] = []
        self._steps = 0
        self._unit = ""
        for event in events:
            self._append(event, merge=event.bands == 1)

    def append(self, event: Event) -> None:
        """Add an event of any number of steps, which go on with the run of the last ones.

        Raises:
            ParameterError: its relation is another than the ledger's.
        """
        self._append(event, merge=True)

    def become(self, other: Ledger) -> None:
        """Hold the events of another one instead: all who hold this ledger see them."""
        self._events, self._steps = list(other._events), other._steps

    def protect(self, unit: str) -> None:
        """Say whom the next steps protect: each "record", or each "owner" of one grouping, which a digest follows.

        Raises:
            ParameterError: the steps so far protect others: one ε needs one unit.
        """
        if self._events and self._unit not in ("", unit):
            was, now = (words.partition(" ")[0] for words in (self._unit, unit))
            other = "of another grouping " if was == now else ""
            raise ParameterError(
                f"steps that protect each {now} {other}cannot be counted with steps that protect each {was}; one ε"
                " needs one unit. Take a new engine, whose ε is a statement of its own"
            )
        self._unit = unit

    def _append(self, event: Event, *, merge: bool) -> None:
        if event.steps == 0:
            return
        if self._events and self._events[-1].relation is not event.relation:
            raise ParameterError(
                f"a step under {event.relation.value!r} cannot follow steps under {self._events[-1].relation.value!r};"
                " one ε needs one relation"
            )
        if merge and self._events and self._events[-1].with_steps(event.steps) == event:
            self._events[-1] = event.with_steps(self._events[-1].steps + event.steps)
        else:
            self._events.append(event)
        self._steps += event.steps

    @property
    def events(self) -> tuple[Event, ...]:
        """The events so far, in order."""
        return tuple(self._events)

    @property
    def steps(self) -> int:
        """How many steps they have altogether."""
        return self._steps

    @property
    def unit(self) -> str:
        """Whom the steps protect, as `protect` was told; "" where it was not."""
        return self._unit

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, fit for JSON; floats survive exactly."""
        events = [{**asdict(event), "relation": event.relation.value} for event in self._events]
        return {"events": events, "unit": self._unit}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Ledger:
        """The ledger that `state_dict` described.

        Raises:
            ParameterError: the state is not one that `state_dict` returns.
        """
        try:
            ledger = cls(Event(**fields) for fields in state["events"])
        except (KeyError, TypeError) as error:
            raise ParameterError(f"not the state of a ledger ({error}): state_dict() gives the form") from error
        ledger._unit = str(state.get("unit", ""))  # older ones say nothing
        return ledger


def require_positive(name: str, value: float) -> None:
    """ParameterError where it is no finite number > 0."""
    if not isinstance(value, Real) or not 0.0 < value < math.inf:
        raise ParameterError(f"{name}={value!r}: a finite number > 0 is needed")
