"""The norm of a convolution from its Fourier transform holds, and is tight."""

from __future__ import annotations

import pytest
import torch

from lipdp.certify import Network
from lipdp.certify.convolution import fourier_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def operator_norm(layer, shape, steps=300):
    """A lower bound by power iteration on the layer itself."""
    x = torch.randn(1, *shape, dtype=torch.float64)
    for _ in range(steps):
        x = (x / x.norm()).requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y, x, y.detach())
        x = gradient.detach()
    return float(layer(x / x.norm()).detach().norm())


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 0},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 1), "padding": (1, 0)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    {"kernel_size": (2, 5), "padding": (1, 2)},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("smooth", [False, True])
def test_the_fourier_bound_of_a_convolution_holds_and_is_tight(options, smooth):
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(2, 4, bias=False, dtype=torch.float64, **options)
    circular = options.get("padding_mode") == "circular"
    if smooth:
        layer.weight.data.abs_()
    bounds = {
        name: float(Network(layer.eval(), (2, 20, 21), convolution=name).lipschitz())
        for name in ("fourier", "reshaped")
    }
    truth = operator_norm(layer, (2, 20, 21))
    assert truth <= bounds["fourier"] <= bounds["reshaped"]
    if options.get("stride", 1) == 1 and not (circular and options["padding"] == 2):  # there it cannot be exact
        assert bounds["fourier"] <= truth * (1.001 if circular else 1.05)


def test_the_fourier_norm_of_a_circular_convolution_is_exact_also_on_tiny_grids():
    torch.manual_seed(0)
    for points in (1, 2, 3, 4, 7):
        kernel = torch.randn(3, 2, 5, dtype=torch.float64)
        dense = torch.zeros(3, points, 2, points, dtype=torch.float64)
        for i in range(points):
            for t in range(5):
                dense[:, i, :, (i + t) % points] += kernel[:, :, t]
        truth = float(torch.linalg.matrix_norm(dense.reshape(3 * points, -1), ord=2))
        assert truth <= fourier_norm(kernel, (points,)) <= truth * (1 + 1e-9)
