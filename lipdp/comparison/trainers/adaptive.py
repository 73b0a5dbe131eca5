"""Flat clipping at a norm that follows a quantile of the gradient norms, estimated privately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from opacus.optimizers import DPOptimizer

from lipdp.comparison.clipping import AdaptiveOptimizer
from lipdp.comparison.trainers.opacus import OpacusTrainer


@dataclass(frozen=True)
class AdaptiveClipping(OpacusTrainer):
    """Opacus' adaptive clipping, repaired; the joint σ covers the gradient and the count.

    Attributes:
        max_grad_norm: C at the first step.
        quantile: γ, the share of samples that should pass unclipped.
        learning_rate: η of C.

    The count gets noise of std max(B/20, 2.5 σ) records: it then takes at most 4 % of the budget 1/σ².

    Source: Andrew, Thakkar, McMahan & Ramaswamy (2021).
    """

    quantile: float = 0.5
    learning_rate: float = 0.2

    name: ClassVar[str] = "adaptive"
    words: ClassVar[str] = "clips at a threshold that follows a quantile of the norms, privately"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.3, 1.0), "quantile": (0.5, 0.8)}

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        count_std = max(options["expected_batch_size"] / 20, 2.5 * options["noise_multiplier"])
        return AdaptiveOptimizer(
            optimizer,
            max_grad_norm=self.max_grad_norm,
            target_unclipped_quantile=self.quantile,
            clipbound_learning_rate=self.learning_rate,
            max_clipbound=1e6,
            min_clipbound=1e-6,
            unclipped_num_std=count_std,
            **options,
        )
