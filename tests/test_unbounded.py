"""What has no bound is refused: mixing of samples, operations without a rule, hooks, what is not finite."""

import math

import pytest
import torch
from deel import torchlip
from kit import Function, conv_net, linear, parameter
from torch import nn
from torch.nn import functional as F

import lipdp
from lipdp import nn as lnn
from lipdp.errors import (
    LossError,
    MixesSamplesError,
    NonFiniteError,
    ParameterError,
    UnboundedError,
    UnsupportedLayerError,
    UnsupportedOperationError,
)
from lipdp.losses import MeanSquaredError, TauCrossEntropy

pytestmark = pytest.mark.usefixtures("one_thread")


class Scale100(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + 0.0

    @staticmethod
    def backward(ctx, g):
        return 100 * g


def stale(m, x):
    y = m.a(x)
    y.add_(100.0)
    return m.b(y) * y.mean(1, keepdim=True) + m.b(y)


def stale_view(m, x):
    y = m.a(x)
    z = y.unsqueeze(1)
    F.relu(z, inplace=True)
    return m.b(y)


def overwrites_parameter(m, x):
    m.buffer_.add_(1.0)
    return m.a(x)


MIXES = {
    "batch mean": ((4,), lambda m, x: m.a(x - x.mean(0)), {}),
    "mean of everything": ((4,), lambda m, x: m.a(x / 2 - x.mean()), {}),
    "sum over the batch": ((4,), lambda m, x: m.a(x - x.sum(dim=0, keepdim=True)), {}),
    "softmax over the batch": ((4,), lambda m, x: m.a(F.softmax(x, dim=0)), {}),
    "token and batch axes of one size": ((6, 4), lambda m, x: m.a(x.transpose(0, 1)), {}),
    "there and back": ((6, 4), lambda m, x: m.a(x.transpose(0, 1).transpose(0, 1)), {}),
    "roll without axis": ((4,), lambda m, x: m.a(torch.roll(x, 1)), {}),
    "roll of the batch": ((4,), lambda m, x: m.a(x.roll(1, 0)), {}),
    "flip of the batch": ((4,), lambda m, x: m.a(x.flip(0, 1)), {}),
    "concatenation along the batch": ((4,), lambda m, x: m.a(torch.cat([x, x])), {}),
    "reshape over samples": ((4,), lambda m, x: m.a(x.reshape(-1, 2).repeat(1, 2)), {}),
    "squeeze": ((1, 4), lambda m, x: m.a(x.squeeze()), {}),
    "broadcast over the batch": ((6, 4), lambda m, x: m.a(x * x.mean(2)[:, :4]), {}),
    "index of the batch": ((4,), lambda m, x: m.a(x[0:1] + x), {}),
    "mask of the batch": ((4,), lambda m, x: m.a(x[..., ::2, :]), {}),
    "constant along the batch": ((4,), lambda m, x: m.a(x + m.table), {"table": torch.randn(6, 4)}),
    "batch norm": ((4,), lambda m, x: m.a(m.norm(x)), {"norm": nn.BatchNorm1d(4)}),
    "frozen batch norm": ((4,), lambda m, x: m.a(m.norm(x)), {"norm": nn.BatchNorm1d(4, affine=False).eval()}),
    "instance norm with memory": (
        (4, 5),
        lambda m, x: m.a(m.norm(x).mean(2)),
        {"norm": nn.InstanceNorm1d(4, track_running_stats=True)},
    ),
    "batch centering": ((4,), lambda m, x: m.a(m.norm(x)), {"norm": torchlip.BatchCentering(4)}),
    "layer centering of vectors": ((4,), lambda m, x: m.a(m.norm(x)), {"norm": torchlip.LayerCentering()}),
    "our layer centering of vectors": ((4,), lambda m, x: m.a(m.norm(x)), {"norm": lnn.LayerCentering()}),
    "householder over the batch": ((6, 4), lambda m, x: m.a(m.house(x, axis=0)), {"house": lnn.HouseHolder(6)}),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_samples_is_refused(name):
    shape, forward, members = MIXES[name]
    with pytest.raises((MixesSamplesError, UnsupportedOperationError)) as caught:
        lipdp.sensitivity(Function(forward, a=linear(4), **members), TauCrossEntropy(), shape)
    if isinstance(caught.value, UnsupportedOperationError):
        assert name in ("reshape over samples", "householder over the batch")


UNSUPPORTED = {
    "times the batch size": (lambda m, x: m.a(x * x.size(0)), "number of samples of a batch"),
    "over the batch size": (lambda m, x: m.a(x / len(x)), "divides|trace|len"),
    "divided by itself": (lambda m, x: m.a(x / x), "divides"),
    "divided by zero": (lambda m, x: m.a(x / 0), "divides"),
    "rounded": (lambda m, x: m.a(torch.div(x, 2, rounding_mode="floor")), "divides"),
    "no rule": (lambda m, x: m.a(torch.cumsum(x, 1)), "cumsum"),
    "no rule for a method": (lambda m, x: m.a(x.exp()), "@lipdp.bounds.rule"),
    "branch on values": (lambda m, x: m.a(x) if x.sum() > 0 else x[:, :3], "trace"),
    "numbers out of a tensor": (lambda m, x: m.a(x * x.sum(dim=1).tolist()[0]), "reads numbers"),
    "mode": (lambda m, x: m.a(10 * x if m.training else x), "training"),
    "random scale": (lambda m, x: m.a(x * torch.randn(4)), "does not compute|training|random numbers"),
    "random scale by shape": (lambda m, x: m.a(x * torch.randn(x.shape[1])), "random"),
    "custom backward": (lambda m, x: Scale100.apply(m.a(x)), "custom autograd.Function"),
    "own gate function": (lambda m, x: lnn.gates.gate_cotangent(m.a(x), 0.1), "view_as"),
    "parameter computed": (lambda m, x: m.a(x) * m.w.exp(), "trainable"),
    "index by a list": (lambda m, x: m.a(x[:, [0, 0, 1, 1]]), "repeat"),
    "stale read": (stale, "overwritten"),
    "stale read of a view": (stale_view, "overwritten"),
    "overwritten buffer": (overwrites_parameter, "overwrites"),
    "bits": (lambda m, x: m.a(x.view(torch.int32).view(torch.float32)), "dtype"),
    "softmax without axis": (lambda m, x: m.a(m.soft(x)), None),
    "two outputs": (lambda m, x: (m.a(x), x), "one tensor"),
    "no samples": (lambda m, x: m.w, "one tensor"),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_rule_is_refused(name):
    forward, message = UNSUPPORTED[name]
    members = {"a": linear(4), "b": linear(3), "w": parameter(3), "buffer_": torch.zeros(3), "soft": nn.Softmax()}
    model = Function(forward, **members)
    with pytest.raises(UnsupportedOperationError, match=message):
        lipdp.sensitivity(model, TauCrossEntropy(), (4,))


LAYERS = {
    "dilation": (nn.MaxPool2d(3, dilation=2), (1, 8, 8)),
    "ceil_mode": (nn.MaxPool2d(2, ceil_mode=True), (1, 5, 5)),
    "ceil_mode of torchlip": (torchlip.ScaledAvgPool2d(2, ceil_mode=True), (1, 5, 5)),
    "divisor_override": (torchlip.ScaledAvgPool2d(2, divisor_override=1), (1, 4, 4)),
    "count_include_pad": (nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 5, 5)),
    "adaptive": (nn.AdaptiveAvgPool2d(2), (1, 5, 5)),
    "parametrised": (torchlip.SpectralLinear(4, 4), (4,)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (4,)),
    "alpha dropout": (nn.AlphaDropout(), (4,)),
    "eps 0": (nn.LayerNorm(4, eps=0.0), (4,)),
    "threshold": (nn.Softplus(threshold=1.0), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_settings_without_a_bound_are_refused(name):
    layer, shape = LAYERS[name]
    with pytest.raises(UnsupportedLayerError):
        lipdp.lipschitz_constant(nn.Sequential(lnn.InputBound(1.0), layer), shape)


@pytest.mark.parametrize("where", ["leaf", "container", "root"])
@pytest.mark.parametrize(
    "kind",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_refused_wherever_they_are(where, kind):
    model = nn.Sequential(lnn.InputBound(1.0), nn.Sequential(linear(4)))
    module = {"leaf": model[1][0], "container": model[1], "root": model}[where]
    getattr(module, kind)(lambda *arguments: None)
    with pytest.raises(UnsupportedLayerError, match="hooks"):
        lipdp.lipschitz_constant(model, (4,))


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_parameter_are_refused(kind):
    model = nn.Sequential(lnn.InputBound(1.0), linear(4))
    getattr(model[1].weight, kind)(lambda g: None)
    with pytest.raises(UnsupportedLayerError, match="gradient hooks"):
        lipdp.lipschitz_constant(model, (4,))


def test_patched_forwards_are_refused():
    model = nn.Sequential(lnn.InputBound(1.0), linear(4))
    model[1].forward = lambda x: 100 * x[:, :3]
    with pytest.raises(UnsupportedLayerError, match="patched"):
        lipdp.lipschitz_constant(model, (4,))
    model = nn.Sequential(lnn.InputBound(1.0), linear(4))
    original = model.forward
    model.forward = lambda x: 100 * original(x)
    with pytest.raises(UnsupportedOperationError, match="does not compute"):
        lipdp.lipschitz_constant(model, (4,))


def test_a_parameter_that_fx_cannot_see_is_found():
    layer = linear(4)
    hidden = nn.Parameter(torch.ones(3))

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = layer
            self.hidden = hidden

        def forward(self, x):
            return self.a(x) + hidden * 2

    with pytest.raises((UnboundedError, UnsupportedOperationError)):
        lipdp.lipschitz_constant(Closure(), (4,))


def test_unbounded_inputs_and_losses_are_refused():
    with pytest.raises(UnboundedError, match="InputBound"):
        lipdp.sensitivity(nn.Sequential(linear(4)), TauCrossEntropy(), (4,))
    with pytest.raises(UnboundedError, match="InputBound"):
        lipdp.sensitivity(nn.Sequential(linear(4)), MeanSquaredError(1.0, 3), (4,))
    with pytest.raises(LossError):
        lipdp.sensitivity(nn.Sequential(lnn.InputBound(1.0), linear(4)), torchlip.KRLoss(), (4,))
    with pytest.raises(LossError):
        lipdp.sensitivity(nn.Sequential(lnn.InputBound(1.0), linear(4)), nn.MSELoss(), (4,))


@pytest.mark.parametrize("gate", [0.0, -1.0, math.nan])
def test_a_gate_is_positive(gate):
    with pytest.raises(ParameterError, match="gate"):
        lipdp.sensitivity(conv_net(), TauCrossEntropy(), (1, 6, 6), gate=gate)


def test_zero_weights_behind_an_unbounded_input_are_no_nan():
    model = nn.Sequential(linear(4, 4), lnn.ValueClip(2.0), linear(4)).double()
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(UnboundedError):
        lipdp.sensitivity(model, TauCrossEntropy(), (4,))
    model[0].requires_grad_(False)
    s = lipdp.sensitivity(model, TauCrossEntropy(), (4,))
    assert s["2.weight"] == pytest.approx(2 * math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("index", [1, 5])
def test_weights_that_are_not_finite_are_refused(bad, index):
    model = conv_net()
    with torch.no_grad():
        model[index].weight.view(-1)[0] = bad
    with pytest.raises((NonFiniteError, UnboundedError)):
        lipdp.sensitivity(model, TauCrossEntropy(), (1, 6, 6))


def test_a_wrong_input_shape_is_named():
    with pytest.raises(UnsupportedOperationError, match=r"\(5,\)"):
        lipdp.lipschitz_constant(nn.Sequential(lnn.InputBound(1.0), linear(4)), (5,))


def test_a_model_with_two_inputs_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = linear(4)

        def forward(self, x, y):
            return self.a(x) + self.a(y)

    with pytest.raises(UnsupportedOperationError):
        lipdp.lipschitz_constant(Two(), (4,))
