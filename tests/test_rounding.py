"""Bounds hold in the precision that the model computes in."""

import pytest
import torch
from kit import conv_net, linear
from torch import nn

import lipdp
from lipdp import nn as lnn
from lipdp.errors import UnsupportedLayerError
from lipdp.losses import CategoricalHinge, TauCrossEntropy
from lipdp.testing import falsify

pytestmark = pytest.mark.usefixtures("one_thread")


def test_autocast_is_within_its_own_bound():
    falsify(conv_net(), TauCrossEntropy(32.0), (1, 6, 6), weights=("given",), steps=4, forward_dtype=torch.bfloat16)


def largest_move(model, loss, x, y, index, **autocast):
    """How far each summed gradient moves when one record leaves a large batch of similar ones."""

    def gradients(x, y):
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            value = loss(model(x), y).sum()
        return torch.autograd.grad(value, list(model.parameters()))

    keep = torch.arange(len(x)) != index
    pairs = zip(gradients(x, y), gradients(x[keep], y[keep]), strict=True)
    return [float((a.double() - b.double()).norm()) for a, b in pairs]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("bias", [False, True])
def test_sums_over_a_large_batch_are_not_rounded_to_bfloat16(bias):
    """With torch's own backward pass one of 3000 equal records moves the sum by 2 to 4 times its bound."""
    model = nn.Sequential(
        *(lnn.InputBound(1.0), lnn.SpectralConv2d(1, 4, 3, padding="same", bias=bias), lnn.GroupSort2(), nn.Flatten()),
        lnn.SpectralLinear(64, 10, bias),
    )
    loss = CategoricalHinge(10.0)
    declared = lipdp.sensitivity(model, loss, (1, 4, 4), forward_dtype=torch.bfloat16)
    x, y = torch.randn(1, 1, 4, 4).repeat(3000, 1, 1, 1), torch.full((3000,), 3)
    moves = largest_move(model, loss, x, y, 0)
    assert all(move <= bound for move, bound in zip(moves, declared.values(), strict=True))


def test_what_is_summed_in_low_precision_is_refused():
    model = nn.Sequential(lnn.InputBound(1.0), nn.Linear(4, 3))
    lipdp.sensitivity(model, TauCrossEntropy(), (4,))
    with pytest.raises(UnsupportedLayerError, match="sums its gradient"):
        lipdp.sensitivity(model, TauCrossEntropy(), (4,), forward_dtype=torch.bfloat16)
    with pytest.raises(UnsupportedLayerError, match="Keep parameters in float32"):
        lipdp.sensitivity(model.bfloat16(), TauCrossEntropy(), (4,))
    model.requires_grad_(False)
    assert lipdp.lipschitz_constant(model, (4,)) < 10


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_autocast_computes_the_layer(mode):
    layers = [
        (lnn.SpectralConv2d(2, 4, 3, (2, 1), 2, groups=2, bias=True, padding_mode=mode), (2, 6, 6)),
        (lnn.SpectralConv1d(2, 4, 4, padding="same", bias=True, padding_mode=mode), (2, 9)),
        (lnn.SpectralLinear(6, 4, bias=True), (3, 6)),
    ]
    for layer, shape in layers:
        x = torch.randn(5, *shape, requires_grad=True)
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(x)
        assert low.dtype == torch.bfloat16
        assert torch.allclose(plain, low.float(), atol=0.05)
        expected = torch.autograd.grad(plain.square().sum(), [x, *layer.parameters()])
        for a, b in zip(
            expected, torch.autograd.grad(low.float().square().sum(), [x, *layer.parameters()]), strict=True
        ):
            assert b.dtype == torch.float32
            assert (a - b).norm() <= 0.03 * a.norm()


def test_float32_attack_on_a_model():
    falsify(conv_net(), TauCrossEntropy(32.0), (1, 6, 6), weights=("given",), steps=4, dtype=torch.float32)


def test_slack_follows_the_precision(monkeypatch):
    model = nn.Sequential(lnn.InputBound(1.0), linear(4, 4))
    bounds = [lipdp.lipschitz_constant(model.to(dtype), (4,)) for dtype in (torch.float64, torch.float32)]
    assert bounds[0] < bounds[1]
    assert bounds[0] == pytest.approx(1.0, abs=1e-7)
    assert lipdp.lipschitz_constant(model.float(), (4,), forward_dtype=torch.bfloat16) > 1.02
    before = lipdp.lipschitz_constant(model.float(), (4,))
    try:
        torch.set_float32_matmul_precision("high")
        high = lipdp.lipschitz_constant(model, (4,))
        torch.set_float32_matmul_precision("medium")
        assert before < high < lipdp.lipschitz_constant(model, (4,))
    finally:
        torch.set_float32_matmul_precision("highest")
