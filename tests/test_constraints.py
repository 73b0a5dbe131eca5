"""The four verbs of every constraint, and the one promise that privacy rests on: `norm_bound` is never too small."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipdp.constraints import Frobenius, Orthogonal, Spectral
from lipdp.errors import ConstraintError
from lipdp.norms import certified_norm, gram_bound, gram_of, newton_schulz_root, vector_norm

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (3, 8), (8, 3), (2, 3, 5), (4, 6, 2), (1, 16, 25)]
CONSTRAINTS = [Spectral(), Spectral(0.3), Spectral(40.0), Orthogonal(), Frobenius(), Frobenius(0.3)]


def svd_norm(matrix):
    return torch.linalg.svdvals(matrix.double())[..., 0]


@st.composite
def matrices(draw):
    """Matrices of every shape, rank, conditioning and scale, in float32 and float64."""
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrix = torch.randn(*shape, generator=generator, dtype=F64)
    kind = draw(st.sampled_from(["gaussian", "orthogonal", "rank one", "zero", "constant", "graded", "sparse"]))
    if kind == "orthogonal":
        matrix = Orthogonal().sample(*shape, generator=generator, dtype=F64)
    elif kind == "rank one":
        matrix = matrix[..., :1] * matrix[..., :1, :]
    elif kind == "zero":
        matrix = torch.zeros_like(matrix)
    elif kind == "constant":
        matrix = torch.ones_like(matrix)
    elif kind == "graded":
        matrix = matrix * torch.logspace(0, -draw(st.integers(1, 12)), shape[-1], dtype=F64)
    elif kind == "sparse":
        matrix = matrix * (torch.rand(shape, generator=generator) < 0.3)
    dtype = draw(st.sampled_from([torch.float32, F64]))
    exponent = draw(st.integers(-30, 30) if dtype == torch.float32 else st.integers(-180, 180))
    return (matrix * 10.0**exponent).to(dtype)


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_certified_norm_is_never_below_the_true_norm(matrix):
    bound, true = certified_norm(matrix), svd_norm(matrix)
    assert (bound >= true).all()
    assert (bound <= true * 1.000001).all()  # exact on a CPU


@settings(max_examples=120, deadline=None)
@given(matrices())
def test_gram_bound_of_the_gpu_is_never_below_the_true_norm(matrix):
    largest = matrix.double().abs().max()
    if largest > 0:
        w = matrix.double() / largest
        scale = torch.full((*w.shape[:-2], 1, 1), float(largest), dtype=F64)
        bound = gram_bound(gram_of(w), scale, 9) * (1 + 1e-12)
        true = svd_norm(w)
        assert (bound >= true).all()
        assert (bound <= true * min(w.shape[-2:]) ** (1 / 2**11) * (1 + 1e-9)).all()


@pytest.mark.parametrize("shape", [(8, 8), (16, 25), (64, 64), (10, 300), (200, 128)])
def test_gram_bound_is_exact_for_orthogonal_matrices(shape):
    w = Orthogonal().sample(*shape, dtype=F64)
    bound = gram_bound(gram_of(w), torch.ones(1, 1, dtype=F64), 9)
    assert 1 - 1e-12 <= bound <= 1 + 1e-6


@settings(max_examples=120, deadline=None)
@given(matrices(), st.sampled_from(CONSTRAINTS))
def test_norm_bound_of_every_constraint_is_certified(matrix, constraint):
    assert (constraint.norm_bound(matrix) >= svd_norm(matrix)).all()


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from(CONSTRAINTS))
def test_projection_lands_in_the_set_and_stays(matrix, constraint):
    projected = constraint.project(matrix)
    assert projected.shape == matrix.shape
    assert projected.dtype == matrix.dtype
    radius = getattr(constraint, "radius", 1.0)
    rounding = 1 + 1e-6 if matrix.dtype == torch.float32 else 1 + 1e-9
    assert (svd_norm(projected) <= radius * rounding).all()
    if isinstance(constraint, Orthogonal):
        singular = torch.linalg.svdvals(matrix.double())
        if not (singular[..., -1] > 1e-3 * singular[..., 0]).all():
            return  # rank-deficient: norm at most 1, and that is all
    assert constraint.contains(projected)
    again = constraint.project(projected)
    assert torch.allclose(again, projected, rtol=1e-6, atol=1e-6 * float(projected.abs().max()))


@pytest.mark.parametrize("constraint", [Spectral(), Frobenius()])
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_the_nearest_point(constraint, shape):
    """⟨W − P(W), V − P(W)⟩ ≤ 0 for every V of a convex set."""
    for scale in (0.1, 1.0, 10.0):
        matrix = scale * torch.randn(*shape, dtype=F64)
        projected = constraint.project(matrix)
        for _ in range(20):
            other = constraint.project(3 * torch.randn(*shape, dtype=F64))
            inner = ((matrix - projected) * (other - projected)).sum((-2, -1))
            assert (inner <= 1e-9 * scale).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_orthogonal_projection_is_the_polar_factor(shape, scale):
    matrix = torch.randn(*shape, dtype=F64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(Orthogonal().project(matrix * scale), u @ vh, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (64, 64), (2, 16, 25)])
def test_newton_schulz_of_the_gpu_agrees_with_the_eigenvalues(shape):
    matrix = torch.randn(*shape, dtype=F64)
    root = newton_schulz_root(gram_of(matrix))
    by_iteration = root @ matrix if shape[-2] <= shape[-1] else matrix @ root
    assert torch.allclose(by_iteration, Orthogonal().project(matrix), atol=1e-8)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_samples_lie_in_the_set(constraint, shape, dtype):
    generator = torch.Generator().manual_seed(3)
    first = constraint.sample(*shape, generator=generator, dtype=dtype)
    second = constraint.sample(*shape, generator=generator, dtype=dtype)
    assert first.shape == shape
    assert first.dtype == dtype
    assert constraint.contains(first)
    assert shape == (1, 1) or not torch.equal(first, second)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(1, 4), (4, 4), (3, 5), (2, 3, 3)])
def test_non_finite_weights_are_never_hidden(constraint, bad, shape):
    """Decision: nothing raises and nothing synchronises; a NaN or infinite entry makes bound and projection so too."""
    for position in (0, -1):
        matrix = torch.randn(*shape)
        matrix.view(-1)[position] = bad
        assert not constraint.norm_bound(matrix).isfinite().all()
        assert not constraint.project(matrix).isfinite().all()
        assert not constraint.contains(matrix)


@pytest.mark.parametrize("constraint", [Spectral, Frobenius])
@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan, math.inf])
def test_bad_radius_is_refused(constraint, radius):
    with pytest.raises(ConstraintError, match="positive finite"):
        constraint(radius)


@pytest.mark.parametrize("constraint", [Spectral(), Orthogonal(), Frobenius()])
def test_a_vector_is_no_matrix(constraint):
    with pytest.raises(ConstraintError, match="two axes"):
        constraint.sample(5)


@pytest.mark.parametrize("constraint", [Spectral(), Orthogonal(), Frobenius()])
def test_contains_rejects_what_is_outside(constraint):
    inside = constraint.sample(4, 6, dtype=F64)
    assert constraint.contains(inside)
    assert not constraint.contains(inside * (1.001 / torch.linalg.matrix_norm(inside, 2)) * 1.5)
    if isinstance(constraint, Orthogonal):
        assert not constraint.contains(inside * 0.99)


def test_power_iteration_would_have_been_too_small():
    """The reason it is not used: with two close singular values it is below the norm for many steps."""
    w = torch.diag(torch.tensor([1.0, 0.999, 0.5], dtype=F64))
    v = torch.tensor([1e-3, 1.0, 0.0], dtype=F64)
    for _ in range(20):
        v = w.T @ (w @ v)
        v = v / v.norm()
    assert (w @ v).norm() < 0.9995
    assert certified_norm(w) >= 1.0


def test_vector_norm_counts_every_entry():
    for shape in [(3,), (2, 5), (4, 1, 2)]:
        v = torch.randn(*shape)
        assert vector_norm(v) >= v.double().norm()
        assert vector_norm(v) <= v.double().norm() * (1 + 1e-9)
