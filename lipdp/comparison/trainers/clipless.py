"""lipdp's own engine: bounds instead of clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lipdp.comparison.protocol import Session, Task, Trainer
from lipdp.privacy.engine import PrivacyEngine


@dataclass(frozen=True)
class Clipless(Trainer):
    """`lipdp.PrivacyEngine` as it is.

    Attributes:
        gate: cotangent gate at the logits, None for the loss's constant.
        allocation: of the noise.
    """

    gate: float | None = None
    allocation: str = "per_layer"

    name: ClassVar[str] = "clipless"
    words: ClassVar[str] = "lipdp as it is, bounded layers and no clipping"
    plain: ClassVar[bool] = False
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.3, 1.0), "gate": (0.1, 0.3)}

    def start(self, model: nn.Module, task: Task) -> Session:
        return EngineSession(model, task, gate=self.gate, allocation=self.allocation)


class EngineSession(Session):
    """A model under `PrivacyEngine`."""

    def __init__(self, model: nn.Module, task: Task, *, gate: float | None, allocation: str) -> None:
        self.engine = PrivacyEngine(task.plan.accountant, seed=task.seed)
        self.task, self.event = task, task.plan.step_event
        self.model, self.optimizer, self.loader, self.criterion = self.engine.make_private_with_plan(
            task.plan,
            module=model,
            optimizer=task.optimizer(model.parameters()),
            criterion=task.loss,
            dataset=task.dataset,
            gate=gate,
            allocation=allocation,
            multiplicity=task.views,
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        for xb, yb in self.task.pieces(x, y):
            self.criterion(self.model(xb), yb).backward()
        self.optimizer.step()

    def close(self) -> None:
        self.engine.detach()
