"""Every form of writing a model is bounded, and attacks cannot break the bound."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import LIGHT, Function, linear, parameter
from torch import nn
from torch.nn import functional as F

from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.testing import ProbeLoss, falsify

pytestmark = pytest.mark.usefixtures("one_thread")


# --- forms of writing a model, all attacked ---------------------------------------------------------------------------


def attention_like(m, x):
    a, b = x.chunk(2, dim=-1)
    return m.out((torch.sigmoid(m.key(a)) * b).flatten(1))


def inplace_sum(m, x):
    y = m.fc(x)
    y += m.shift
    return F.relu(y, inplace=True)


def gated(m, x):
    weights = F.softmax(m.query(x), dim=-1)
    return m.out((x * weights).sum(dim=1))


FORMS = {
    "functional": ((5,), lambda m, x: m.b(F.relu(m.a(x))), {"a": linear(5, 6), "b": linear(6)}),
    "methods": ((5,), lambda m, x: m.b(m.a(x).relu().tanh().sigmoid()), {"a": linear(5, 6), "b": linear(6)}),
    "curves": (
        (4,),
        lambda m, x: m.b(F.gelu(m.a(x)) + F.silu(x) - F.softplus(x) + F.elu(x, 2.0) - F.leaky_relu(x, 0.3)),
        {"a": linear(4, 4), "b": linear(4)},
    ),
    "view": ((2, 3), lambda m, x: m.a(x.view(x.size(0), -1)), {"a": linear(6)}),
    "reshape with shape": ((2, 3), lambda m, x: m.a(x.reshape(x.shape[0], x.shape[1] * 3)), {"a": linear(6)}),
    "max_pool2d": ((1, 4, 4), lambda m, x: m.a(F.max_pool2d(x, 2).flatten(1)), {"a": linear(4)}),
    "max_pool2d overlap": (
        (1, 4, 4),
        lambda m, x: m.a(F.max_pool2d(m.c(x), 3, stride=1, padding=1).flatten(1)),
        {"c": lnn.SpectralConv2d(1, 2, 3, padding=1), "a": linear(32)},
    ),
    "avg_pool2d": ((1, 4, 4), lambda m, x: m.a(F.avg_pool2d(x, 2, 1).flatten(1)), {"a": linear(9)}),
    "adaptive_avg_pool2d": ((2, 4, 4), lambda m, x: m.a(F.adaptive_avg_pool2d(x, 1).flatten(1)), {"a": linear(2)}),
    "cat": ((4,), lambda m, x: m.b(torch.cat([m.a(x), x, F.relu(x)], dim=1)), {"a": linear(4, 4), "b": linear(12)}),
    "stack": ((4,), lambda m, x: m.b(torch.stack([m.a(x), x], dim=2).mean(2)), {"a": linear(4, 4), "b": linear(4)}),
    "position": ((3, 4), lambda m, x: m.a((x + m.pos).flatten(1)), {"pos": parameter(3, 4), "a": linear(12)}),
    "position with batch axis": (
        (3, 4),
        lambda m, x: m.a((m.pos + x).flatten(1)),
        {"pos": parameter(1, 3, 4), "a": linear(12)},
    ),
    "position shared by tokens": (
        (3, 4),
        lambda m, x: m.a((x - m.pos).flatten(1)),
        {"pos": parameter(4), "a": linear(12)},
    ),
    "buffer sliced by shape": (
        (3, 4),
        lambda m, x: m.a((x + m.table[:, : x.shape[2]]).flatten(1)),
        {"table": torch.randn(3, 9), "a": linear(12)},
    ),
    "buffer computed": ((4,), lambda m, x: m.a(x * m.log.exp()), {"log": torch.tensor(0.7), "a": linear(4)}),
    "scalar parameter": ((4,), lambda m, x: m.scale * m.a(x), {"scale": parameter(1), "a": linear(4)}),
    "vector parameter": ((3, 4), lambda m, x: m.a((x * m.scale).flatten(1)), {"scale": parameter(4), "a": linear(12)}),
    "widening parameter": (
        (1, 4),
        lambda m, x: m.a((x * m.scale).flatten(1)),
        {"scale": parameter(3, 1), "a": linear(12)},
    ),
    "numbers": ((4,), lambda m, x: 3.0 - 2.0 * m.a(x) / 4.0 + 1, {"a": linear(4)}),
    "number by name": ((4,), lambda m, x: torch.add(m.a(x), other=2.5), {"a": linear(4)}),
    "alpha": ((4,), lambda m, x: torch.sub(m.a(x), m.b(x), alpha=3.0), {"a": linear(4), "b": linear(4)}),
    "alpha by name": (
        (4,),
        lambda m, x: torch.add(other=m.a(x), input=m.b(x), alpha=-3.0),
        {"a": linear(4), "b": linear(4, k_coef_lip=0.1)},
    ),
    "number from the shape": ((4,), lambda m, x: m.a(x * x.shape[1] ** -0.5), {"a": linear(4)}),
    "product": ((4,), lambda m, x: m.a(x) * m.b(x), {"a": linear(4, 3, bias=True), "b": linear(4, 3)}),
    "square": ((4,), lambda m, x: m.a(x * x), {"a": linear(4)}),
    "product with a column": ((4,), lambda m, x: m.a(x * m.b(x)), {"a": linear(4), "b": linear(4, 1, bias=True)}),
    "residual": ((4,), lambda m, x: m.b(x + m.a(x)), {"a": linear(4, 4, bias=True), "b": linear(4)}),
    "in place": ((4,), inplace_sum, {"fc": linear(4), "shift": parameter(3)}),
    "chunk": ((2, 4), attention_like, {"key": linear(2, 2), "out": linear(4)}),
    "split": ((6,), lambda m, x: m.a(torch.split(x, [2, 4], dim=1)[1]), {"a": linear(4)}),
    "unbind": ((2, 4), lambda m, x: m.a(x.unbind(1)[0]) - m.a(x.unbind(1)[1]), {"a": linear(4)}),
    "index": ((3, 4), lambda m, x: m.a(x[:, 0, 1:]) + m.a(x[..., -1, :3]), {"a": linear(3)}),
    "gated": ((3, 4), gated, {"query": linear(4, 4, bias=True), "out": linear(4)}),
    "reductions": (
        (3, 4),
        lambda m, x: m.a(x.mean(1) + x.sum(dim=1) - x.amax(dim=1) + torch.amin(x, 1)),
        {"a": linear(4)},
    ),
    "centering": ((5,), lambda m, x: m.a(x - x.mean(dim=1, keepdim=True)), {"a": linear(5)}),
    "shifts": ((4,), lambda m, x: m.a(torch.roll(x, 1, 1) - x.flip(1)), {"a": linear(4)}),
    "transpose": (
        (3, 4),
        lambda m, x: m.b(m.a(x.transpose(1, 2)).permute(0, 2, 1).flatten(1)),
        {"a": linear(3, 3, bias=True), "b": linear(12)},
    ),
    "dropout": ((4,), lambda m, x: m.a(F.dropout(x, 0.25, m.training)), {"a": linear(4)}),
    "gate inside": (
        (4,),
        lambda m, x: m.c(m.gate(m.b(m.a(x)))),
        {"a": linear(4, 4), "b": linear(4, 4, bias=True), "gate": lnn.GradientGate(0.2), "c": linear(4)},
    ),
    "clip inside": (
        (4,),
        lambda m, x: m.b(m.clip(m.a(x))),
        {"a": linear(4, 4, k_coef_lip=5.0), "clip": lnn.ValueClip(0.5), "b": linear(4)},
    ),
    "sines": ((4,), lambda m, x: m.a(torch.sin(x) + torch.cos(x).abs() - x.neg()), {"a": linear(4)}),
}


def form(name):
    shape, forward, members = FORMS[name]
    return Function(forward, **copy.deepcopy(members)), shape


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_writing_a_model_is_bounded(name):
    model, shape = form(name)
    falsify(model, ProbeLoss(), shape, **{**LIGHT, "weights": ("scaled",)})  # norms that no constraint tells


def test_functional_forms_reach_the_rule_of_the_module():
    """fx must hand us the very function that the rule is registered for."""
    pairs = [
        (lambda m, x: F.relu(x), nn.ReLU()),
        (lambda m, x: F.max_pool2d(x, 2), nn.MaxPool2d(2)),
        (lambda m, x: F.max_pool2d(x, 3, 1, 1), nn.MaxPool2d(3, 1, 1)),
        (lambda m, x: F.avg_pool2d(x, 3, 1, 1), nn.AvgPool2d(3, 1, 1)),
        (lambda m, x: F.adaptive_avg_pool2d(x, 2), nn.AdaptiveAvgPool2d(2)),
        (lambda m, x: F.gelu(x), nn.GELU()),
        (lambda m, x: F.leaky_relu(x, 2.0), nn.LeakyReLU(2.0)),
        (lambda m, x: F.elu(x, 3.0), nn.ELU(3.0)),
        (lambda m, x: F.softplus(x, 2.0), nn.Softplus(2.0)),
        (lambda m, x: F.softmax(x, dim=1), nn.Softmax(1)),
        (lambda m, x: F.dropout(x, 0.3, m.training), nn.Dropout(0.3)),
        (lambda m, x: F.pixel_shuffle(x, 2), nn.PixelShuffle(2)),
        (lambda m, x: F.silu(x), nn.SiLU()),
        (lambda m, x: F.mish(x), nn.Mish()),
        (lambda m, x: F.relu6(x), nn.ReLU6()),
        (lambda m, x: F.softsign(x), nn.Softsign()),
        (lambda m, x: F.tanh(x), nn.Tanh()),
        (lambda m, x: F.sigmoid(x), nn.Sigmoid()),
    ]
    for function, module in pairs:
        by_function = BoundGraph(Function(function), (4, 4, 4)).sweep(1.0)
        by_module = BoundGraph(nn.Sequential(lnn.InputBound(1.0), module), (4, 4, 4)).sweep(1.0)
        assert by_function.lipschitz == by_module.lipschitz
        assert by_function.output == by_module.output


# --- numbers that are known -------------------------------------------------------------------------------------------


def test_a_replaced_position_parameter_is_noticed():
    model, shape = form("position")
    graph = BoundGraph(model, shape)
    before = float(graph.sweep(1.0).parameters["a.weight"])
    model.pos = nn.Parameter(100 * torch.ones(3, 4))
    after = graph.sweep(1.0)
    assert float(after.parameters["a.weight"]) > 50 * before
    assert float(after.parameters["pos"]) >= 1.0
    with torch.no_grad():
        model.a.weight.mul_(2)
    assert float(graph.sweep(1.0).parameters["pos"]) == pytest.approx(2.0, rel=1e-4)


def test_a_changed_buffer_is_noticed():
    model, shape = form("buffer computed")
    graph = BoundGraph(model, shape)
    before = float(graph.lipschitz())
    model.log.fill_(3.0)
    assert float(graph.lipschitz()) == pytest.approx(before * math.exp(2.3), rel=1e-3)


# --- random graphs ----------------------------------------------------------------------------------------------------


class RandomGraph(nn.Module):
    """A random directed graph of operations on vectors of 4 entries."""

    def __init__(self, plan):
        super().__init__()
        self.bound = lnn.InputBound(1.0)
        self.plan = plan
        self.layers = nn.ModuleList(lnn.SpectralLinear(4, 4, bias=i % 2 == 0, k_coef_lip=1.2) for i in range(3))
        self.merge = lnn.SpectralLinear(8, 4)
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.1]))

    def forward(self, x):
        known = [self.bound(x)]
        for operation, first, second in self.plan:
            a, b = known[first % len(known)], known[second % len(known)]
            if operation == "linear":
                known.append(self.layers[second % 3](a))
            elif operation == "sort":
                known.append(torch.relu(a) - torch.relu(-b))
            elif operation == "add":
                known.append(a + b)
            elif operation == "mix":
                known.append(0.3 * a - 0.7 * b)
            elif operation == "cat":
                known.append(self.merge(torch.cat([a, b], dim=1)))
            elif operation == "scale":
                known.append(a * self.scale)
            else:
                known.append(a * torch.tanh(b))
        return known[-1]


plans = st.lists(
    st.tuples(
        st.sampled_from(["linear", "sort", "add", "mix", "cat", "scale", "product"]),
        st.integers(0, 7),
        st.integers(0, 7),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans)
def test_random_graphs_are_bounded(plan):
    torch.manual_seed(0)
    falsify(RandomGraph(plan), ProbeLoss(), (4,), weights=("given",), starts=3, climbs=1, steps=4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_overwriting_what_nobody_reads_again_is_fine():
    def forward(m, x):
        return (m.a(x) * 2.0).add_(5.0) + F.relu(m.a(x), inplace=True)

    falsify(Function(forward, a=linear(4)), ProbeLoss(), (4,), weights=("given",), steps=3)
