"""From deel-torchlip to lipdp, and from lipdp to plain torch: other modules, the same function.

Both directions copy the model and replace modules wherever they are, by one table each: module class → converter. A
table serves subclasses that inherit `forward` unchanged, no others.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from deel import torchlip
from deel.torchlip.modules.module import _LipschitzCoefMultiplication
from deel.torchlip.utils.bjorck_norm import _BjorckNorm
from deel.torchlip.utils.frobenius_norm import _FrobeniusNorm
from deel.torchlip.utils.lconv_norm import _LConvNorm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipdp.constraints import Constraint, Frobenius, Orthogonal, Spectral
from lipdp.errors import MixesSamplesError
from lipdp.nn.activation import FullSort, GroupSort, GroupSort2
from lipdp.nn.conv import SpectralConv1d, SpectralConv2d, window_overlap
from lipdp.nn.gates import GradientGate, ValueClip
from lipdp.nn.linear import FrobeniusLinear, SpectralLinear
from lipdp.nn.normalization import GroupNorm, LayerCentering, LayerNorm
from lipdp.nn.plain import Ball, BothSigns, Centred, Reflect, Scale, SortGroups, SortPairs, inlined
from lipdp.nn.pooling import InvertibleDownSampling, InvertibleUpSampling, ScaledAvgPool2d, ScaledL2NormPool2d
from lipdp.nn.walk import Converter, Table, fill, placed, refuse, replaced, settings


def from_torchlip(model: nn.Module) -> nn.Module:
    """A copy of a deel-torchlip model with lipdp's layers, computing the same function.

    deel-torchlip computes the weight it uses from a raw one, W = k c N(V) with N its normalisation, c the convolution's
    coefficient and k the layer's constant. The gradient in V has no bound (it scales as 1/‖V‖), so the layer of lipdp
    holds N(V) itself as a plain parameter, with the constraint N aims at and k c as its scale.

    Guarantees: the same outputs in the mode (training or evaluation) the model is in, up to rounding, and up to 1e-6 a
    window for L2-norm pooling. Names, modes, devices, dtypes and `requires_grad` are kept, a module used twice stays
    one module, and the model given is not changed. Bounds come from the weights as they are, never from what
    deel-torchlip states:
    - `FrobeniusLinear(disjoint_neurons=True)` has rows of norm 1, so a norm of up to √out; it gets the ball of that
      radius as its constraint;
    - a norm above 1 because power iteration had not converged is seen, and projected away at the first step;
    - a bias is projected on a ball that just holds it (of radius 1 if it is shorter).
    torch's LayerNorm, GroupNorm and InstanceNorm, whose kernels keep no bound at large means, become lipdp's.

    Args:
        model: any module with layers of deel-torchlip in it, by registered attributes.

    Raises:
        UnsupportedLayerError: padding that repeats border entries (reflect, replicate, symmetric), dilation, pooling
            with `ceil_mode` or `divisor_override`, transposed convolution, scales shared by a `SharedLipFactory`, a
            reparametrised layer that is not deel-torchlip's, hooks on a layer to be replaced.
        MixesSamplesError: `BatchCentering`, `BatchLipNorm`, `LayerCentering` over all axes.

    >>> from deel import torchlip
    >>> lipdp.nn.from_torchlip(torchlip.Sequential(torchlip.SpectralLinear(8, 4), torchlip.GroupSort2()))
    Sequential(
      (0): SpectralLinear(in_features=8, out_features=4, bias=True)
      (1): GroupSort()
    )

    Source: deel-torchlip 1.0 (parametrisations of its layers).
    """
    for name, module in model.named_modules():
        if isinstance(module, torchlip.ScaledLipschitzModule) and module.factory is not None:
            refuse(name, module, "its scale is shared by a SharedLipFactory; bounds are computed layer by layer")
    converted = replaced(copy.deepcopy(model), _FROM_TORCHLIP, "", {})
    for name, module in converted.named_modules():
        if parametrize.is_parametrized(module):
            refuse(
                name,
                module,
                "it is reparametrised and not a layer of deel-torchlip; the gradient of the raw weight has no bound."
                " Call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first",
            )
    return converted


def to_torch(model: nn.Module) -> nn.Module:
    """A copy of a lipdp model in plain torch.nn layers, computing the same function.

    Dense and convolutional layers become `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` with the scale α folded into the weight;
    L2-norm pooling `nn.LPPool2d`, average pooling `nn.AvgPool2d`, pixel shuffles theirs, `LPReLU` `nn.PReLU`. A gate
    does nothing forwards: `nn.Identity`. What torch.nn has no equivalent of (sorting, projections, centering, residual
    sums) becomes a `torch.fx.GraphModule` of torch's own operations: the result needs neither lipdp nor deel-torchlip,
    and `torch.jit.script`, `torch.export` and ONNX take it.

    Guarantees: the same outputs up to rounding, and up to 1e-6 a window for L2-norm pooling. Names, modes, devices,
    dtypes and `requires_grad` are kept, and the model given is not changed. The export is for inference: it has no
    constraints and no gates, `nn.LPPool2d` has NaN gradients on windows of zeros, and a parameter shared by two layers
    becomes two.

    Args:
        model: any module with layers of `lipdp.nn` in it, by registered attributes.

    >>> lipdp.nn.to_torch(torch.nn.Sequential(lipdp.nn.SpectralConv2d(1, 4, 3), lipdp.nn.ScaledL2NormPool2d(2)))
    Sequential(
      (0): Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1), bias=False)
      (1): LPPool2d(norm_type=2, kernel_size=(2, 2), stride=None, ceil_mode=False)
    )
    """
    return inlined(replaced(copy.deepcopy(model), _TO_TORCH, "", {}))


# --- deel-torchlip → lipdp -------------------------------------------------------------------------------------------


def _steps(layer: Any) -> list[nn.Module]:
    """The parametrisations deel-torchlip applies to a layer's weight, in order."""
    return list(layer.parametrizations.weight) if parametrize.is_parametrized(layer, "weight") else []


def _scale(layer: nn.Module) -> float:
    """The constants k · c that deel-torchlip multiplies the normalised weight by."""
    scale = 1.0
    for step in _steps(layer):
        if isinstance(step, _LipschitzCoefMultiplication):
            scale *= float(step._coef)
        elif isinstance(step, _LConvNorm):
            scale *= float(step.lconv_coefficient)
    return scale


def _sequential(name: str, old: nn.Sequential) -> nn.Module:
    return nn.Sequential(OrderedDict(old._modules))


def _constraint(layer: nn.Module, outputs: int, groups: int = 1) -> Constraint:
    """The set that deel-torchlip's normalisation aims at. Björck looks at all groups as one matrix, which does not make
    every group orthogonal; its norm is at most 1 all the same."""
    for step in _steps(layer):
        if isinstance(step, _BjorckNorm) and groups == 1:
            return Orthogonal()
        if isinstance(step, _FrobeniusNorm):
            return Frobenius(math.sqrt(outputs) if step.dim_norm is not None else 1.0)
    return Spectral()


def _bias_radius(layer: nn.Module) -> float:
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return 1.0 if bias is None else max(1.0, bias.detach().double().norm().item() * (1 + 1e-6))


@torch.no_grad()
def _dense(name: str, old: torchlip.SpectralLinear | torchlip.FrobeniusLinear) -> nn.Module:
    weight, scale = old.weight, _scale(old)
    constraint = _constraint(old, old.out_features)
    kind = FrobeniusLinear if isinstance(constraint, Frobenius) else SpectralLinear
    new = kind(
        *(old.in_features, old.out_features, old.bias is not None),
        constraint=constraint,
        k_coef_lip=scale,
        bias_radius=_bias_radius(old),
        **placed(weight),
    )
    return fill(new, old, weight / scale)


def _check_convolution(name: str, old: torchlip.PadConv1d | torchlip.PadConv2d) -> None:
    """`old_padding_mode` is what was asked for: symmetric padding hides as a module and padding_mode='zeros'."""
    if old.old_padding_mode not in ("zeros", "circular"):
        refuse(
            name,
            old,
            f"padding_mode={old.old_padding_mode!r} repeats border entries, which raises the layer's norm beyond the"
            " bound; use 'zeros' or 'circular'",
        )
    if any(d != 1 for d in old.dilation):
        refuse(name, old, f"dilation={old.dilation}: the overlap of its windows has no bound here; use dilation=1")


@torch.no_grad()
def _convolution(name: str, old: torchlip.SpectralConv1d | torchlip.SpectralConv2d) -> nn.Module:
    """lipdp computes k/√m · W; deel-torchlip's coefficient is 1/√m in two dimensions and 1/m in one."""
    _check_convolution(name, old)
    weight, scale = old.weight, _scale(old)
    overlap = math.prod(map(window_overlap, old.kernel_size, old.stride))
    kind = SpectralConv1d if isinstance(old, nn.Conv1d) else SpectralConv2d
    new = kind(
        *settings(old),
        constraint=_constraint(old, old.out_channels, old.groups),
        k_coef_lip=scale * math.sqrt(overlap),
        bias_radius=_bias_radius(old),
        **placed(weight),
    )
    return fill(new, old, weight / new.scale)


def _plain_convolution(name: str, old: torchlip.PadConv1d | torchlip.PadConv2d) -> nn.Module:
    _check_convolution(name, old)
    kind = nn.Conv1d if isinstance(old, nn.Conv1d) else nn.Conv2d
    return fill(kind(*settings(old), **placed(old.weight)), old, old.weight)


def _check_pooling(name: str, old: nn.Module) -> None:
    if getattr(old, "ceil_mode", False) or getattr(old, "divisor_override", None) is not None:
        refuse(name, old, "ceil_mode and divisor_override change the weights of a window and break the constant")


def _average_pooling(name: str, old: torchlip.ScaledAvgPool2d) -> nn.Module:
    _check_pooling(name, old)
    return ScaledAvgPool2d(old.kernel_size, k_coef_lip=old._coefficient_lip)


def _norm_pooling(name: str, old: torchlip.ScaledL2NormPool2d) -> nn.Module:
    _check_pooling(name, old)
    pool = ScaledL2NormPool2d(old.kernel_size)
    k = old._coefficient_lip
    return pool if k == 1.0 else nn.Sequential(pool, Scale(k)).train(old.training)


def _sorting(name: str, old: torchlip.GroupSort) -> nn.Module:
    """Equal entries share a gradient in deel-torchlip, which doubles it; lipdp's sort is a permutation there too."""
    k = old._coefficient_lip
    return FullSort(k) if old.group_size is None else GroupSort(old.group_size, k)


def _centering(name: str, old: torchlip.LayerCentering) -> nn.Module:
    if old.dim is None:
        _batch_statistics(name, old)
    new = LayerCentering(1 if old.bias is None else old.bias.numel(), old.dim, old.bias is not None)
    new.bias = old.bias
    return new


def _as(kind: Any) -> Converter:
    """A normalisation in the other library, with the same parameters."""

    def convert(name: str, old: Any) -> nn.Module:
        size = (old.normalized_shape,) if isinstance(old, nn.LayerNorm) else (old.num_groups, old.num_channels)
        new = kind(*size, old.eps, old.weight is not None)
        new.weight, new.bias = old.weight, old.bias
        return new

    return convert


def _instance_normalisation(name: str, old: Any) -> nn.Module:
    if old.track_running_stats:
        _batch_statistics(name, old)
    new = GroupNorm(old.num_features, old.num_features, old.eps, old.affine)
    new.weight, new.bias = old.weight, old.bias
    return new


def _batch_statistics(name: str, old: nn.Module) -> nn.Module:
    raise MixesSamplesError(
        f"'{name or 'the model'}' ({type(old).__name__}) takes or keeps means over the batch: one record changes the"
        " outputs of others, so no per-sample bound exists. Use LayerCentering over axes of one sample"
    )


def _refused(reason: str) -> Converter:
    def convert(name: str, old: nn.Module) -> nn.Module:
        refuse(name, old, reason)

    return convert


_FROM_TORCHLIP: Table = {
    torchlip.SpectralLinear: _dense,
    torchlip.FrobeniusLinear: _dense,
    torchlip.SpectralConv1d: _convolution,
    torchlip.SpectralConv2d: _convolution,
    torchlip.FrobeniusConv2d: _convolution,
    torchlip.PadConv1d: _plain_convolution,
    torchlip.PadConv2d: _plain_convolution,
    torchlip.SpectralConvTranspose2d: _refused(
        "lipdp has no transposed convolution; use InvertibleUpSampling and SpectralConv2d"
    ),
    torchlip.ScaledAvgPool2d: _average_pooling,
    torchlip.ScaledL2NormPool2d: _norm_pooling,
    torchlip.ScaledAdaptativeL2NormPool2d: _refused(
        "its window depends on the input; use lipdp.nn.ScaledL2NormPool2d((height, width))"
    ),
    torchlip.GroupSort: _sorting,
    torchlip.FullSort: _sorting,
    torchlip.GroupSort2: _sorting,
    torchlip.InvertibleDownSampling: lambda name, old: InvertibleDownSampling(old.downscale_factor),
    torchlip.InvertibleUpSampling: lambda name, old: InvertibleUpSampling(old.upscale_factor),
    torchlip.LayerCentering: _centering,
    torchlip.BatchCentering: _batch_statistics,
    torchlip.BatchLipNorm: _batch_statistics,
    torchlip.Sequential: _sequential,
    nn.LayerNorm: _as(LayerNorm),
    nn.GroupNorm: _as(GroupNorm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_normalisation),
}


# --- lipdp → torch ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _to_linear(name: str, old: SpectralLinear) -> nn.Module:
    new = nn.Linear(old.in_features, old.out_features, old.bias is not None, **placed(old.weight))
    return fill(new, old, old.weight * old.scale)


@torch.no_grad()
def _to_convolution(name: str, old: SpectralConv1d | SpectralConv2d) -> nn.Module:
    kind = nn.Conv1d if isinstance(old, nn.Conv1d) else nn.Conv2d
    return fill(kind(*settings(old), **placed(old.weight)), old, old.weight * old.scale)


def _to_average_pooling(name: str, old: ScaledAvgPool2d) -> nn.Module:
    """sum / (√n / k): a divisor where it is an integer (2 for 2x2), else a constant behind the pooling."""
    divisor = old.scalingFactor / old._coefficient_lip
    if divisor == int(divisor):
        return nn.AvgPool2d(old.kernel_size, divisor_override=int(divisor))
    scale = old.scalingFactor * old._coefficient_lip
    return nn.Sequential(nn.AvgPool2d(old.kernel_size), Scale(scale)).train(old.training)


def _to_prelu(name: str, old: torchlip.LPReLU) -> nn.Module:
    k = old._coefficient_lip
    new = nn.PReLU(old.num_parameters, **placed(old.weight))
    new.weight.data.copy_(old.weight.detach().clamp(-k, k))
    return new.requires_grad_(old.weight.requires_grad)


_TO_TORCH: Table = {
    SpectralLinear: _to_linear,
    SpectralConv1d: _to_convolution,
    SpectralConv2d: _to_convolution,
    GroupSort2: lambda name, old: SortPairs(old.dim),
    GroupSort: lambda name, old: SortGroups(old.group_size, float(old._coefficient_lip)),
    ValueClip: lambda name, old: Ball(old.bound, old.radius),
    LayerCentering: lambda name, old: Centred(tuple(old.dim), old.bias),
    torchlip.MaxMin: lambda name, old: BothSigns(1 if old._dim is None else old._dim, float(old._coefficient_lip)),
    torchlip.HouseHolder: lambda name, old: Reflect(old.theta),
    GradientGate: lambda name, old: nn.Identity(),
    ScaledL2NormPool2d: lambda name, old: nn.LPPool2d(2, old.kernel_size),
    ScaledAvgPool2d: _to_average_pooling,
    InvertibleDownSampling: lambda name, old: nn.PixelUnshuffle(old.downscale_factor),
    InvertibleUpSampling: lambda name, old: nn.PixelShuffle(old.upscale_factor),
    torchlip.LPReLU: _to_prelu,
    LayerNorm: _as(nn.LayerNorm),
    GroupNorm: _as(nn.GroupNorm),
    torchlip.Sequential: _sequential,
}
