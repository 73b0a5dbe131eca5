"""Bounded inputs: each map keeps its constant, and reaches it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipdp import data
from lipdp.errors import ParameterError

pytestmark = pytest.mark.usefixtures("no_environment")


BOUNDS = [
    data.Clip(-2.0, 0.5),
    data.Clip((-1.0, 0.0, -3.0), (1.0, 2.0, 3.0)),
    data.Rescale(-2.0, 0.5),
    data.Rescale((-1.0, 0.0, -3.0), 4.0),
    data.Tanh(0.7),
    data.SignedLog(),
    data.SignedLog(scale=3.0, limit=2.0),
    data.Standardise((0.1, -2.0, 0.3), (0.2, 1.0, 3.0)),
]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1e-3, 0.1, 1.0, 50.0]))
@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bounding_keeps_its_constant_and_is_monotone(bound, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(64, 3, dtype=torch.float64, generator=generator)
    other = x + spread * 10.0 ** -(seed % 7) * torch.rand(64, 3, dtype=torch.float64, generator=generator)
    moved = bound(other) - bound(x)
    assert (moved >= -1e-12).all()
    assert (moved.norm(dim=1) <= bound.lipschitz * (other - x).norm(dim=1) * (1 + 1e-9) + 1e-12).all()
    # record by record: each alone is mapped as in the batch
    assert torch.equal(bound(x)[5:6], bound(x[5:6]))


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bounding_constant_is_reached(bound):
    """Somewhere the slope is the declared constant: 5 % less would fail."""
    x = torch.linspace(-3, 3, 60_001, dtype=torch.float64)[:, None].repeat(1, 3)
    slope = (bound(x[1:]) - bound(x[:-1])).abs() / (x[1:] - x[:-1])
    assert slope.max() >= 0.99 * bound.lipschitz


def test_bounding_ranges():
    x = torch.tensor([[-1e30, 0.0, 1e30], [3.0, -0.2, 0.1]])
    assert data.Clip(-1.0, 1.0)(x).tolist()[0] == [-1, 0, 1]
    assert data.SignedLog(limit=6.0)(x)[0].tolist() == [-6, 0, 6]
    assert data.Tanh()(x)[0].tolist() == [-1, 0, 1]
    assert data.Rescale(0.0, 0.1)(x)[1].tolist() == [1, -1, 1]
    images = torch.ones(2, 3, 4, 5)
    assert data.public_standardisation("cifar10")(images)[0, :, 0, 0].tolist() == pytest.approx(
        [(1 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (1 - 0.4465) / 0.2616]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: data.Clip(1.0, 1.0),
        lambda: data.Clip((0.0, 1.0), (1.0, 2.0, 3.0)),
        lambda: data.Rescale(0.0, float("inf")),
        lambda: data.Clip(float("nan"), 1.0),
        lambda: data.Tanh(0.0),
        lambda: data.SignedLog(scale=-1.0),
        lambda: data.SignedLog(limit=float("inf")),
        lambda: data.Standardise(0.0, 0.0),
        lambda: data.Standardise(float("nan"), 1.0),
        lambda: data.Clip(2.0, 1.0),
        lambda: data.Clip((0.0, 0.0, 0.0), 1.0)(torch.ones(2, 2)),
        lambda: data.Standardise((0.0, 1.0), 1.0)(torch.ones(4)),
        lambda: data.bounding("tanh", scales=1.0),
    ],
)
def test_bad_constants_are_refused(make):
    with pytest.raises(ParameterError):
        make()


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bounding_takes_what_is_not_finite_for_zero(bound):
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert torch.equal(bound(torch.tensor([[0.3, bad, 0.0]])), bound(torch.tensor([[0.3, 0.0, 0.0]])))
