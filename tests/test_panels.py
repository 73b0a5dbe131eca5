"""Large matrices in pieces: the same sets, the same promises, and half a matrix of memory."""

import math

import pytest
import torch
from torch import nn

import lipdp
from lipdp import panels
from lipdp.bounds import BoundGraph
from lipdp.constraints import Frobenius, Orthogonal, Spectral
from lipdp.nn.constrained import cannot_certify
from lipdp.norms import certified_norm
from lipdp.testing.inputs import ProbeLoss

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = [Orthogonal(), Spectral(0.7), Frobenius(0.7)]
SHAPES = [(1, 40), (40, 1), (24, 24), (20, 33), (33, 20), (2, 12, 30), (140, 150)]
PANELS = (300, 310)  # of which a Gram matrix has three panels


@pytest.fixture
def pieces(monkeypatch):
    """Small matrices count as large, and are taken in several pieces."""
    monkeypatch.setattr(panels, "LARGE", 1)
    monkeypatch.setattr(panels, "_PIECE", 300)


def drawn(shape, dtype=torch.float32, spread=0.1):
    near = Orthogonal().sample(*shape, dtype=torch.float64)
    return (near + spread * torch.randn(*shape, dtype=torch.float64) / math.sqrt(max(shape[-2:]))).to(dtype)


def true_norm(matrix):
    return torch.linalg.svdvals(matrix.double())[..., 0]


@pytest.mark.parametrize("constraint", EVERY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_pieces_project_on_the_same_point_and_never_beyond_the_radius(constraint, shape, dtype, spread, monkeypatch):
    matrix = drawn(shape, dtype, spread)
    whole = constraint.project(matrix.double())
    monkeypatch.setattr(panels, "LARGE", 1)
    monkeypatch.setattr(panels, "_PIECE", 300)
    found = matrix.clone()
    constraint.retract_(found)
    rounding = {torch.float32: 3e-5, torch.float64: 1e-9, torch.bfloat16: 3e-2}[dtype]
    assert (found.double() - whole).abs().max() <= rounding * max(1.0, whole.abs().max())
    radius = getattr(constraint, "radius", 1.0)
    assert not cannot_certify(found, radius)
    if dtype is not torch.bfloat16:
        assert (true_norm(found) <= radius).all()
        assert (constraint.norm_bound(found) <= radius * (1 + 1e-9)).all()
    assert constraint.contains(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 3.0])
@pytest.mark.parametrize("scale", [1e-120, 0.3, 1e30])
def test_the_norm_of_pieces_is_never_below_the_true_one(shape, spread, scale, pieces):
    matrix = drawn(shape, torch.float64, spread) * scale
    bound, true = certified_norm(matrix), true_norm(matrix)
    assert (bound >= true).all()
    assert (bound <= true * 1.0021).all()


def test_a_bound_five_per_cent_smaller_would_be_seen(pieces):
    matrix = drawn((24, 30))
    assert 0.95 * certified_norm(matrix) < true_norm(matrix) <= certified_norm(matrix)
    assert cannot_certify(matrix, 0.95 * float(true_norm(matrix)))
    assert cannot_certify(Orthogonal().project(matrix) * 1.001, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("spread", [0.0, 0.3, 100.0])
def test_a_factor_tells_a_norm_to_nine_digits(spread, scale, dtype, pieces):
    matrix = (drawn(PANELS, torch.float64, spread) * scale).to(dtype)
    true = float(true_norm(matrix))
    assert panels.is_within(matrix, true * (1 + 1e-9))
    assert not panels.is_within(matrix, true * (1 - 1e-9))
    assert true <= panels.spectral(matrix, true * 0.9999) <= true * 1.0021  # a guess that is too small


@pytest.mark.parametrize("constraint", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_record_reaches_the_gradient_that_follows_from_the_norm(constraint, dtype, pieces):
    """Maximised over inputs by ascent, the gradient of the next layer comes within 5 % of its bound, and not beyond."""
    torch.manual_seed(0)
    first, second = lipdp.nn.SpectralLinear(30, 20, constraint=constraint), lipdp.nn.SpectralLinear(20, 4)
    model = nn.Sequential(lipdp.nn.InputBound(1.0), first, second).to(dtype)
    bound = lipdp.sensitivity(model, ProbeLoss(), (30,))["2.weight"]
    x, cotangent = 0.1 * torch.randn(1, 30, dtype=dtype), torch.tensor([[0.6, 0.0, -0.8, 0.0]], dtype=dtype)
    for _ in range(300):  # just within the InputBound, where the ascent leads to the largest singular value
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((model(x) * cotangent).sum(), second.weight, create_graph=True)
        (ascent,) = torch.autograd.grad(gradient.norm(), x)
        x = 0.999 * nn.functional.normalize(ascent)
    assert 0.95 * bound < float(gradient.detach().norm()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[0.5], [3.0], [1e-3], [3.0, 0.01], [0.3] * 150, [1e3, 1e2]])
def test_every_singular_value_becomes_one_though_few_are_far_from_it(values, dtype, pieces):
    matrix = drawn(PANELS, torch.float64, 0.0)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = torch.ones(len(matrix), dtype=torch.float64)
    spectrum[: len(values)] = torch.tensor(values)
    found = ((u * spectrum) @ v).to(dtype)
    panels.polar_(found)
    assert (torch.linalg.svdvals(found.double()) - 1).abs().max() <= 100 * torch.finfo(dtype).eps
    assert (found.double() - u @ v).abs().max() <= 1e5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("constraint", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_what_is_not_finite_is_never_hidden(constraint, bad, position, pieces):
    matrix = torch.randn(12, 14)
    matrix.view(-1)[position] = bad
    assert not constraint.norm_bound(matrix).isfinite().all()
    assert not constraint.project(matrix).isfinite().all()
    assert cannot_certify(matrix, 1.0)


@pytest.mark.parametrize("kind", ["zero", "rank one", "huge", "tiny", "gaussian"])
def test_orthogonal_pieces_of_awkward_matrices(kind, pieces):
    matrix = {
        "zero": torch.zeros(12, 20),
        "rank one": torch.ones(12, 20),
        "huge": drawn((12, 20)) * 1e25,
        "tiny": drawn((12, 20)) * 1e-25,
        "gaussian": torch.randn(12, 12),
    }[kind]
    found = Orthogonal().project(matrix)
    assert true_norm(found) <= 1
    assert kind in ("zero", "rank one") or Orthogonal().contains(found)


def test_a_constraint_of_the_user_is_asked_itself(pieces):
    class Mine(Orthogonal):
        def project(self, matrix):
            return matrix * 0 + 0.5

    matrix = torch.randn(3, 4)
    Mine().retract_(matrix)
    assert (matrix == 0.5).all()


def test_layers_of_every_layout_are_projected_in_place(pieces):
    for layer in (
        lipdp.nn.SpectralConv2d(3, 8, 3).to(memory_format=torch.channels_last),
        lipdp.nn.SpectralConv2d(4, 8, 3, groups=2),
        lipdp.nn.SpectralLinear(30, 20, constraint=Spectral()),
    ):
        layer.weight.data.mul_(3).add_(0.01)
        lipdp.nn.project_(layer, batched=False)
        assert layer.constraint.contains(layer.weight_matrix())
        assert not any(layer.uncertified().values())


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_a_large_layer_is_bounded_as_it_is_computed(scale, pieces):
    """The gain of a scaled layer, without a scaled copy: never below ‖fl(α W)‖₂."""
    layer = lipdp.nn.SpectralLinear(30, 20, k_coef_lip=scale)
    true = float(true_norm(layer.weight.detach() * layer.scale))
    bound = float(BoundGraph(layer, (30,), input_bound=1.0).lipschitz())
    assert true <= bound <= true * 1.01
