"""1-Lipschitz poolings over windows that do not overlap.

deel-torchlip's `ScaledAvgPool2d` is used as it is, without `ceil_mode` and `divisor_override`: they break the
constant. Its L2-norm pooling is not: the gradient of `torch.nn.LPPool2d` is NaN on a window of zeros, which every MNIST
border is. Nor are its pixel shuffles, which refuse an empty batch.
"""

from __future__ import annotations

from typing import Any

import torch
from deel import torchlip
from deel.torchlip import ScaledAdaptiveAvgPool2d
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.errors import ParameterError
from lipdp.nn.blocks import Function, blocks, is_traced

__all__ = [
    "InvertibleDownSampling",
    "InvertibleUpSampling",
    "ScaledAdaptiveAvgPool2d",
    "ScaledAvgPool2d",
    "ScaledL2NormPool2d",
]

_EPSILON = 1e-6


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(k, int) or k < 1 for k in pair):
        raise ParameterError(f"a pooling window is one or two positive integers, got {size}")
    return pair[0], pair[1]


class ScaledAvgPool2d(torchlip.ScaledAvgPool2d):
    """Average pooling times √(k_h k_w): 1-Lipschitz, windows side by side.

    Each output is ⟨1/√n, window⟩ with a unit vector, and windows are disjoint.

    Args:
        kernel_size: side of the window; also the stride.

    >>> lipdp.nn.ScaledAvgPool2d(2)(torch.ones(1, 1, 2, 2)).item()
    2.0
    """

    def __init__(self, kernel_size: int | tuple[int, int], *, k_coef_lip: float = 1.0) -> None:
        super().__init__(_pair(kernel_size), k_coef_lip=k_coef_lip)


class _L2NormPool(Function):
    """y = √(Σ x² + ε²) − ε over disjoint windows; backward x · g / (y + ε)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: tuple[int, int]) -> Tensor:
        if is_traced(x):
            mean = F.avg_pool2d(x * x, kernel)
            return (mean * (kernel[0] * kernel[1]) + _EPSILON**2).sqrt() - _EPSILON
        out = torch.empty_like(_covered(x, kernel)[..., :: kernel[0], :: kernel[1]])
        for some, norms in blocks(x, out):
            first, *rows = _rows(some.to(_wide(x)), kernel)
            squares = first * first
            for row in rows:
                squares.addcmul_(row, row)
            total = squares[..., :: kernel[1]]
            for j in range(1, kernel[1]):
                total = total + squares[..., j :: kernel[1]]
            torch.sub(total.add_(_EPSILON**2).sqrt_(), _EPSILON, out=norms)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kernel = inputs[1]
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        spread = _spread if torch.is_grad_enabled() or is_traced(x, *grads) else _spread_in_blocks
        return spread(x, y, grads[0], ctx.kernel), None


def _covered(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """What the windows cover."""
    return x[..., : x.shape[-2] // kernel[0] * kernel[0], : x.shape[-1] // kernel[1] * kernel[1]]


def _rows(x: Tensor, kernel: tuple[int, int]) -> list[Tensor]:
    """The first rows of all windows, the second ones, and so on."""
    return [_covered(x, kernel)[..., i :: kernel[0], :] for i in range(kernel[0])]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _spread(x: Tensor, y: Tensor, g: Tensor, kernel: tuple[int, int]) -> Tensor:
    """x · g / (y + ε), each window by its own; 0 beyond the windows. It can be differentiated again."""
    inner, (height, width) = _covered(x, kernel), y.shape[-2:]
    windows = inner.reshape(*x.shape[:-2], height, kernel[0], width, kernel[1])
    out = (windows * (g / (y + _EPSILON))[..., :, None, :, None]).reshape(inner.shape)
    pad = (0, x.shape[-1] - inner.shape[-1], 0, x.shape[-2] - inner.shape[-2])
    return F.pad(out, pad) if any(pad) else out


def _spread_in_blocks(x: Tensor, y: Tensor, g: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The same: the factors of a row of windows are written out once, and multiply each of its rows of entries."""
    out = torch.empty_like(x) if _covered(x, kernel).shape == x.shape else torch.zeros_like(x)
    for some, norms, upper, to in blocks(x, y, g, out):
        rows = _rows(some, kernel)
        factors = torch.empty_like(rows[0], dtype=_wide(x))
        torch.div(upper, norms.to(_wide(x)) + _EPSILON, out=factors[..., :: kernel[1]])
        for j in range(1, kernel[1]):
            factors[..., j :: kernel[1]] = factors[..., :: kernel[1]]
        for row, into in zip(rows, _rows(to, kernel), strict=True):
            torch.mul(row, factors, out=into)
    return out


class ScaledL2NormPool2d(nn.Module):
    """The Euclidean norm of each window: y = √(‖x_w‖² + ε²) − ε with ε = 1e-6.

    1-Lipschitz and, but for ε, norm-preserving: ‖∂y/∂x_w‖ = ‖x_w‖ / √(‖x_w‖² + ε²) ≤ 1, disjoint windows, and
    0 ≤ y ≤ ‖x_w‖. The gradient is 0 (not NaN) on a window of zeros.

    Args:
        kernel_size: side of the window; also the stride.

    >>> round(lipdp.nn.ScaledL2NormPool2d(2)(torch.ones(1, 1, 2, 2)).item(), 4)
    2.0

    Source: Boureau, Ponce & LeCun (2010); name and meaning from deel-torchlip.
    """

    def __init__(self, kernel_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.kernel_size = _pair(kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4) or any(n < k for n, k in zip(input.shape[-2:], self.kernel_size, strict=True)):
            raise ParameterError(
                f"ScaledL2NormPool2d takes (N, C, H, W) with windows of {self.kernel_size}, got {tuple(input.shape)}"
            )
        return _L2NormPool.apply(input, self.kernel_size)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class InvertibleDownSampling(torchlip.InvertibleDownSampling):
    """Move k x k pixels into k² channels: (N, C, H, W) to (N, C k², H/k, W/k). Only moves numbers around.

    Args:
        kernel_size: k, which divides H and W.

    >>> lipdp.nn.InvertibleDownSampling(2)(torch.zeros(0, 3, 4, 6)).shape
    torch.Size([0, 12, 2, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        k = self.downscale_factor
        _check_divides(k, input.shape[-2], input.shape[-1])
        blocks = input.unflatten(-1, (input.shape[-1] // k, k)).unflatten(-3, (input.shape[-2] // k, k))
        return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


class InvertibleUpSampling(torchlip.InvertibleUpSampling):
    """The inverse: (N, C k², H, W) to (N, C, H k, W k).

    Args:
        kernel_size: k; k² divides the channels.

    >>> x = torch.randn(2, 3, 4, 4)
    >>> torch.equal(lipdp.nn.InvertibleUpSampling(2)(lipdp.nn.InvertibleDownSampling(2)(x)), x)
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        k = self.upscale_factor
        _check_divides(k * k, input.shape[1])
        blocks = input.unflatten(1, (input.shape[1] // (k * k), k, k))
        return blocks.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def _check_divides(factor: int, *sizes: int) -> None:
    if any(size % factor for size in sizes):
        raise ParameterError(f"{factor} does not divide {' x '.join(map(str, sizes))}: no way to rearrange the pixels")
