"""Centering and normalisation of each sample alone. (Batch statistics mix samples and are refused.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deel import torchlip
from torch import Tensor, nn

from lipdp.errors import MixesSamplesError, ParameterError
from lipdp.nn.blocks import Function
from lipdp.nn.constrained import check_positive


class LayerCentering(torchlip.LayerCentering):
    """Subtract a sample's mean over the given axes; optionally add a bias per channel.

    x ↦ x − (1/n) 𝟏𝟏ᵀx is an orthogonal projection: ‖y‖ ≤ ‖x‖, cotangent likewise. A bias broadcast over P positions
    has ‖∇_b‖ ≤ √P G.

    Args:
        num_features: channels of the bias (1: one number for all).
        dim: axes of the mean, negative, never the batch axis.
        bias: off by default.

    Raises:
        MixesSamplesError: when an axis is the batch axis, as happens with the default axes on a 2-D input.

    >>> lipdp.nn.LayerCentering()(torch.ones(2, 3, 4, 4)).abs().max().item()
    0.0

    Source: deel-torchlip (name and meaning).
    """

    def __init__(self, num_features: int = 1, dim: Sequence[int] = (-2, -1), bias: bool = False) -> None:
        super().__init__(num_features=num_features, dim=tuple(dim), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        check_centering_axes(self.dim, x.dim())
        y: Tensor = _Centred.apply(x, self.dim)
        return y if self.bias is None else y + self.bias.view(1, -1, *[1] * (x.dim() - 2))


class _Centred(Function):
    """x ↦ x − μ, its own transpose: one pass back instead of three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: tuple[int, ...]) -> Tensor:
        return x - x.mean(dim, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Centred.apply(grads[0], ctx.dim), None


def check_centering_axes(dim: Sequence[int], ndim: int) -> list[int]:
    """The axes as non-negative numbers; refuses the batch axis (axis 0)."""
    axes = [d % ndim if -ndim <= d < ndim else -1 for d in dim]
    if any(a <= 0 for a in axes):
        raise MixesSamplesError(
            f"LayerCentering over axes {tuple(dim)} of a {ndim}-D input takes the mean over the batch axis, so samples"
            " influence each other; choose axes of one sample, e.g. dim=(-1,) for an input (N, d)"
        )
    return axes


def normalised(x: Tensor, axes: int, eps: float) -> Tensor:
    r"""(x − μ)/√(var + ε) over the last `axes` axes, in float32 or better, with bounds that rounding keeps.

    Computed in float64 from the centred entries d, y = r d with r = 1/√(mean(d²) + ε).
    Whatever d is, ‖y‖² = n ‖d‖²/(‖d‖² + nε) < n and r ≤ 1/√ε: no sum cancels, and no float32 overflows. The backward
    pass computes P r (I − yyᵀ/n) g with P the centering, of norm at most r, from the same d; y need not be orthogonal
    to 1 for that. (torch's kernels compute the variance as a difference and y as a x + b, which rounding lets grow
    without limit.)

    >>> normalised(torch.full((1, 4), 1e30), 1, 1e-5)
    tensor([[0., 0., 0., 0.]])
    """
    dims = list(range(-axes, 0))
    with torch.autocast(x.device.type, enabled=False):
        wide = x.double()
        centred = wide - wide.mean(dims, keepdim=True)
        rate = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
        return (centred * rate).to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    r"""`torch.nn.LayerNorm` with bounds that hold for every input: ‖y‖ ≤ √n before the affine map, gain 1/√ε.

    torch's own layer breaks them: its variance and its a x + b cancel where the mean is large against √ε (one record
    moved a gradient by 197 Δ behind identifiers of 10⁷). The output is in float32 under autocast.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch's, with ε > 0.

    >>> lipdp.nn.LayerNorm(2, eps=1.0)(torch.tensor([[1e7, 1e7 + 2]]))
    tensor([[-0.7071,  0.7071]], grad_fn=<AddBackward0>)

    Source: Ba, Kiros & Hinton (2016).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_positive("eps", self.eps)

    def forward(self, input: Tensor) -> Tensor:
        axes = len(self.normalized_shape)
        if input.dim() <= axes or input.shape[-axes:] != self.normalized_shape:
            raise ParameterError(f"{self} is for inputs (N, …, *{self.normalized_shape}), got {tuple(input.shape)}")
        y = normalised(input, axes, self.eps)
        if self.weight is None:
            return y
        y = y * self.weight
        return y if self.bias is None else y + self.bias


class GroupNorm(nn.GroupNorm):
    r"""`torch.nn.GroupNorm` with bounds that hold for every input; as many groups as channels are an InstanceNorm.

    ‖y‖ ≤ √n before the affine map for the n entries of a sample, gain 1/√ε. torch's own layer breaks them (in
    channels_last one record of 8-bit pixels moved a gradient by 153 Δ). The output is in float32 under autocast.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as torch's, with ε > 0.

    >>> lipdp.nn.GroupNorm(1, 2, affine=False)(torch.full((1, 2, 3), 1e6)).abs().max().item()
    0.0

    Source: Wu & He (2018).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_positive("eps", self.eps)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 2 or input.shape[1] != self.num_channels:
            raise ParameterError(f"{self} is for inputs (N, {self.num_channels}, …), got {tuple(input.shape)}")
        groups = input.unflatten(1, (self.num_groups, -1)).flatten(2)
        y = normalised(groups, 1, self.eps).view(input.shape)
        if self.weight is None:
            return y
        shape = (-1, *[1] * (input.dim() - 2))
        y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)
