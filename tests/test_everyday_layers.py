"""Layers and functions that people bring: every bound holds, and is reached so nearly that 5 % less would be broken."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.bounds.moving import _nearest_copies
from lipdp.errors import MixesSamplesError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.testing import falsify_layer

pytestmark = pytest.mark.usefixtures("one_thread")


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.functions = [function]

    def forward(self, x):
        return self.functions[0](x)


def ones(layer):
    """All weights alike: the kernel whose windows add up in phase."""
    with torch.no_grad():
        layer.weight.fill_(1.0)
    return layer


GAIN, WEIGHT, BIAS, VALUE = (
    "Lipschitz constant (gradient",
    "gradient of layer.weight",
    "gradient of layer.bias",
    "value of",
)

# name → (layer, shape, radius, what an attack must reach to 95 %)
LAYERS = {
    "Conv2d dilated": (lambda: ones(nn.Conv2d(1, 1, 2, dilation=2, padding=1)), (1, 3, 3), 1.0, (BIAS,)),
    "Conv1d dilated, circular": (
        lambda: ones(nn.Conv1d(1, 1, 3, dilation=2, padding=2, padding_mode="circular", bias=False)),
        *((1, 7), 1.0, (GAIN, WEIGHT, VALUE)),
    ),
    "Conv1d dilated, strided": (
        lambda: ones(nn.Conv1d(1, 1, 2, dilation=2, stride=4, bias=False)),
        *((1, 7), 1.0, (GAIN, WEIGHT)),
    ),
    "Conv1d reflect": (
        lambda: ones(nn.Conv1d(1, 1, 1, padding=2, padding_mode="reflect")),
        *((1, 3), 1.0, (GAIN, BIAS)),
    ),
    "Conv1d replicate": (
        lambda: ones(nn.Conv1d(1, 1, 1, padding=2, padding_mode="replicate")),
        *((1, 3), 1.0, (GAIN, BIAS)),
    ),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 4, 2, 2), 1.0, (GAIN, WEIGHT, BIAS)),
    "Conv3d circular": (
        lambda: ones(nn.Conv3d(1, 1, 3, padding=1, padding_mode="circular", bias=False)),
        *((1, 3, 3, 3), 1.0, (GAIN, WEIGHT, VALUE)),
    ),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 3), 1.0, (GAIN, WEIGHT, BIAS)),
    "ConvTranspose1d overlap": (lambda: ones(nn.ConvTranspose1d(1, 1, 2, bias=False)), *((1, 24), 1.0, (GAIN, WEIGHT))),
    "ConvTranspose1d dilated": (
        lambda: ones(nn.ConvTranspose1d(1, 1, 2, stride=3, padding=1, output_padding=1, dilation=2)),
        *((1, 4), 1.0, (BIAS,)),
    ),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 3), groups=2),
        *((4, 2, 2), 1.0, (GAIN, WEIGHT, BIAS)),
    ),
    "ConvTranspose2d overlap": (
        lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1),
        *((2, 3, 3), 1.0, (BIAS,)),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2, stride=2), (1, 2, 1, 2), 1.0, (GAIN, WEIGHT, BIAS)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (2, 5), 1.0, (GAIN, VALUE)),
    "MaxPool1d overlap": (lambda: nn.MaxPool1d(3, 1, 1), (1, 7), 1.0, (GAIN, VALUE)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), (1, 2, 4, 2), 1.0, (GAIN, VALUE)),
    "AvgPool1d": (lambda: nn.AvgPool1d(3), (2, 6), 1.0, (GAIN, VALUE)),
    "AvgPool1d overlap": (lambda: nn.AvgPool1d(2, 1), (1, 24), 1.0, (GAIN, VALUE)),
    "AvgPool3d": (lambda: nn.AvgPool3d((1, 2, 2)), (1, 2, 4, 2), 1.0, (GAIN, VALUE)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 6), 1.0, (GAIN, VALUE)),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d((1, None, 1)), (1, 2, 3, 2), 1.0, (GAIN, VALUE)),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(2), (2, 6), 1.0, (GAIN, VALUE)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d((2, 1)), (1, 4, 3), 1.0, (GAIN, VALUE)),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(1), (2, 2, 2, 2), 1.0, (GAIN, VALUE)),
    "ZeroPad2d": (lambda: nn.ZeroPad2d((1, 2, 0, 3)), (1, 3, 3), 1.0, (GAIN, VALUE)),
    "ConstantPad1d": (lambda: nn.ConstantPad1d((3, -1), 5.0), (1, 3), 0.1, (GAIN, VALUE)),
    "ReflectionPad1d": (lambda: nn.ReflectionPad1d(2), (2, 4), 1.0, (GAIN, VALUE)),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d((1, 1, 2, 0)), (1, 3, 3), 1.0, (GAIN, VALUE)),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d((2, 0, 1, 0)), (1, 2, 2), 1.0, (GAIN, VALUE)),
    "CircularPad1d": (lambda: nn.CircularPad1d((2, 1)), (1, 4), 1.0, (GAIN, VALUE)),
    "F.pad": (lambda: Call(lambda x: F.pad(x, (1, 1), "replicate")), (2, 3), 1.0, (GAIN, VALUE)),
    "F.pad value": (lambda: Call(lambda x: F.pad(x, (0, 2, 1, 0), value=2.0)), (2, 3), 0.1, (GAIN, VALUE)),
    "Upsample": (lambda: nn.Upsample(scale_factor=3), (1, 2, 2), 1.0, (GAIN, VALUE)),
    "Upsample size": (lambda: nn.Upsample(size=(4, 2), mode="nearest-exact"), (2, 2, 2), 1.0, (GAIN, VALUE)),
    "F.interpolate": (lambda: Call(lambda x: F.interpolate(x, scale_factor=2.0)), (2, 3), 1.0, (GAIN, VALUE)),
    "Unfold": (lambda: nn.Unfold(2, padding=1), (1, 2, 2), 1.0, (GAIN, VALUE)),
    "Unfold dilated": (lambda: nn.Unfold((1, 2), dilation=2, stride=2), (1, 1, 5), 1.0, (GAIN, VALUE)),
    "SELU": (nn.SELU, (3,), 0.02, (GAIN, VALUE)),
    "CELU": (lambda: nn.CELU(0.3), (3,), 1.0, (GAIN, VALUE)),
    "ELU": (lambda: nn.ELU(2.5), (3,), 0.02, (GAIN, VALUE)),
    "Hardswish": (nn.Hardswish, (2,), 3.0, (GAIN,)),
    "Hardsigmoid": (nn.Hardsigmoid, (3,), 0.1, (GAIN, VALUE)),
    "LogSigmoid": (nn.LogSigmoid, (2,), 30.0, (GAIN, VALUE)),
    "LogSigmoid at 0": (nn.LogSigmoid, (3,), 0.01, (VALUE,)),
    "F.hardtanh": (lambda: Call(lambda x: F.hardtanh(x, 1.0, 2.0)), (3,), 1e-3, (VALUE,)),
    "clamp": (lambda: Call(lambda x: torch.clamp(x, -0.5, max=3.0)), (3,), 9.0, (GAIN, VALUE)),
    "clamp_min": (lambda: Call(lambda x: x.clamp_min(-2.0)), (3,), 1.0, (GAIN, VALUE)),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), (2, 5), 40.0, (GAIN,)),
    "LogSoftmax at 0": (lambda: nn.LogSoftmax(1), (3, 2), 0.01, (VALUE,)),
    "F.normalize": (lambda: Call(lambda x: F.normalize(x, dim=2, eps=0.2)), (3, 4), 1.0, (GAIN, VALUE)),
    "GLU": (lambda: nn.GLU(1), (4, 2), 1.0, (GAIN,)),
    "GLU far": (nn.GLU, (2,), 6.0, (GAIN,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_attack_breaks_a_bound_and_one_reaches_it(name):
    make, shape, radius, reached = LAYERS[name]
    layer = make().double()
    options = {"radius": radius, "weights": ("given",)}
    report = falsify_layer(layer, shape, starts=6, climbs=3, steps=12, **options)
    print(f"{name:28s} {report.worst:.6f}")
    for quantity in reached:
        ratios = {q: f.ratio for q, f in report.findings.items() if q.startswith(quantity) and "bound" not in q}
        assert max(ratios.values()) > 0.953, ratios
    weights = ("given", "constant", "rank one") if list(layer.parameters()) else ("given",)
    falsify_layer(layer, shape, radius=radius, dtype=torch.float32, weights=weights, starts=2, climbs=1, steps=0)


def test_functions_reach_the_rule_of_the_module():
    pairs = [
        (lambda x: F.max_pool1d(x, 2), nn.MaxPool1d(2), (2, 4)),
        (lambda x: F.max_pool3d(x, 2), nn.MaxPool3d(2), (1, 2, 2, 2)),
        (lambda x: F.avg_pool1d(x, 2, 1, 1), nn.AvgPool1d(2, 1, 1), (2, 4)),
        (lambda x: F.avg_pool3d(x, 2), nn.AvgPool3d(2), (1, 2, 2, 2)),
        (lambda x: F.adaptive_avg_pool1d(x, 2), nn.AdaptiveAvgPool1d(2), (2, 4)),
        (lambda x: F.adaptive_avg_pool3d(x, 1), nn.AdaptiveAvgPool3d(1), (1, 2, 2, 2)),
        (lambda x: F.adaptive_max_pool1d(x, 2), nn.AdaptiveMaxPool1d(2), (2, 4)),
        (lambda x: F.adaptive_max_pool2d(x, 1), nn.AdaptiveMaxPool2d(1), (2, 4, 4)),
        (lambda x: F.adaptive_max_pool3d(x, 1), nn.AdaptiveMaxPool3d(1), (1, 2, 2, 2)),
        (lambda x: F.pad(x, (1, 0)), nn.ZeroPad1d((1, 0)), (2, 4)),
        (lambda x: F.pad(x, (1, 1), mode="reflect"), nn.ReflectionPad1d(1), (2, 4)),
        (lambda x: F.pad(x, (1, 1), mode="circular"), nn.CircularPad1d(1), (2, 4)),
        (lambda x: F.interpolate(x, size=8), nn.Upsample(8), (2, 4)),
        (lambda x: F.unfold(x, 2, stride=2), nn.Unfold(2, stride=2), (1, 4, 4)),
        (lambda x: F.selu(x), nn.SELU(), (4,)),
        (lambda x: F.celu(x, 2.0), nn.CELU(2.0), (4,)),
        (lambda x: F.elu(x, 2.0), nn.ELU(2.0), (4,)),
        (lambda x: F.hardswish(x), nn.Hardswish(), (4,)),
        (lambda x: F.hardsigmoid(x), nn.Hardsigmoid(), (4,)),
        (lambda x: F.logsigmoid(x), nn.LogSigmoid(), (4,)),
        (lambda x: x.clamp(min=-1, max=1), nn.Hardtanh(), (4,)),
        (lambda x: torch.clamp_max(x, 3.0), nn.Identity(), (4,)),
        (lambda x: x.log_softmax(1), nn.LogSoftmax(1), (4,)),
        (lambda x: F.log_softmax(x, dim=-1), nn.LogSoftmax(-1), (4,)),
        (lambda x: F.glu(x, 1), nn.GLU(1), (4,)),
    ]
    for function, module, shape in pairs:
        sweeps = [BoundGraph(m, shape, input_bound=2.0).sweep(1.0) for m in (Call(function), module)]
        assert sweeps[0].lipschitz == pytest.approx(float(sweeps[1].lipschitz), rel=1e-5)
        assert sweeps[0].output == pytest.approx(float(sweeps[1].output), rel=1e-5)


def test_copies_of_nearest_upsampling_are_counted_as_torch_rounds():
    """49 · (1/49) rounds below 1 in float32: the first entry is shown 50 times."""
    for size, factor in ((2, 49), (3, 2), (5, 7), (2, 41)):
        index = torch.arange(size, dtype=torch.float32).view(1, 1, -1)
        for options in ({"scale_factor": factor}, {"size": size * factor}):
            shown = F.interpolate(index, **options).flatten().long().bincount().max()
            assert int(shown) <= _nearest_copies(size, size * factor, 0.0) <= factor + 1


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 2), "nearest"),
        (nn.Upsample(scale_factor=1.5), (1, 4), "whole factors"),
        (nn.Upsample(size=5), (1, 3), "whole factors"),
        (nn.AdaptiveMaxPool2d(2), (1, 5, 4), "overlap"),
        (nn.AdaptiveAvgPool1d(2), (1, 3), "overlap"),
        (nn.MaxPool1d(2, ceil_mode=True), (1, 5), "ceil_mode"),
        (nn.AvgPool3d(2, divisor_override=1), (1, 2, 2, 2), "divisor_override"),
        (nn.CELU(-1.0), (3,), "alpha > 0"),
        (Call(lambda x: F.normalize(x, p=1.0)), (3,), "p=2"),
        (Call(lambda x: F.normalize(x, eps=1e-30)), (3,), "eps"),
        (Call(lambda x: F.pad(x, (0, 0, 1, -1))), (3,), "batch axis"),
        (Call(lambda x: F.normalize(x, dim=0)), (3,), "batch axis"),
        (Call(lambda x: torch.clamp(x, x.mean(1, keepdim=True))), (3,), "only numbers"),
    ],
)
def test_what_has_no_bound_is_refused_with_the_reason(layer, shape, reason):
    with pytest.raises((UnsupportedLayerError, UnsupportedOperationError, MixesSamplesError), match=reason):
        BoundGraph(layer, shape)


@pytest.mark.parametrize("make", [lambda: nn.ConvTranspose1d(1, 1, 2), lambda: nn.Conv3d(1, 1, 1)])
def test_new_layers_with_parameters_are_refused_where_sums_are_in_bfloat16(make):
    shape = (1, 3) if isinstance(make(), nn.ConvTranspose1d) else (1, 2, 2, 2)
    with pytest.raises(UnsupportedLayerError, match="float32"):
        BoundGraph(nn.Sequential(lnn.InputBound(1.0), make()), shape, dtype=torch.bfloat16)


def test_without_a_value_bound_glu_has_none():
    assert BoundGraph(nn.GLU(), (4,)).lipschitz() == torch.inf


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_the_weight_of_a_padded_convolution_sees_every_copy(mode):
    layer = nn.Conv1d(1, 1, 1, padding=2, padding_mode=mode, bias=False).double()
    place = {"reflect": 1, "replicate": 0}[
        mode
    ]  # the entry that is shown three times, and the cotangent that adds them up
    x = F.one_hot(torch.tensor([[place]]), 3).double()
    cotangent = F.pad(x, (2, 2), mode=mode) / 3**0.5
    (layer(x) * cotangent).sum().backward()
    bound = float(BoundGraph(layer, (1, 3), input_bound=1.0).sweep(1.0).parameters["weight"])
    assert 0.95 * bound < float(layer.weight.grad.norm()) <= bound
