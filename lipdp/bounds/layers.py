"""The rules of modules with parameters or windows; section by section the table of the README's mathematics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from deel import torchlip
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.bounds.rules import Call, Local, Number, own_axes, rule, times
from lipdp.constraints import Constraint, Spectral, certified_norm, vector_norm
from lipdp.errors import MixesSamplesError, UnsupportedLayerError
from lipdp.nn import conv as lconv
from lipdp.nn import gates, linear, normalization, pooling
from lipdp.nn.normalization import check_centering_axes

# --- dense -----------------------------------------------------------------------------------------------------------


def _dense(call: Call, layer: nn.Linear, constraint: Constraint, scale: float) -> Local:
    """y = α W x + b over R rows: gain α‖W‖₂; ‖Σ g xᵀ‖_F ≤ ‖g‖‖x‖ (Cauchy–Schwarz); b is added R times: √R."""
    count = call.x.numel // layer.in_features
    rows = math.sqrt(count)
    norm = constraint.norm_bound(call.used(layer.weight * scale))
    parameters: dict[str, Number] = {"weight": scale * call.x.value}
    offset: Number = 0.0
    if layer.bias is not None:
        parameters["bias"] = rows
        offset = rows * vector_norm(call.used(layer.bias))
    return Local(gains=(norm,), offset=offset, parameters=parameters, fan_in=max(layer.in_features, count))


@rule(linear.SpectralLinear)
def _spectral_linear(call: Call) -> Local:
    layer: linear.SpectralLinear = call.module  # type: ignore[assignment]
    return replace(_dense(call, layer, layer.constraint, layer.scale), sums_in=torch.float32)


@rule(nn.Linear)
def _linear(call: Call) -> Local:
    return _dense(call, call.module, Spectral(), 1.0)  # type: ignore[arg-type]


# --- convolution -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def axis_overlap(size: int, kernel: int, stride: int, pad_left: int, pad_right: int, *, circular: bool) -> int:
    """The most windows that any entry of an axis lies in, counted.

    At most ⌈k/s⌉ for zero padding, fewer when the axis has fewer windows. Circular padding wider than the kernel's
    reach shows an entry twice and exceeds ⌈k/s⌉, which is why it is counted and not assumed.
    """
    windows = (size + pad_left + pad_right - kernel) // stride + 1
    counts: Counter[int] = Counter()
    for start in range(-pad_left, -pad_left + windows * stride, stride):
        covered = range(start, start + kernel)
        counts.update((u % size for u in covered) if circular else (u for u in covered if 0 <= u < size))
    return max(counts.values(), default=0)


def _convolution(call: Call, layer: nn.Conv1d | nn.Conv2d, scale: float) -> Local:
    """y = α W P: P repeats an entry at most m times, so ‖P‖_F ≤ √m ‖x‖; gain α √m ‖W‖₂; Δ_W = α √m X G.

    With groups W is block-diagonal: the largest of the blocks' norms. A bias is added at H'W' positions: √(H'W').
    """
    lconv.check_convolution(layer)
    axes = len(layer.kernel_size)
    settings = zip(call.x.shape[-axes:], layer.kernel_size, layer.stride, lconv.padding_of(layer), strict=True)
    circular = layer.padding_mode == "circular"
    overlap = math.prod(axis_overlap(n, k, s, *sides, circular=circular) for n, k, s, sides in settings)
    kernel = call.used(layer.weight * scale)
    norm = certified_norm(kernel.reshape(layer.groups, layer.out_channels // layer.groups, -1)).max()
    root = math.sqrt(overlap)
    parameters: dict[str, Number] = {"weight": scale * root * call.x.value}
    offset: Number = 0.0
    positions = math.prod(call.output_shape[-axes:])
    if layer.bias is not None:
        parameters["bias"] = math.sqrt(positions)
        offset = math.sqrt(positions) * vector_norm(call.used(layer.bias))
    fan_in = max(layer.weight[0].numel(), positions)
    return Local(gains=(root * norm,), offset=offset, parameters=parameters, fan_in=fan_in)


@rule(lconv.SpectralConv1d, lconv.SpectralConv2d)
def _spectral_convolution(call: Call) -> Local:
    local = _convolution(call, call.module, call.module.scale)  # type: ignore[arg-type, union-attr]
    return replace(local, sums_in=torch.float32)


@rule(nn.Conv1d, nn.Conv2d)
def _plain_convolution(call: Call) -> Local:
    return _convolution(call, call.module, 1.0)  # type: ignore[arg-type]


# --- projections and gates -------------------------------------------------------------------------------------------


@rule(gates.ValueClip, gates.InputBound)
def _value_clip(call: Call) -> Local:
    """Projection on the ball of radius c, then scaling by r/c: (r/c)-Lipschitz, norm at most r."""
    clip: gates.ValueClip = call.module  # type: ignore[assignment]
    return Local(gains=(clip.radius / clip.bound,), value_cap=clip.radius, fan_in=call.x.numel)


@rule(gates.GradientGate)
def _gradient_gate(call: Call) -> Local:
    return Local(cotangent_cap=call.module.bound, fan_in=call.x.numel)  # type: ignore[union-attr, arg-type]


# --- pooling ---------------------------------------------------------------------------------------------------------


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _windows(call: Call) -> tuple[int, int]:
    """n and m of a 2-D pooling: the entries of a window, and the most windows that an entry lies in."""
    kernel = call.setting(1, "kernel_size")
    stride, padding = call.setting(2, "stride") or kernel, call.setting(3, "padding", 0)
    pairs = zip(call.x.shape[-2:], _pair(kernel), _pair(stride), _pair(padding), strict=True)
    return math.prod(_pair(kernel)), math.prod(axis_overlap(n, k, s, p, p, circular=False) for n, k, s, p in pairs)


def _refuse_pooling(call: Call, *unusual: bool) -> None:
    if any(unusual):
        raise UnsupportedLayerError(
            f"'{call.name}': ceil_mode, divisor_override, dilation, return_indices and count_include_pad=False with"
            " padding change the weights of a window and have no bound here; leave them at their defaults"
        )


@rule(nn.MaxPool2d, F.max_pool2d)
def _max_pool2d(call: Call) -> Local:
    """Each window's maximum is 1-Lipschitz in the window; an entry lies in at most m windows: √m."""
    dilated = any(d != 1 for d in _pair(call.setting(4, "dilation", 1)))
    _refuse_pooling(call, dilated, call.setting(5, "ceil_mode", False), call.setting(6, "return_indices", False))
    return Local(gains=(math.sqrt(_windows(call)[1]),), exact=True)


@rule(nn.AvgPool2d, F.avg_pool2d)
def _avg_pool2d(call: Call) -> Local:
    """⟨1/n, window⟩ has norm 1/√n in the window of n entries; an entry lies in at most m windows: √(m/n)."""
    left_out = any(_pair(call.setting(3, "padding", 0))) and not call.setting(5, "count_include_pad", True)
    weighted = call.setting(6, "divisor_override") is not None
    _refuse_pooling(call, left_out, weighted, call.setting(4, "ceil_mode", False))
    entries, overlap = _windows(call)
    return Local(gains=(math.sqrt(overlap / entries),), fan_in=entries)


@rule(torchlip.ScaledAvgPool2d, pooling.ScaledAvgPool2d)
def _scaled_avg_pool2d(call: Call) -> Local:
    """Average pooling times k √n over disjoint windows: k."""
    layer: torchlip.ScaledAvgPool2d = call.module
    plain = _avg_pool2d(call)
    return replace(plain, gains=(plain.gains[0] * layer.scalingFactor * abs(layer._coefficient_lip),))


@rule(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(call: Call) -> Local:
    """Equal disjoint windows of n entries: 1/√n. Unequal windows are refused."""
    (height, width), (rows, columns) = call.x.shape[-2:], call.output_shape[-2:]
    if height % rows or width % columns:
        raise UnsupportedLayerError(
            f"'{call.name}': adaptive average pooling from {height}x{width} to {rows}x{columns} has windows that"
            " overlap or differ; choose an output size that divides the input size"
        )
    entries = (height // rows) * (width // columns)
    return Local(gains=(1 / math.sqrt(entries),), fan_in=entries)


@rule(torchlip.ScaledAdaptiveAvgPool2d)
def _scaled_adaptive_avg_pool2d(call: Call) -> Local:
    entries = math.prod(call.x.shape[-2:])
    return Local(gains=(abs(call.module._coefficient_lip),), fan_in=entries)  # type: ignore[union-attr, arg-type]


@rule(pooling.ScaledL2NormPool2d)
def _l2_norm_pool2d(call: Call) -> Local:
    """The norm of a window is 1-Lipschitz in the window; the windows are disjoint."""
    return Local(fan_in=math.prod(call.module.kernel_size))  # type: ignore[union-attr, arg-type]


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


_HARMLESS_ROUNDING = 2.0**-6


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
            f"'{call.name}': in {call.dtype} the variance that torch's {type(layer).__name__} computes of values of"
            f" norm {float(call.x.value):.3g} cancels, and no bound holds. Use lipdp.nn.LayerNorm or lipdp.nn.GroupNorm"
            " (C groups for InstanceNorm), with the same arguments, or lipdp.nn.from_torchlip(model), or a smaller"
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
