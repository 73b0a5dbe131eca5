"""What each layer of torch.nn becomes in a constrained model: one entry a class, with the reason.

Every counterpart is 1-Lipschitz. A function (`F.relu`, `x.mean((2, 3))`) is written as the module it is short for, so
that this table is the only one.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lipdp.nn.activation import GroupSort2
from lipdp.nn.conv import SpectralConv1d, SpectralConv2d, window_overlap
from lipdp.nn.linear import SpectralLinear
from lipdp.nn.normalization import LayerCentering
from lipdp.nn.plain import Scale
from lipdp.nn.pooling import ScaledL2NormPool2d
from lipdp.nn.walk import find, placed, settings


class NoCounterpartError(Exception):
    """Carries the reason to where all of them are named."""


@dataclass(frozen=True)
class Site:
    """A call of a layer in the traced model.

    Attributes:
        module: the layer.
        shape, output_shape: of one sample.
        channels_last: the nearest weights in front were a dense layer's.
        first: no weights are in front.
        last: what it computes is the model's output.
        bias: biases are kept.
    """

    module: Any
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channels_last: bool = False
    first: bool = False
    last: bool = False
    bias: bool = False

    @property
    def axis(self) -> int:
        """Of the channels."""
        return -1 if self.channels_last and len(self.shape) > 1 else 1

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.axis == -1 else self.shape[0]


@dataclass(frozen=True)
class Choice:
    """The modules that take a layer's place, one behind the other (none: it is left out), and why."""

    modules: tuple[nn.Module, ...]
    why: str


# --- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def constrained(old: Any, bias: bool) -> SpectralLinear | SpectralConv1d | SpectralConv2d:
    """The layer with its weight copied and projected, trainable where it was."""
    options = placed(old.weight)
    new: Any
    kind: Any
    if isinstance(old, nn.Linear):
        new = SpectralLinear(old.in_features, old.out_features, bias and old.bias is not None, **options)
    else:
        *geometry, had_bias, padding_mode = settings(old)
        padding_mode = "circular" if padding_mode == "circular" else "zeros"
        kind = SpectralConv1d if isinstance(old, nn.Conv1d) else SpectralConv2d
        new = kind(*geometry, bias and had_bias, padding_mode, **options)
    new.weight.copy_(old.weight)
    new.weight.copy_(new.constraint.project(new.weight_matrix()).view(new.weight.shape))
    new.weight.requires_grad_(old.weight.requires_grad)
    if new.bias is not None:
        new.bias.copy_(old.bias)
        new._project_bias_()
        new.bias.requires_grad_(old.bias.requires_grad)
    return new.train(old.training)


def _weights(site: Site) -> Choice:
    old, why = site.module, "the nearest orthogonal weights"
    if not isinstance(old, nn.Linear):
        if any(d != 1 for d in old.dilation):
            raise NoCounterpartError(f"dilation={old.dilation}; use dilation=1 and a larger kernel or a stride")
        if old.padding_mode not in ("zeros", "circular"):
            why += f"; padding_mode={old.padding_mode!r} repeats border entries: zeros"
    if old.bias is not None and not site.bias:
        why += "; no bias, which costs noise"
    return Choice((constrained(old, site.bias),), why)


# --- activations -----------------------------------------------------------------------------------------------------


def _activation(site: Site) -> Choice:
    if site.channels % 2 == 0:
        return Choice((GroupSort2(site.axis),), "sorting keeps the norm of values and gradients")
    return Choice((nn.ReLU(),), f"{site.channels} channels are odd and make no pairs; an even width would sort")


def _probabilities(site: Site) -> Choice:
    if not site.last:
        raise NoCounterpartError("probabilities inside a network; only at its output can they be left to the loss")
    return Choice((), "the loss takes logits")


# --- pooling ---------------------------------------------------------------------------------------------------------


def _pair(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _norm_pool(window: tuple[int, ...], site: Site, why: str) -> Choice:
    """Norm pooling over the last axes, less the mean over the channels: large, and the same for all classes."""
    channels = len(site.shape) - len(window)
    if channels > 1:
        raise NoCounterpartError(f"pooling of a sample of {len(site.shape)} axes")
    pool: tuple[nn.Module, ...] = (ScaledL2NormPool2d((window[0], window[1] if len(window) > 1 else 1)),)
    if all(k == 1 for k in window):
        return Choice((), "its windows are single entries")
    if len(window) == 1:
        pool = (nn.Unflatten(2, (site.shape[-1], 1)), *pool, nn.Flatten(2))
    centred = (LayerCentering(dim=(1,)),) if channels and site.shape[0] > 1 else ()
    return Choice((*pool, *centred), why)


def _pooling(site: Site) -> Choice:
    """Over windows side by side if the shape allows, else as it was, times what makes it 1-Lipschitz."""
    old: Any = site.module
    axes = 1 if isinstance(old, (nn.MaxPool1d, nn.AvgPool1d)) else 2
    kernel = _pair(old.kernel_size, axes)
    stride = _pair(old.stride if old.stride is not None else kernel, axes)
    if getattr(old, "return_indices", False):
        raise NoCounterpartError("return_indices=True")
    plain = tuple(n // s for n, s in zip(site.shape[-axes:], stride, strict=True)) == site.output_shape[-axes:]
    if plain and any(s > 1 for s in stride):
        disjoint = kernel == stride
        why = "norm pooling keeps the norm" if disjoint else f"windows of {kernel} overlap: side by side, of {stride}"
        return _norm_pool(stride, site, why)
    uneven = any(_pair(old.padding, axes)) and not getattr(old, "count_include_pad", True)
    changed = old.ceil_mode or getattr(old, "dilation", 1) != 1 or getattr(old, "divisor_override", None)
    if axes == 1 or uneven or changed:
        raise NoCounterpartError(f"windows of {kernel} at steps of {stride} overlap, or reach over the border")
    overlap = math.prod(map(window_overlap, kernel, stride))
    gain = overlap if isinstance(old, nn.MaxPool2d) else overlap / math.prod(kernel)
    return Choice(
        (copy.deepcopy(old), Scale(1 / math.sqrt(gain))),
        f"overlapping windows: kept, times {1 / math.sqrt(gain):.3g}, which makes it 1-Lipschitz",
    )


def _adaptive(site: Site) -> Choice:
    axes = 1 if isinstance(site.module, (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)) else 2
    if getattr(site.module, "return_indices", False):
        raise NoCounterpartError("return_indices=True")
    sizes = list(zip(site.shape[-axes:], site.output_shape[-axes:], strict=True))
    if any(n % m for n, m in sizes):
        raise NoCounterpartError(f"windows of {sizes} (size in, size out) differ; the second must divide the first")
    return _norm_pool(tuple(n // m for n, m in sizes), site, "norm pooling keeps the norm")


# --- normalisation, and what is left out or kept ---------------------------------------------------------------------


def _centering(site: Site, axes: tuple[int, ...]) -> Choice:
    if math.prod(site.shape[a - 1 if a > 0 else a] for a in axes) == 1:
        return Choice((), "it has one channel, and nothing would be left of it")
    return Choice((LayerCentering(dim=axes),), "subtracts a sample's mean; a division by its variance has no bound")


def _batch_norm(site: Site) -> Choice:
    if site.first:
        return Choice((), "statistics of a batch mix samples; scale inputs by public constants")
    return _centering(site, (site.axis,))


def _sample_norm(site: Site) -> Choice:
    old = site.module
    return _centering(site, tuple(range(-len(old.normalized_shape), 0)) if isinstance(old, nn.LayerNorm) else (1,))


def _kept(site: Site) -> Choice:
    return Choice((copy.deepcopy(site.module),), "kept: it moves entries around")


COUNTERPARTS: Mapping[type[nn.Module], Callable[[Site], Choice]] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d), _weights),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
        _activation,
    ),
    **dict.fromkeys((nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Softplus, nn.Softsign), _activation),
    nn.Sigmoid: lambda site: _probabilities(site) if site.last else _activation(site),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _probabilities),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d), _pooling),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), _adaptive
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d), _batch_norm),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d), _sample_norm),
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout), lambda site: Choice((), "the noise regularises")
    ),
    nn.Identity: lambda site: Choice((), "it does nothing"),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), _kept),
}


def choose(site: Site) -> Choice:
    """The counterpart of a layer; NoCounterpartError where there is none."""
    counterpart = find(site.module, COUNTERPARTS)
    if counterpart is None:
        raise NoCounterpartError("no constrained layer stands for it")
    choice: Choice = counterpart(site)
    return choice


# --- functions as modules --------------------------------------------------------------------------------------------

_POOL = ("kernel_size", "stride", "padding")
_FUNCTIONS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), (nn.ReLU, ())),
    **{f: (kind, ()) for f, kind in ((F.relu6, nn.ReLU6), (F.silu, nn.SiLU), (F.mish, nn.Mish), (F.gelu, nn.GELU))},
    **{f: (kind, ()) for f, kind in ((F.leaky_relu, nn.LeakyReLU), (F.elu, nn.ELU), (F.selu, nn.SELU))},
    **{f: (kind, ()) for f, kind in ((F.hardswish, nn.Hardswish), (F.softplus, nn.Softplus), (F.celu, nn.CELU))},
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), (nn.Tanh, ())),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), (nn.Sigmoid, ())),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), (nn.Softmax, ("dim",))),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"), (nn.LogSoftmax, ("dim",))),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode"))),
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), (nn.MaxPool1d, (*_POOL, "dilation", "ceil_mode"))),
    F.avg_pool2d: (nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
    F.avg_pool1d: (nn.AvgPool1d, (*_POOL, "ceil_mode", "count_include_pad")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size",)),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_max_pool1d: (nn.AdaptiveMaxPool1d, ("output_size",)),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout), (nn.Dropout, ())),
}


def as_module(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module | None:
    """The module that a function of one tensor is short for; `args` without that tensor."""
    if target not in _FUNCTIONS:
        return None
    kind, names = _FUNCTIONS[target]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    known = inspect.signature(kind).parameters.keys() - {"inplace"}
    return kind(**{key: value for key, value in given.items() if key in known})
