"""Modules that torch.nn lacks, in plain torch: they trace, script and export, and need nothing else of lipdp."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """Multiply by a constant: |factor|-Lipschitz.

    Args:
        factor: any finite number.

    >>> lipdp.nn.Scale(0.5)(torch.tensor([[4.0]]))
    tensor([[2.]])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Projection(nn.Module):
    """What `ValueClip` and `InputBound` compute, in operations that every exporter knows: x r/max(‖x‖, c).

    Args:
        bound: c > 0.
        radius: r > 0.

    >>> Projection(1.0, 1.0)(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.5000]])
    """

    def __init__(self, bound: float, radius: float) -> None:
        super().__init__()
        self.bound, self.radius = float(bound), float(radius)

    def forward(self, input: Tensor) -> Tensor:
        flat = input.flatten(1)
        norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return (flat * (self.radius / norm.clamp(min=self.bound))).reshape(input.shape)

    def extra_repr(self) -> str:
        return f"bound={self.bound}, radius={self.radius}"


class SortPairs(nn.Module):
    """What `GroupSort2` computes, in operations that every exporter knows: sort channel j with channel j + C/2.

    Args:
        dim: the axis of the channels.

    >>> SortPairs()(torch.tensor([[1.0, 5.0, 3.0, 2.0]]))
    tensor([[3., 5., 1., 2.]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        first, second = torch.chunk(input, 2, dim=self.dim)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
