"""Losses that are a mean over the C outputs of a sample, each with a target of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lipdp.constraints import check_positive, check_size
from lipdp.errors import ParameterError
from lipdp.losses.base import LipschitzLoss, as_columns, public_weights


class _OfColumns(LipschitzLoss):
    """A mean over C outputs of slope at most `slope`: the gradient has C entries of at most slope/C, norm slope/√C."""

    def __init__(self, num_outputs: int, slope: float = 1.0) -> None:
        super().__init__()
        check_size("num_outputs", num_outputs)
        self.num_outputs = int(num_outputs)
        self.lipschitz = slope / math.sqrt(self.num_outputs)


class TauBCEWithLogits(_OfColumns):
    r"""Binary cross-entropy at temperature, mean over the C logits of a sample; constant 1/√C (1 for one logit).

    ∂ℓ/∂z_c = ((1 − y_c) σ(τz_c) − w_c y_c (1 − σ(τz_c)))/C lies in [−w_c/C, 1/C], w the weight of positive targets:
    constant √(Σ_c max(1, w_c)²)/C.

    Args:
        tau: τ > 0.
        num_outputs: C.
        pos_weight: w, a public number, or one for each output; 1 by default.
    Shapes:
        logits (N, C) or (N,) for C = 1; target the same, in [0, 1] (others are clamped to it).

    >>> lipdp.losses.TauBCEWithLogits(num_outputs=4).lipschitz
    0.5
    >>> lipdp.losses.TauBCEWithLogits(pos_weight=3.0).lipschitz
    3.0
    """

    def __init__(
        self, tau: float = 1.0, num_outputs: int = 1, *, pos_weight: float | Tensor | Sequence[float] | None = None
    ) -> None:
        super().__init__(num_outputs)
        self.tau = check_positive("tau", tau)
        self.pos_weight: tuple[float, ...] | None = None
        if pos_weight is not None:
            given = [pos_weight] if isinstance(pos_weight, (int, float)) else pos_weight
            weights = public_weights("pos_weight", given)
            self.pos_weight = weights * self.num_outputs if len(weights) == 1 else weights
            if len(self.pos_weight) != self.num_outputs:
                raise ParameterError(f"pos_weight has {len(weights)} numbers, but num_outputs={num_outputs}")
            self.lipschitz = math.hypot(*(max(1.0, w) for w in self.pos_weight)) / self.num_outputs

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = as_columns(logits, target, self.num_outputs)
        weight = None
        if self.pos_weight is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a rounded weight may be a larger one
            weight = logits.new_tensor(self.pos_weight)
        target = target.to(logits.dtype).clamp(0, 1)
        scaled = logits * self.tau
        values = F.binary_cross_entropy_with_logits(scaled, target, reduction="none", pos_weight=weight)
        return values.mean(1) / self.tau

    def extra_repr(self) -> str:
        weight = "" if self.pos_weight is None else f", pos_weight={list(self.pos_weight)}"
        return f"tau={self.tau}, num_outputs={self.num_outputs}{weight}"


class SoftMargin(_OfColumns):
    """(1/C) Σ_c log(1 + exp(−y_c z_c)); constant 1/√C.

    ∂ℓ/∂z_c = −y_c σ(−y_c z_c)/C lies in [−1/C, 1/C].

    Args:
        num_outputs: C.
    Shapes:
        logits and target (N, C), or (N,) for C = 1; target −1 or 1 (others are clamped to [−1, 1]).

    >>> lipdp.losses.SoftMargin()(torch.zeros(1), torch.ones(1))
    tensor([0.6931])
    """

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__(num_outputs)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = as_columns(logits, target, self.num_outputs)
        return F.softplus(-target.clamp(-1, 1) * logits).mean(1)


class MeanAbsoluteError(_OfColumns):
    """(1/C) Σ_c |z_c − y_c|; constant 1/√C.

    Args:
        num_outputs: C.
    Shapes:
        logits and target (N, C), or (N,) for C = 1.

    >>> lipdp.losses.MeanAbsoluteError(4).lipschitz
    0.5
    """

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__(num_outputs)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = as_columns(logits, target, self.num_outputs)
        return (logits - target).abs().mean(1)


class Huber(_OfColumns):
    """(1/C) Σ_c h(z_c − y_c), h(d) = d²/2 for |d| ≤ δ and δ (|d| − δ/2) beyond; constant δ/√C (h' is d clamped to ±δ).

    Args:
        delta: δ > 0.
        num_outputs: C.
    Shapes:
        logits and target (N, C), or (N,) for C = 1.

    >>> lipdp.losses.Huber(delta=0.5, num_outputs=4).lipschitz
    0.25
    """

    def __init__(self, delta: float = 1.0, num_outputs: int = 1) -> None:
        slope = check_positive("delta", delta)
        super().__init__(num_outputs, slope)
        self.delta = slope

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = as_columns(logits, target, self.num_outputs)
        return F.huber_loss(logits, target, reduction="none", delta=self.delta).mean(1)

    def extra_repr(self) -> str:
        return f"delta={self.delta}, num_outputs={self.num_outputs}"


class SmoothL1(_OfColumns):
    """Huber's loss with δ = β, divided by β: (1/C) Σ_c of slopes d/β clamped to ±1; constant 1/√C.

    Args:
        beta: β > 0 (for β = 0 there is `MeanAbsoluteError`).
        num_outputs: C.
    Shapes:
        logits and target (N, C), or (N,) for C = 1.

    >>> lipdp.losses.SmoothL1(num_outputs=4).lipschitz
    0.5
    """

    def __init__(self, beta: float = 1.0, num_outputs: int = 1) -> None:
        super().__init__(num_outputs)
        self.beta = check_positive("beta", beta)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = as_columns(logits, target, self.num_outputs)
        return F.smooth_l1_loss(logits, target, reduction="none", beta=self.beta).mean(1)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, num_outputs={self.num_outputs}"


class MeanSquaredError(LipschitzLoss):
    """(1/C) ‖z − y‖² with the target projected on a ball; constant 2(X_out + ‖y‖_max)/C.

    The gradient 2(z − y)/C is bounded only because the logits are: X_out comes from the propagation. Without it
    `lipschitz` is infinite.

    Args:
        target_bound: ‖y‖_max, a public constant; larger targets are projected.
        num_outputs: C.

    >>> lipdp.losses.MeanSquaredError(target_bound=1.0).constant(3.0)
    8.0
    """

    def __init__(self, target_bound: float, num_outputs: int = 1) -> None:
        super().__init__()
        self.target_bound = check_positive("target_bound", target_bound)
        check_size("num_outputs", num_outputs)
        self.num_outputs = int(num_outputs)
        self.lipschitz = math.inf

    def constant(self, output_bound: float | Tensor) -> float | Tensor:
        return 2 * (output_bound + self.target_bound) / self.num_outputs

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = as_columns(logits, target, self.num_outputs)
        norm = torch.linalg.vector_norm(target, dim=1, keepdim=True).clamp_min(self.target_bound)
        return (logits - target * (self.target_bound / norm)).square().mean(1)
