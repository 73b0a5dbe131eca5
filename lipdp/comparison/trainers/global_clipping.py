"""Global clipping, in both published definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from opacus.optimizers import DPOptimizer

from lipdp.comparison.clipping import StrategyOptimizer
from lipdp.comparison.factors import GlobalFlat
from lipdp.comparison.trainers.opacus import OpacusTrainer


@dataclass(frozen=True)
class GlobalScaledClipping(OpacusTrainer):
    """(C/Z) 1(‖g‖ ≤ Z) g, the definition of the first version.

    Attributes:
        threshold: Z, above most gradient norms.
    """

    threshold: float = 10.0

    name: ClassVar[str] = "global_scaled"
    words: ClassVar[str] = "scales gradients below Z by C/Z, drops the others"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.3, 1.0), "threshold": (3.0, 10.0)}

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        clipping = GlobalFlat(self.max_grad_norm, self.threshold)
        return StrategyOptimizer(optimizer, clipping=clipping, max_grad_norm=self.max_grad_norm, **options)


@dataclass(frozen=True)
class GlobalClipping(OpacusTrainer):
    """1(‖g‖ ≤ C) g, the later definition: C has to lie above most gradient norms."""

    max_grad_norm: float = 5.0

    name: ClassVar[str] = "global"
    words: ClassVar[str] = "keeps gradients below C, drops the others"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.1, 0.3), "max_grad_norm": (3.0, 10.0)}

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        clipping = GlobalFlat(self.max_grad_norm)
        return StrategyOptimizer(optimizer, clipping=clipping, max_grad_norm=self.max_grad_norm, **options)
