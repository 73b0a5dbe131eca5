"""Ways to clip per-sample gradients, as strategies for Opacus' optimiser: what each sample's gradient is multiplied by.

With g a sample's whole gradient every factor f obeys f ‖g‖ ≤ C: the sum moves by at most C when a record is added or
removed, and noise of std σC costs what σ says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from torch import Tensor


class Clipping(Protocol):
    """`factors(norms, bound)`: (n,) norms ≥ 0 and C to (n,) factors with factor · norm ≤ C."""

    def factors(self, norms: Tensor, bound: float) -> Tensor: ...


@dataclass(frozen=True)
class Automatic:
    """C / (‖g‖ + γ): every gradient counts about the same, and no threshold is left to tune.

    >>> Automatic(0.0).factors(torch.tensor([0.5, 4.0]), 2.0)
    tensor([4.0000, 0.5000])

    Source: Bu, Wang, Zha & Karypis (2022), "Automatic clipping", AUTO-S.
    """

    stability: float = 0.01

    def factors(self, norms: Tensor, bound: float) -> Tensor:
        return bound / (norms + self.stability)


@dataclass(frozen=True)
class GlobalScaled:
    """(C/Z) 1(‖g‖ ≤ Z): gradients up to Z keep their direction and relative length, others are dropped.

    >>> GlobalScaled(4.0).factors(torch.tensor([3.0, 5.0]), 2.0)
    tensor([0.5000, 0.0000])

    Source: Bu, Wang, Long & Su (2021), "On the convergence and calibration of deep learning with differential privacy",
    first version.
    """

    threshold: float

    def factors(self, norms: Tensor, bound: float) -> Tensor:
        return (norms <= self.threshold).to(norms.dtype) * (bound / self.threshold)


@dataclass(frozen=True)
class Global:
    """1(‖g‖ ≤ C): gradients up to C pass unchanged, others are dropped.

    >>> Global().factors(torch.tensor([1.0, 3.0]), 2.0)
    tensor([1., 0.])

    Source: Bu, Wang, Long & Su (2021), later version.
    """

    def factors(self, norms: Tensor, bound: float) -> Tensor:
        return (norms <= bound).to(norms.dtype)


class StrategyOptimizer(DPOptimizer):
    """Opacus' optimiser with the factors of a `Clipping`; noise, division and step are Opacus' own."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, clipping: Clipping, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.clipping = clipping

    def clip_and_accumulate(self) -> None:
        """Σ_i f(‖g_i‖) g_i, added to `summed_grad` of every parameter."""
        samples = self.grad_samples
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in map(_at_least_2d, samples)])
        factors = self.clipping.factors(torch.linalg.vector_norm(norms, dim=0), self.max_grad_norm)
        for parameter, gradients in zip(self.params, samples, strict=True):
            total = torch.einsum("i,i...->...", factors.to(gradients.dtype), gradients)
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


def _at_least_2d(x: Tensor) -> Tensor:
    return x[:, None] if x.dim() == 1 else x
