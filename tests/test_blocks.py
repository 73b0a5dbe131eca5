"""Layers written with few temporaries compute the plain formula: values, gradients, gradients of gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from lipdp import nn as lnn
from lipdp.errors import ParameterError
from lipdp.nn.gates import clip_norm

pytestmark = pytest.mark.usefixtures("one_thread")  # which takes small blocks

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
}


class PlainNormPool(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, x):
        height, width = (n // k for n, k in zip(x.shape[-2:], self.kernel, strict=True))
        covered = x[..., : height * self.kernel[0], : width * self.kernel[1]]
        windows = covered.unflatten(-1, (width, -1)).unflatten(-3, (height, -1))
        return (windows.square().sum((-3, -1)) + 1e-12).sqrt() - 1e-6


class PlainClip(nn.Module):
    def __init__(self, bound, radius):
        super().__init__()
        self.bound, self.radius = bound, radius

    def forward(self, x):
        norm = x.reshape(len(x), math.prod(x.shape[1:])).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        return x * (self.radius / norm.clamp_min(self.bound))


def images(layout, *shape, dtype=torch.float64):
    """Random ones; the first is zeros in a corner, as every digit is."""
    x = torch.randn(shape, dtype=dtype)
    x[:1, ..., :2, :2] = 0.0
    return LAYOUTS[layout](x)


def gradients(layer, x, g):
    """Value, gradient, and the gradient of a function of the gradient."""
    x = x.detach().requires_grad_()
    y = layer(x)
    (plain,) = torch.autograd.grad(y, x, g, retain_graph=True)
    upper = g.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(y, x, upper, create_graph=True)
    second = torch.autograd.grad((first * first.detach().cos()).sum(), (x, upper), materialize_grads=True)
    return y, plain, first, *second


def check_same(layer, formula, x, tolerance=1e-9):
    g = torch.randn_like(formula(x))
    for found, expected in zip(gradients(layer, x, g), gradients(formula, x, g), strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


sizes = st.integers(1, 7)


@given(
    shape=st.tuples(st.integers(0, 4), sizes, sizes, sizes),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@settings(max_examples=25, deadline=None)
def test_a_norm_pool_is_the_root_of_its_squares(shape, kernel, layout):
    x, layer = images(layout, *shape), lnn.ScaledL2NormPool2d(kernel)
    if shape[2] < kernel[0] or shape[3] < kernel[1]:
        with pytest.raises(ParameterError, match="windows"):
            layer(x)
        return
    check_same(layer, PlainNormPool(kernel), x, 1e-6)  # the second derivative is 1/ε at a window of zeros


@given(
    shape=st.lists(sizes, max_size=3),
    rows=st.integers(0, 4),
    lengths=st.lists(st.sampled_from([1e-3, 0.3, 1.0, 40.0]), min_size=4, max_size=4),
    radius=st.sampled_from([0.5, 2.0]),
)
@settings(max_examples=25, deadline=None)
def test_a_clip_is_a_projection_on_the_ball_and_a_scale(shape, rows, lengths, radius):
    x = torch.randn(rows, *shape, dtype=torch.float64)
    x *= torch.tensor(lengths[:rows], dtype=torch.float64).view(-1, *[1] * len(shape))
    check_same(lnn.ValueClip(1.1, radius), PlainClip(1.1, radius), x)


@given(
    shape=st.tuples(st.integers(0, 4), sizes, sizes, sizes),
    dim=st.sampled_from([(-2, -1), (-1,), (1,), (1, 2, 3)]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    bias=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_centering_takes_off_the_mean(shape, dim, layout, bias):
    layer = lnn.LayerCentering(shape[1], dim, bias).double()
    if bias:
        nn.init.normal_(layer.bias)
    shift = layer.bias.view(-1, 1, 1) if bias else 0.0
    check_same(layer, lambda x: x - x.mean(dim, keepdim=True) + shift, images(layout, *shape))


def test_at_zero_a_clip_has_the_derivatives_of_its_scale():
    x, g = torch.zeros(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for found, expected in zip(gradients(lnn.ValueClip(2.0, 1.0), x, g), (x, g / 2, g / 2, x), strict=False):
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("length", [1e-30, 1e15, 1e30])
def test_the_gradient_of_a_clip_is_finite_and_short_at_any_length(length):
    x = (torch.randn(3, 50) * length).requires_grad_()
    g = torch.randn(3, 50)
    (found,) = torch.autograd.grad(lnn.ValueClip(2.0)(x), x, g)
    assert found.isfinite().all()
    assert bool((found.norm(dim=1) <= g.norm(dim=1) * min(1.0, 2.01 / length)).all())


LAYERS = {
    "centering": (lnn.LayerCentering, (3, 2, 4)),
    "clip, within": (lambda: lnn.ValueClip(100.0, 3.0), (3, 2, 4)),
    "clip, beyond": (lambda: lnn.ValueClip(0.1), (3, 2, 4)),
    "norm pool": (lambda: lnn.ScaledL2NormPool2d(2), (3, 5, 4)),
    "norm pool, wide": (lambda: lnn.ScaledL2NormPool2d((1, 3)), (2, 4, 6)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@layers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_are_those_of_finite_differences(make, shape, layout):
    x = LAYOUTS[layout](torch.randn(2, *shape, dtype=torch.float64)).detach().requires_grad_()
    assert torch.autograd.gradcheck(make(), x)
    assert torch.autograd.gradgradcheck(make(), x)


@layers
def test_functions_of_torch_func_follow(make, shape):
    layer, x = make(), torch.randn(4, 2, *shape, dtype=torch.float64)
    weights = torch.randn_like(layer(x[0]))

    def value(one):
        return (layer(one) * weights).sum()

    apart = torch.stack([torch.func.grad(value)(one) for one in x])
    assert torch.allclose(vmap(layer)(x), torch.stack([layer(one) for one in x]))
    assert torch.allclose(vmap(grad(value))(x), apart)
    leaf = x.clone().requires_grad_()
    (together,) = torch.autograd.grad(sum(value(one) for one in leaf), leaf)
    assert torch.allclose(together, apart)


@pytest.mark.parametrize(
    ("make", "shape"),
    [*LAYERS.values(), (lambda: lnn.GradientGate(0.5), (3, 2, 4)), (lnn.GroupSort2, (4, 3)), (lnn.MaxMin, (4, 3))],
)
def test_many_gradients_at_once_are_those_one_by_one(make, shape):
    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    y = make()(x)
    upper = torch.randn(5, *y.shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(y, x, upper, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in upper]
    assert torch.allclose(together, torch.stack(apart))


def test_a_clip_takes_many_bounds_at_once():
    x, bounds = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    apart = torch.stack([clip_norm(x, bound) for bound in bounds])
    assert torch.allclose(vmap(lambda bound: clip_norm(x, bound))(bounds), apart)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_go_through_in_blocks_of_any_dtype(make, shape, dtype):
    """A batch of several blocks computes what its rows compute alone."""
    layer, x = make(), torch.randn(3, *shape[:-2], 300, 400).to(dtype).requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, g)
    assert y.dtype == found.dtype == dtype
    for i in range(3):
        one = x[i : i + 1].detach().requires_grad_()
        alone = layer(one)
        assert torch.equal(alone, y[i : i + 1])
        assert torch.equal(torch.autograd.grad(alone, one, g[i : i + 1])[0], found[i : i + 1])
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(make()(wide), wide, g.double())
    assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_a_norm_pool_keeps_the_layout():
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = lnn.ScaledL2NormPool2d(2)(x)
    assert y.stride() == F.avg_pool2d(x, 2).stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()
