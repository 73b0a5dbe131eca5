"""Products with a backward pass of their own: weight gradients in float32 under autocast, or behind a gate.

Autocast computes the gradient of a weight in the dtype of the forward pass, the sum over the batch included. A sum S in
bfloat16 is rounded to 8 bits, so that one record more moves it by up to Δ + 2⁻⁸ ‖S‖: with 4096 records of similar
gradients 3.7 Δ was measured, and the noise is calibrated to Δ. Here the forward pass and the cotangent of the input are
in the dtype of autocast, and the weight's gradient is a product in float32 of the same rounded numbers.

A gate replaces the sum Σ_i ∇_i of the samples' weight gradients by Σ_i ∇_i min(1, C/‖∇_i‖_F); the cotangent of the
input stays as it is. See `lipdp.nn.weight_gate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lipdp.nn.blocks import Function
from lipdp.nn.weight_gate import gated_sum, patches


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast is on for, where `x` lies, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _Linear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gate: float) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.has_bias, ctx.gate = inputs[2] is not None, inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            by_input = grads[0] @ weight.to(grads[0].dtype)
            g, x = _wide(grads[0]), _wide(x)
            rows = g.flatten(0, -2)
            by_bias = rows.sum(0) if ctx.has_bias else None
            if ctx.gate == math.inf:
                return by_input, rows.mT @ x.flatten(0, -2), by_bias, None
            g, x = (t.reshape(len(t), 1, math.prod(t.shape[1:-1]), t.shape[-1]).mT for t in (g, x))
            return by_input, gated_sum(g, x, ctx.gate)[0], by_bias, None


class _Convolution(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], groups: int, gate: float
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        zeros, ones = [0] * len(stride), [1] * len(stride)
        return torch.convolution(x, weight.to(x.dtype), bias, list(stride), zeros, ones, False, zeros, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.has_bias, ctx.stride, ctx.groups, ctx.gate = inputs[2] is not None, list(inputs[3]), *inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        g = grads[0]

        def products(g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
            zeros, ones = [0] * len(ctx.stride), [1] * len(ctx.stride)
            geometry = (ctx.stride, zeros, ones, False, zeros, ctx.groups)
            return torch.ops.aten.convolution_backward(g, x, weight, [weight.shape[0]], *geometry, mask)

        with torch.autocast(x.device.type, enabled=False):
            by_input = products(g, x, weight.to(g.dtype), [True, False, False])[0]
            g, x = _wide(g), _wide(x)
            by_bias = g.sum([0, *range(2, g.dim())]) if ctx.has_bias else None
            if ctx.gate == math.inf:
                by_weight = products(g, x, weight, [False, True, False])[1]
            else:
                columns = patches(x, weight.shape[2:], ctx.stride, ctx.groups)
                rows = g.reshape(len(g), ctx.groups, len(weight) // ctx.groups, columns.shape[-1])
                by_weight = gated_sum(rows, columns, ctx.gate).reshape(weight.shape)
        return by_input, by_weight, by_bias, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gate: float | None = None) -> Tensor:
    """`F.linear` in `dtype`, with the gradients of weight and bias in float32. `x`: (N, …, in); `gate`: C."""
    return _Linear.apply(x.to(dtype), weight, bias, math.inf if gate is None else gate)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    stride: Sequence[int],
    groups: int,
    gate: float | None = None,
) -> Tensor:
    """A convolution without padding in `dtype`, with the gradients of weight and bias in float32. `x`: (N, C, …)."""
    return _Convolution.apply(x.to(dtype), weight, bias, stride, groups, math.inf if gate is None else gate)
