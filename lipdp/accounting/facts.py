"""What ε depends on, frozen: saved with every checkpoint and report, compared at every resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lipdp.accounting.events import Event
from lipdp.accounting.relation import Relation
from lipdp.errors import ResumeError


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
        secure: batches and noise come from a cipher (`SecureGaussianNoise`).
        unit: what one step draws and ε protects: a "record", or an "owner" with all records.
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
    secure: bool = False
    unit: str = "record"

    @property
    def step_event(self) -> Event:
        """The account of one step."""
        return Event(self.noise_multiplier, self.sampling_rate, 1, Relation(self.relation))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)

    def check_same(self, saved: Any) -> None:
        """Refuse a resume under other facts.

        Raises:
            ResumeError: names every fact that differs.
        """
        if not isinstance(saved, Mapping):
            raise ResumeError(
                "the run to resume states no privacy facts; its files were edited, or are of another program"
            )
        names = [f.name for f in fields(self)]
        saved = {"unit": "record", **saved}  # what runs of version 0.1 drew
        different = [n for n in names if saved.get(n) != getattr(self, n)]
        if different or set(saved) - set(names):
            listed = "; ".join(f"{n} was {saved.get(n)!r}, is now {getattr(self, n)!r}" for n in different)
            raise ResumeError(
                f"the run to resume has other privacy facts ({listed or 'unknown fields'}); ε would be wrong. Resume with the"
                " same settings, or start a new run"
            )


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values as canonical JSON: sorted keys, no spaces; an entry `digest` is left out.

    It shows edits, not forgeries: whoever edits can compute it again.

    >>> digest({"b": 1.5, "a": None}) == digest({"a": None, "b": 1.5}) != digest({"a": None, "b": 1.25})
    True
    """
    plain = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and, as `digest`, their digest.

    >>> with_digest({"a": 1})["digest"][:8]
    '015abd7f'
    """
    return {**values, "digest": digest(values)}


def check_digest(values: Mapping[str, Any], what: str) -> None:
    """Refuse values that are not what `with_digest` was given.

    Raises:
        ResumeError: they were edited since.
    """
    if values.get("digest") != digest(values):
        raise ResumeError(
            f"{what} is not what was written (its digest differs): facts, account or keys were changed since, so that ε or the"
            " noise would be wrong. Go on from untouched files, or start a new run"
        )
