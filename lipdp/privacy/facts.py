"""What ε depends on, frozen: saved with every checkpoint and report, compared at every resume."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from lipdp.errors import ResumeError
from lipdp.privacy.events import Event
from lipdp.relation import Relation


@dataclass(frozen=True)
class PrivacyFacts:
    """The public constants of one run.

    Attributes:
        noise_multiplier: the joint σ of everything one step releases.
        sampling_rate: q.
        steps: T, the most steps the run may take.
        expected_batch_size: B = q N, the divisor of the noisy sum.
        dataset_size: N, a public constant.
        relation: the neighbouring relation ("add_or_remove_one", "replace_one").
        sampling: "poisson" or "fixed_size".
        allocation: how the noise is shared among the parameters.
        gate: the gate at the logits, as text.
        accountant: whose ε is reported.
        target_epsilon, target_delta: what was asked for, if it was.
        seeded: the draws can be repeated by whoever knows the seed, so the run is NOT private.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    expected_batch_size: int
    dataset_size: int
    relation: str
    sampling: str
    allocation: str
    gate: str
    accountant: str
    target_epsilon: float | None
    target_delta: float | None
    seeded: bool

    @property
    def step_event(self) -> Event:
        """The account of one step."""
        return Event(self.noise_multiplier, self.sampling_rate, 1, Relation(self.relation))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)

    def check_same(self, saved: dict[str, Any]) -> None:
        """Refuse a resume under other facts.

        Raises:
            ResumeError: names every fact that differs.
        """
        names = [f.name for f in fields(self)]
        different = [n for n in names if saved.get(n) != getattr(self, n)]
        if different or set(saved) - set(names):
            listed = "; ".join(f"{n} was {saved.get(n)!r}, is now {getattr(self, n)!r}" for n in different)
            raise ResumeError(
                f"the run to resume has other privacy facts ({listed or 'unknown fields'}); ε would be wrong. Resume with the"
                " same settings, or start a new run"
            )
