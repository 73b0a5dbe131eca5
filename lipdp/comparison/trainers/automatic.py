"""Automatic clipping: normalise instead of clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from opacus.optimizers import DPOptimizer

from lipdp.comparison.clipping import StrategyOptimizer
from lipdp.comparison.factors import Automatic
from lipdp.comparison.trainers.opacus import OpacusTrainer


@dataclass(frozen=True)
class AutomaticClipping(OpacusTrainer):
    """C g/(‖g‖ + γ) on Opacus' per-sample gradients. C only scales the learning rate.

    Source: Bu, Wang, Zha & Karypis (2022).
    """

    stability: float = 0.01

    name: ClassVar[str] = "automatic"
    words: ClassVar[str] = "divides every gradient by its norm, no threshold to choose"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.1, 0.3, 1.0, 3.0)}

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        clipping = Automatic(self.max_grad_norm, self.stability)
        return StrategyOptimizer(optimizer, clipping=clipping, max_grad_norm=self.max_grad_norm, **options)
