"""What was suggested for a run: frozen, printed as a table, and passed on as arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lipdp.accounting.plan import PrivacyPlan
from lipdp.accounting.plan_table import HEADER, Row, aligned, plan_rows
from lipdp.losses import LipschitzLoss
from lipdp.noise.allocation import Allocation
from lipdp.suggestion.decay import decaying
from lipdp.suggestion.joints import Joint

_TAU = "a larger τ shortens the gradients of records that are classified well"
_RATES = "rates fall linearly to 0; large where gradients are short; a signal over noise below 2 is little"
_SHARES = "fixed shares of the typical norms of public inputs; longer ones are shortened, which biases gradients"
_COST = "each record's, where its bound is loose; clips, and costs the memory of one gradient for each record"


@dataclass(frozen=True)
class BlockSetting:
    """What is chosen for a parameter, and how well it can learn.

    Attributes:
        name: of the parameter.
        learning_rate: at the first step.
        signal: the most that all steps can add up to over their noise.
    """

    name: str
    learning_rate: float
    signal: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a private run needs that its user did not choose; computed by `lipdp.suggest` from public facts.

    Attributes:
        plan: N, B, T, σ.
        criterion: the loss.
        gate: at the logits; None: none.
        allocation: of the noise over the parameters.
        joints: clips and gates between layers and at weights.
        blocks: the learning rate of every parameter.
        momentum: of SGD, whose learning rates fall linearly to 0.
        own_optimizer: whether the run has another optimiser; `blocks` and `momentum` are then not in use.

    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    >>> public = dict(input_shape=(4,), dataset_size=1000, target_epsilon=3.0, target_delta=1e-5)
    >>> settings = lipdp.suggest(model, **public)
    >>> data = torch.utils.data.TensorDataset(torch.randn(1000, 4), torch.randint(3, (1000,)))
    >>> engine = lipdp.PrivacyEngine()
    >>> _ = engine.make_private(module=model, dataset=data, **settings.arguments(model))
    >>> engine.plan.steps == settings.plan.steps
    True
    """

    plan: PrivacyPlan
    criterion: LipschitzLoss
    gate: float | None
    allocation: str | Allocation
    joints: tuple[Joint, ...]
    blocks: tuple[BlockSetting, ...]
    momentum: float
    own_optimizer: bool = False

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD over the model's trainable parameters, a group each, whose rates fall linearly to 0 at step T."""
        parameters = dict(model.named_parameters())
        groups = [{"params": [parameters[b.name]], "lr": b.learning_rate} for b in self.blocks]
        return decaying(torch.optim.SGD(groups, lr=1.0, momentum=self.momentum), steps=self.plan.steps)

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """The settings as arguments of `PrivacyEngine.make_private`, with a new optimiser over the model."""
        return {
            "optimizer": self.optimizer(model),
            "criterion": self.criterion,
            "expected_batch_size": self.plan.expected_batch_size,
            "steps": self.plan.steps,
            "noise_multiplier": self.plan.noise_multiplier,
            "sampling": self.plan.sampling,
            "dataset_size": self.plan.dataset_size,
            "target_epsilon": self.plan.target_epsilon,
            "target_delta": self.plan.target_delta,
            "gate": self.gate,
            "allocation": self.allocation,
            "joints": self.joints,
        }

    def __str__(self) -> str:
        """The table: what was chosen, and why."""
        gate = "none" if self.gate is None else f"{self.gate:.3g}"
        rows: list[Row] = [
            *plan_rows(self.plan),
            ("criterion", str(self.criterion), _TAU),
            ("gate", gate, "the longest gradient of one record at the logits; longer ones are shortened"),
            ("allocation", str(self.allocation), "of the noise over the parameters"),
            *self._optimizer_rows(),
            *((f"joint at {j.layer}", j.summary, _COST if j.weight < math.inf else _SHARES) for j in self.joints),
        ]
        return aligned([HEADER, *rows])

    def _optimizer_rows(self) -> list[Row]:
        if self.own_optimizer:
            return [("optimizer", "your own", "its learning rates are not chosen here")]
        rates = [
            (f"lr of {b.name}", f"{b.learning_rate:.3g}", f"signal over noise {b.signal:.3g}") for b in self.blocks
        ]
        return [("optimizer", f"SGD, momentum {self.momentum:g}", _RATES), *rates]
