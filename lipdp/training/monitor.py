"""What a run tells while it goes, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lipdp.training.checkpoint import RunFolder

if TYPE_CHECKING:
    from lipdp.data import DataSplit
    from lipdp.training import TrainConfig, Trainer


class Interrupted(KeyboardInterrupt):
    """The run was stopped by SIGINT or SIGTERM, after a checkpoint; `Trainer.resume` goes on."""


@dataclass(frozen=True)
class Result:
    """What came out of a run: its last metrics, the ε spent, and where its files are."""

    metrics: dict[str, Any]
    epsilon: float
    delta: float
    steps: int
    folder: RunFolder | None


class Monitor:
    """Is told how a run goes, and says nothing. The command's own monitors draw tables and bars."""

    def opened(self, config: TrainConfig, split: DataSplit) -> None:
        """The data are open; features, if there are any, are not computed yet."""

    def features(self, done: int, total: int) -> None:
        """`done` of `total` records have their features."""

    def begin(self, trainer: Trainer) -> None:
        """Before the first step: everything is decided, nothing released."""

    def step(self, step: int, loss: float, epsilon: float) -> None:
        """After a step. `loss` is not private; `epsilon` bounds what is spent until the next record."""

    def record(self, record: dict[str, Any]) -> None:
        """A line was added to the metrics."""
