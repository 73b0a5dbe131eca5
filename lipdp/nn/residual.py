"""Residual and concatenating blocks that stay 1-Lipschitz."""

from __future__ import annotations

import math

import torch
from deel.torchlip import LipResidual
from torch import Tensor, nn

from lipdp.errors import ParameterError

__all__ = ["Concat", "LipResidual", "Residual"]


class Residual(nn.Module):
    """Convex combination (1 − λ) x + λ f(x): 1-Lipschitz if f is.

    (For a trainable weight use deel-torchlip's `LipResidual`, which has a rule too.)

    Args:
        block: f, with outputs of its input's shape.
        weight: λ in (0, 1), a constant.

    >>> lipdp.nn.Residual(torch.nn.ReLU(), weight=0.25)(torch.tensor([[-4.0]]))
    tensor([[-3.]])

    Source: Béthune et al. (2024), appendix C.
    """

    def __init__(self, block: nn.Module, weight: float = 0.5) -> None:
        super().__init__()
        if not 0 < weight < 1:
            raise ParameterError(f"Residual: weight lies in (0, 1), got {weight}")
        self.block = block
        self.weight = float(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 - self.weight) + self.block(x) * self.weight

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class Concat(nn.Module):
    """Branches side by side along the channels, over √(number of branches): 1-Lipschitz if every branch is.

    ‖(f₁(x), …, f_n(x))/√n‖ = √(Σ_j ‖f_j(x)‖² / n).

    Args:
        branches: modules that take the same input.
        dim: axis of the channels.

    >>> lipdp.nn.Concat(torch.nn.Identity(), torch.nn.ReLU())(torch.ones(1, 2)).shape
    torch.Size([1, 4])
    """

    def __init__(self, *branches: nn.Module, dim: int = 1) -> None:
        super().__init__()
        if not branches:
            raise ParameterError("Concat needs at least one branch")
        self.branches = nn.ModuleList(branches)
        self.dim = dim
        self.scale = 1.0 / math.sqrt(len(branches))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=self.dim) * self.scale
