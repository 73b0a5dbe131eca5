"""The rules of operations without parameters, each registered for its module, its function and its tensor method."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from deel import torchlip
from torch import nn
from torch.nn import functional as F

from lipdp.bounds.rules import Call, Input, Local, Number, own_axes, rule, times
from lipdp.bounds.steady import steady_norm
from lipdp.errors import MixesSamplesError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.nn.activation import BetaAbs, FullSort, GroupSort, GroupSort2
from lipdp.nn.pooling import InvertibleDownSampling, InvertibleUpSampling
from lipdp.nn.shift import SpatialShift

# --- entrywise: f is L-Lipschitz on the line, so on vectors; f(0) ≠ 0 adds √n |f(0)| ---------------------------------


def entrywise(lipschitz: float, *targets: object, at_zero: float = 0.0, cap: float = math.inf) -> None:
    """Register |f(a) − f(b)| ≤ L |a − b|, f(0) and sup |f| for every form of an entrywise function."""

    @rule(*targets)
    def apply(call: Call) -> Local:
        root = math.sqrt(call.x.numel)
        return Local(gains=(lipschitz,), offset=root * abs(at_zero), value_cap=root * cap)


entrywise(1.0, nn.ReLU, torch.relu, torch.relu_, F.relu, "relu", "relu_")
entrywise(1.0, nn.ReLU6, F.relu6, cap=6.0)
entrywise(1.0, nn.Tanh, torch.tanh, F.tanh, "tanh", cap=1.0)
entrywise(1.0, torch.abs, "abs", operator.abs)
entrywise(1.0, torch.neg, "neg", operator.neg)
entrywise(1.0, torch.sin, "sin", cap=1.0)
entrywise(1.0, torch.cos, "cos", at_zero=1.0, cap=1.0)
entrywise(0.25, nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", at_zero=0.5, cap=1.0)
entrywise(1.129, nn.GELU, F.gelu)  # sup of Φ(x) + xφ(x) = 1.12890… at √2; the tanh form peaks at 1.12899…
entrywise(1.0999, nn.SiLU, F.silu)  # sup of s(x)(1 + x(1 − s(x))) = 1.09983… at x = 2.3994
entrywise(1.0889, nn.Mish, F.mish)  # sup of the derivative = 1.08850…
entrywise(1.0, nn.Softsign, F.softsign, cap=1.0)
entrywise(1.0, nn.Tanhshrink, F.tanhshrink)  # slope tanh² < 1
entrywise(1.0, torch.atan, "atan", cap=1.5708)
entrywise(1.1284, torch.erf, "erf", cap=1.0)  # slope 2/√π = 1.12837… at 0
entrywise(1.0, nn.Softshrink, F.softshrink)


@rule(nn.Softplus, F.softplus)
def _softplus(call: Call) -> Local:
    """log(1 + e^(βx))/β: slope a sigmoid ≤ 1; f(0) = log 2 / β. Above the threshold t it is x: a jump of e^(−t)/β."""
    beta, threshold = float(call.setting(1, "beta", 1.0)), call.setting(2, "threshold", 20.0)
    if not threshold >= 20:
        raise UnsupportedLayerError(f"'{call.name}': softplus with threshold={threshold} jumps; leave it at 20")
    return Local(offset=math.sqrt(call.x.numel) * math.log(2) / abs(beta))


@rule(nn.LeakyReLU, F.leaky_relu)
def _leaky_relu(call: Call) -> Local:
    return Local(gains=(max(1.0, abs(float(call.setting(1, "negative_slope", 0.01)))),))


@rule(nn.Softmax, torch.softmax, F.softmax, "softmax")
def _softmax(call: Call) -> Local:
    """Jacobian diag(p) − ppᵀ: spectral norm ≤ 1/2 (Gershgorin: 2p(1 − p)); a row of probabilities has norm ≤ 1."""
    (axis,) = own_axes(call, call.x, [call.setting(1, "dim")])
    classes = call.x.shape[axis - 1]
    return Local(gains=(0.5,), value_cap=math.sqrt(call.x.numel / classes), offset=math.inf, fan_in=classes)


# --- permutations of entries: sorting, reshaping, shuffling ----------------------------------------------------------


@rule(GroupSort2)
def _pair_sort(call: Call) -> Local:
    """A permutation that depends on the input, continuous and piecewise linear: an isometry almost everywhere."""
    own_axes(call, call.x, [call.module.dim])  # type: ignore[union-attr, list-item]
    return Local(exact=True)


@rule(BetaAbs)
def _beta_abs(call: Call) -> Local:
    """Signs of entries: | |a| − |b| | ≤ |a − b|."""
    own_axes(call, call.x, [call.module.dim])  # type: ignore[union-attr, list-item]
    return Local(exact=True)


@rule(SpatialShift)
def _spatial_shift(call: Call) -> Local:
    """Every entry at one other place at most, zeros elsewhere."""
    return Local(exact=True)


@rule(GroupSort, FullSort)
def _group_sort(call: Call) -> Local:
    """The same, of groups along axis 1, times k."""
    return Local(gains=(_coefficient(call),))


@rule(torchlip.GroupSort, torchlip.GroupSort2, torchlip.FullSort)
def _torchlip_group_sort(call: Call) -> Local:
    """Pairs are sorted as (min, max), and where both entries are equal both gradients go to the first of them: √2."""
    channels = call.x.shape[0]
    pairs = min(call.module.group_size or channels, channels) == 2  # type: ignore[union-attr, type-var]
    return Local(gains=(_coefficient(call) * (math.sqrt(2) if pairs else 1.0),))


@rule(torchlip.MaxMin)
def _max_min(call: Call) -> Local:
    """x ↦ (relu(x), relu(−x)): |relu(a) − relu(b)|² + |relu(−a) − relu(−b)|² ≤ |a − b|²."""
    return Local(gains=(_coefficient(call),))


def _coefficient(call: Call) -> float:
    """deel-torchlip's k, which multiplies the output."""
    return abs(float(call.module._coefficient_lip))  # type: ignore[union-attr, arg-type]


@rule(InvertibleDownSampling, InvertibleUpSampling, torchlip.InvertibleDownSampling, torchlip.InvertibleUpSampling)
def _pixel_shuffle(call: Call) -> Local:
    return Local(exact=True)


@rule(
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose, torch.movedim),
    *(F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle),
    *(
        "flatten",
        "reshape",
        "view",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "movedim",
        "contiguous",
        "unflatten",
    ),
)
def _rearrange(call: Call) -> Local:
    """The entries of a sample, in another order. (That samples stay apart is checked on the shapes and by probing.)"""
    if any(isinstance(a, torch.dtype) for a in (*call.args, *call.kwargs.values())):
        raise UnsupportedOperationError(f"node '{call.name}' reads the bits of a tensor as another dtype")
    return Local(exact=True)


@rule(torch.roll, "roll")
def _roll(call: Call) -> Local:
    own_axes(call, call.x, _dims(call, 2, "dims"))
    return Local(exact=True)


@rule(torch.flip, "flip")
def _flip(call: Call) -> Local:
    own_axes(call, call.x, _dims(call, 1, "dims"))
    return Local(exact=True)


@rule(torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split")
def _split(call: Call) -> Local:
    """Tensors side by side: every entry in one of them. (Their cotangents are added, which is more than √ΣG².)"""
    own_axes(call, call.x, [call.argument(2, "dim", 0)])
    return Local(exact=True)


@rule(torch.unbind, "unbind")
def _unbind(call: Call) -> Local:
    own_axes(call, call.x, [call.argument(1, "dim", 0)])
    return Local(exact=True)


def _dims(call: Call, position: int, name: str) -> list[Any]:
    """Axes given as one number, as a sequence or as the rest of the arguments; none given means all of them."""
    rest = list(call.args[position:]) or [call.kwargs.get(name, call.kwargs.get("axis"))]
    dims = list(rest[0]) if isinstance(rest[0], (tuple, list)) else rest
    if not dims or None in dims:
        raise MixesSamplesError(f"node '{call.name}' works on every axis, the batch included; name axes of one sample")
    return dims


# --- sums, products, concatenation -----------------------------------------------------------------------------------


def _broadcast(call: Call, source: Input) -> float:
    """An input repeated r times to fill the output has r times its squared norm. Samples must not be broadcast over."""
    full = len(call.output_shape) + 1
    ndim = len(source.shape) + (source.constant is None)
    if source.constant is None and ndim != full:
        raise MixesSamplesError(
            f"node '{call.name}' combines tensors of {ndim} and {full} axes: the batch axis of one is matched with"
            " another axis; give both the same number of axes (unsqueeze)"
        )
    if source.constant is not None and ndim == full and source.shape[0] != 1:
        raise MixesSamplesError(
            f"node '{call.name}' combines a constant of shape {source.shape} along the batch axis; its first axis must"
            " be 1"
        )
    return math.sqrt(math.prod(call.output_shape) / source.numel)


def _numbers(call: Call) -> list[float]:
    """Absolute values of the operands that are numbers; anything else but a tensor has no bound."""
    operands = [*call.args, *(call.kwargs[k] for k in ("input", "other") if k in call.kwargs)]
    if len(operands) != 2:  # torch.add(x, alpha, y), which torch still takes
        raise UnsupportedOperationError(
            f"node '{call.name}' is given {len(operands)} operands; give two, and a factor by its name (alpha=)"
        )
    plain = [a for a in operands if not isinstance(a, Input)]
    constants = [*plain, call.kwargs.get("alpha", 1.0)]
    if not all(isinstance(c, (int, float)) for c in constants) or set(call.kwargs) - {"alpha", "input", "other"}:
        raise UnsupportedOperationError(
            f"node '{call.name}' combines a tensor with {constants!r}; only tensors of the model and constant numbers"
            " have a bound (a number computed from the size of the batch is not constant)"
        )
    return [abs(float(a)) for a in plain]


@rule(operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_")
def _add(call: Call) -> Local:
    """±a ±αb: norms add. A scalar c adds √n |c|."""
    numbers, alpha = _numbers(call), abs(float(call.kwargs.get("alpha", 1.0)))
    offset = math.sqrt(math.prod(call.output_shape)) * sum(numbers) * max(1.0, alpha)
    scaled = call.argument(1, "other")
    gains = tuple(_broadcast(call, source) * (alpha if source is scaled else 1.0) for source in call.inputs)
    return Local(gains=gains, offset=offset, fan_in=_repeats(call))


def _repeats(call: Call) -> int:
    """The most terms that meet in one entry, forwards or in the gradient of an input that is repeated."""
    return max(2, *(math.prod(call.output_shape) // source.numel for source in call.inputs))


@rule(operator.mul, operator.imul, torch.mul, "mul", "mul_")
def _mul(call: Call) -> Local:
    """c·a: |c|. a ⊙ w with w constant: max|w| in a, X_a in w. Two activations: each other's value bound."""
    scalars = _numbers(call)
    if scalars:
        return Local(gains=(scalars[0],))
    (first, second), repeats = call.inputs, [_broadcast(call, source) for source in call.inputs]
    gains = (_factor(call, first, repeats[0], second, repeats[1]), _factor(call, second, repeats[1], first, repeats[0]))
    product = times(gains[0], first.value) if first.constant is None else times(gains[1], second.value)
    return Local(gains=gains, value_cap=product, fan_in=_repeats(call))


def _factor(call: Call, own: Input, own_repeats: float, other: Input, other_repeats: float) -> Number:
    """Gain of a ⊙ b in a: max|b| on every repetition of a, if b is constant; else ‖b‖ as it fills the output.

    For dL/da_j = Σ_{i ∈ S_j} g_i b_i, Cauchy–Schwarz gives |dL/da_j| ≤ ‖g_{S_j}‖ ‖b_{S_j}‖.
    """
    if other.constant is None:
        return times(other_repeats, other.value)
    return own_repeats * call.used(other.constant).abs().max().double()


@rule(operator.truediv, torch.div, "div", "div_")
def _div(call: Call) -> Local:
    divisor = call.argument(1, "other")
    if not isinstance(divisor, (int, float)) or divisor == 0 or call.kwargs.get("rounding_mode") is not None:
        raise UnsupportedOperationError(
            f"node '{call.name}' divides by {divisor!r}; only division by a non-zero constant number, without rounding,"
            " has a bound"
        )
    return Local(gains=(1.0 / abs(float(divisor)),))


@rule(torch.clone, "clone", "float", "double", "to", "type_as")
def _cast(call: Call) -> Local:
    """The same numbers in a dtype that holds them: rounding moves near inputs apart, so a narrower one is refused."""
    given = [a for a in (*call.args[1:], *call.kwargs.values()) if isinstance(a, torch.dtype)]
    named = {"float": torch.float32, "double": torch.float64}.get(call.name.partition("_")[0])
    dtype = given[0] if given else named or call.dtype
    others = [0.0] * (len(call.inputs) - 1)
    if not dtype.is_floating_point or dtype.itemsize < max(4, call.dtype.itemsize):
        raise UnsupportedOperationError(
            f"node '{call.name}' casts to the dtype {dtype}; leave the cast out, or use torch.autocast for less than"
            " float32"
        )
    return Local(gains=(1.0, *others))


@rule(steady_norm)
def _norm(call: Call) -> Local:
    """‖·‖₂ over axes of a sample: 1-Lipschitz."""
    order, dim = call.argument(1, "p", 2), call.argument(2, "dim")
    if order not in (2, None, "fro") or dim is None:
        raise UnsupportedOperationError(f"node '{call.name}': a norm has a bound with p=2 and dim= axes of one sample")
    axes = own_axes(call, call.x, [dim] if isinstance(dim, int) else dim)
    return Local(fan_in=math.prod(call.x.shape[a - 1] for a in axes))


@rule(torch.cat, torch.concat, torch.concatenate, torch.stack)
def _concatenate(call: Call) -> Local:
    """√Σ X_j²; each input gets its slice of the cotangent: norm ≤ G."""
    dim = call.argument(1, "dim", 0)
    if dim % (len(call.output_shape) + 1) == 0:
        raise MixesSamplesError(f"node '{call.name}' concatenates along the batch axis; use a later axis")
    return Local(gains=(1.0,) * len(call.inputs), orthogonal=True, exact=True)


# --- reductions and indexing within a sample -------------------------------------------------------------------------


def _reduction(gain: Callable[[int], float], *targets: object) -> None:
    @rule(*targets)
    def reduce(call: Call) -> Local:
        dims = call.argument(1, "dim", call.kwargs.get("axis"))
        if dims is None:
            raise MixesSamplesError(f"node '{call.name}' reduces over every axis, the batch included; give `dim`")
        axes = own_axes(call, call.x, [dims] if isinstance(dims, int) else dims)
        entries = math.prod(call.x.shape[a - 1] for a in axes)
        return Local(gains=(gain(entries),), fan_in=entries)


_reduction(lambda n: 1.0 / math.sqrt(n), torch.mean, "mean")
_reduction(lambda n: math.sqrt(n), torch.sum, "sum")
_reduction(lambda n: 1.0, torch.amax, "amax", torch.amin, "amin")


@rule(operator.getitem)
def _getitem(call: Call) -> Local:
    """A slice of a sample: a coordinate projection. Every sample must keep its place on the batch axis."""
    index = call.args[1]
    if call.x.is_tuple:  # the i-th of a tuple of tensors
        return Local(exact=True)
    if isinstance(index, tuple):
        axes = [i for i in index if isinstance(i, (int, slice)) and not isinstance(i, bool)]
        reached = bool(index) and index[0] is Ellipsis and len(axes) > len(call.x.shape)  # `...` stands for no axis
        if reached or (index and index[0] not in (slice(None), Ellipsis)):
            raise MixesSamplesError(f"node '{call.name}' indexes the batch axis in {index!r}; begin with `:`")
        if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index):
            raise UnsupportedOperationError(
                f"node '{call.name}' indexes with {index!r}; only numbers and slices are sure not to repeat entries"
            )
    elif not (isinstance(index, slice) and index == slice(None)):
        raise MixesSamplesError(f"node '{call.name}' indexes the batch axis with {index!r}; begin with `:`")
    return Local(exact=True)


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, F.dropout)
def _dropout(call: Call) -> Local:
    """Kept entries are multiplied by 1/(1 − p) in training mode, of which none is for p = 1; else nothing is done."""
    if isinstance(call.module, nn.AlphaDropout):
        raise UnsupportedLayerError(f"'{call.name}': AlphaDropout adds constants; use nn.Dropout")
    p = float(call.setting(1, "p", 0.5))
    if p >= 1:
        return Local()
    return Local(gains=(1.0 / (1.0 - p),))
