"""How far a private run is: the steps in its account beside the batches that were drawn."""

from __future__ import annotations

from typing import Any

import torch

from lipdp.accounting.events import Event, Ledger
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.loader import BatchLoader
from lipdp.errors import EngineError, ResumeError

STEPS_TAKEN = "lipdp_steps"  # in the optimiser's first parameter group, when its state is saved


class StepCount:
    """Keeps account, batches and budget of one run in step: a step for each batch, and none beyond the plan.

    Attributes:
        ledger: the engine's, which may begin with earlier runs.
        before: how many of its steps are no steps of this run, but measurements or steps of earlier runs. They count
            for ε, not for the steps that the plan allows.
    """

    def __init__(self, plan: PrivacyPlan, ledger: Ledger, loader: BatchLoader) -> None:
        self._plan, self.ledger, self._loader = plan, ledger, loader
        self.before = ledger.steps
        self._loaded = 0  # steps that came with a loaded state; all others this engine has released itself
        self._taken_at = loader.position  # batches drawn up to the last step

    @property
    def step(self) -> int:
        """Steps of this run."""
        return self.ledger.steps - self.before

    @property
    def left(self) -> int:
        """Steps that the budget has left."""
        return self._plan.steps - self.step

    @property
    def unused(self) -> int:
        """Batches drawn since the last step."""
        return self._loader.position - self._taken_at

    def add(self, steps: int = 1) -> None:
        """Account for steps: before their noise is drawn, so that none is under-counted."""
        for _ in range(steps):
            self.ledger.append(self._plan.step_event)

    def add_step(self) -> None:
        """Account for this step; for the first one, also for batches that were only looked at before it.

        Else a script could draw batches until one suits, and step on that.
        """
        self.add(1 if self.step else self._loader.position - self._taken_at)

    def add_measurement(self, event: Event) -> None:
        """Account for a release beside the steps."""
        self.ledger.append(event)
        self.before += 1

    def use_batch(self) -> None:
        """The batches drawn so far have had their step."""
        self._taken_at = self._loader.position

    def skip(self) -> int:
        """Each batch drawn since the last step counts as a step; how many those were."""
        skipped = min(self._loader.position - self._taken_at, self.left)
        self.add(skipped)
        self.use_batch()
        return skipped

    def check_order(self) -> None:
        """One step per drawn batch."""
        if self.left <= 0:
            raise EngineError(f"all {self._plan.steps} steps of the budget are taken; a further one would exceed ε")
        batches = self._loader.position - self._taken_at
        if batches < 1:
            raise EngineError(
                "step() without a new batch from the loader: every noisy step needs its own random subsample. Take one"
                " step per batch; for parts of a batch use engine.microbatches"
            )
        if batches > 1 and self.step > 0:  # before the first step a look at a batch is common: it counts as a step
            raise EngineError(
                f"{batches} batches were drawn since the last step: their gradients may have been added up, or one was"
                " skipped, which tells that it was empty. Take one step per batch, also when it is empty. Do not use"
                " accumulate_grad_batches, gradient_accumulation_steps or the like; engine.microbatches cuts a batch"
                " into parts. After an interrupted loop call engine.skip_batch(), which counts unused batches as steps"
            )

    def stamp(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's state says how many noisy steps it has behind it, for `check_account` after a resume."""
        optimizer.param_groups[0][STEPS_TAKEN] = self.ledger.steps

    def check_account(self, optimizer: torch.optim.Optimizer) -> None:
        """A restored optimiser comes with the account of the steps that it took."""
        taken = optimizer.param_groups[0].get(STEPS_TAKEN, 0)
        if taken > self.ledger.steps:
            raise EngineError(
                f"the optimiser was restored after {taken} private steps but the account has {self.ledger.steps}: ε"
                " would not count the others. Restore the engine with it: engine.load_state_dict (Lightning: the"
                " callback lipdp.integrations.PrivacyBudget; Accelerate:"
                " accelerator.register_for_checkpointing(engine); Fabric: engine among the objects of save and load)"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.state_dict(), "before": self.before, "unused": self.unused}

    def check_state(self, ledger: Ledger, before: int, *, same_noise: bool) -> None:
        """Refuse a saved account that lacks steps which were released, or whose steps protect others."""
        if ledger.unit not in ("", self.ledger.unit):
            raise ResumeError(
                "the steps of the saved account protect other units: group= must be as it was, for one ε is of one unit"
            )
        if ledger.steps < self.ledger.steps:
            raise ResumeError(
                f"the account has {self.ledger.steps} private steps and the state only {ledger.steps}: ε would not"
                " count the others, and their noise would be drawn again. To go back to older weights, load the"
                " weights alone; later steps stay counted"
            )
        same = ledger.steps == self.ledger.steps and same_noise
        if (self.ledger.steps > self._loaded and not same) or before < self.before:
            raise ResumeError(
                f"the engine has released {self.ledger.steps} steps that the saved account does not hold: ε would not"
                " count them. Load a checkpoint before the first step, into a new engine"
            )

    def go_on_from(self, ledger: Ledger, before: int, unused: int) -> None:
        """Take over a saved account, whose loader is where it was already; batches left unused count as steps."""
        self.ledger.become(ledger)
        self.before = before
        self.use_batch()
        self.add(min(unused, self.left))
        self._loaded = self.ledger.steps
