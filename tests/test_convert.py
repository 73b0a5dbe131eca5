"""from_torchlip and to_torch compute the same function, keep what they promise, and refuse what is unsound."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from deel import torchlip
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lipdp
from lipdp import errors
from lipdp import nn as lnn
from lipdp.losses import TauCrossEntropy

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64)


def close(actual, expected, shape, dtype):
    """Equal up to rounding and the ε = 1e-6 of L2-norm pooling: at most ε √windows in norm; the rest adds little."""
    tolerance = 1e-6 * math.sqrt(math.prod(shape)) if len(shape) == 3 else 0.0
    tolerance += 1e-12 if dtype == torch.float64 else 3e-6
    assert expected.std() > 10 * tolerance
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def sequential(*layers, k=1.0):
    """deel-torchlip warns of layers it does not know; which ones is not our concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchlip.Sequential(*layers, k_coef_lip=k)


def perceptron():
    return sequential(
        *(torchlip.SpectralLinear(12, 9), torchlip.FullSort(), torchlip.SpectralLinear(9, 8, bias=False)),
        *(torchlip.GroupSort2(), torchlip.SpectralLinear(8, 6, k_coef_lip=2.5, eps_bjorck=None), torchlip.MaxMin()),
        *(torchlip.FrobeniusLinear(12, 5), torchlip.LPReLU(), torchlip.FrobeniusLinear(5, 3, disjoint_neurons=False)),
    )


def images():
    return sequential(
        *(torchlip.SpectralConv2d(2, 4, 3, padding=1), torchlip.GroupSort2(), torchlip.ScaledL2NormPool2d(2)),
        *(torchlip.SpectralConv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular", bias=False, k_coef_lip=3.0),),
        *(torchlip.HouseHolder(6), torchlip.ScaledAvgPool2d(2), torchlip.LayerCentering(6, bias=True)),
        *(torchlip.FrobeniusConv2d(6, 3, 1), torchlip.InvertibleDownSampling(2), torchlip.PadConv2d(12, 4, 1)),
        *(nn.Flatten(), torchlip.SpectralLinear(4, 3)),
    )


def series():
    return sequential(
        torchlip.SpectralConv1d(2, 4, 3, padding=1), torchlip.GroupSort(4), torchlip.PadConv1d(4, 4, 2), nn.Flatten()
    )


class Branches(nn.Module):
    """Not sequential: a layer under two names, nested children, a residual, a torchlip sequence inside."""

    def __init__(self):
        super().__init__()
        self.first = torchlip.SpectralLinear(12, 12)
        self.again = self.first
        self.body = nn.ModuleDict({"inner": sequential(torchlip.SpectralLinear(12, 12), torchlip.GroupSort2())})
        self.mix = torchlip.LipResidual()
        self.head = torchlip.FrobeniusLinear(12, 3)
        self.missing = None

    def forward(self, x):
        x = self.again(self.first(x))
        return self.head(self.mix(x, self.body["inner"](x)))


TORCHLIP = {
    "perceptron": (perceptron, (12,)),
    "images": (images, (2, 16, 16)),
    "series": (series, (2, 7)),
    "branches": (Branches, (12,)),
    "global k": (lambda: sequential(torchlip.ScaledL2NormPool2d(2), torchlip.ScaledAvgPool2d(2), k=1.5), (1, 8, 8)),
}


def scramble(model):
    """Weights away from initialisation, as training leaves them, and norms that power iteration has not yet found."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def state(model):
    return copy.deepcopy(model.state_dict())


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- from deel-torchlip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TORCHLIP)
def test_from_torchlip_computes_the_same(name, training, dtype):
    build, shape = TORCHLIP[name]
    model = scramble(build().to(dtype))
    model(torch.randn(3, *shape, dtype=dtype))  # a forward pass in training mode moves deel-torchlip's buffers
    model.train(training)
    before = state(model)
    ours = lnn.from_torchlip(model)
    assert same_state(before, model.state_dict())
    x = torch.randn(5, *shape, dtype=dtype)
    close(ours(x), model(x), shape, dtype)
    assert not any(parametrize.is_parametrized(m) for m in ours.modules())
    assert all(m.training is training for m in ours.modules())
    assert {p.dtype for p in ours.parameters()} <= {dtype}


@pytest.mark.parametrize("name", ["perceptron", "images", "series", "branches"])
def test_a_converted_model_has_bounds_and_they_hold(name):
    build, shape = TORCHLIP[name]
    ours = lnn.from_torchlip(scramble(build().double()))
    model = nn.Sequential(lnn.InputBound(1.0), ours)
    loss = TauCrossEntropy(10.0)
    s = lipdp.sensitivity(model, loss, input_shape=shape)
    assert set(s) == {k for k, _ in model.named_parameters()}
    for _ in range(10):
        x = torch.randn(1, *shape).double()
        model.zero_grad()
        z = model(x)
        loss(z, z.argmin(1)).sum().backward()
        assert all(p.grad.norm() <= s[k] for k, p in model.named_parameters())


def test_projecting_a_converted_model_keeps_its_function():
    """The constraint is the one the normalisation aims at: a converged model is (nearly) a fixed point."""
    model = nn.Sequential(
        *(torchlip.SpectralLinear(6, 8), torchlip.GroupSort2(), torchlip.SpectralLinear(8, 4, eps_bjorck=None)),
        *(torchlip.FrobeniusLinear(4, 4), torchlip.FrobeniusLinear(4, 3, disjoint_neurons=False)),
    ).double()
    model[0].bias.data.fill_(2.0)
    for _ in range(60):
        model(torch.randn(1, 6).double())  # power iteration converges
    ours = lnn.from_torchlip(model.eval())
    x = torch.randn(4, 6).double()
    before = ours(x)
    lnn.project_(ours)
    torch.testing.assert_close(ours(x), before, atol=1e-3, rtol=0)
    kinds = [(type(m).__name__, type(m.constraint).__name__) for m in ours if isinstance(m, lnn.Constrained)]
    assert kinds == [
        *(("SpectralLinear", "Orthogonal"), ("SpectralLinear", "Spectral")),
        *(("FrobeniusLinear", "Frobenius"), ("FrobeniusLinear", "Frobenius")),
    ]
    assert [ours[i].constraint.radius for i in (3, 4)] == [2.0, 1.0]  # rows of norm 1: √out


def test_disjoint_neurons_are_bounded_as_they_are():
    """Four equal rows of norm 1: the layer deel-torchlip calls 1-Lipschitz has norm 2, and the bound says 2."""
    layer = torchlip.FrobeniusLinear(5, 4, bias=False).double()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.ones(4, 5))
    assert 2.0 <= lipdp.lipschitz_constant(lnn.from_torchlip(layer), input_shape=(5,)) < 2.001


def test_an_unconverged_norm_is_seen():
    layer = torchlip.SpectralLinear(6, 6, bias=False, eps_bjorck=None).double().eval()
    with torch.no_grad():  # the buffers of power iteration are left behind
        layer.parametrizations.weight.original.copy_(torch.diag(torch.arange(1.0, 7.0)))
    true = torch.linalg.matrix_norm(layer.weight, 2).item()
    assert true > 1.1
    assert true <= lipdp.lipschitz_constant(lnn.from_torchlip(layer), input_shape=(6,)) < 1.01 * true


def test_one_module_under_two_names_stays_one():
    ours = lnn.from_torchlip(Branches())
    assert ours.first is ours.again
    assert isinstance(ours.first, lnn.SpectralLinear)
    assert type(ours.body["inner"]) is nn.Sequential
    exported = lnn.to_torch(ours)
    assert exported.first is exported.again
    assert type(exported.first) is nn.Linear


def test_frozen_layers_stay_frozen():
    model = nn.Sequential(torchlip.SpectralLinear(3, 3), torchlip.SpectralConv2d(1, 1, 3), torchlip.LPReLU())
    model[0].parametrizations.weight.original.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    for converted in (lnn.from_torchlip(model), lnn.to_torch(lnn.from_torchlip(model))):
        flags = {k: p.requires_grad for k, p in converted.named_parameters()}
        expected = {"0.weight": False, "0.bias": True, "1.weight": True, "1.bias": False, "2.weight": False}
        assert flags == expected


def refusals():
    shared = torchlip.SharedLipFactory()
    with_factory = torchlip.GroupSort2(k_coef_lip=2.0)
    with_factory.factory = shared
    hooked = torchlip.SpectralLinear(2, 2)
    hooked.register_forward_hook(lambda module, args, output: output)
    return {
        "padding_mode='symmetric'": torchlip.SpectralConv2d(1, 1, 5, padding=2, padding_mode="symmetric"),
        "padding_mode='replicate'": torchlip.SpectralConv2d(1, 1, 3, padding=1, padding_mode="symmetric"),
        "padding_mode='reflect'": torchlip.SpectralConv1d(1, 1, 3, padding=1, padding_mode="reflect"),
        "repeats border": torchlip.PadConv2d(1, 1, 5, padding=2, padding_mode="symmetric"),
        "dilation": torchlip.SpectralConv2d(1, 1, 3, dilation=2),
        "transposed": torchlip.SpectralConvTranspose2d(1, 1, 2),
        "ceil_mode": torchlip.ScaledL2NormPool2d(2, ceil_mode=True),
        "divisor_override": torchlip.ScaledAvgPool2d(2, divisor_override=1),
        "window depends": torchlip.ScaledAdaptativeL2NormPool2d(),
        "SharedLipFactory": with_factory,
        "carries hooks": hooked,
        "is reparametrised": parametrizations.spectral_norm(nn.Linear(2, 2)),
    }


@pytest.mark.parametrize("reason", refusals())
def test_refuses_what_is_unsound(reason):
    layer = refusals()[reason]
    with pytest.raises(errors.UnsupportedLayerError, match=reason):
        lnn.from_torchlip(layer)
    with pytest.raises(errors.UnsupportedLayerError, match="'1' "):
        lnn.from_torchlip(nn.Sequential(nn.Identity(), layer))


@pytest.mark.parametrize(
    "layer",
    [torchlip.BatchCentering(2), torchlip.BatchLipNorm(2), torchlip.LayerCentering(1, dim=None, bias=False)],
    ids=lambda layer: type(layer).__name__,
)
def test_refuses_what_mixes_samples(layer):
    with pytest.raises(errors.MixesSamplesError, match="over the batch"):
        lnn.from_torchlip(layer.eval())


# --- to torch ---------------------------------------------------------------------------------------------------------


def every_layer():
    return nn.Sequential(
        *(lnn.InputBound(30.0), lnn.SpectralConv2d(2, 4, 3, padding=1, bias=True, k_coef_lip=0.5), lnn.GroupSort2()),
        *(lnn.GradientGate(1.0), lnn.SpectralConv2d(4, 8, 3, stride=2, padding=1, groups=2, padding_mode="circular")),
        *(lnn.Residual(lnn.SpectralConv2d(8, 8, 3, padding="same")), lnn.ScaledL2NormPool2d(2), lnn.MaxMin()),
        *(lnn.ScaledAvgPool2d((1, 2)), lnn.ScaledAvgPool2d(2), lnn.InvertibleUpSampling(2), lnn.LPReLU(init=-3.0)),
        *(lnn.InvertibleDownSampling(2), lnn.LayerCentering(16, bias=True), lnn.Concat(nn.ReLU(), lnn.ValueClip(5.0))),
        *(
            nn.Flatten(1),
            lnn.SpectralLinear(128, 6, True),
            lnn.GroupSort2(-1),
            lnn.FrobeniusLinear(6, 3),
            lnn.Scale(3.0),
        ),
    )


OURS = {
    "every layer": (every_layer, (2, 16, 32)),
    "series": (lambda: nn.Sequential(lnn.SpectralConv1d(2, 4, 3, stride=2, bias=True), lnn.GroupSort2()), (2, 9)),
    "one layer": (lambda: lnn.SpectralLinear(3, 2, k_coef_lip=0.3), (3,)),
    **{
        name: (lambda name=name: lipdp.models.build(name, input_shape=(1, 8, 8), num_classes=3, gates=0.1), (1, 8, 8))
        for name in ("cnn", "mixer", "resnet", "transformer")
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_to_torch_computes_the_same(name, dtype):
    build, shape = OURS[name]
    model = build().to(dtype).eval()
    before = state(model)
    exported = lnn.to_torch(model)
    assert same_state(before, model.state_dict())
    x = torch.randn(5, *shape, dtype=dtype)
    close(exported(x), model(x), shape, dtype)
    assert [k for k, _ in exported.named_parameters()] == [k for k, _ in model.named_parameters()]
    assert not any(m.training for m in exported.modules())
    assert {p.dtype for p in exported.parameters()} <= {dtype}
    assert not any(isinstance(m, (lnn.Constrained, lnn.GroupSort2, lnn.GradientGate)) for m in exported.modules())


EXPORTED = {
    **OURS,
    "sorting": (lambda: nn.Sequential(nn.Flatten(), lnn.GroupSort(4), lnn.FullSort(), lnn.MaxMin()), (1, 4, 4)),
    "reflections": (lambda: nn.Sequential(lnn.HouseHolder(4), lnn.ScaledAdaptiveAvgPool2d((1, 1))), (4, 8, 8)),
    "normalised": (lambda: nn.Sequential(lnn.LayerNorm(8), lnn.LayerCentering(8, dim=(-1,), bias=True)), (8,)),
    "attention": (lambda: nn.Sequential(lnn.InputBound(2.0), lnn.SpectralAttention(6, 2, bound=0.4)), (4, 6)),
    "absolute values": (lambda: nn.Sequential(lnn.SpatialShift(1), lnn.BetaAbs(0.5), lnn.BetaAbs(0.3, -1)), (5, 3, 3)),
    "clip": (lambda: nn.Sequential(lnn.ValueClip(1.0, 2.0), lnn.SpectralLinear(6, 3)), (6,)),
    "table": (lambda: lipdp.models.build("tabular", input_shape=(5,), num_classes=1), (5,)),
}


OF_LAYERS_OF_OTHERS = ("one layer", "cnn", "resnet", "transformer")  # "every layer", "mixer" and "attention" have them


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in OF_LAYERS_OF_OTHERS else n for n in EXPORTED]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_an_export_holds_nothing_of_ours_and_scripts_and_exports(name):
    build, shape = EXPORTED[name]
    model = scramble(build()).eval()
    exported = lnn.to_torch(model)
    assert not [m for m in exported.modules() if type(m).__module__.startswith(("lipdp", "deel"))]
    x = torch.randn(6, *shape)
    batch = torch.export.Dim("batch")
    program = torch.export.export(exported, (x[:3],), dynamic_shapes=({0: batch},))
    for made in (exported, torch.jit.script(exported), program.module()):
        torch.testing.assert_close(made(x), model(x), atol=1e-4, rtol=1e-4)


def test_exported_layers_are_torch_nn():
    exported = lnn.to_torch(every_layer())
    kinds = {type(m) for m in exported.modules()}
    assert {nn.Conv2d, nn.Linear, nn.LPPool2d, nn.AvgPool2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.PReLU} <= kinds
    assert nn.Identity in kinds  # the gate
    assert exported.training
    flat = lnn.to_torch(nn.Sequential(lnn.SpectralLinear(4, 4), lnn.GroupSort2(), lnn.SpectralLinear(4, 2)))
    torch.fx.symbolic_trace(flat)


def test_the_sensitivity_of_an_export_is_that_of_the_model():
    """The folded weights are bounded as they are, by the rules of torch.nn."""
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralConv2d(1, 4, 3), nn.Flatten(), lnn.SpectralLinear(16, 3))
    ours, exported = (lipdp.lipschitz_constant(m, input_shape=(1, 4, 4)) for m in (model, lnn.to_torch(model)))
    assert ours == pytest.approx(exported, rel=1e-3)


def test_round_trip():
    model = scramble(images().double())
    model(torch.randn(2, 2, 16, 16).double())
    model.eval()
    x = torch.randn(3, 2, 16, 16).double()
    torch.testing.assert_close(lnn.to_torch(lnn.from_torchlip(model))(x), model(x), atol=1e-3, rtol=0)
