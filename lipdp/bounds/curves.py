"""The rules of further activations: curves with settings, and those that look at a row of a sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.bounds.functions import entrywise
from lipdp.bounds.rules import Call, Local, Number, own_axes, rule
from lipdp.errors import UnsupportedLayerError

entrywise(1.7580993408473768, nn.SELU, F.selu, torch.selu)  # λ for x > 0, λ α eˣ below: sup λ α
entrywise(1.5, nn.Hardswish, F.hardswish)  # x (x + 3)/6 on [−3, 3]: slope (2x + 3)/6, 3/2 at 3
entrywise(
    0.1666667, nn.Hardsigmoid, F.hardsigmoid, at_zero=0.5, cap=1.0
)  # (x + 3)/6 in [0, 1]; torch's 1/6 is a float32
entrywise(1.0, nn.LogSigmoid, F.logsigmoid, at_zero=math.log(2))  # log σ: slope 1 − σ < 1


@rule(nn.ELU, F.elu)
def _elu(call: Call) -> Local:
    """x or α(eˣ − 1): slope at most max(1, |α|)."""
    return Local(gains=(max(1.0, abs(float(call.setting(1, "alpha", 1.0)))),))


@rule(nn.CELU, F.celu, torch.celu)
def _celu(call: Call) -> Local:
    """x or α(exp(x/α) − 1): slope exp(x/α) ≤ 1 for α > 0, unbounded for α < 0."""
    alpha = float(call.setting(1, "alpha", 1.0))
    if not alpha > 0:
        raise UnsupportedLayerError(f"'{call.name}': CELU with alpha={alpha} has no bounded slope; give alpha > 0")
    return Local()


def _clamped(call: Call, low: Any, high: Any) -> Local:
    """Clamping to [low, high] is 1-Lipschitz; 0 may become another number, and no entry is longer than both ends."""
    ends = [-math.inf if low is None else low, math.inf if high is None else high]
    if not all(isinstance(end, (int, float)) and end == end for end in ends):
        raise UnsupportedLayerError(f"'{call.name}' clamps to [{low!r}, {high!r}]; only numbers have a bound")
    root = math.sqrt(call.x.numel)
    return Local(offset=root * abs(min(max(0.0, ends[0]), ends[1])), value_cap=root * max(map(abs, ends)))


@rule(nn.Hardtanh, F.hardtanh)
def _hardtanh(call: Call) -> Local:
    return _clamped(call, call.setting(1, "min_val", -1.0), call.setting(2, "max_val", 1.0))


@rule(torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_")
def _clamp(call: Call) -> Local:
    return _clamped(call, call.argument(1, "min"), call.argument(2, "max"))


@rule(torch.clamp_min, "clamp_min", "clamp_min_")
def _clamp_min(call: Call) -> Local:
    return _clamped(call, call.argument(1, "min"), None)


@rule(torch.clamp_max, "clamp_max", "clamp_max_")
def _clamp_max(call: Call) -> Local:
    return _clamped(call, None, call.argument(1, "max"))


@rule(nn.LogSoftmax, torch.log_softmax, F.log_softmax, "log_softmax")
def _log_softmax(call: Call) -> Local:
    """Jacobian I − 1pᵀ, of a norm convex in p, so largest at a unit vector: there Σ_{j>1} (x_j − x_1)² ≤ C ‖x‖², √C.

    At 0 every entry is −log C.
    """
    (axis,) = own_axes(call, call.x, [call.setting(1, "dim")])
    classes = call.x.shape[axis - 1]
    return Local(
        gains=(math.sqrt(classes),), offset=math.sqrt(call.x.numel) * math.log(classes), fan_in=max(classes, 2)
    )


@rule(F.normalize)
def _normalize(call: Call) -> Local:
    """x/max(‖x‖, ε) for every row: I/ε inside the ball of radius ε, (I − x̂x̂ᵀ)/‖x‖ outside: 1/ε, rows of norm ≤ 1."""
    p, eps = call.argument(1, "p", 2.0), call.argument(3, "eps", 1e-12)
    if p != 2 or not (isinstance(eps, float) and eps >= 1e-12) or call.argument(4, "out") is not None:
        raise UnsupportedLayerError(
            f"'{call.name}': normalize with p={p}, eps={eps}; there is a bound for p=2 and eps ≥ 1e-12, below which"
            " squares of float32 vanish"
        )
    (axis,) = own_axes(call, call.x, [call.argument(2, "dim", 1)])
    size = call.x.shape[axis - 1]
    return Local(gains=(1.0 / eps,), value_cap=math.sqrt(call.x.numel / size), fan_in=size)


@rule(nn.GLU, F.glu)
def _glu(call: Call) -> Local:
    """a ⊙ σ(b), pair by pair: gradient norm² g(s) = s² (1 + a² (1 − s)²), s = σ(b), with |a| ≤ X and s ≤ σ(X).

    g' = 2s (1 + a² (1 − s)(1 − 2s)) vanishes where 2s² − 3s + 1 + 1/a² = 0, at a maximum for the smaller root
    s₁ = (3 − √(1 − 8/a²))/4 if a² ≥ 8, else nowhere. So the gain is √max(g(s₁), g(σ(X))) at a = X, and ‖y‖ ≤ ‖a‖ ≤ X.
    """
    own_axes(call, call.x, [call.setting(1, "dim", -1)])
    return Local(gains=(_glu_gain(call.x.value),), value_cap=call.x.value)


def _glu_gain(bound: Number) -> Number:
    if not isinstance(bound, Tensor):
        return math.inf if bound == math.inf else float(_glu_gain(torch.tensor(bound, dtype=torch.float64)))
    square = bound.double().square()
    last = torch.sigmoid(bound.double())
    inner = torch.minimum((3 - (1 - 8 / square.clamp_min(8.0)).sqrt()) / 4, last)
    squares = [s * s * (1 + square * (1 - s).square()) for s in (inner, last)]
    return torch.maximum(*squares).sqrt()
