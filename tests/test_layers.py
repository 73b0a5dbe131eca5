"""Every layer with a rule goes through the shipped test case: attacked in float64, float32 and bfloat16, and more."""

import pytest
import torch
from deel import torchlip
from torch import nn

from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.constraints import Spectral
from lipdp.errors import MixesSamplesError, ParameterError, UnsupportedLayerError
from lipdp.testing import LayerTestCase, falsify_layer

pytestmark = pytest.mark.usefixtures("one_thread")


class Join(nn.Module):
    """deel-torchlip's trainable residual around a block; `swapped` passes its arguments by name, in the other order."""

    def __init__(self, *, swapped=False):
        super().__init__()
        self.block = lnn.SpectralLinear(6, 6, k_coef_lip=3.0)
        self.join = lnn.LipResidual()
        self.swapped = swapped
        with torch.no_grad():
            self.join.alpha.fill_(1.3)

    def forward(self, x):
        if self.swapped:
            return self.join(y=self.block(x), x=x)
        return self.join(x, self.block(x))


GATED = {"gates_gradients": True, "effort": {"steps": 3}}
IN_FLOAT32 = {"test_bounds_hold_under_autocast": None}  # refused there: torch sums their gradients in bfloat16

CASES = {
    "Attention": (lambda: lnn.SpectralAttention(4, 2, bound=0.35), (4, 4), {}),
    "AttentionSharp": (lambda: lnn.SpectralAttention(3, head_width=2, sharpness=2.0, bound=0.5), (5, 3), {}),
    "AttentionOneToken": (lambda: lnn.SpectralAttention(4), (1, 4), {}),
    "Linear": (lambda: lnn.SpectralLinear(6, 6), (6,), {"tight": 0.999}),
    "LinearWideBias": (lambda: lnn.SpectralLinear(7, 3, True), (7,), {"tight": 0.999}),
    "LinearTallBias": (lambda: lnn.SpectralLinear(3, 8, True), (3,), {"tight": 0.999}),
    "LinearTokensBias": (lambda: lnn.SpectralLinear(4, 5, True), (6, 4), {"tight": 0.99}),
    "LinearSpectral": (lambda: lnn.SpectralLinear(5, 4, constraint=Spectral(2.0)), (5,), {"tight": 0.99}),
    "LinearScaled": (lambda: lnn.SpectralLinear(5, 4, k_coef_lip=2.5), (5,), {"tight": 0.999}),
    "FrobeniusOne": (lambda: lnn.FrobeniusLinear(6, 1, True), (6,), {"tight": 0.999}),
    "FrobeniusMany": (lambda: lnn.FrobeniusLinear(4, 3), (4,), {"tight": 0.99}),
    "PlainLinear": (lambda: nn.Linear(5, 4), (5,), {"tight": 0.99, **IN_FLOAT32}),
    "Conv1d": (lambda: lnn.SpectralConv1d(2, 3, 3, padding=1, bias=True), (2, 7), {"tight": 0.8}),
    "Conv1dStrideEven": (lambda: lnn.SpectralConv1d(2, 3, 4, stride=2), (2, 9), {"tight": 0.7}),
    "Conv1dCircular": (
        lambda: lnn.SpectralConv1d(2, 2, 3, padding=1, padding_mode="circular"),
        (2, 6),
        {"tight": 0.99},
    ),
    "Conv2dBias": (lambda: lnn.SpectralConv2d(2, 3, 3, padding=1, bias=True), (2, 5, 5), {"tight": 0.7}),
    "Conv2dEvenSame": (lambda: lnn.SpectralConv2d(1, 2, 2, padding="same"), (1, 5, 4), {}),
    "Conv2dStride": (lambda: lnn.SpectralConv2d(1, 2, (5, 3), stride=(2, 1), padding=2), (1, 6, 5), {}),
    "Conv2dStrideBeyondKernel": (lambda: lnn.SpectralConv2d(1, 4, 2, stride=3), (1, 6, 6), {"tight": 0.99}),
    "Conv2dGroups": (lambda: lnn.SpectralConv2d(4, 6, 3, padding=1, groups=2), (4, 4, 4), {}),
    "Conv2dCircularSame": (
        lambda: lnn.SpectralConv2d(1, 2, 3, padding="same", padding_mode="circular"),
        (1, 4, 5),
        {"tight": 0.99},
    ),
    "Conv2dCircularEven": (
        lambda: lnn.SpectralConv2d(1, 2, 2, padding="same", padding_mode="circular"),
        (1, 4, 5),
        {"tight": 0.99},
    ),
    "Conv2dCircularWide": (lambda: lnn.SpectralConv2d(1, 2, 3, padding=3, padding_mode="circular"), (1, 4, 4), {}),
    "Conv2dWholeImage": (lambda: lnn.SpectralConv2d(1, 3, 4), (1, 4, 4), {"tight": 0.999}),
    "Conv2dPaddedBeyondKernel": (lambda: lnn.SpectralConv2d(1, 2, 3, padding=4), (1, 3, 3), {}),
    "PlainConv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4), IN_FLOAT32),
    "PlainConv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 8), IN_FLOAT32),
    "LinearWeightGate": (
        lambda: lnn.SpectralLinear(6, 4, True, k_coef_lip=2.0, weight_gate=0.3),
        (6,),
        {"tight": 0.999, **GATED},
    ),
    "LinearTokensWeightGate": (lambda: lnn.SpectralLinear(4, 5, weight_gate=0.2), (6, 4), {"tight": 0.999, **GATED}),
    "Conv1dWeightGate": (
        lambda: lnn.SpectralConv1d(2, 3, 3, padding=1, padding_mode="circular", weight_gate=0.2),
        (2, 6),
        {"tight": 0.999, **GATED},
    ),
    "Conv2dWeightGate": (
        lambda: lnn.SpectralConv2d(4, 6, 3, stride=(2, 1), padding=1, groups=2, bias=True, weight_gate=0.2),
        (4, 4, 4),
        {"tight": 0.0, **GATED},
    ),
    "ReLU": (nn.ReLU, (6,), {"tight": 0.999}),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.2), (6,), {"tight": 0.999}),
    "LeakyReLUSteep": (lambda: nn.LeakyReLU(3.0), (6,), {"tight": 0.999}),
    "ReLU6": (nn.ReLU6, (6,), {"radius": 9.0}),
    "Hardtanh": (lambda: nn.Hardtanh(1.0, 2.0), (6,), {"radius": 5.0}),
    "Tanh": (nn.Tanh, (6,), {"tight": 0.99}),
    "Sigmoid": (nn.Sigmoid, (6,), {"tight": 0.99}),
    "GELU": (nn.GELU, (2,), {"radius": 3.0, "tight": 0.98}),
    "GELUTanh": (lambda: nn.GELU(approximate="tanh"), (2,), {"radius": 3.0, "tight": 0.98}),
    "SiLU": (nn.SiLU, (2,), {"radius": 4.0, "tight": 0.98}),
    "Mish": (nn.Mish, (2,), {"radius": 4.0, "tight": 0.98}),
    "ELU": (lambda: nn.ELU(1.7), (4,), {"tight": 0.95}),
    "Softplus": (lambda: nn.Softplus(beta=2.0), (4,), {"radius": 20.0}),
    "Softsign": (nn.Softsign, (4,), {"tight": 0.99}),
    "PReLU": (lambda: nn.PReLU(3), (3, 4), {"tight": 0.9, "effort": {"climbs": 4}, **IN_FLOAT32}),
    "Softmax": (lambda: nn.Softmax(-1), (3, 4), {}),
    "GroupSort2": (lnn.GroupSort2, (6, 2), {"tight": 0.999}),
    "GroupSort2Tokens": (lambda: lnn.GroupSort2(-1), (3, 4), {"tight": 0.999}),
    "BetaAbs": (lnn.BetaAbs, (6, 2), {"tight": 0.999}),
    "BetaAbsTokens": (lambda: lnn.BetaAbs(0.7, dim=-1), (3, 4), {"tight": 0.999}),
    "SpatialShift": (lambda: lnn.SpatialShift(1), (5, 3, 3), {"tight": 0.999}),
    "GroupSort": (lambda: lnn.GroupSort(3), (6,), {"tight": 0.999}),
    "TorchlipGroupSort2": (torchlip.GroupSort2, (4, 3), {"tight": 0.999}),
    "TorchlipFullSortOfTwo": (torchlip.FullSort, (2, 3), {"tight": 0.999}),
    "GroupSortScaled": (lambda: lnn.GroupSort(2, k_coef_lip=-2.0), (6,), {"tight": 0.999}),
    "FullSort": (lnn.FullSort, (5,), {"tight": 0.999}),
    "MaxMin": (lnn.MaxMin, (4, 3), {"tight": 0.999}),
    "LPReLU": (lambda: lnn.LPReLU(init=0.7, k_coef_lip=2.0), (4, 3), IN_FLOAT32),
    "HouseHolder": (lambda: lnn.HouseHolder(6), (6, 2), {"tight": 0.7, **IN_FLOAT32}),
    "ScaledAvgPool2d": (lambda: lnn.ScaledAvgPool2d((2, 3)), (2, 4, 7), {"tight": 0.999}),
    "ScaledL2NormPool2d": (lambda: lnn.ScaledL2NormPool2d(2), (2, 5, 4), {"tight": 0.999}),
    "ScaledAdaptiveAvgPool2d": (lambda: lnn.ScaledAdaptiveAvgPool2d((1, 1)), (2, 3, 3), {"tight": 0.999}),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (1, 5, 4), {"tight": 0.999}),
    "MaxPool2dOverlap": (lambda: nn.MaxPool2d(3, 1, 1), (1, 5, 5), {"tight": 0.8}),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (2, 4, 4), {"tight": 0.999}),
    "AvgPool2dOverlap": (lambda: nn.AvgPool2d(3, 2, 1), (1, 5, 5), {}),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((2, 1)), (1, 4, 3), {"tight": 0.999}),
    "InvertibleDownSampling": (lambda: lnn.InvertibleDownSampling(2), (2, 4, 4), {"tight": 0.999}),
    "InvertibleUpSampling": (lambda: lnn.InvertibleUpSampling(2), (4, 2, 2), {"tight": 0.999}),
    "LayerCentering": (lnn.LayerCentering, (2, 3, 3), {"tight": 0.999}),
    "LayerCenteringBias": (lambda: lnn.LayerCentering(2, bias=True), (2, 3, 3), {"tight": 0.999, **IN_FLOAT32}),
    "LayerCenteringVector": (lambda: lnn.LayerCentering(dim=(-1,)), (5,), {"tight": 0.999}),
    "LayerCenteringWidens": (lambda: lnn.LayerCentering(4, bias=True), (1, 3, 3), {"tight": 0.99, **IN_FLOAT32}),
    "TorchlipLayerCentering": (lambda: torchlip.LayerCentering(2), (2, 3, 3), {"tight": 0.999}),
    "LayerNorm": (lambda: lnn.LayerNorm(5, eps=0.1), (3, 5), {}),
    "GroupNorm": (lambda: lnn.GroupNorm(2, 4, eps=0.1), (4, 3), {}),
    "GroupNormPlain": (lambda: lnn.GroupNorm(1, 4, affine=False), (4,), {}),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, eps=0.1), (2, 3, 3), IN_FLOAT32),
    "TorchLayerNorm": (lambda: nn.LayerNorm(5, eps=0.1), (3, 5), IN_FLOAT32),
    "ValueClip": (lambda: lnn.ValueClip(0.4), (5,), {"tight": 0.99}),
    "ValueClipTokens": (lambda: lnn.ValueClip(0.4), (3, 2), {"tight": 0.99}),
    "GradientGate": (lambda: lnn.GradientGate(0.3), (5,), {"gates_gradients": True, "effort": {"steps": 3}}),
    "Residual": (lambda: lnn.Residual(lnn.SpectralLinear(5, 5), weight=0.3), (5,), {}),
    "Concat": (lambda: lnn.Concat(lnn.SpectralLinear(4, 4), nn.ReLU()), (4,), {}),
    "LipResidual": (Join, (6,), IN_FLOAT32),
    "LipResidualByName": (lambda: Join(swapped=True), (6,), IN_FLOAT32),
    "Dropout": (lambda: nn.Dropout(0.4), (6,), {}),
    "Flatten": (nn.Flatten, (2, 3), {"tight": 0.999}),
    "PixelShuffle": (
        lambda: nn.PixelShuffle(2),
        (4, 2, 2),
        {"tight": 0.999, "test_an_empty_batch_works": None},  # torch's refuses an empty batch, ours does not
    ),
}

VARIANTS = {  # of a layer that the default run attacks as well, here or as a form of writing a model
    "LinearTallBias", "LinearScaled", "LinearWideBias", "FrobeniusMany", "PlainConv1d", "Conv2dCircularEven",
    "Conv2dPaddedBeyondKernel", "Conv2dWholeImage", "LeakyReLU", "GELUTanh", "Mish", "Softsign", "Tanh", "SiLU", "ELU",
    "Hardtanh", "GroupSort2Tokens", "TorchlipFullSortOfTwo", "FullSort", "BetaAbsTokens", "TorchlipLayerCentering",
    "LayerCenteringVector", "GroupNormPlain", "AdaptiveAvgPool2d", "ValueClipTokens", "LipResidualByName", "Flatten",
}  # fmt: skip

for _name, (_make, _shape, _attributes) in CASES.items():
    _members = {"make_layer": lambda self, make=_make: make(), "input_shape": _shape, **_attributes}
    _case = type(f"Test{_name}", (LayerTestCase,), _members)
    _case = pytest.mark.filterwarnings("ignore:Using padding='same'")(_case)
    globals()[f"Test{_name}"] = pytest.mark.slow(_case) if _name in VARIANTS else _case


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_every_layer_at_every_setting_of_the_weights(name):
    make, shape, attributes = CASES[name]
    radius = attributes.get("radius", 1.0)
    for dtype in (torch.float64, torch.float32):
        report = falsify_layer(make(), shape, radius=radius, starts=12, climbs=4, steps=20, dtype=dtype)
        print(f"{name:28s} {dtype!s:14s} {report.evaluations:7d} {report.worst:.9f} {report.worst_finding.quantity}")


# --- what a layer refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lnn.SpectralConv2d(1, 2, 3, dilation=2), "dilation"),
        (lambda: lnn.SpectralConv1d(1, 2, 3, padding=1, padding_mode="reflect"), "reflect"),
        (lambda: lnn.SpectralConv2d(1, 2, 3, padding=1, padding_mode="replicate"), "replicate"),
    ],
)
def test_convolutions_without_a_bound_are_refused(make, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: lnn.SpectralLinear(3, 0),
        lambda: lnn.SpectralLinear(3, 2, k_coef_lip=0.0),
        lambda: lnn.SpectralLinear(3, 2, bias_radius=float("nan")),
        lambda: lnn.SpectralConv2d(1, 2, 3, k_coef_lip=-1.0),
        lambda: lnn.SpectralLinear(3, 2, weight_gate=0.0),
        lambda: lnn.ValueClip(0.0),
        lambda: lnn.InputBound(float("inf")),
        lambda: lnn.GradientGate(-1.0),
        lambda: lnn.Residual(nn.ReLU(), weight=1.0),
        lambda: lnn.Concat(),
        lambda: lnn.ScaledL2NormPool2d(0),
        lambda: lnn.ScaledAvgPool2d((2, 2, 2)),
        lambda: lnn.GroupSort2()(torch.zeros(2, 3)),
        lambda: lnn.GroupSort(2)(torch.zeros(2, 3)),
        lambda: lnn.InvertibleDownSampling(2)(torch.zeros(1, 1, 3, 4)),
        lambda: lnn.InvertibleUpSampling(2)(torch.zeros(1, 6, 3, 4)),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ParameterError):
        make()


def test_layer_centering_never_takes_the_batch_axis():
    with pytest.raises(MixesSamplesError, match="batch axis"):
        lnn.LayerCentering()(torch.zeros(4, 3))
    with pytest.raises(MixesSamplesError, match="batch axis"):
        lnn.LayerCentering(dim=(0,))(torch.zeros(4, 3, 2))


# --- details ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1.0, 1e-3, 1e3, torch.tensor(0.5)])
def test_value_clip_is_the_projection_and_has_finite_gradients_everywhere(bound):
    from lipdp.nn.gates import clip_norm

    for norm in (0.0, 1e-38, 1e-21, 1e-3, 1.0, 1e3, 1e18, 1e30):
        x = torch.full((2, 4), norm / 2, requires_grad=True)
        y = clip_norm(x, bound)
        assert torch.linalg.vector_norm(y, dim=1).max() <= float(bound) * (1 + 1e-6)
        y.sum().backward()
        assert x.grad.isfinite().all()
        if norm <= float(bound) * 0.999:
            assert torch.equal(y, x)


def test_sorting_equal_entries_keeps_gradients_apart():
    """torch's min and max send both gradients to one entry: √2. A sort sends one each."""
    x = torch.zeros(1, 4, requires_grad=True)
    lnn.GroupSort(2)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 4))
    x.grad = None
    lnn.GroupSort2()(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 4))
    x.grad = None
    torchlip.GroupSort2()(x).sum().backward()
    assert x.grad.norm() > 2.8  # 2√2, and the bound of its rule says so


def test_group_sort_agrees_with_torchlip():
    x = torch.randn(3, 6, 2, 2)
    for size in (2, 3, None):
        assert torch.equal(lnn.GroupSort(size)(x), torchlip.GroupSort(size)(x))


def test_pixel_shuffles_agree_with_torch():
    x = torch.randn(3, 4, 4, 6)
    assert torch.equal(lnn.InvertibleDownSampling(2)(x), nn.PixelUnshuffle(2)(x))
    assert torch.equal(lnn.InvertibleUpSampling(2)(x), nn.PixelShuffle(2)(x))


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 4)])
def test_group_sort_2_sorts_the_two_halves(shape):
    x = torch.randn(shape)
    a, b = x.chunk(2, dim=1)
    assert torch.equal(lnn.GroupSort2()(x), torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1))


@pytest.mark.parametrize("kernel", [1, 2, (3, 2)])
def test_l2_norm_pool_is_the_norm_of_windows(kernel):
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    expected = nn.LPPool2d(2, kernel)(x)
    assert torch.allclose(lnn.ScaledL2NormPool2d(kernel)(x), expected, atol=2e-6)


def test_project_leaves_frozen_parameters_alone():
    layer = lnn.SpectralLinear(4, 4, bias=True)
    with torch.no_grad():
        layer.weight.mul_(5.0)
        layer.bias.fill_(9.0)
    layer.weight.requires_grad_(False)
    before = layer.weight.clone()
    lnn.project_(layer)
    assert torch.equal(layer.weight, before)
    assert layer.bias.norm() <= 1 + 1e-6


def test_layers_hold_no_buffers():
    for make, _, _ in CASES.values():
        assert not list(make().buffers()) or not type(make()).__module__.startswith("lipdp")


# --- weight gates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda gate: lnn.SpectralLinear(6, 4, True, k_coef_lip=2.0, weight_gate=gate), (6,)),
        (lambda gate: lnn.SpectralLinear(6, 4, weight_gate=gate), (3, 5, 6)),
        (lambda gate: lnn.SpectralConv1d(2, 3, 3, padding=1, padding_mode="circular", weight_gate=gate), (2, 9)),
        (lambda gate: lnn.SpectralConv2d(4, 6, (3, 2), (2, 1), 1, groups=2, bias=True, weight_gate=gate), (4, 7, 6)),
    ],
    ids=["rows", "tokens", "conv1d", "conv2d"],
)
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_a_weight_gate_clips_every_samples_gradient_of_the_weight_alone(make, shape, chunk, monkeypatch):
    monkeypatch.setattr("lipdp.nn.weight_gate._CHUNK", chunk)
    torch.manual_seed(0)
    plain, x = make(None).double(), torch.randn(12, *shape, dtype=torch.float64)
    along = torch.rand(12, *[1] * len(shape), dtype=torch.float64) * torch.randn_like(plain(x))

    def gradients(layer, rows):
        inputs = x[rows].requires_grad_()
        return torch.autograd.grad((layer(inputs) * along[rows]).sum(), [inputs, *layer.parameters()])

    singles = [gradients(plain, slice(i, i + 1))[1] for i in range(12)]
    norms = torch.stack([g.norm() for g in singles])
    gate = float(norms.median())
    gated = make(gate).double()
    gated.load_state_dict(plain.state_dict())
    assert torch.equal(gated(x), plain(x))
    by_input, by_weight, *others = gradients(gated, slice(None))
    expected = sum(g * min(1.0, gate / float(norm)) for g, norm in zip(singles, norms, strict=True))
    assert torch.allclose(by_weight, expected, rtol=1e-9)
    for found, other in zip(
        [by_input, *others], [gradients(plain, slice(None))[i] for i in (0, *range(2, 2 + len(others)))], strict=True
    ):
        assert torch.allclose(found, other)
    assert torch.equal(gradients(gated, slice(0, 0))[1], torch.zeros_like(by_weight))


def test_a_weight_gate_bounds_each_use_of_a_layer():
    layer = lnn.SpectralLinear(4, 4, weight_gate=0.25)
    once, twice = nn.Sequential(lnn.InputBound(1.0), layer), nn.Sequential(lnn.InputBound(1.0), layer, layer)
    assert float(BoundGraph(once, (4,)).sweep(3.0).parameters["1.weight"]) == pytest.approx(0.25, rel=1e-4)
    assert float(BoundGraph(once, (4,)).sweep(0.1).parameters["1.weight"]) == pytest.approx(0.1, rel=1e-4)
    assert float(BoundGraph(twice, (4,)).sweep(3.0).parameters["1.weight"]) == pytest.approx(0.5, rel=1e-4)
    owners = BoundGraph(once, (4,), gated=False)  # an owner's gradient is a sum of several samples
    assert float(owners.sweep(3.0).parameters["1.weight"]) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("gate", [1.0, 10.0])
def test_a_weight_gate_leaves_a_row_of_zeros_finite(gate):
    layer = lnn.SpectralLinear(3, 2, weight_gate=gate)
    layer(torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]])).sum().backward()
    assert 0.99 * gate < float(layer.weight.grad.norm()) <= gate
