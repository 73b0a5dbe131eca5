"""The rules of convolutions and of their transposes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.bounds.layers import weight_caps
from lipdp.bounds.rules import Call, Local, Number, rule, times
from lipdp.bounds.windows import axis_overlap, most_visits, sides
from lipdp.errors import MixesSamplesError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.nn import conv as lconv
from lipdp.norms import certified_norm, vector_norm

_Transposed: TypeAlias = "nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d"


@dataclass(frozen=True)
class _Convolution:
    """A convolution, of a layer or called as a function.

    Attributes:
        padding: before and after each axis.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Sequence[tuple[int, int]]
    dilation: tuple[int, ...]
    groups: int
    mode: str = "zeros"

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> _Convolution:
        """That of a layer."""
        options = layer.stride, lconv.padding_of(layer), layer.dilation, layer.groups, layer.padding_mode
        return cls(layer.weight, layer.bias, *options)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Of the axes that the windows move along."""
        return tuple(self.weight.shape[2:])


def _convolution(call: Call, layer: _Convolution, scale: float) -> Local:
    """y = α W P: P repeats an entry at most m times, so ‖P‖_F ≤ √m ‖x‖; gain α √m ‖W‖₂; Δ_W = α √m X G.

    m is counted for any stride, dilation and padding (`axis_overlap`). With groups W is block-diagonal: the largest of
    the blocks' norms. A bias is added at H'W' positions: √(H'W').
    """
    axes = len(layer.kernel_size)
    settings = zip(call.x.shape[-axes:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    overlap = math.prod(
        axis_overlap(n, k, s, *padding, mode=layer.mode, dilation=d) for n, k, s, padding, d in settings
    )
    kernel = call.used(layer.weight * scale)
    norm = certified_norm(kernel.reshape(layer.groups, len(kernel) // layer.groups, -1)).max()
    return _of_patches(call, layer, norm, overlap, scale, terms=layer.weight[0].numel())


def _of_patches(
    call: Call, layer: _Convolution | _Transposed, norm: Number, overlap: int, scale: float, terms: int
) -> Local:
    root = math.sqrt(overlap)
    parameters: dict[str, Number] = {"weight": scale * root * call.x.value}
    offset: Number = 0.0
    positions = math.prod(call.output_shape[-len(layer.kernel_size) :])
    if layer.bias is not None:
        parameters["bias"] = math.sqrt(positions)
        offset = math.sqrt(positions) * vector_norm(call.used(layer.bias))
    return Local(gains=(root * norm,), offset=offset, parameters=parameters, fan_in=max(terms, positions))


@rule(lconv.SpectralConv1d, lconv.SpectralConv2d)
def _spectral_convolution(call: Call) -> Local:
    lconv.check_convolution(call.module)  # type: ignore[arg-type]
    local = _convolution(call, _Convolution.of(call.module), call.module.scale)  # type: ignore[arg-type, union-attr]
    return replace(local, sums_in=torch.float32, parameter_caps=weight_caps(call.module))  # type: ignore[arg-type]


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _plain_convolution(call: Call) -> Local:
    return _convolution(call, _Convolution.of(call.module), 1.0)  # type: ignore[arg-type]


@rule(F.conv1d, F.conv2d, F.conv3d)
def _called_convolution(call: Call) -> Local:
    """The same, where kernel and bias are tensors of the model: they take the place of parameters."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    if call.x.constant is not None or any(t is not None and t.constant is None for t in (weight, bias)):
        raise UnsupportedOperationError(f"node '{call.name}': a convolution has a bound for a kernel of the model")
    axes = len(weight.shape) - 2
    if len(call.x.shape) != axes + 1:
        raise MixesSamplesError(f"node '{call.name}' convolves along the batch axis: give (N, C, …)")
    stride, dilation = (sides(call.argument(i, n, 1), axes) for i, n in ((3, "stride"), (5, "dilation")))
    pads = call.argument(4, "padding", 0)
    if isinstance(pads, str):
        reach = [d * (k - 1) if pads == "same" else 0 for k, d in zip(weight.shape[2:], dilation, strict=True)]
        padding = [(r // 2, r - r // 2) for r in reach]
    else:
        padding = [(p, p) for p in sides(pads, axes)]
    kernel, shift = weight.constant, None if bias is None else bias.constant
    settings = _Convolution(kernel, shift, stride, padding, dilation, call.argument(6, "groups", 1))
    local = _convolution(call, settings, 1.0)
    cap = times(local.gains[0], call.x.value) + local.offset
    return replace(local, gains=(*local.gains, *local.parameters.values()), parameters={}, offset=0.0, value_cap=cap)


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(call: Call) -> Local:
    """The adjoint of y ↦ W P(y), which maps outputs to inputs: the same norm √m ‖W‖₂, m counted over the outputs.

    From ⟨g, Wᵀ⋆x⟩ = ⟨W P(g), x⟩ = ⟨W, x P(g)ᵀ⟩ also ‖∇_W‖_F ≤ ‖P(g)‖_F ‖x‖ ≤ √m X G. A bias: √(H'W') as in a
    convolution.
    """
    layer: _Transposed = call.module  # type: ignore[assignment]
    if layer.padding_mode != "zeros":
        raise UnsupportedLayerError(f"'{call.name}': a transposed convolution has a bound with padding_mode='zeros'")
    axes = len(layer.kernel_size)
    settings = zip(
        *(call.x.shape[-axes:], layer.kernel_size, layer.stride, layer.padding, call.output_shape[-axes:]),
        layer.dilation,
        strict=True,
    )
    overlap = math.prod(most_visits(n, k, s, int(p), size, "zeros", d) for n, k, s, p, size, d in settings)
    kernel = call.used(layer.weight)
    norm = certified_norm(kernel.reshape(layer.groups, layer.in_channels // layer.groups, -1)).max()
    return _of_patches(call, layer, norm, overlap, 1.0, terms=max(kernel[0].numel(), kernel[:, 0].numel()))
