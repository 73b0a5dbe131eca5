"""Two families of layers with the same shapes, so that every model of the zoo is written once.

A model asks its family for a layer and never names a class: `Lipschitz` answers with the layers of `lipdp.nn`, `Family`
itself with their unconstrained twins. Modules, parameters and their names correspond one to one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lipdp import nn as lnn
from lipdp.constraints import Constraint

from .starts import Start, smooth


@dataclass(frozen=True)
class Family:
    """Where a model gets its layers from, and what all models are told: plain layers, nothing at input and joints.

    Attributes:
        input_shape, num_classes: of the model.
        gain: Lipschitz constant of the first layer.
        bias: give every dense and convolutional layer a bias.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    gain: float = 1.0
    bias: bool = False

    def bound(self, radius: float) -> nn.Module:
        """What stands at the input: a projection on the ball of that radius."""
        return nn.Identity()

    def clip(self, bound: float) -> nn.Module:
        """A clip of values at a joint, scaled to the unit ball."""
        return nn.Identity()

    def gate(self, bound: float) -> nn.Module:
        """A gate of cotangents at a joint."""
        return nn.Identity()

    def linear(
        self, in_features: int, out_features: int, *, lipschitz: float = 1.0, constraint: Constraint | None = None
    ) -> nn.Module:
        """A dense layer on the last axis, with the given Lipschitz constant and set of weights (orthogonal ones)."""
        return nn.Linear(in_features, out_features, self.bias)

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int, *, lipschitz: float = 1.0, start: Start = smooth
    ) -> nn.Module:
        """A convolution with an odd kernel that keeps height and width; `start` sets its first kernel."""
        return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=self.bias)

    def attention(self, width: int, heads: int, *, sharpness: float, bound: float) -> nn.Module:
        """Self-attention of tokens (N, T, width) with scores of at most `sharpness`."""
        return DotProductAttention(width, heads)

    def activation(self, dim: int = 1) -> nn.Module:
        """The activation, with its channels on axis `dim`."""
        return nn.ReLU()

    def magnitude(self, size: int) -> list[nn.Module]:
        """Two modules: a non-linear pooling over windows of size x size that needs no activation in front."""
        return [nn.ReLU(), nn.AvgPool2d(size)]

    def residual(self, block: nn.Module, weight: float) -> nn.Module:
        """A shortcut around `block`: (1−λ) x + λ f(x), f(x) alone for λ = 1; of plain layers x + f(x)."""
        return Shortcut(block)


@dataclass(frozen=True)
class Lipschitz(Family):
    """Orthogonal weights, sorting activations, norm pooling: 1-Lipschitz, and values and gradients keep their norms."""

    def bound(self, radius: float) -> nn.Module:
        return lnn.InputBound(radius)

    def clip(self, bound: float) -> nn.Module:
        return lnn.ValueClip(bound, radius=1.0)

    def gate(self, bound: float) -> nn.Module:
        return lnn.GradientGate(bound)

    def linear(
        self, in_features: int, out_features: int, *, lipschitz: float = 1.0, constraint: Constraint | None = None
    ) -> nn.Module:
        return lnn.SpectralLinear(in_features, out_features, self.bias, constraint=constraint, k_coef_lip=lipschitz)

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int, *, lipschitz: float = 1.0, start: Start = smooth
    ) -> nn.Module:
        conv = lnn.SpectralConv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=self.bias, k_coef_lip=lipschitz
        )
        start(conv)
        return conv

    def attention(self, width: int, heads: int, *, sharpness: float, bound: float) -> nn.Module:
        return lnn.SpectralAttention(width, heads, sharpness=sharpness, bound=bound)

    def activation(self, dim: int = 1) -> nn.Module:
        return lnn.GroupSort2(dim)

    def magnitude(self, size: int) -> list[nn.Module]:
        return [lnn.ScaledL2NormPool2d(size), lnn.LayerCentering(dim=(1,))]

    def residual(self, block: nn.Module, weight: float) -> nn.Module:
        return lnn.Residual(block, weight) if weight != 1 else nn.Sequential(OrderedDict(block=block))


class Shortcut(nn.Module):
    """x + f(x), with the attribute name of `lipdp.nn.Residual`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class DotProductAttention(nn.Module):
    """Self-attention as usual, without biases, with the attribute names of `lipdp.nn.SpectralAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            dense(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for dense in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Patches(nn.Module):
    """Cut (N, C, rows · p, columns · p) into tokens (N, rows · columns, C p²): the same numbers, so the same norm.

    (nn.PixelUnshuffle, which does the cutting, leaves the shape of an empty batch as it is.)
    """

    def __init__(self, rows: int, columns: int, size: int) -> None:
        super().__init__()
        self.rows, self.columns, self.size = rows, columns, size

    def forward(self, x: Tensor) -> Tensor:
        grid = x.unflatten(3, (self.columns, self.size)).unflatten(2, (self.rows, self.size))
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Transpose(nn.Module):
    """Swap tokens and features: (N, T, d) to (N, d, T). Moves numbers around, so it changes no norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
