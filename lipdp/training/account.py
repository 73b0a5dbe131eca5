"""The ε of a run, as planned and at every step, and what `privacy.json` says of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from lipdp.accounting.calibration import EpsilonCurve
from lipdp.accounting.digest import with_digest
from lipdp.accounting.plan import protected
from lipdp.training.assembly import Assembly, decided, stated_features
from lipdp.training.config import TrainConfig
from lipdp.training.progress import Progress

_log = logging.getLogger(__name__)
NOT_COVERED = "training loss; choices made by looking at private data; metrics on a private test set"


class Account:
    """The ε of a run.

    Attributes:
        planned: ε after all steps, and the accountant that says so.
    """

    def __init__(self, config: TrainConfig, parts: Assembly, progress: Progress) -> None:
        self._engine, self._progress, self._features = parts.engine, progress, stated_features(config)
        self._steps, self._delta = parts.engine.plan.steps, decided(parts.engine.plan.target_delta)
        self.planned, self._curve = parts.planned, parts.curve
        self._epsilons = {self._steps: self.planned.epsilon}

    @property
    def again(self) -> int:
        """Steps that were released, lost with their checkpoint and taken again; each counts twice."""
        return self._engine.steps_taken - self._progress.step

    def epsilon_at(self, step: int) -> float:
        """An upper bound on ε after the measurements and `step` steps; at the end, what `engine.get_epsilon` says."""
        if step not in self._epsilons:
            self._epsilons[step] = self._curve(len(self._engine.plan.measurements) + step + self.again)
        return self._epsilons[step]

    def plan_again(self) -> None:
        """Once a checkpoint was restored: ε of the steps taken again and of all of the run."""
        if not self.again:
            return
        plan = replace(self._engine.plan, steps=self._steps + self.again)
        self.planned = plan.predicted
        self._curve = EpsilonCurve(plan.events, self._delta, plan.accountant)
        self._epsilons = {self._steps: self.planned.epsilon}
        _log.warning(
            "%d steps were released and lost with their checkpoint: they are counted again, and ε after all steps is"
            " %.4g",
            self.again,
            self.planned.epsilon,
        )

    def statement(self) -> dict[str, Any]:
        """What `privacy.json` holds: the plan, and the ε spent so far."""
        plan = self._engine.plan
        report = {
            "epsilon": self.epsilon_at(self._progress.step),
            "delta": self._delta,
            **plan.as_dict(),
            "steps": self._engine.steps_taken,
            "steps_counted_again": self.again,
            "planned_steps": self._steps,
            "planned_epsilon": self.planned.epsilon,
            "accountant": self.planned.accountant,
            "accountant_requested": self.planned.requested,
            "accountant_note": self.planned.note,
            "sensitivity": dict(self._engine.sensitivity()),
            "noise_stds": self._progress.noise_stds(self._engine),
            "features": self._features,
            "protects": protected(plan.unit, plan.dataset_size),
            "not_covered": NOT_COVERED,
        }
        return with_digest(report)
