"""Products under autocast whose weight gradients are summed over the batch in float32.

Autocast computes the gradient of a weight in the dtype of the forward pass, the sum over the batch included. A sum S in
bfloat16 is rounded to 8 bits, so that one record more moves it by up to Δ + 2⁻⁸ ‖S‖: with 4096 records of similar
gradients 3.7 Δ was measured, and the noise is calibrated to Δ. Here the forward pass and the cotangent of the input are
in the dtype of autocast, and the weight's gradient is a product in float32 of the same rounded numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast is on for, where `x` lies, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.has_bias = inputs[2] is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            rows = grads[0].flatten(0, -2).float()
            by_weight = rows.mT @ x.flatten(0, -2).float()
            return grads[0] @ weight.to(grads[0].dtype), by_weight, rows.sum(0) if ctx.has_bias else None


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], groups: int) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        zeros, ones = [0] * len(stride), [1] * len(stride)
        return torch.convolution(x, weight.to(x.dtype), bias, list(stride), zeros, ones, False, zeros, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.has_bias, ctx.stride, ctx.groups = inputs[2] is not None, list(inputs[3]), inputs[4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        g = grads[0]

        def products(g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
            zeros, ones = [0] * len(ctx.stride), [1] * len(ctx.stride)
            geometry = (ctx.stride, zeros, ones, False, zeros, ctx.groups)
            return torch.ops.aten.convolution_backward(g, x, weight, [weight.shape[0]], *geometry, mask)

        with torch.autocast(x.device.type, enabled=False):
            by_input = products(g, x, weight.to(g.dtype), [True, False, False])[0]
            by_weight = products(g.float(), x.float(), weight, [False, True, False])[1]
            by_bias = g.float().sum([0, *range(2, g.dim())]) if ctx.has_bias else None
        return by_input, by_weight, by_bias, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`F.linear` in `dtype`, with the gradients of weight and bias in float32. `x`: (N, …, in)."""
    return _Linear.apply(x.to(dtype), weight, bias)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, stride: Sequence[int], groups: int
) -> Tensor:
    """A convolution without padding in `dtype`, with the gradients of weight and bias in float32. `x`: (N, C, …)."""
    return _Convolution.apply(x.to(dtype), weight, bias, stride, groups)
