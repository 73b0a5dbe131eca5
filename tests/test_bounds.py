"""Propagation over graphs: numbers that are known, counts by brute force, and how tight it is."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Function, conv_net, linear
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lipdp
from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.bounds.windows import axis_overlap
from lipdp.losses import CategoricalHinge, MeanSquaredError, TauCrossEntropy
from lipdp.testing import ProbeLoss, falsify

pytestmark = pytest.mark.usefixtures("one_thread")


# --- numbers that are known -------------------------------------------------------------------------------------------


def sweep(model, shape, start=1.0, **options):
    return BoundGraph(model.double(), shape, **options).sweep(start)


def test_the_example_of_the_contract():
    model = nn.Sequential(
        *(lnn.InputBound(1.0), lnn.SpectralConv2d(1, 16, 5, padding=2), lnn.GroupSort2(), lnn.ScaledL2NormPool2d(2)),
        *(nn.Flatten(), lnn.SpectralLinear(16 * 14 * 14, 10)),
    )
    s = lipdp.sensitivity(model, TauCrossEntropy(tau=32.0), input_shape=(1, 28, 28))
    assert set(s) == {"1.weight", "5.weight"}
    assert s["1.weight"] == pytest.approx(math.sqrt(2), rel=0.02)
    assert s["5.weight"] == pytest.approx(math.sqrt(2), rel=0.02)
    assert s.total == pytest.approx(2.0, rel=0.02)
    assert lipdp.lipschitz_constant(model, input_shape=(1, 28, 28)) == pytest.approx(1.0, rel=0.02)


def test_bounds_multiply_along_a_chain():
    model = nn.Sequential(lnn.InputBound(2.0), linear(4, 4, k_coef_lip=3.0), nn.ReLU(), linear(4, 4, k_coef_lip=5.0))
    swept = sweep(model, (4,), 7.0)
    assert swept.lipschitz == pytest.approx(15.0, rel=1e-6)
    assert swept.output == pytest.approx(30.0, rel=1e-6)
    assert swept.parameters["1.weight"] == pytest.approx(3 * 2 * 5 * 7, rel=1e-6)
    assert swept.parameters["3.weight"] == pytest.approx(5 * 6 * 7, rel=1e-6)
    assert [r.kind for r in swept.rows] == ["InputBound", "SpectralLinear", "ReLU", "SpectralLinear"]
    assert [float(r.cotangent) for r in swept.rows] == pytest.approx([7 * 15, 7 * 5, 7 * 5, 7], rel=1e-6)
    assert [float(r.value) for r in swept.rows] == pytest.approx([2, 6, 6, 30], rel=1e-6)


def test_uses_of_a_weight_add():
    shared = linear(4, 4)
    once, twice = sweep(nn.Sequential(lnn.InputBound(1.0), shared), (4,)), None
    twice = sweep(nn.Sequential(lnn.InputBound(1.0), shared, nn.ReLU(), shared), (4,))
    assert twice.parameters["1.weight"] == pytest.approx(2 * float(once.parameters["1.weight"]), rel=1e-6)
    tied = nn.Sequential(lnn.InputBound(1.0), linear(4, 4), nn.ReLU(), linear(4, 4))
    tied[3].weight = tied[1].weight
    assert set(sweep(tied, (4,)).parameters) == {"1.weight"}
    assert sweep(tied, (4,)).parameters["1.weight"] == pytest.approx(2.0, rel=1e-6)
    falsify(tied, ProbeLoss(), (4,), weights=("given",), steps=5)


def test_cotangents_of_several_users_add():
    model = Function(lambda m, x: x + m.a(x) + x, a=linear(4, 4))
    assert sweep(model, (4,)).lipschitz == pytest.approx(3.0, rel=1e-6)
    assert sweep(model, (4,)).rows[0].cotangent == pytest.approx(3.0, rel=1e-6)


def test_concatenation_is_pythagorean():
    model = Function(lambda m, x: torch.cat([3 * x, 4 * x], dim=1))
    assert sweep(model, (4,)).lipschitz == pytest.approx(5.0, rel=1e-4)


def test_gates_and_clips_cap():
    model = nn.Sequential(lnn.InputBound(1.0), linear(4, 4), lnn.ValueClip(0.25), lnn.GradientGate(0.5), linear(4, 4))
    swept = sweep(model, (4,), 3.0)
    assert swept.parameters["4.weight"] == pytest.approx(0.25 * 3.0, rel=1e-6)
    assert swept.parameters["1.weight"] == pytest.approx(0.5, rel=1e-6)


def test_freezing_and_replacing_is_noticed_by_a_traced_graph():
    model = nn.Sequential(lnn.InputBound(1.0), linear(4, 4), linear(4, 4)).double()
    graph = BoundGraph(model, (4,))
    assert set(graph.sweep(1.0).parameters) == {"1.weight", "2.weight"}
    model[1].requires_grad_(False)
    assert set(graph.sweep(1.0).parameters) == {"2.weight"}
    model[1].weight = nn.Parameter(10 * torch.eye(4, dtype=torch.float64))
    assert graph.sweep(1.0).parameters["1.weight"] == pytest.approx(1.0, rel=1e-6)
    assert graph.sweep(1.0).parameters["2.weight"] == pytest.approx(10.0, rel=1e-6)


def test_squared_error_uses_the_output_bound():
    model = nn.Sequential(lnn.InputBound(3.0), linear(4, 2)).double()
    s = lipdp.sensitivity(model, MeanSquaredError(target_bound=1.0, num_outputs=2), (4,))
    assert s.loss_constant == pytest.approx(4.0, rel=1e-6)
    assert s["1.weight"] == pytest.approx(12.0, rel=1e-6)


def test_the_model_is_left_as_it_was():
    model = Function(lambda m, x: m.norm(m.a(x)), a=linear(4), norm=nn.GroupNorm(1, 3), drop=nn.Dropout())
    model.register_buffer("count", torch.zeros(2))
    model.drop.eval()
    modes = [m.training for m in model.modules()]
    state, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    generator = torch.get_rng_state()
    BoundGraph(model, (4,))
    assert [m.training for m in model.modules()] == modes
    assert set(vars(model)) == attributes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_traced_under_no_grad_is_the_same():
    model = conv_net()
    with torch.no_grad():
        inside = lipdp.sensitivity(model, CategoricalHinge(), (1, 6, 6))
    assert dict(inside) == dict(lipdp.sensitivity(model, CategoricalHinge(), (1, 6, 6)))


# --- constants and counts, by brute force -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "constant"),
    [
        (nn.GELU(), 1.129),
        (nn.GELU(approximate="tanh"), 1.129),
        (nn.SiLU(), 1.0999),
        (nn.Mish(), 1.0889),
        (nn.Sigmoid(), 0.25),
        (nn.Tanh(), 1.0),
        (nn.Softplus(), 1.0),
        (nn.ELU(), 1.0),
        (nn.ELU(2.5), 2.5),
        (nn.LeakyReLU(1.5), 1.5),
        (nn.Softsign(), 1.0),
        (nn.Hardtanh(-3.0, 5.0), 1.0),
    ],
)
def test_constants_of_curves_on_a_fine_grid(module, constant):
    x = torch.linspace(-30, 30, 2_000_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    assert slope.abs().max() <= constant
    assert slope.abs().max() >= constant * 0.999
    declared = BoundGraph(module, (1,), dtype=torch.float64).lipschitz()
    assert declared == pytest.approx(constant, rel=1e-6)
    at_zero = BoundGraph(nn.Sequential(lnn.InputBound(1e-9), module), (1,), dtype=torch.float64).output_bound()
    assert float(at_zero) >= abs(float(module(torch.zeros(1, dtype=torch.float64))))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5), st.data())
def test_window_overlap_is_counted_right(size, kernel, stride, left, right, data):
    mode = data.draw(st.sampled_from(["constant", "circular", "reflect", "replicate"]))
    dilation = data.draw(st.integers(1, 3))
    most = {"circular": size, "reflect": size - 1}.get(mode, 5)  # torch allows no more
    left, right = min(left, most), min(right, most)
    reach = dilation * (kernel - 1) + 1
    if size + left + right < reach:
        return
    index = torch.arange(1, size + 1, dtype=torch.float64).view(1, 1, -1)
    row = F.pad(index, (left, right), mode=mode)[0, 0]
    windows = row.unfold(0, reach, stride)[:, ::dilation].flatten().long()
    counts = torch.bincount(windows, minlength=size + 1)[1:]
    assert axis_overlap(size, kernel, stride, left, right, mode=mode, dilation=dilation) == int(counts.max())


@pytest.mark.parametrize("padding", [0, 1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_gain_covers_the_exact_operator_norm(padding, mode, stride):
    """Against the singular values of the layer as a matrix."""
    for kernel in (1, 2, 3):
        layer = lnn.SpectralConv2d(2, 3, kernel, stride, padding, padding_mode=mode).double()
        x = torch.eye(2 * 4 * 4, dtype=torch.float64).view(-1, 2, 4, 4)
        exact = torch.linalg.matrix_norm(layer(x).detach().flatten(1), 2)
        assert BoundGraph(layer, (2, 4, 4)).lipschitz() >= exact
    layer = lnn.SpectralConv2d(1, 1, 3, 1, 1, padding_mode="circular").double()
    with torch.no_grad():
        layer.weight.fill_(1 / 3)
    x = torch.eye(16, dtype=torch.float64).view(-1, 1, 4, 4)
    exact = torch.linalg.matrix_norm(layer(x).detach().flatten(1), 2)
    assert float(BoundGraph(layer, (1, 4, 4)).lipschitz()) == pytest.approx(float(exact), rel=1e-6)


# --- tightness --------------------------------------------------------------------------------------------------------


def test_chain_of_orthogonal_layers_is_tight():
    layers = [lnn.InputBound(1.0)]
    for _ in range(4):
        layers += [lnn.SpectralLinear(8, 8), lnn.GroupSort2()]
    ratios = falsify(nn.Sequential(*layers), ProbeLoss(), (8,), weights=("given",)).ratios
    assert len(ratios) == 4
    assert min(ratios.values()) >= 0.99


def test_chain_of_orthogonal_layers_is_tight_with_a_real_loss():
    model = nn.Sequential(
        *(lnn.InputBound(1.0), lnn.SpectralLinear(6, 6), lnn.GroupSort2(), lnn.SpectralLinear(6, 6), lnn.GroupSort2()),
        lnn.SpectralLinear(6, 6),
    )
    assert lipdp.testing.tightness(model, TauCrossEntropy(tau=1000.0), (6,)) >= 0.99
    assert lipdp.testing.tightness(model, CategoricalHinge(margin=10.0), (6,)) >= 0.99


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_single_convolution_is_tight_on_a_constant_input(mode):
    layer = lnn.SpectralConv2d(1, 4, 3, padding=1, padding_mode=mode)
    model = nn.Sequential(lnn.InputBound(1.0), layer).double()
    declared = lipdp.sensitivity(model, ProbeLoss(), (1, 28, 28))
    x = torch.ones(1, 1, 28, 28, dtype=torch.float64)
    out = model(x)
    (grad,) = torch.autograd.grad(out, layer.weight, torch.ones_like(out) / math.sqrt(out.numel()))
    assert 0.9 <= grad.norm() / declared["1.weight"] <= 1


# --- what a sweep costs -----------------------------------------------------------------------------------------------


def test_a_sweep_is_cheap():
    model = nn.Sequential(
        *(lnn.InputBound(1.0), lnn.SpectralConv2d(1, 16, 5, padding=2), lnn.GroupSort2(), lnn.ScaledL2NormPool2d(2)),
        *(nn.Flatten(), lnn.SpectralLinear(16 * 14 * 14, 10)),
    )
    graph = BoundGraph(model, (1, 28, 28))
    with _Operations() as operations:
        graph.sweep(1.0)
    assert 0 < operations.count < 160  # two norms and little else: 106 when this was written


class _Operations(TorchDispatchMode):
    """Counts the tensor operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_sweep_does_not_synchronise():
    graph = BoundGraph(conv_net().cuda(), (1, 6, 6))
    graph.sweep(1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        swept = graph.sweep(lambda bound: 2 * (bound + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = BoundGraph(conv_net(), (1, 6, 6)).sweep(1.0)
    assert set(swept.parameters) == set(expected.parameters)
