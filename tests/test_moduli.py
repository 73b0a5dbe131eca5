"""How far a layer moves what it is given: derived bounds, attacked directly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipdp.certify.moduli import Confined, GroupNormalisation, Lipschitz, Projection, pull, push
from lipdp.features import FeatureSpec, features
from lipdp.nn.gates import clip_norm

pytestmark = pytest.mark.usefixtures("one_thread")


positive = st.floats(1e-3, 1e3)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def plane(bound, norm, count=400_000, reach=3.0):
    """Random points of the plane around (norm, 0): distances before and after the projection."""
    generator = torch.Generator().manual_seed(0)
    x = double(norm, 0.0)
    radii = torch.rand(count, 1, generator=generator, dtype=torch.float64) ** 2 * reach
    directions = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    moved = x + radii * directions / directions.norm(dim=1, keepdim=True)
    before = (moved - x).norm(dim=1)
    return before, (clip_norm(moved, bound) - clip_norm(x[None], bound)).norm(dim=1)


@pytest.mark.parametrize("norm", [0.3, 0.999, 1.0, 1.001, 1.2, 2.0, 10.0])
def test_the_projections_modulus_holds_and_is_attained(norm):
    before, after = plane(1.0, norm, reach=2 * norm + 2)
    modulus = Projection(1.0, double(norm).expand(len(before)))
    assert bool((after <= modulus.after(before) * (1 + 1e-12) + 1e-12).all())
    for rho in (0.05, 0.4, 1.0, 1.3, 1.9):  # the nearest point that moves by ρ or more is hardly further than R(ρ)
        nearest = min(before[after >= rho].tolist(), default=math.inf)
        found = float(Projection(1.0, double(norm)).before(double(rho)))
        if nearest < math.inf:
            assert found <= nearest <= 1.05 * found + 0.02, rho


@given(positive, positive, st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_after_and_before_are_inverse_and_grow(bound, norm, share):
    modulus = Projection(bound, double(norm))
    rho = double(share * 2 * bound)
    radius = modulus.before(rho)
    assert float(radius) >= float(rho) * (1 - 1e-9)  # never worse than the global constant 1
    assert float(modulus.after(radius)) == pytest.approx(float(rho), rel=1e-5, abs=1e-7 * bound)
    larger = Projection(bound, double(1.1 * norm))
    assert float(larger.before(rho)) >= float(radius) * (1 - 1e-12)
    assert float(modulus.before(rho * 0.99)) <= float(radius)
    assert math.isinf(modulus.before(double(2.001 * bound)))
    assert float(modulus.after(double(math.inf))) == 2 * bound


@pytest.mark.parametrize("norm", [1.0, 1.1, 2.0, 10.0])
def test_the_segment_bound_of_the_projection_is_never_larger(norm):
    """2cr/(2‖x‖ − r) ≤ ρ gives 2aρ/(2c + ρ), which is sound, and less than the exact radius."""
    rho = torch.linspace(0.01, 1.99, 100, dtype=torch.float64)
    exact = Projection(1.0, double(norm).expand(100)).before(rho)
    segment = 2 * norm * rho / (2 + rho)
    assert bool((segment <= exact * (1 + 1e-12)).all())


def test_group_normalisation_moves_no_further_than_its_modulus():
    """Attacked by gradient ascent on the move of the output, from many starts, at many radii."""
    torch.manual_seed(0)
    groups, entries, eps = 3, 4, 1e-3
    z = torch.randn(12, dtype=torch.float64).view(groups, entries) * torch.tensor([[0.3], [1.0], [3.0]])
    spec = FeatureSpec(features("dct").map, group_norm=groups, eps=eps)
    norms = (z - z.mean(1, keepdim=True)).square().sum(1).add(entries * eps).sqrt().min()
    modulus = GroupNormalisation(entries, groups, norms)

    def normalise(v):
        return torch.nn.functional.group_norm(v.reshape(-1, groups, entries), spec.group_norm, eps=eps).flatten(1)

    for share in (0.1, 0.5, 0.9, 1.5):
        radius = share * norms
        delta = torch.randn(64, groups * entries, dtype=torch.float64)
        for _ in range(200):
            delta = (radius * delta / delta.norm(dim=1, keepdim=True)).requires_grad_()
            moved = (normalise(z.flatten() + delta) - normalise(z.flatten()[None])).norm(dim=1)
            (gradient,) = torch.autograd.grad(moved.sum(), delta)
            delta = delta.detach() + 0.3 * radius * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        furthest, bound = float(moved.detach().max()), float(modulus.after(radius))
        assert furthest <= bound * (1 + 1e-9)
        if share < 1:
            assert furthest >= 0.95 * bound
            assert float(modulus.before(double(bound))) == pytest.approx(float(radius), rel=1e-6)


def test_the_other_moduli():
    assert push([Lipschitz(2.0, 0.5), Confined(double(10.0))], double(1.0)).item() == 2.5
    assert pull([Lipschitz(2.0, 0.5), Confined(double(10.0))], double(2.5)).item() == 1.0
    assert pull([Lipschitz(2.0, 0.5)], double(0.25)).item() == 0.0
    assert pull([Confined(double(10.0))], double(20.0)).item() == 10.0
    assert math.isinf(push([Confined(double(10.0))], double(20.0)).item())
    assert math.isinf(Lipschitz(0.0).before(double(1.0)).item())
    assert Lipschitz(0.0).after(double(math.inf)).item() == 0.0
