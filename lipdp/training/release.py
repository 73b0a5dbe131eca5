"""The order in which a step leaves the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lipdp.distributed.collectives import World
from lipdp.distributed.wrappers import check_same_weights
from lipdp.errors import NonFiniteError
from lipdp.training.account import Account
from lipdp.training.assembly import Assembly
from lipdp.training.checkpoint import RunFolder
from lipdp.training.config import TrainConfig
from lipdp.training.progress import Progress
from lipdp.training.resume import saved_state


class Release:
    """Lets a step leave the process: its account, then the checkpoint, then what is computed from the weights.

    So a killed process has shown nothing of a step after its last checkpoint, and whoever takes that step again
    releases it for the first time. Whatever was shown is counted in `privacy.json`. Without a folder nothing is
    written.

    Attributes:
        saved_at: the step of the last checkpoint; None if what is on disk is not yet this run's.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Assembly,
        progress: Progress,
        account: Account,
        world: World,
        data: Mapping[str, Any],
    ) -> None:
        self._data = dict(data)
        self._config, self._parts, self._progress = config, parts, progress
        self._account, self._world = account, world
        self.saved_at: int | None = None

    def save(self, folder: RunFolder | None) -> None:
        """Account, checkpoint and metrics of the step that was taken."""
        self.check_weights()
        with self._world.fail_together():
            if folder is not None:
                folder.write_privacy(self._account.statement())
                folder.save({**self._weights(), "resume": saved_state(self._parts, self._progress)})
                folder.write_metrics(self._progress.records)
        self.saved_at = self._progress.step

    def restate(self, folder: RunFolder | None) -> None:
        """Put in the files beside the checkpoint what it says."""
        if folder is not None:
            folder.sweep()
            folder.write_privacy(self._account.statement())
            folder.write_metrics(self._progress.records)

    def finish(self, folder: RunFolder | None, evaluation: Mapping[str, Any] | None) -> None:
        """Details of the last metrics, if there are any, and the last checkpoint, without the keys."""
        with self._world.fail_together():
            if folder is not None:
                if evaluation is not None:
                    folder.write_evaluation(evaluation)
                folder.save(self._weights())
                folder.drop_keys()

    def check_weights(self) -> None:
        """Refuse NaN, infinity, and weights that differ between the processes."""
        self._parts.engine.settle()
        bad = [n for n, p in self._parts.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            kept = f"; the last good checkpoint is of step {self.saved_at}" if self.saved_at is not None else ""
            raise NonFiniteError(
                f"step {self._progress.step}: NaN or infinity in {', '.join(bad)}; lower the learning rate{kept}"
            )
        check_same_weights(self._world, self._parts.model)

    def _weights(self) -> dict[str, Any]:
        weights = self._parts.model.state_dict()
        return {
            "model": weights,
            "ema": {**weights, **self._parts.ema.weights()},
            "step": self._progress.step,
            "config": self._config.as_dict(),
            "plan": self._parts.engine.plan.as_dict(),
            "data": self._data,
        }
