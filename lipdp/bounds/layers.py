"""The rules of modules with parameters, convolutions aside: dense layers, gates, normalisation, residuals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from deel import torchlip
from torch import Tensor, nn

from lipdp import panels
from lipdp.bounds.rules import Call, Local, Number, least, own_axes, rule, times
from lipdp.constraints import Constraint, Spectral
from lipdp.errors import MixesSamplesError, UnsupportedLayerError
from lipdp.nn import gates, linear, normalization, table
from lipdp.nn.constrained import Constrained
from lipdp.nn.normalization import check_centering_axes
from lipdp.norms import vector_norm

# --- dense -----------------------------------------------------------------------------------------------------------


def _dense(call: Call, layer: nn.Linear, constraint: Constraint, scale: float) -> Local:
    """y = α W x + b over R rows: gain α‖W‖₂; ‖Σ g xᵀ‖_F ≤ ‖g‖‖x‖ (Cauchy–Schwarz); b is added R times: √R."""
    count = call.x.numel // layer.in_features
    rows = math.sqrt(count)
    if panels.is_large(layer.weight) or scale == 1.0:  # without a copy: rounding α W moves it by u √m α ‖W‖₂ at most
        rounding = 0.0 if scale == 1.0 else math.sqrt(min(layer.weight.shape)) * torch.finfo(layer.weight.dtype).eps
        norm = constraint.norm_bound(call.used(layer.weight)) * (scale * (1.0 + rounding))
    else:
        norm = constraint.norm_bound(call.used(layer.weight * scale))
    parameters: dict[str, Number] = {"weight": scale * call.x.value}
    offset: Number = 0.0
    if layer.bias is not None:
        parameters["bias"] = rows
        offset = rows * vector_norm(call.used(layer.bias))
    return Local(gains=(norm,), offset=offset, parameters=parameters, fan_in=max(layer.in_features, count))


def weight_caps(layer: Constrained) -> dict[str, Number]:
    """What a weight gate makes of ∇_W: C at most."""
    return {} if layer.weight_gate is None else {"weight": layer.weight_gate}


@rule(linear.SpectralLinear)
def _spectral_linear(call: Call) -> Local:
    layer: linear.SpectralLinear = call.module  # type: ignore[assignment]
    local = _dense(call, layer, layer.constraint, layer.scale)
    return replace(local, sums_in=torch.float32, parameter_caps=weight_caps(layer))


@rule(nn.Linear)
def _linear(call: Call) -> Local:
    return _dense(call, call.module, Spectral(), 1.0)  # type: ignore[arg-type]


# --- projections and gates -------------------------------------------------------------------------------------------


@rule(gates.ValueClip, gates.InputBound)
def _value_clip(call: Call) -> Local:
    """Projection on the ball of radius c, then scaling by r/c: (r/c)-Lipschitz, norm at most r."""
    clip: gates.ValueClip = call.module  # type: ignore[assignment]
    return Local(gains=(clip.radius / clip.bound,), value_cap=clip.radius, fan_in=call.x.numel)


@rule(gates.GradientGate)
def _gradient_gate(call: Call) -> Local:
    return Local(cotangent_cap=call.module.bound, fan_in=call.x.numel)  # type: ignore[union-attr, arg-type]


@rule(table.TableFeatures)
def _table_features(call: Call) -> Local:
    """Its own constant, and a bound on its values that holds whatever the input.

    What it sums: k products in a frequency's argument, and few operations around them, in place of which 64 are taken.
    """
    features: table.TableFeatures = call.module  # type: ignore[assignment]
    bound = features.value_bound()
    return Local(gains=(features.lipschitz(),), offset=bound, value_cap=bound, fan_in=features.columns + 64)


# --- centering and normalisation -------------------------------------------------------------------------------------


@rule(torchlip.LayerCentering, normalization.LayerCentering)
def _layer_centering(call: Call) -> Local:
    """An orthogonal projection, plus a bias that n entries of the output share: √n. (A bias may widen the output.)"""
    layer: torchlip.LayerCentering = call.module
    axes = check_centering_axes(layer.dim, len(call.x.shape) + 1)
    entries = math.prod(call.x.shape[a - 1] for a in axes)
    if layer.bias is None:
        return Local(fan_in=entries)
    size = math.prod(call.output_shape)
    shared = math.sqrt(size / layer.bias.numel())
    offset = shared * vector_norm(call.used(layer.bias))
    gain = math.sqrt(size / call.x.numel)
    return Local(gains=(gain,), offset=offset, parameters={"bias": shared}, fan_in=size)


@rule(normalization.LayerNorm, normalization.GroupNorm)
def _sample_norm(call: Call) -> Local:
    """y = r (x − μ) γ + β, r = 1/√(var + ε): as `lipdp.nn` computes it, ‖y‖ ≤ √n and ‖∂y/∂x‖ ≤ r ≤ 1/√ε for every x.

    ‖∇_γ‖ ≤ ‖x̂‖_F G ≤ √n G and ‖∇_β‖ ≤ √(entries per β) G. Loose as a gain: fine in front of the first trainable layer.
    """
    layer: nn.LayerNorm | nn.GroupNorm = call.module  # type: ignore[assignment]
    entries = math.sqrt(call.x.numel)
    gain: Number = 1.0 / math.sqrt(layer.eps)
    if layer.weight is None:
        return Local(gains=(gain,), value_cap=entries, fan_in=call.x.numel)
    largest = layer.weight.detach().abs().max().double()
    parameters: dict[str, Number] = {"weight": entries}
    offset: Number = 0.0
    if layer.bias is not None:
        parameters["bias"] = shared = math.sqrt(call.x.numel / layer.bias.numel())
        offset = shared * vector_norm(layer.bias.detach())
    return Local(
        gains=(gain * largest,),
        offset=offset,
        parameters=parameters,
        sums_in=torch.float32,
        value_cap=entries * largest + offset,
        fan_in=call.x.numel,
    )


@rule(nn.RMSNorm)
def _rms_norm(call: Call) -> Local:
    """y = r x γ, r = 1/√(‖x‖²/n + ε) for every row: ‖y‖ ≤ √(entries), and r (I − r² xxᵀ/n) has norm ≤ r ≤ 1/√ε.

    A sum of squares cancels nothing. ‖∇_γ‖ ≤ ‖x̂‖_F G. Loose as a gain, like LayerNorm.
    """
    layer: nn.RMSNorm = call.module  # type: ignore[assignment]
    eps = torch.finfo(call.dtype).eps if layer.eps is None else layer.eps
    if not eps > 0:
        raise UnsupportedLayerError(f"'{call.name}': RMSNorm has no Lipschitz constant with eps={eps}; give eps > 0")
    entries, gain = math.sqrt(call.x.numel), 1.0 / math.sqrt(eps)
    if layer.weight is None:
        return Local(gains=(gain,), value_cap=entries, fan_in=call.x.numel)
    largest = call.used(layer.weight).abs().max().double()
    parameters: dict[str, Number] = {"weight": least(entries, times(gain, call.x.value))}
    return Local(gains=(gain * largest,), parameters=parameters, value_cap=entries * largest, fan_in=call.x.numel)


_HARMLESS = 2.0**-6


@rule(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _torch_norm(call: Call) -> Local:
    r"""torch's kernels where X makes their cancellation harmless; elsewhere `_sample_norm`'s bounds are false for them.

    The kernels differ by device, memory format and version. What is assumed: mean and variance come from sums over the
    n entries of a group, in any order, in one pass (E x² − μ²) or Welford's; then y = a x + b, and the cotangent of x
    is a g + b' x + c, with a, b, b', c computed from r = 1/√(var + ε), μ, Σ g and Σ g x. With u the unit roundoff, ρ =
    2u (n + 8) and κ = ρ X²/(n ε), both at most 1/64:
    - μ is off by ρ X/(2√n), the variance by 2ρ X²/n = 2κ ε at most, so r by a factor within 1 ± 1.1 κ;
    - y is off further by 1.1 ρ r X ≤ 1.1 √n √(ρκ), so that ‖y‖ ≤ √n (1 + 2κ + ρ);
    - the map of g is r (I − 11ᵀ/n − yyᵀ/n), of norm at most r max(1, ‖y‖²/n), up to the rounding of Σ g x − μ Σ g, at
      most 1.5 ρ G X, times r³ ‖x − μ‖/n ≤ 1.1 r X/(n ε), and of b' x + c, less than κ r G: in all r (1 + 10κ + 4ρ).
    A fan-in of 2(n + 8) + 4 X²/ε gives the slack 1 + 16ρ + 32κ, and certificates the error (ρ + 2κ)(‖y‖ + X/√ε). Where
    κ or ρ is larger it is infinite, and so is every bound behind and in front.
    """
    layer: Any = call.module
    if getattr(layer, "track_running_stats", False):
        raise MixesSamplesError(
            f"'{call.name}' keeps running statistics of the batches it saw; leave track_running_stats=False"
        )
    if not layer.eps > 0:
        raise UnsupportedLayerError(
            f"'{call.name}': {layer} has no Lipschitz constant with eps={layer.eps}; give eps > 0"
        )
    entries = _group_entries(call)
    unit = torch.finfo(call.dtype).eps * (entries + 8)
    squared = times(call.x.value, call.x.value)
    error = times(squared, unit / (entries * layer.eps))
    known = not isinstance(error, Tensor) and error < math.inf
    if call.dtype.itemsize < 4 or unit > _HARMLESS or (known and error > _HARMLESS):
        raise UnsupportedLayerError(
            f"'{call.name}': in {call.dtype}, torch's {type(layer).__name__} loses the variance of values of norm"
            f" {float(call.x.value):.3g} to rounding, so no bound holds. Use lipdp.nn.LayerNorm or lipdp.nn.GroupNorm"
            " (C groups for InstanceNorm) with the same arguments, lipdp.nn.from_torchlip(model), or a smaller"
            " InputBound"
        )
    fan_in = times(squared, 4 / layer.eps) + 2 * (entries + 8)
    if isinstance(error, Tensor):
        fan_in = torch.where(error <= _HARMLESS, fan_in, math.inf)
    return replace(_sample_norm(call), fan_in=fan_in)


def _group_entries(call: Call) -> int:
    """n: how many entries of a sample share a mean."""
    layer, shape = call.module, call.x.shape
    if isinstance(layer, nn.LayerNorm):
        return math.prod(layer.normalized_shape)
    if isinstance(layer, nn.GroupNorm):
        return call.x.numel // layer.num_groups
    return math.prod(shape[1:]) if len(shape) > 1 else call.x.numel


# --- trainable activations and residuals of deel-torchlip -------------------------------------------------------------


@rule(torchlip.LPReLU)
def _lprelu(call: Call) -> Local:
    """max(x,0) + a min(x,0) with |a| clamped to k: slope ≤ max(1, k); ∂y/∂a = min(x, 0), so Δ_a ≤ X G."""
    coefficient: float = call.module._coefficient_lip  # type: ignore[assignment, union-attr]
    return Local(gains=(max(1.0, abs(coefficient)),), parameters={"weight": call.x.value}, fan_in=call.x.numel)


@rule(nn.PReLU)
def _prelu(call: Call) -> Local:
    """Slope at most max(1, |a|); ∂y/∂a = min(x, 0), so Δ_a ≤ X G."""
    slope = call.used(call.module.weight).abs().max().double().clamp_min(1.0)  # type: ignore[union-attr, arg-type]
    return Local(gains=(slope,), parameters={"weight": call.x.value}, fan_in=call.x.numel)


@rule(torchlip.HouseHolder)
def _householder(call: Call) -> Local:
    """Reflects pairs (x, y) or leaves them: an isometry; ∂/∂θ has the pair's norm, so Δ_θ ≤ X G."""
    own_axes(call, call.x, [call.argument(1, "axis", 1)])
    return Local(parameters={"theta": call.x.value}, fan_in=call.x.numel)


@rule(torchlip.LipResidual)
def _lip_residual(call: Call) -> Local:
    """a x + (1−a) y with a = sigmoid(α): gains a and 1 − a; |∂a/∂α| ≤ 1/4, so Δ_α ≤ (X_x + X_y) G / 4."""
    share = torch.sigmoid(call.module.alpha.detach().double())  # type: ignore[union-attr, operator]
    x = call.argument(0, "x")
    gains = tuple(share if source is x else 1 - share for source in call.inputs)
    delta = sum(source.value for source in call.inputs) / 4
    return Local(gains=gains, parameters={"alpha": delta}, fan_in=call.x.numel)
