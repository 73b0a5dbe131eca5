"""Ordinary training, without noise: the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lipdp.comparison.protocol import ComparedTrainer, Grid, Session, Task, ladder, put_back, remove_gates
from lipdp.nn import project_


@dataclass(frozen=True)
class NonPrivate(ComparedTrainer):
    """The sum of the batch's gradients over B, the optimiser's step, the projection: no noise, no ε."""

    name = "non_private"
    words = "no noise, no privacy"
    private = False
    grid: ClassVar[Grid] = {"lr": ladder(1.0, 8)}

    def start(self, model: nn.Module, task: Task) -> Session:
        return _Session(model, task)


class _Session(Session):
    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task, self.event = model, task, None
        self.gates = remove_gates(model)
        self.loader = task.loader()
        self.optimizer = task.optimizer(model.parameters())

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        count = self.task.batch_size * self.task.views
        for xb, yb in self.task.pieces(x, y):
            (self.task.loss(self.model(xb), yb).sum() / count).backward()
        self.optimizer.step()
        project_(self.model)

    def close(self) -> None:
        put_back(self.gates)
