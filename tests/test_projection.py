"""Layers are projected together, and iterations in bfloat16 end certified."""

from __future__ import annotations

import math

import kit
import pytest
import torch
from small_convnet import needs_cuda, private, weights
from torch import nn

import lipdp
from lipdp import nn as lnn
from lipdp import norms
from lipdp.constraints import Orthogonal
from lipdp.nn.constrained import cannot_certify

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(model, size=0.05):
    """The model after a step: weights near their constraints."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def zoo(name):
    torch.manual_seed(0)
    return lipdp.models.build(name, input_shape=(3, 16, 16), num_classes=10)


@pytest.mark.parametrize("name", ["mixer", "resnet", "cnn", "mlp"])
def test_layers_of_one_shape_are_projected_together(name, monkeypatch):
    one_by_one, together, default = (moved(zoo(name)) for _ in range(3))
    lnn.project_(one_by_one, batched=False)
    with monkeypatch.context() as patched:
        patched.setattr("lipdp.nn.constrained._STACK", 3 * 64 * 64)  # a stack in several parts
        lnn.project_(together, batched=True)
    lnn.project_(default)
    for other in (together, default):
        torch.testing.assert_close(weights(one_by_one), weights(other), rtol=0, atol=2e-6)


def test_what_projects_itself_and_what_is_frozen_goes_alone():
    class Own(lnn.SpectralLinear):
        def project_(self):
            self.weight.data.fill_(0.5)

    model = moved(nn.Sequential(*(lnn.SpectralLinear(8, 8, bias=True) for _ in range(3)), Own(8, 8)), size=2.0)
    model[1].weight.requires_grad_(False)
    frozen = model[1].weight.clone()
    lnn.project_(model, batched=True)
    assert torch.equal(model[1].weight, frozen)
    assert bool((model[3].weight == 0.5).all())
    assert all(layer.constraint.contains(layer.weight) for layer in (model[0], model[2]))
    assert all(float(layer.bias.detach().norm()) <= 1 + 1e-6 for layer in model[:3])


SHAPES = [(16, 27), (64, 576), (96, 96), (10, 2048), (40, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 2.0, None])
def test_iterations_in_bfloat16_end_certified(shape, size, monkeypatch):
    """As on a GPU: whatever the low precision did, the norm of what comes out is at most 1, by `cannot_certify`."""
    monkeypatch.setattr(norms, "low_precision", lambda matrix: torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    orthogonal = Orthogonal()
    start = orthogonal.sample(3, *shape, generator=generator)
    noise = torch.randn(3, *shape, generator=generator) / max(shape) ** 0.5
    matrix = noise if size is None else start + size * noise
    out = orthogonal.retract(matrix)
    assert not bool(cannot_certify(out, 1.0))
    assert bool(cannot_certify(out * (1 + 1e-5), 1.0))  # it could have been seen
    exact = orthogonal.project(matrix)
    if float(torch.linalg.cond(matrix).max()) < 20:  # the rest rises to 1 over several steps
        assert orthogonal.contains(out)
        assert (out - exact).norm() <= 0.01 * (exact - matrix).norm() + 1e-6 * exact.norm()
    if size is None or size >= 0.3:  # it is the finish that does it
        monkeypatch.setattr(norms, "_FINISH", ())
        assert not orthogonal.contains(orthogonal.retract(matrix), tolerance=1e-6)


def test_a_matrix_without_full_rank_comes_out_within_the_norm(monkeypatch):
    monkeypatch.setattr(norms, "low_precision", lambda matrix: torch.bfloat16)
    matrix = torch.zeros(2, 8, 12)
    matrix[0, 0, 0], matrix[0, 1, 1] = 5.0, 1e-3
    out = Orthogonal().retract(matrix)
    assert not bool(cannot_certify(out, 1.0))
    assert out[0, 0, 0] == pytest.approx(1.0, abs=1e-5)
    assert bool((out[1] == 0).all())
    assert bool(Orthogonal().retract(matrix * math.nan).isnan().any())


def test_a_run_with_bfloat16_projections_is_certified_at_every_step(monkeypatch):
    monkeypatch.setattr(norms, "low_precision", lambda matrix: torch.bfloat16)
    engine, model, optimizer, loader, criterion = private(steps=12, lr=2.0)
    engine._hooks._projection_check.every = 1
    kit.train(model, optimizer, loader, criterion)
    assert lipdp.lipschitz_constant(model, (1, 8, 8)) < 1 + 1e-3
    assert all(m.constraint.contains(m.weight_matrix()) for m in model.modules() if isinstance(m, lnn.Constrained))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["mixer", "resnet"])
def test_projection_on_cuda_agrees_with_the_cpu(name):
    expected, model = moved(zoo(name)), moved(zoo(name)).cuda()
    before = weights(expected)
    lnn.project_(expected)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lnn.project_(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    move = (weights(expected) - before).norm()
    assert (weights(model).cpu() - weights(expected)).norm() <= 0.01 * move
    assert not any(bool(a) for m in model.modules() if isinstance(m, lnn.Constrained) for a in m.uncertified().values())
