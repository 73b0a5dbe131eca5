"""The rules of poolings over windows, in one, two and three dimensions."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from deel import torchlip
from torch import nn
from torch.nn import functional as F

from lipdp.bounds.rules import Call, Local, Rule, rule
from lipdp.bounds.windows import axis_overlap, sides
from lipdp.errors import UnsupportedLayerError
from lipdp.nn import pooling


def _windows(call: Call, axes: int) -> tuple[int, int]:
    """n and m of a pooling: the entries of a window, and the most windows that an entry lies in."""
    kernel = sides(call.setting(1, "kernel_size"), axes)
    stride = sides(call.setting(2, "stride") or kernel, axes)
    padding = sides(call.setting(3, "padding", 0), axes)
    settings = zip(call.x.shape[-axes:], kernel, stride, padding, strict=True)
    return math.prod(kernel), math.prod(axis_overlap(n, k, s, p, p) for n, k, s, p in settings)


def _refuse(call: Call, *unusual: bool) -> None:
    if any(unusual):
        raise UnsupportedLayerError(
            f"'{call.name}': ceil_mode, divisor_override, dilation, return_indices and count_include_pad=False with"
            " padding change the weights of a window and have no bound here; leave them at their defaults"
        )


def _max_pool(axes: int) -> Rule:
    def max_pool(call: Call) -> Local:
        """Each window's maximum is 1-Lipschitz in the window; an entry lies in at most m windows: √m."""
        dilated = any(d != 1 for d in sides(call.setting(4, "dilation", 1), axes))
        _refuse(call, dilated, call.setting(5, "ceil_mode", False), call.setting(6, "return_indices", False))
        return Local(gains=(math.sqrt(_windows(call, axes)[1]),), exact=True)

    return max_pool


rule(nn.MaxPool1d, F.max_pool1d, torch.max_pool1d)(_max_pool(1))
rule(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)(_max_pool(2))
rule(nn.MaxPool3d, F.max_pool3d, torch.max_pool3d)(_max_pool(3))


def _avg_pool(axes: int) -> Rule:
    def avg_pool(call: Call) -> Local:
        """⟨1/n, window⟩ has norm 1/√n in the window of n entries; an entry lies in at most m windows: √(m/n)."""
        left_out = any(sides(call.setting(3, "padding", 0), axes)) and not call.setting(5, "count_include_pad", True)
        weighted = axes > 1 and call.setting(6, "divisor_override") is not None
        _refuse(call, left_out, weighted, call.setting(4, "ceil_mode", False))
        entries, overlap = _windows(call, axes)
        return Local(gains=(math.sqrt(overlap / entries),), fan_in=entries)

    return avg_pool


_avg_pool2d = _avg_pool(2)
rule(nn.AvgPool1d, F.avg_pool1d)(_avg_pool(1))
rule(nn.AvgPool2d, F.avg_pool2d)(_avg_pool2d)
rule(nn.AvgPool3d, F.avg_pool3d)(_avg_pool(3))


@rule(torchlip.ScaledAvgPool2d, pooling.ScaledAvgPool2d)
def _scaled_avg_pool2d(call: Call) -> Local:
    """Average pooling times k √n over disjoint windows: k."""
    layer: torchlip.ScaledAvgPool2d = call.module
    plain = _avg_pool2d(call)
    return replace(plain, gains=(plain.gains[0] * layer.scalingFactor * abs(layer._coefficient_lip),))


def _adaptive_entries(call: Call, axes: int) -> int:
    """n, the entries of a window of adaptive pooling; the windows must be equal and disjoint."""
    before, after = call.x.shape[-axes:], call.output_shape[-axes:]
    if any(b % a for b, a in zip(before, after, strict=True)):
        old, new = ("x".join(map(str, shape)) for shape in (before, after))
        raise UnsupportedLayerError(
            f"'{call.name}': adaptive pooling from {old} to {new} has windows that overlap or differ; choose an output"
            " size that divides the input size"
        )
    return math.prod(before) // math.prod(after)


def _adaptive_avg_pool(axes: int) -> Rule:
    def adaptive_avg_pool(call: Call) -> Local:
        """Equal disjoint windows of n entries: 1/√n. Unequal windows are refused."""
        entries = _adaptive_entries(call, axes)
        return Local(gains=(1 / math.sqrt(entries),), fan_in=entries)

    return adaptive_avg_pool


rule(nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d)(_adaptive_avg_pool(1))
rule(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)(_adaptive_avg_pool(2))
rule(nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d)(_adaptive_avg_pool(3))


def _adaptive_max_pool(axes: int) -> Rule:
    def adaptive_max_pool(call: Call) -> Local:
        """The maximum of equal disjoint windows: 1."""
        _refuse(call, call.setting(2, "return_indices", False))
        _adaptive_entries(call, axes)
        return Local(exact=True)

    return adaptive_max_pool


rule(nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d, torch.adaptive_max_pool1d)(_adaptive_max_pool(1))
rule(nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d)(_adaptive_max_pool(2))
rule(nn.AdaptiveMaxPool3d, F.adaptive_max_pool3d)(_adaptive_max_pool(3))


@rule(torchlip.ScaledAdaptiveAvgPool2d)
def _scaled_adaptive_avg_pool2d(call: Call) -> Local:
    entries = math.prod(call.x.shape[-2:])
    return Local(gains=(abs(call.module._coefficient_lip),), fan_in=entries)  # type: ignore[union-attr, arg-type]


@rule(pooling.ScaledL2NormPool2d)
def _l2_norm_pool2d(call: Call) -> Local:
    """The norm of a window is 1-Lipschitz in the window; the windows are disjoint."""
    return Local(fan_in=math.prod(call.module.kernel_size))  # type: ignore[union-attr, arg-type]
