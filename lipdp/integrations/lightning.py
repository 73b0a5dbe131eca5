"""A callback for Lightning's `Trainer`: ε in the log, an end within the budget, the account in checkpoints."""

from __future__ import annotations

from typing import Any

from lipdp.accounting.events import Ledger
from lipdp.distributed.wrappers import own_reduction
from lipdp.errors import EngineError, OptimizerError, ParameterError
from lipdp.integrations.budget import steps_within
from lipdp.privacy.engine import PrivacyEngine

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ParameterError(f'PrivacyBudget needs Lightning ({error}): pip install "lipdp[lightning]"') from error


class PrivacyBudget(Callback):
    r"""Logs ε, ends `fit` before a step that would exceed the budget, and saves and restores the account.

    Training needs none of this: the noise is in the optimiser and the account in the engine. What the callback adds:

    - **log**: "epsilon" every `log_every` steps and at the end of `fit`, by `LightningModule.log`: for the progress
      bar, loggers, `ModelCheckpoint(monitor="epsilon")`;
    - **budget**: n is the largest number of steps for which ε_n(δ) ≤ ε, found once
      when `fit` starts. After step n `trainer.should_stop` is set; where Lightning goes on all the same (`min_steps`,
      `min_epochs`), step n + 1 is refused before its gradient is computed;
    - **checkpoints**: the engine's state is part of every checkpoint (save_weights_only excepted), and
      `fit(ckpt_path=...)` goes on with the same account, the same batches and the same noise, bit for bit. Such a
      checkpoint holds the noise to come: keep it as secret as the data, and continue it once;
    - **several processes**: the engine sums the gradients itself, once a step; what the strategy's
      `DistributedDataParallel` would do besides, its communication hooks included, is switched off.

    Guarantees: whatever stops the run, `engine.get_epsilon(delta)` at that moment is at most the budget and covers
    every step whose result was released. Without the callback the last two are the user's business, except that a
    restored optimiser without the account is refused.

    Args:
        engine: that of the optimiser which `configure_optimizers` returns. `make_private` may come before or in it.
        delta: δ of the ε that is logged.
        epsilon: the budget at δ; by default all the steps that `make_private` planned.
        log_every: steps; by default the trainer's `log_every_n_steps`.

    Raises:
        ParameterError: ε, δ or `log_every` out of range; Lightning is not installed.
        OptimizerError: at the start of `fit`, several optimisers, or one that is not the engine's.
        ResumeError, CheckpointError: at the start of `fit`, the checkpoint is of another run, or damaged.
        EngineError: Lightning goes on when the budget is spent; a checkpoint would take the engine back to an earlier
            step.

    >>> engine = lipdp.PrivacyEngine()
    >>> callback = PrivacyBudget(engine, delta=1e-5, epsilon=3.0)  # Trainer(callbacks=[callback]).fit(module)
    """

    def __init__(
        self, engine: PrivacyEngine, *, delta: float, epsilon: float = float("inf"), log_every: int | None = None
    ) -> None:
        if not 0 < delta < 1:
            raise ParameterError(f"delta={delta}: a probability in (0, 1)")
        if not epsilon > 0:
            raise ParameterError(f"epsilon={epsilon}: a budget is a positive number")
        if log_every is not None and log_every < 1:
            raise ParameterError(f"log_every={log_every}: a whole number of steps, at least 1, or None")
        self._engine, self._delta, self._epsilon, self._log_every = engine, delta, epsilon, log_every
        self._last = 0
        self._saved: dict[str, Any] | None = None

    # -- the run -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Refuse what Lightning would otherwise refuse without the reason."""
        if trainer.overfit_batches:
            raise EngineError(
                f"overfit_batches={trainer.overfit_batches} takes the same batches again; ε needs a fresh random one at"
                " every step. Leave it out (limit_train_batches shortens an epoch)"
            )

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Restore what a checkpoint brought, look at the optimiser, find the last step that the budget pays for."""
        if self._saved is not None:  # came before `configure_optimizers`, hence perhaps before make_private
            self._go_on(self._saved)
            self._saved = None
        own_reduction(trainer.model, self._engine.world)
        if len(trainer.optimizers) != 1 or not self._engine.is_private(trainer.optimizers[0]):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise OptimizerError(
                f"configure_optimizers returned {names or 'none'}; the callback needs the one optimiser that"
                " make_private returned: another one would move the same weights without noise"
            )
        self._last = self._engine.steps_taken + steps_within(self._engine, epsilon=self._epsilon, delta=self._delta)
        self._stop_at_the_end(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse a step that the budget does not pay for."""
        if self._engine.steps_taken >= self._last:
            raise EngineError(
                f"the budget ε = {self._epsilon} at δ = {self._delta} pays for {self._last} steps, and all are taken,"
                " but the trainer continues. Leave out min_steps and min_epochs, or lower them"
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and stop after the last step that the budget pays for."""
        taken = self._engine.steps_taken
        if taken % (self._log_every or trainer.log_every_n_steps or 50) == 0 or taken >= self._last:
            pl_module.log("epsilon", self._engine.get_epsilon(self._delta), prog_bar=True)
        self._stop_at_the_end(trainer)

    def _go_on(self, saved: dict[str, Any]) -> None:
        there = Ledger.from_state(saved["ledger"]).steps if "ledger" in saved else 0
        if there < self._engine.steps_taken:
            raise EngineError(
                f"the checkpoint is of step {there}, but the engine has taken {self._engine.steps_taken} steps. Going"
                " back would draw the same noise twice, and the difference of two such steps has no noise."
                " Tuner.lr_find, and fit with an older ckpt_path, go back. Begin with a new engine, and count both runs"
            )
        self._engine.load_state_dict(saved)

    def _stop_at_the_end(self, trainer: Trainer) -> None:
        if self._engine.steps_taken >= self._last:
            trainer.should_stop = True

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The engine's state, for Lightning's checkpoint; nothing before make_private."""
        if self._saved is not None:
            return {"engine": self._saved}
        return {"engine": self._engine.state_dict()} if self._engine.attached else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the optimiser exists."""
        self._saved = state_dict.get("engine")
