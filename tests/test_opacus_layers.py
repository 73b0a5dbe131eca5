"""Opacus' per-sample gradients and norms of every lipdp layer, against torch.func's."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from lipdp import nn as lnn

opacus = pytest.importorskip("opacus")
from opacus.grad_sample.utils import get_hooks_class  # noqa: E402

import lipdp.comparison.opacus_layers  # noqa: E402, F401

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Full backward hook is firing")]

F64 = torch.float64


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.join, self.block = lnn.LipResidual(), lnn.SpectralLinear(6, 6, dtype=F64)

    def forward(self, x):
        return self.join(x, self.block(x))


LAYERS = {
    "linear": (lnn.SpectralLinear(5, 3, k_coef_lip=0.7), (5,)),
    "linear with bias": (lnn.SpectralLinear(5, 3, True, k_coef_lip=2.0), (5,)),
    "linear on tokens": (lnn.SpectralLinear(5, 3, True, k_coef_lip=0.7), (4, 5)),
    "linear on a grid of tokens": (lnn.SpectralLinear(5, 3, True), (2, 3, 5)),
    "frobenius": (lnn.FrobeniusLinear(5, 3, True), (5,)),
    "conv": (lnn.SpectralConv2d(3, 4, 3, padding=1, bias=True), (3, 6, 5)),
    "conv, Gram matrices": (lnn.SpectralConv2d(8, 16, 5, stride=3, bias=True), (8, 8, 8)),
    "conv, strided": (lnn.SpectralConv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 7, 6)),
    "conv, circular": (lnn.SpectralConv2d(2, 4, 3, padding=1, padding_mode="circular", bias=True), (2, 5, 5)),
    "conv, same": (lnn.SpectralConv2d(2, 4, 5, padding="same"), (2, 5, 6)),
    "conv, groups": (lnn.SpectralConv2d(4, 6, 3, groups=2, padding=1, bias=True), (4, 5, 5)),
    "conv 1d": (lnn.SpectralConv1d(2, 4, 3, stride=2, padding=1, bias=True), (2, 9)),
    "conv 1d, circular": (lnn.SpectralConv1d(2, 4, 3, padding=1, padding_mode="circular"), (2, 9)),
    "centering": (lnn.LayerCentering(3, bias=True), (3, 4, 4)),
    "centering, one bias": (lnn.LayerCentering(1, bias=True), (3, 4, 4)),
    "centering of vectors": (lnn.LayerCentering(3, dim=(-1,), bias=True), (3,)),
    "prelu": (lnn.LPReLU(3), (3, 4)),
    "prelu, one slope": (lnn.LPReLU(1), (3, 4)),
    "prelu, clamped": (lnn.LPReLU(1, init=1.5), (3, 4)),
    "householder": (lnn.HouseHolder(4, theta_initializer="normal"), (4, 3, 3)),
    "householder on vectors": (lnn.HouseHolder(4, theta_initializer="normal"), (4,)),
    "residual": (Join(), (6,)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    torch.manual_seed(0)
    layer, shape = LAYERS[request.param]
    model = nn.Sequential(copy.deepcopy(layer).double())
    return model, torch.randn(7, *shape, dtype=F64), torch.randn(7, 200, dtype=F64)


def per_sample_losses(model, x, mix):
    out = model(x).flatten(1)
    return (out * mix[: len(out), : out.shape[1]]).sum(1) + out.square().sum(1)


def reference(model, x, mix):
    parameters = dict(model.named_parameters())

    def one(p, x, mix):
        out = functional_call(model, p, (x[None],)).flatten()
        return (out * mix[: len(out)]).sum() + out.square().sum()

    return vmap(grad(one), in_dims=(None, 0, 0))({n: p.detach() for n, p in parameters.items()}, x, mix)


def test_gradients(case):
    model, x, mix = case
    expected = reference(model, x, mix)
    hooks = get_hooks_class("hooks")(model, loss_reduction="sum")
    per_sample_losses(model, x, mix).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad_sample, expected[name])
    hooks.cleanup()


def test_norms(case):
    model, x, mix = case
    expected = reference(model, x, mix)
    hooks = get_hooks_class("ghost")(model, loss_reduction="sum")
    assert all(type(m) in hooks.NORM_SAMPLERS for m in model.modules() if list(m.parameters(recurse=False)))
    per_sample_losses(model, x, mix).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter._norm_sample, expected[name].reshape(7, -1).norm(dim=1))
    hooks.cleanup()


def test_every_layer_with_parameters_has_samplers():
    """A layer added to lipdp.nn later cannot silently fall back to torch.func."""
    made = {type(m) for layer, _ in LAYERS.values() for m in layer.modules()}
    for name in lnn.__all__:
        kind = getattr(lnn, name)
        if not isinstance(kind, type) or kind in (lnn.Constrained, lnn.Concat, lnn.Residual):
            continue
        hooks = get_hooks_class("ghost")
        registered = kind in hooks.GRAD_SAMPLERS and kind in hooks.NORM_SAMPLERS
        assert registered == (kind in made), name


def test_a_wrong_sampler_is_seen():
    """The comparison fails when the factor α is left out."""
    model = nn.Sequential(lnn.SpectralConv2d(2, 4, 3, padding=1).double())
    x, mix = torch.randn(3, 2, 5, 5, dtype=F64), torch.randn(3, 200, dtype=F64)
    expected = reference(model, x, mix)["0.weight"]
    hooks = get_hooks_class("hooks")(model, loss_reduction="sum")
    per_sample_losses(model, x, mix).sum().backward()
    wrong = model[0].weight.grad_sample / model[0].scale
    hooks.cleanup()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, expected)
