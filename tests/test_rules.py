"""Rules of one's own, and ways around a rule."""

import math

import pytest
import torch
from kit import LIGHT, Function, linear, parameter
from torch import nn
from torch.nn import functional as F

import lipdp
from lipdp import nn as lnn
from lipdp.bounds import BoundGraph, Local, rule
from lipdp.bounds.rules import _RULES
from lipdp.errors import MixesSamplesError, UnboundedError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.testing import ProbeLoss, falsify

pytestmark = pytest.mark.usefixtures("one_thread")


# --- rules of one's own -----------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return torch.fft.fft(x, norm="ortho").real * self.gain


def register(monkeypatch, target, function):
    monkeypatch.setitem(_RULES, target, function)


def test_a_rule_of_ones_own(monkeypatch):
    with pytest.raises(UnsupportedOperationError, match="fft_fft") as caught:
        lipdp.lipschitz_constant(Doubled(), (4,))
    assert "@lipdp.bounds.rule(" in str(caught.value)

    def right(call):
        gain = call.module.gain.detach().abs().double()
        return Local(gains=(gain,), parameters={"gain": call.x.value}, fan_in=call.x.numel)

    register(monkeypatch, Doubled, right)
    assert lipdp.lipschitz_constant(Doubled().double(), (4,)) == pytest.approx(2.0, rel=1e-6)
    falsify(nn.Sequential(lnn.InputBound(1.0), Doubled()), ProbeLoss(), (4,), weights=("given",), steps=4)


def test_the_decorator_registers(monkeypatch):
    class Halve(nn.Module):
        def forward(self, x):
            return torch.special.expit(x) * 2

    @rule(Halve)
    def halve(call):
        return Local(gains=(0.5,), offset=math.sqrt(call.x.numel))

    try:
        assert lipdp.lipschitz_constant(Halve(), (3,)) == pytest.approx(0.5, rel=1e-4)

        class Same(Halve):
            def __init__(self):
                super().__init__()

            def helper(self):
                return 1

        class Other(Halve):
            def forward(self, x):
                return 100 * super().forward(x)

        assert lipdp.lipschitz_constant(Same(), (3,)) == pytest.approx(0.5, rel=1e-4)
        with pytest.raises(UnsupportedOperationError, match="expit"):
            lipdp.lipschitz_constant(Other(), (3,))
    finally:
        del _RULES[Halve]


def test_a_subclass_that_changes_the_forward_pass_has_not_the_rule_of_its_base():
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 100 * weight, bias)

    class Other(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, torch.exp(weight), bias)

    torch.manual_seed(0)
    layer, plain = Standardised(1, 1, 3), nn.Conv2d(1, 1, 3)
    plain.load_state_dict(layer.state_dict())
    sweeps = [BoundGraph(m, (1, 4, 4), input_bound=1.0).sweep(1.0) for m in (layer, plain)]
    assert float(sweeps[0].lipschitz) == pytest.approx(100 * float(sweeps[1].lipschitz), rel=1e-3)
    assert float(sweeps[0].parameters["weight"]) == pytest.approx(100 * float(sweeps[1].parameters["weight"]), rel=1e-3)
    with pytest.raises(UnsupportedOperationError, match="before they meet the input"):
        lipdp.lipschitz_constant(Other(1, 1, 3), (1, 4, 4))


def test_a_rule_with_the_wrong_number_of_gains(monkeypatch):
    register(monkeypatch, lnn.LipResidual, lambda call: Local(parameters={"alpha": 1.0}))
    model = Function(lambda m, x: m.join(x, m.a(x)), a=linear(4, 4), join=lnn.LipResidual())
    with pytest.raises(UnsupportedOperationError, match="1 gains for 2"):
        lipdp.lipschitz_constant(model, (4,))


def test_a_rule_that_forgets_a_parameter(monkeypatch):
    register(monkeypatch, Doubled, lambda call: Local(gains=(2.0,)))
    with pytest.raises(UnboundedError, match="gain"):
        lipdp.lipschitz_constant(Doubled(), (4,))


class TripledByProperty(nn.Linear):
    """A subclass that overrides nothing of nn.Linear's class, and yet what its forward pass reads."""

    @property
    def weight(self):
        if "weight" not in self._parameters:
            raise AttributeError
        return 3 * self._parameters["weight"]

    def reset_parameters(self):
        nn.init.normal_(self._parameters["weight"])


class Cached(nn.Module):
    """Computes with `keep(weight)` from before the forward pass, beside the layer itself."""

    def __init__(self, keep, forward):
        super().__init__()
        self.bound, self.layer, self.forwards = lnn.InputBound(1.0), nn.Linear(3, 3), [forward]
        self.kept = keep(self.layer)

    def forward(self, x):
        x = self.bound(x)
        return self.layer(x) + self.forwards[0](self, x)


def transposed_layer(layer):
    other = nn.Linear(3, 3, bias=False)
    del other.weight
    other.weight = layer.weight.t()
    return other


@pytest.mark.parametrize(
    "model",
    [
        Function(lambda m, x: torch.add(x, 5, m.a(x)), a=linear(3)),
        Function(lambda m, x: m.a(x).sub_(5, x), a=linear(3)),
        Function(lambda m, x: m.a(x.unsqueeze(1)).sum(1, dtype=torch.bfloat16), a=linear(3)),
        Function(lambda m, x: m.a(x).type_as(m.short), a=linear(3), short=torch.zeros(1, dtype=torch.bfloat16)),
        Function(lambda m, x: m.a(x)[..., :64, :], a=linear(3)),
        Cached(lambda layer: layer.weight.t(), lambda m, x: x @ m.kept),
        Cached(lambda layer: [layer.weight], lambda m, x: x @ m.kept[0].t()),
        Cached(transposed_layer, lambda m, x: m.kept(x)),
        nn.Sequential(lnn.InputBound(1.0), TripledByProperty(3, 3, bias=False)),
    ],
    ids=["add-alpha", "sub_-alpha", "sum-dtype", "type_as", "first-64", "cached", "listed", "tied-by-hand", "property"],
)
def test_ways_around_a_rule_that_were_found_are_refused(model):
    """Excess of each over the stated bound: 5, 5, 1.002, 1.002, none (records were left out), 2, 2, 2 and 3."""
    with pytest.raises((UnsupportedOperationError, UnsupportedLayerError, MixesSamplesError)):
        BoundGraph(model, (3,))


@pytest.mark.parametrize(
    ("forward", "members", "shape"),
    [
        (lambda m, x: F.linear(x, bias=m.b, weight=m.w), {"w": (3, 4), "b": (3,)}, (9, 4)),
        (lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), {"w": (3, 4), "b": (3,)}, (9, 4)),
        (lambda m, x: F.conv1d(x, bias=m.b, weight=m.w), {"w": (3, 2, 3), "b": (3,)}, (2, 9)),
    ],
)
def test_tensors_given_by_name_have_their_own_gains_in_any_order(forward, members, shape):
    model = Function(forward, **{name: parameter(*sizes) for name, sizes in members.items()})
    swapped = dict(falsify(model, ProbeLoss(), shape, radius=1.0, **LIGHT).findings)
    assert swapped["gradient of b"].ratio > 0.95


@pytest.mark.parametrize("name", ["norm", "vector_norm"])
def test_the_gradient_of_a_norm_keeps_its_bound_where_squares_vanish(name):
    """Squares of 3e-23 and less are no float32 numbers: x over the norm as torch computes it is up to 17 long here."""
    forward = {
        "norm": lambda m, x: m.a(x).norm(dim=1, keepdim=True),
        "vector_norm": lambda m, x: torch.linalg.vector_norm(m.a(x), 2, (-1,)),
    }
    model = Function(forward[name], a=nn.Linear(4, 1000))
    nn.init.constant_(model.a.weight, 1.0)
    nn.init.zeros_(model.a.bias)
    graph, x = BoundGraph(model, (4,)), torch.full((1, 4), 1e-23)
    with torch.no_grad():
        model.a.weight[0] = 3.0
    for scale in (0.25, 0.6, 0.9, 1.3, 2.0):
        (grad,) = torch.autograd.grad(graph.forward_pass(scale * x).sum(), model.a.bias)
        assert 0.99 < grad.double().norm() <= float(graph.sweep(1.0).parameters["a.bias"])


def test_dropout_of_everything_is_the_identity_in_evaluation_mode():
    """Without its values in front of the last layer, that one's bound was too small by any factor."""
    model = nn.Sequential(lnn.InputBound(1.0), nn.Dropout(1.0), nn.Linear(3, 3, bias=False)).eval()
    assert float(BoundGraph(model, (3,)).sweep(1.0).parameters["2.weight"]) >= 1.0


@pytest.mark.parametrize("make", [lambda: lnn.LayerNorm(4), lambda: lnn.GroupNorm(1, 4)])
def test_a_bias_that_is_the_weight_counts_twice(make):
    layer = make()
    apart = BoundGraph(layer, (4, 4), input_bound=1.0).sweep(1.0).parameters
    layer.bias = layer.weight
    tied = BoundGraph(layer, (4, 4), input_bound=1.0).sweep(1.0).parameters
    assert float(tied["weight"]) == pytest.approx(float(apart["weight"] + apart["bias"]), rel=1e-3)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_module_that_hides_mixing_behind_a_rule_is_found(monkeypatch):
    class Hidden(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    class HiddenBackwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 0.0

        @staticmethod
        def backward(ctx, g):
            return g - g.mean(0, keepdim=True)

    class MixesGradients(nn.Module):
        def forward(self, x):
            return HiddenBackwards.apply(x)

    class OnlyInTraining(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True) if self.training else x

    class CountsTheBatch(nn.Module):
        def forward(self, x):
            return x * (len(x) / 1e3)

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            y = x - self.mean
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return y

    for module in (Hidden, MixesGradients, OnlyInTraining, CountsTheBatch, Remembers):
        register(monkeypatch, module, lambda call: Local())
        for scale in (1.0, 1e-9):  # whatever the scale of the model
            model = nn.Sequential(lnn.InputBound(scale), module(), linear(4)).eval()
            with pytest.raises(MixesSamplesError, match=r"mixes the samples|changes the buffer"):
                lipdp.lipschitz_constant(model, (4,))
