"""Sets of matrices a layer's weight is kept in, each with a *certified* upper bound of the operator norm.

Power iteration under-estimates a norm and is never used here. `norm_bound` looks at the matrix as it is, so a layer's
bound holds whether or not the weight has been projected; the constraint only keeps the product of the norms small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lipdp.errors import ConstraintError

_GRAM_SQUARINGS = 9  # the bound is loose by at most rank ** (1 / 2**11): 0.4 % at rank 1000
# Newton-Schulz polynomials s ↦ a s + b s³ + c s⁵ on the singular values: the quintic lifts small ones by 3.4 a step into
# [0.68, 1.21] (Jordan et al. 2024), the cubic then converges quadratically to 1.
_QUINTIC, _CUBIC = (3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)
_NEWTON_SCHULZ = (_QUINTIC,) * 8 + (_CUBIC,) * 6


def _gram(matrix: Tensor) -> Tensor:
    """W Wᵀ or Wᵀ W, whichever is smaller, in float64. `matrix`: (..., m, n)."""
    w = matrix.double()
    return w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w


def _slack(matrix: Tensor) -> float:
    """Relative slack that covers the float64 rounding of a bound computed from a Gram matrix of this shape."""
    return 1.0 + 8 * max(matrix.shape[-2:]) * torch.finfo(torch.float64).eps


def _gram_iteration(gram: Tensor, squarings: int) -> Tensor:
    """‖(WᵀW)^(2^k)‖_F ^ (1 / 2^(k+1)) with the exponents kept apart, so that nothing overflows."""
    log_scale = torch.zeros(gram.shape[:-2], dtype=torch.float64, device=gram.device)
    for _ in range(squarings):
        norm = torch.linalg.matrix_norm(gram).clamp_min(1e-300)
        gram = gram / norm[..., None, None]
        gram = gram @ gram
        log_scale = 2 * (log_scale + norm.log())
    return ((torch.linalg.matrix_norm(gram).log() + log_scale) / 2 ** (squarings + 1)).exp()


def certified_norm(matrix: Tensor, *, squarings: int = _GRAM_SQUARINGS) -> Tensor:
    r"""Certified upper bound of the spectral norm, without a host-device synchronisation.

    The smaller of two bounds that always hold: Gram iteration
    :math:`\|W\|_2 = \|(W^\top W)^{2^k}\|_2^{1/2^{k+1}} \le \|(W^\top W)^{2^k}\|_F^{1/2^{k+1}}`, loose by at most
    ``rank ** (1 / 2**(k+2))``, and :math:`\|W\|_2^2 = \|WW^\top\|_2 \le 1 + \|I - WW^\top\|_F`, exact for an
    orthogonal W (for a tall W with WᵀW).

    Args:
        matrix: (..., m, n), any floating dtype; computed in float64.
        squarings: k.

    Returns:
        float64 tensor of shape (...), an upper bound up to and including its own rounding error.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> 3.0 <= certified_norm(w).item() < 3.0001
    True

    Source: Delattre, Barthélemy, Araujo & Allauzen (2023), theorem 2 (Gram iteration); Weyl's inequality.
    """
    gram = _gram(matrix)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    near_orthogonal = (1.0 + torch.linalg.matrix_norm(eye - gram)).sqrt()
    return torch.minimum(_gram_iteration(gram, squarings), near_orthogonal) * _slack(matrix)


class Constraint(ABC):
    """A set of (..., m, n) matrices that a weight is projected on after every noisy step.

    Every constraint answers the same four verbs. A stack of matrices (a grouped convolution) is treated matrix by
    matrix.
    """

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """A matrix of the set near `matrix` (the nearest one up to rounding), same shape, dtype and device."""

    @abstractmethod
    def contains(self, matrix: Tensor, *, tolerance: float | None = None) -> bool:
        """Whether `matrix` lies in the set, up to a relative tolerance (default: 1e-4 in float32, 1e-9 in float64)."""

    def norm_bound(self, matrix: Tensor) -> Tensor:
        """Certified upper bound of the spectral norm of `matrix` as it is: float64, shape (...)."""
        return certified_norm(matrix)

    def sample(
        self,
        *shape: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A random matrix of the set with the given shape (..., m, n): the projection of a Gaussian one."""
        if len(shape) < 2:
            raise ConstraintError(f"a matrix needs at least two axes, got shape {shape}")
        dtype = dtype or torch.get_default_dtype()
        gaussian = torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)
        return self.project(gaussian / math.sqrt(max(shape[-2:]))).to(dtype)


def _tolerance(matrix: Tensor, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return 1e-9 if matrix.dtype == torch.float64 else 1e-4 if matrix.dtype == torch.float32 else 2e-2


def _shrink(matrix: Tensor, radius: float) -> Tensor:
    """Divide by the certified bound where it exceeds the radius."""
    factor = (radius / certified_norm(matrix).clamp_min(radius)).to(matrix.dtype)
    return matrix * factor[..., None, None]


@dataclass(frozen=True)
class Spectral(Constraint):
    r"""Matrices of spectral norm at most `radius`.

    `project` clips the singular values at the radius (the nearest matrix in Frobenius norm):
    :math:`W \mapsto U \min(1, r\Lambda^{-1/2}) U^\top W` with :math:`WW^\top = U\Lambda U^\top`, in float64, and then
    divides by the certified bound, so that `norm_bound(project(W)) ≤ radius` up to the slack of the weight's dtype.

    >>> Spectral().contains(Spectral().project(torch.randn(4, 6)))
    True

    Source: Higham (1988), the projection on a spectral-norm ball.
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    def project(self, matrix: Tensor) -> Tensor:
        eigenvalues, vectors = torch.linalg.eigh(_gram(matrix))
        shrink = self.radius / eigenvalues.clamp_min(self.radius**2).sqrt()
        transform = (vectors * shrink[..., None, :]) @ vectors.mT
        w = matrix.double()
        clipped = transform @ w if w.shape[-2] <= w.shape[-1] else w @ transform
        return _shrink(clipped, self.radius).to(matrix.dtype)

    def contains(self, matrix: Tensor, *, tolerance: float | None = None) -> bool:
        norm = torch.linalg.matrix_norm(matrix.double(), ord=2)
        return bool((norm <= self.radius * (1 + _tolerance(matrix, tolerance))).all())


@dataclass(frozen=True)
class Orthogonal(Constraint):
    r"""Matrices with orthonormal rows (m ≤ n) or columns (m > n): every singular value is 1.

    `project` runs Newton-Schulz (Björck) iterations :math:`W \leftarrow p(WW^\top) W`, which keep the singular vectors
    and drive every singular value to 1, that is to the polar factor, the nearest orthogonal matrix. All iterates are
    polynomials in the small Gram matrix times W, so the iteration runs on the Gram matrix alone and W is multiplied
    once. It starts from W over its certified norm, and reaches 1 from relative singular values down to 1e-4; a
    rank-deficient matrix keeps its zero singular values (its norm is still at most 1, but `contains` is false).

    >>> w = Orthogonal().sample(3, 5, dtype=torch.float64)
    >>> torch.allclose(w @ w.T, torch.eye(3, dtype=torch.float64))
    True

    Source: Björck & Bowie (1971); Anil, Lucas & Grosse (2019), section 4.2; Jordan et al. (2024) for the quintic.
    """

    def project(self, matrix: Tensor) -> Tensor:
        gram = _gram(matrix)
        scale = _gram_iteration(gram, 3).clamp_min(1e-150)[..., None, None]  # an upper bound of the norm
        gram = gram / scale**2
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        transform = eye / scale
        for linear, cubic, quintic in _NEWTON_SCHULZ:
            step = linear * eye + cubic * gram
            if quintic:
                step = step + quintic * (gram @ gram)
            transform = step @ transform
            gram = step @ gram @ step
        w = matrix.double()
        projected = transform @ w if w.shape[-2] <= w.shape[-1] else w @ transform
        return _shrink(projected, 1.0).to(matrix.dtype)

    def contains(self, matrix: Tensor, *, tolerance: float | None = None) -> bool:
        gram = _gram(matrix)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return bool((torch.linalg.matrix_norm(gram - eye) <= _tolerance(matrix, tolerance) * len(eye)).all())

    def sample(
        self,
        *shape: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A Haar-distributed orthogonal matrix (QR of a Gaussian one, signs fixed): (..., m, n)."""
        if len(shape) < 2:
            raise ConstraintError(f"a matrix needs at least two axes, got shape {shape}")
        *batch, rows, columns = shape
        tall = (*batch, max(rows, columns), min(rows, columns))
        q, r = torch.linalg.qr(torch.randn(*tall, generator=generator, dtype=torch.float64, device=device))
        q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[..., None, :]
        return (q if rows > columns else q.mT).contiguous().to(dtype or torch.get_default_dtype())


@dataclass(frozen=True)
class Frobenius(Constraint):
    r"""Matrices of Frobenius norm at most `radius`; for one row this is the Euclidean ball.

    :math:`\|W\|_2 \le \|W\|_F`, with equality for rank one. `project` rescales: the nearest matrix of the ball.

    >>> Frobenius(2.0).project(torch.full((2, 2), 4.0)).norm().item()
    2.0
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    def project(self, matrix: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(matrix.double())
        factor = self.radius / norm.clamp_min(self.radius)
        return (matrix.double() * factor[..., None, None]).to(matrix.dtype)

    def contains(self, matrix: Tensor, *, tolerance: float | None = None) -> bool:
        norm = torch.linalg.matrix_norm(matrix.double())
        return bool((norm <= self.radius * (1 + _tolerance(matrix, tolerance))).all())

    def norm_bound(self, matrix: Tensor) -> Tensor:
        frobenius = torch.linalg.matrix_norm(matrix.double()) * _slack(matrix)
        return frobenius if min(matrix.shape[-2:]) == 1 else torch.minimum(frobenius, certified_norm(matrix))


def _check_radius(radius: float) -> None:
    if not 0 < radius < math.inf:
        raise ConstraintError(f"a radius is a positive finite number, got {radius}")


def vector_norm(vector: Tensor) -> Tensor:
    """Certified Euclidean norm of a tensor of any shape: float64 scalar, rounding included.

    >>> vector_norm(torch.tensor([3.0, 4.0])).item() >= 5.0
    True
    """
    return torch.linalg.vector_norm(vector.double()) * (1.0 + 8 * vector.numel() * torch.finfo(torch.float64).eps)
