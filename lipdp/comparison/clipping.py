"""Opacus' optimiser with other ways to clip: any factors of `lipdp.comparison.factors`, and an adaptive norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer

from lipdp.comparison.factors import Clipping


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
