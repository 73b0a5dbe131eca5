"""Other ways to clip Opacus' per-sample gradients: automatic, global in both published definitions, and adaptive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer

from lipdp.comparison.factors import Automatic, Clipping, GlobalFlat
from lipdp.comparison.protocol import Grid, ladder
from lipdp.comparison.trainers.opacus import OpacusTrainer


@dataclass(frozen=True)
class AutomaticClipping(OpacusTrainer):
    """C g/(‖g‖ + γ) on Opacus' per-sample gradients. C only scales the learning rate.

    Source: Bu, Wang, Zha & Karypis (2022).
    """

    stability: float = 0.01

    name = "automatic"
    words = "divides every gradient by its norm, no threshold to choose"
    grid: ClassVar[Grid] = {"lr": ladder(0.3, 8), "stability": ladder(0.01)}

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        clipping = Automatic(self.max_grad_norm, self.stability)
        return StrategyOptimizer(optimizer, clipping=clipping, max_grad_norm=self.max_grad_norm, **options)


@dataclass(frozen=True)
class GlobalScaledClipping(OpacusTrainer):
    """(C/Z) 1(‖g‖ ≤ Z) g, the definition of the first version. C ≤ Z only scales the learning rate.

    At the learning rate times Z/C it is `GlobalClipping` at Z: the noise, of std σC, becomes σZ.

    Attributes:
        threshold: Z, above most gradient norms.
    """

    max_grad_norm: float = 0.01
    threshold: float = 10.0

    name = "global_scaled"
    words = "scales gradients below Z by C/Z, drops the others"
    grid: ClassVar[Grid] = {"lr": ladder(0.1, 8), "threshold": ladder(3.0)}

    @property
    def gain(self) -> float:
        return self.max_grad_norm / self.threshold

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        clipping = GlobalFlat(self.max_grad_norm, self.threshold)
        return StrategyOptimizer(optimizer, clipping=clipping, max_grad_norm=self.max_grad_norm, **options)


@dataclass(frozen=True)
class GlobalClipping(OpacusTrainer):
    """1(‖g‖ ≤ C) g, the later definition: C has to lie above most gradient norms."""

    max_grad_norm: float = 5.0

    name = "global"
    words = "keeps gradients below C, drops the others"
    grid: ClassVar[Grid] = {"lr": ladder(0.1, 8), "max_grad_norm": ladder(3.0)}

    @property
    def gain(self) -> float:
        return 1.0

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        clipping = GlobalFlat(self.max_grad_norm)
        return StrategyOptimizer(optimizer, clipping=clipping, max_grad_norm=self.max_grad_norm, **options)


@dataclass(frozen=True)
class AdaptiveClipping(OpacusTrainer):
    """Opacus' adaptive clipping, repaired; the σ covers the gradient and the count.

    Attributes:
        max_grad_norm: C at the first step.
        quantile: γ, the share of samples that should pass unclipped.
        learning_rate: η of C.

    The count gets noise of std max(B/20, 2.5 σ) records: it then takes at most 4 % of the budget 1/σ².

    Source: Andrew, Thakkar, McMahan & Ramaswamy (2021).
    """

    quantile: float = 0.5
    learning_rate: float = 0.2

    name = "adaptive"
    words = "clips at a threshold that follows a quantile of the norms, privately"
    grid: ClassVar[Grid] = {"lr": ladder(0.3, 8), "quantile": (0.1, 0.3, 0.5, 0.7, 0.9)}

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


class StrategyOptimizer(DPOptimizer):
    """Opacus' optimiser with the factors of a `Clipping`; noise, division and step are Opacus' own.

    The clipping's bound is to be `max_grad_norm`, to which the noise is calibrated.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, clipping: Clipping, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.clipping = clipping

    def clip_and_accumulate(self) -> None:
        """Σ_i c_{i,r} g_{i,r}, added to `summed_grad` of every parameter r."""
        samples = self.grad_samples
        norms = [torch.linalg.vector_norm(g.reshape(len(g), g[:1].numel()), dim=1) for g in samples]
        factors = self.clipping.factors(torch.stack(norms, dim=1))
        for parameter, gradients, factor in zip(self.params, samples, factors.unbind(1), strict=True):
            total = torch.einsum("i,i...->...", factor.to(gradients.dtype), gradients)
            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total


class AdaptiveOptimizer(AdaClipDPOptimizer):
    r"""Opacus' adaptive clipping with the two repairs its guarantee needs under Poisson batches.

    The step releases Σ(b_i − 1/2) + N(0, s²) with b_i = 1(‖g_i‖ ≤ C), of sensitivity 1/2, hence noise multiplier 2s,
    and moves C by the share release/B + 1/2. Opacus 1.6 counts Σ b_i, of sensitivity 1, noised as if it were 1/2, and
    divides by the realised size of the batch, which is secret.

    Source: Andrew, Thakkar, McMahan & Ramaswamy (2021), algorithm 1 and theorem 1.
    """

    unclipped_num: Any
    max_grad_norm: float

    def clip_and_accumulate(self) -> None:
        """Flat clipping; counts the samples that were not clipped."""
        if len(self.grad_samples[0]):
            super().clip_and_accumulate()
            return
        DPOptimizer.clip_and_accumulate(self)  # an empty batch: AdaClip's own reshapes fail

    def add_noise(self) -> None:
        """Noise on the gradient and on the centred count."""
        count = torch.as_tensor(self.unclipped_num, dtype=torch.float32) - self.sample_size / 2
        self.unclipped_num = count
        super().add_noise()

    def update_max_grad_norm(self) -> None:
        """C by exp(−η (share − γ)), within its limits."""
        share = float(self.unclipped_num) / float(self.expected_batch_size or 1) + 0.5
        moved = self.max_grad_norm * math.exp(-self.clipbound_learning_rate * (share - self.target_unclipped_quantile))
        self.max_grad_norm = min(max(moved, self.min_clipbound), self.max_clipbound)
