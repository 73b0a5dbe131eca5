"""Per-sample gradients and their norms for lipdp's layers, registered with Opacus on import.

Without them Opacus takes every layer it does not know through `torch.func`, and its own samplers of `nn.Linear` and
`nn.Conv2d` go by the exact type: a subclass never reaches them. Each sampler gets a layer, its detached inputs and the
cotangents (n, *) of its output, and returns parameter → per-sample gradients (n, *shape), or norms (n,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp import nn as lnn
from lipdp.nn.conv import padded

Samples = dict[Tensor, Tensor]
Sampler = Callable[[nn.Module, list[Tensor], Tensor], Samples]

_LINEAR = [lnn.SpectralLinear, lnn.FrobeniusLinear]
_CONV = [lnn.SpectralConv1d, lnn.SpectralConv2d]


@register_grad_sampler(_LINEAR)
def linear_gradients(layer: lnn.SpectralLinear, activations: list[Tensor], backprops: Tensor) -> Samples:
    """y = α W x + b: ∇_W = α Σ_t g_t x_tᵀ and ∇_b = Σ_t g_t over the tokens t."""
    return _scaled(compute_linear_grad_sample(layer, activations, backprops), layer)


@register_norm_sampler(_LINEAR)
def linear_norms(layer: lnn.SpectralLinear, activations: list[Tensor], backprops: Tensor) -> Samples:
    """The norms, from the Gram matrices over tokens: ‖Σ_t g_t x_tᵀ‖² = Σ_{t,u} ⟨g_t, g_u⟩⟨x_t, x_u⟩."""
    tokens = [x.flatten(1, -2) if x.dim() > 3 else x for x in (activations[0], backprops)]
    return _scaled(compute_linear_norm_sample(layer, [tokens[0]], tokens[1]), layer)


@register_grad_sampler(_CONV)
def conv_gradients(
    layer: lnn.SpectralConv1d | lnn.SpectralConv2d, activations: list[Tensor], backprops: Tensor
) -> Samples:
    """∇_W = α G Pᵀ with P the patches of the padded input, ∇_b the sum over positions."""
    patches, cotangents = _patches(layer, activations[0]), _grouped(backprops, layer.groups)
    found: Samples = {}
    if layer.weight.requires_grad:
        products = cotangents @ patches.mT
        found[layer.weight] = products.view(len(products), *layer.weight.shape)
    _add_bias(found, layer, backprops)
    return _scaled(found, layer)


@register_norm_sampler(_CONV)
def conv_norms(layer: lnn.SpectralConv1d | lnn.SpectralConv2d, activations: list[Tensor], backprops: Tensor) -> Samples:
    """The norms, by whichever is smaller: Gram matrices over L positions (2 L² entries) or ∇_W itself (p d entries).

    Source: Bu, Mao & Xu (2022), "Scalable and efficient training of large convolutional neural networks with
    differential privacy" (mixed ghost clipping).
    """
    patches, cotangents = _patches(layer, activations[0]), _grouped(backprops, layer.groups)
    found: Samples = {}
    if layer.weight.requires_grad:
        (rows, positions), columns = cotangents.shape[-2:], patches.shape[-2]
        if 2 * positions**2 < rows * columns:
            square = ((cotangents.mT @ cotangents) * (patches.mT @ patches)).flatten(1).sum(1)
            found[layer.weight] = square.clamp(min=0).sqrt()
        else:
            found[layer.weight] = torch.linalg.vector_norm((cotangents @ patches.mT).flatten(1), dim=1)
    bias: Samples = {}
    _add_bias(bias, layer, backprops)
    return _scaled({**found, **_norms(bias)}, layer)


@register_grad_sampler(lnn.LayerCentering)
def centering_gradients(layer: lnn.LayerCentering, activations: list[Tensor], backprops: Tensor) -> Samples:
    """∇_b: the sum over positions, and over channels where one bias serves all."""
    channels = backprops.flatten(2).sum(2) if backprops.dim() > 2 else backprops
    return {layer.bias: channels if len(layer.bias) > 1 else channels.sum(1, keepdim=True)}


@register_grad_sampler(lnn.LPReLU)
def prelu_gradients(layer: lnn.LPReLU, activations: list[Tensor], backprops: Tensor) -> Samples:
    """y = min(0, x) a + max(0, x) with a clamped to ±k: ∇_a = Σ g min(0, x), none where a is beyond ±k."""
    products = (backprops * activations[0].clamp(max=0)).flatten(2 if backprops.dim() > 1 else 1)
    channels = products.sum(2) if products.dim() > 2 else products
    free = (layer.weight.detach().abs() <= layer._coefficient_lip).to(channels.dtype)
    return {layer.weight: (channels if len(layer.weight) > 1 else channels.sum(1, keepdim=True)) * free}


@register_grad_sampler(lnn.HouseHolder)
def householder_gradients(layer: lnn.HouseHolder, activations: list[Tensor], backprops: Tensor) -> Samples:
    """Where ⟨x, (sin θ/2, −cos θ/2)⟩ > 0: ∂a/∂θ = −x sin θ + y cos θ, ∂b/∂θ = x cos θ + y sin θ; elsewhere none."""
    z = activations[0]
    (x, y), (ga, gb) = z.chunk(2, 1), backprops.chunk(2, 1)
    theta = layer.theta.detach().view(1, -1, *[1] * (z.dim() - 2))
    sine, cosine = theta.sin(), theta.cos()
    reflected = x * (theta / 2).sin() - y * (theta / 2).cos() > 0
    slopes = (ga * (y * cosine - x * sine) + gb * (x * cosine + y * sine)) * reflected
    return {layer.theta: slopes.flatten(2).sum(2) if slopes.dim() > 2 else slopes}


@register_grad_sampler(lnn.LipResidual)
def residual_gradients(layer: lnn.LipResidual, activations: list[Tensor], backprops: Tensor) -> Samples:
    """σ(α) x + (1 − σ(α)) y: ∇_α = σ'(α) ⟨g, x − y⟩."""
    share = layer.alpha.detach().sigmoid()
    return {layer.alpha: share * (1 - share) * (backprops * (activations[0] - activations[1])).flatten(1).sum(1)}


def _norm_sampler(gradients: Sampler) -> Sampler:
    """For layers with few parameters: the norms of the gradients themselves."""
    return lambda layer, activations, backprops: _norms(gradients(layer, activations, backprops))


for _layer, _gradients in (
    (lnn.LayerCentering, centering_gradients),
    (lnn.LPReLU, prelu_gradients),
    (lnn.HouseHolder, householder_gradients),
    (lnn.LipResidual, residual_gradients),
):
    register_norm_sampler(_layer)(_norm_sampler(_gradients))


def _patches(layer: lnn.SpectralConv1d | lnn.SpectralConv2d, x: Tensor) -> Tensor:
    """(n, groups, in/groups · k, positions): what the kernel sees at each position."""
    x, kernel, stride = padded(layer, x), layer.kernel_size, layer.stride
    if x.dim() == 3:
        x, kernel, stride = x.unsqueeze(2), (1, *kernel), (1, *stride)
    return _grouped(F.unfold(x, kernel, stride=stride), layer.groups)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(n, channels, *positions) as (n, groups, channels/groups, positions)."""
    return x.flatten(2).unflatten(1, (groups, -1))


def _add_bias(found: Samples, layer: lnn.SpectralConv1d | lnn.SpectralConv2d, backprops: Tensor) -> None:
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops.flatten(2).sum(2)


def _scaled(found: Samples, layer: lnn.Constrained) -> Samples:
    """The weight's share times α."""
    if layer.weight in found and layer.scale != 1.0:
        found[layer.weight] = found[layer.weight] * layer.scale
    return found


def _norms(gradients: Samples) -> Samples:
    return {
        p: torch.linalg.vector_norm(g.flatten(1) if g.dim() > 1 else g[:, None], dim=1) for p, g in gradients.items()
    }
