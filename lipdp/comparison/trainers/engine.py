"""lipdp's own engine: on models with certified norms, and behind the clips of backpropagation clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lipdp.comparison.backprop_clipping import with_backprop_clipping
from lipdp.comparison.protocol import ComparedTrainer, Grid, Session, Task, ladder
from lipdp.privacy.engine import PrivacyEngine


@dataclass(frozen=True)
class Clipless(ComparedTrainer):
    """`lipdp.PrivacyEngine` as it is; `gate` None for the loss's constant."""

    gate: float | None = None
    allocation: str = "per_layer"

    name = "clipless"
    words = "lipdp as it is, bounded layers and no clipping"
    plain = False
    grid: ClassVar[Grid] = {"lr": ladder(0.1, 8), "gate": ladder(0.1)}

    @property
    def gain(self) -> float:
        return 1.0 if self.gate is None else min(1.0, self.gate)

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
            views=task.views,
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        for xb, yb in self.engine.microbatches(x, y, self.task.microbatch or max(len(x), 1)):
            self.criterion(self.model(xb), yb).backward()
        self.optimizer.step()

    def close(self) -> None:
        self.engine.detach()


@dataclass(frozen=True)
class BackpropClipping(ComparedTrainer):
    """`with_backprop_clipping` and `lipdp.PrivacyEngine`: no per-sample gradients, no constraint.

    Source: Stevens et al. (2022), with the account corrected: one joint subsample for all layers.
    """

    input_bound: float = 3.0
    cotangent_bound: float = 0.1
    allocation: str = "per_layer"

    name = "backprop_clipping"
    words = "clips inputs and gradients inside backpropagation, on an unconstrained model"
    lipschitz = False
    grid: ClassVar[Grid] = {"lr": ladder(0.1, 8), "cotangent_bound": ladder(0.1)}

    @property
    def gain(self) -> float:
        return min(1.0, self.cotangent_bound)

    def start(self, model: nn.Module, task: Task) -> Session:
        clipped = with_backprop_clipping(model, self.input_bound, self.cotangent_bound)
        return EngineSession(clipped, task, gate=None, allocation=self.allocation)
