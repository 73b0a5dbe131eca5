"""The rules of operations without parameters, each registered for its module, its function and its tensor method."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deel import torchlip
from torch import nn
from torch.nn import functional as F

from lipdp.bounds.layers import adaptive_average_pool, average_pool, max_pool
from lipdp.bounds.rules import Call, Input, Local, Number, rule
from lipdp.errors import MixesSamplesError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.nn.activation import GroupSort2
from lipdp.nn.pooling import InvertibleDownSampling, InvertibleUpSampling

# --- entrywise: f is L-Lipschitz on the line, so on vectors; f(0) ≠ 0 adds √n |f(0)| -----------------------------------


def _entrywise(lipschitz: float, *targets: object, at_zero: float = 0.0, cap: float = math.inf) -> None:
    """Register |f(a) − f(b)| ≤ L |a − b|, f(0) and sup |f| for every form of an entrywise function."""

    @rule(*targets)
    def apply(call: Call) -> Local:
        root = math.sqrt(call.x.numel)
        return Local(gains=(lipschitz,), offset=root * abs(at_zero), value_cap=root * cap)


_entrywise(1.0, nn.ReLU, torch.relu, torch.relu_, F.relu, "relu", "relu_")
_entrywise(1.0, nn.ReLU6, F.relu6, cap=6.0)
_entrywise(1.0, nn.Tanh, torch.tanh, F.tanh, "tanh", cap=1.0)
_entrywise(1.0, torch.abs, "abs", operator.abs)
_entrywise(1.0, torch.neg, "neg", operator.neg)
_entrywise(1.0, torch.sin, "sin", cap=1.0)
_entrywise(1.0, nn.Hardtanh, cap=math.inf)
_entrywise(0.25, nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", at_zero=0.5, cap=1.0)
_entrywise(1.129, nn.GELU)  # sup of Φ(x) + xφ(x) = 1.12890… at √2; the tanh form peaks at 1.12899…
_entrywise(1.0999, nn.SiLU, F.silu)  # sup of s(x)(1 + x(1 − s(x))) = 1.09983… at x = 2.3994
_entrywise(1.0889, nn.Mish, F.mish)  # sup of the derivative = 1.08850…
_entrywise(1.0, nn.Softsign, F.softsign, cap=1.0)


@rule(F.gelu)
def _gelu(call: Call) -> Local:
    return Local(gains=(1.129,))


@rule(nn.Softplus, F.softplus)
def _softplus(call: Call) -> Local:
    """log(1 + exp(βx))/β: slope a sigmoid ≤ 1; f(0) = log 2 / β."""
    beta = call.module.beta if call.module is not None else call.argument(1, "beta", 1.0)
    return Local(offset=math.sqrt(call.x.numel) * math.log(2) / float(beta))  # type: ignore[arg-type]


@rule(nn.ELU, F.elu)
def _elu(call: Call) -> Local:
    """x or α(eˣ − 1): slope at most max(1, α)."""
    alpha = call.module.alpha if call.module is not None else call.argument(1, "alpha", 1.0)
    return Local(gains=(max(1.0, abs(float(alpha))),))  # type: ignore[arg-type]


@rule(nn.LeakyReLU, F.leaky_relu)
def _leaky_relu(call: Call) -> Local:
    slope = call.module.negative_slope if call.module is not None else call.argument(1, "negative_slope", 0.01)
    return Local(gains=(max(1.0, abs(float(slope))),))  # type: ignore[arg-type]


@rule(nn.Softmax, torch.softmax, F.softmax, "softmax")
def _softmax(call: Call) -> Local:
    """Jacobian diag(p) − ppᵀ: spectral norm ≤ 1/2 (Gershgorin: 2p(1 − p)); a row of probabilities has norm ≤ 1."""
    dim: Any = call.module.dim if call.module is not None else call.argument(1, "dim")
    (axis,) = _own_axes(call, call.x, [dim])
    return Local(gains=(0.5,), value_cap=math.sqrt(call.x.numel / call.x.shape[axis - 1]), offset=math.inf)


# --- permutations of entries: sorting, reshaping, shuffling ----------------------------------------------------------


@rule(GroupSort2, torchlip.GroupSort, torchlip.GroupSort2, torchlip.FullSort)
def _sort(call: Call) -> Local:
    """A permutation that depends on the input, continuous and piecewise linear: an isometry almost everywhere."""
    return Local(
        gains=(float(getattr(call.module, "_coefficient_lip", 1.0)),), exact=isinstance(call.module, GroupSort2)
    )


@rule(torchlip.MaxMin)
def _max_min(call: Call) -> Local:
    """x ↦ (relu(x), relu(−x)): |relu(a) − relu(b)|² + |relu(−a) − relu(−b)|² ≤ |a − b|²."""
    return Local(gains=(float(call.module._coefficient_lip),))  # type: ignore[union-attr, arg-type]


@rule(InvertibleDownSampling, InvertibleUpSampling)
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
    return Local(exact=True)


@rule(torch.roll, torch.flip, "roll", "flip")
def _shift(call: Call) -> Local:
    dims = call.argument(2 if call.argument(2, "dims") is not None else 1, "dims")
    _own_axes(call, call.x, [dims] if isinstance(dims, int) else dims)
    return Local(exact=True)


# --- sums, products, concatenation -----------------------------------------------------------------------------------


def _broadcast(call: Call, source: Input) -> float:
    """An input repeated r times to fill the output has r times its squared norm."""
    return math.sqrt(math.prod(call.output_shape) / source.numel)


def _numbers(call: Call) -> list[float]:
    """Absolute values of the arguments that are numbers; anything else but a tensor has no bound."""
    plain = [a for a in call.args if not isinstance(a, Input)]
    if any(not isinstance(a, (int, float)) for a in plain) or set(call.kwargs) - {"alpha"}:
        raise UnsupportedOperationError(
            f"node '{call.name}' combines a tensor with {plain or dict(call.kwargs)!r}; only tensors of the model and"
            " constant numbers have a bound (a number computed from the batch's shape is not constant)"
        )
    return [abs(float(a)) for a in plain]


@rule(operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_")
def _add(call: Call) -> Local:
    """±a ±b: norms add. A scalar c adds √n |c|."""
    alpha = abs(float(call.kwargs.get("alpha", 1.0)))
    offset = math.sqrt(math.prod(call.output_shape)) * sum(_numbers(call)) * max(1.0, alpha)
    gains = [_broadcast(call, source) for source in call.inputs]
    if len(gains) == 2:
        gains[1] *= alpha
    return Local(gains=tuple(gains), offset=offset, fan_in=2)


@rule(operator.mul, operator.imul, torch.mul, "mul", "mul_")
def _mul(call: Call) -> Local:
    """c·a: |c|. a ⊙ w with w constant: max|w| in a, X_a in w. Two activations: each other's value bound."""
    scalars = _numbers(call)
    if scalars:
        return Local(gains=(scalars[0],))
    (first, second), repeats = call.inputs, [_broadcast(call, source) for source in call.inputs]
    gains = (_factor(call, first, repeats[0], second, repeats[1]), _factor(call, second, repeats[1], first, repeats[0]))
    product = gains[0] * first.value if first.constant is None else gains[1] * second.value
    return Local(gains=gains, value_cap=product)


def _factor(call: Call, own: Input, own_repeats: float, other: Input, other_repeats: float) -> Number:
    """Gain of a ⊙ b in a: max|b| on every repetition of a, if b is constant; else ‖b‖ as it fills the output.

    For dL/da_j = Σ_{i ∈ S_j} g_i b_i, Cauchy–Schwarz gives |dL/da_j| ≤ ‖g_{S_j}‖ ‖b_{S_j}‖.
    """
    if other.constant is None:
        return other_repeats * other.value
    return own_repeats * call.used(other.constant).abs().max().double()


@rule(operator.truediv, torch.div, "div", "div_")
def _div(call: Call) -> Local:
    divisor = call.argument(1, "other")
    if not isinstance(divisor, (int, float)) or divisor == 0:
        raise UnsupportedOperationError(
            f"node '{call.name}' divides by {divisor!r}; only division by a non-zero constant number has a bound"
        )
    return Local(gains=(1.0 / abs(float(divisor)),))


@rule(torch.cat, torch.concat, torch.concatenate, torch.stack)
def _concatenate(call: Call) -> Local:
    """√Σ X_j²; each input gets its slice of the cotangent: norm ≤ G."""
    dim = call.argument(1, "dim", 0)
    if dim % (len(call.output_shape) + 1) == 0:
        raise MixesSamplesError(f"node '{call.name}' concatenates along the batch axis; use a later axis")
    return Local(gains=(1.0,) * len(call.inputs), orthogonal=True, exact=True)


# --- parts and reductions of a sample --------------------------------------------------------------------------------


def _own_axes(call: Call, source: Input, dims: Sequence[int]) -> list[int]:
    """Axes as positive numbers; the batch axis is refused."""
    ndim = len(source.shape) + 1
    axes = [d % ndim for d in dims]
    if 0 in axes:
        raise MixesSamplesError(
            f"node '{call.name}' reduces or reorders the batch axis: samples would influence each other"
        )
    return axes


def _reduction(gain: Callable[[int], float], *targets: object) -> None:
    @rule(*targets)
    def reduce(call: Call) -> Local:
        dims = call.argument(1, "dim")
        if dims is None:
            raise MixesSamplesError(f"node '{call.name}' reduces over every axis, the batch included; give `dim`")
        axes = _own_axes(call, call.x, [dims] if isinstance(dims, int) else dims)
        entries = math.prod(call.x.shape[a - 1] for a in axes)
        return Local(gains=(gain(entries),), fan_in=entries)


_reduction(lambda n: 1.0 / math.sqrt(n), torch.mean, "mean")
_reduction(lambda n: math.sqrt(n), torch.sum, "sum")
_reduction(lambda n: 1.0, torch.amax, "amax", torch.amin, "amin")


@rule(operator.getitem)
def _getitem(call: Call) -> Local:
    """A part of a sample: a coordinate projection. Every sample must keep its place on the batch axis."""
    index = call.args[1]
    if isinstance(index, tuple):
        if index and index[0] not in (slice(None), Ellipsis):
            raise MixesSamplesError(f"node '{call.name}' indexes the batch axis with {index[0]!r}; begin with `:`")
        if any(isinstance(i, (Input, list)) for i in index):
            raise UnsupportedOperationError(
                f"node '{call.name}' indexes with a tensor or a list, which can repeat entries"
            )
    elif not (isinstance(index, slice) and index == slice(None)):
        raise MixesSamplesError(f"node '{call.name}' indexes the batch axis with {index!r}; begin with `:`")
    return Local(exact=True)


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, F.dropout)
def _dropout(call: Call) -> Local:
    """Kept entries are multiplied by 1/(1 − p), in training mode."""
    if isinstance(call.module, nn.AlphaDropout):
        raise UnsupportedLayerError(f"'{call.name}': AlphaDropout adds constants; use nn.Dropout")
    p = float(call.module.p if call.module is not None else call.argument(1, "p", 0.5))  # type: ignore[arg-type]
    if p >= 1:
        return Local(gains=(0.0,))
    return Local(gains=(1.0 / (1.0 - p),))


# --- poolings as functions -------------------------------------------------------------------------------------------


@rule(F.max_pool2d)
def _functional_max_pool(call: Call) -> Local:
    kernel = call.argument(1, "kernel_size")
    plain = call.argument(5, "ceil_mode", False) or call.argument(4, "dilation", 1) not in (1, (1, 1))
    if plain:
        raise UnsupportedLayerError(f"'{call.name}': ceil_mode and dilation have no bound here")
    return max_pool(call, kernel, call.argument(2, "stride") or kernel, call.argument(3, "padding", 0))


@rule(F.avg_pool2d)
def _functional_avg_pool(call: Call) -> Local:
    kernel = call.argument(1, "kernel_size")
    if call.argument(4, "ceil_mode", False) or call.argument(6, "divisor_override") is not None:
        raise UnsupportedLayerError(f"'{call.name}': ceil_mode and divisor_override have no bound here")
    if call.argument(3, "padding", 0) and not call.argument(5, "count_include_pad", True):
        raise UnsupportedLayerError(f"'{call.name}': padding with count_include_pad=False has no bound here")
    return average_pool(call, kernel, call.argument(2, "stride") or kernel, call.argument(3, "padding", 0))


@rule(F.adaptive_avg_pool2d)
def _functional_adaptive_avg_pool(call: Call) -> Local:
    return adaptive_average_pool(call)
