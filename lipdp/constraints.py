"""Sets of matrices a layer's weight is kept in, each with a *certified* upper bound of the operator norm.

Power iteration under-estimates a norm and is never used here. `norm_bound` looks at the matrix as it is, so a layer's
bound holds whether or not the weight has been projected; the constraint only keeps the product of the norms small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from lipdp import norms, panels
from lipdp.errors import ConstraintError, ParameterError
from lipdp.norms import applied, certified_norm, eigen_root, gram_of, newton_schulz_root, rescaled, warm_root


class Constraint(ABC):
    """A set of (..., m, n) matrices that a weight is projected on after every noisy step.

    Every constraint answers the same four verbs. A stack of matrices (a grouped convolution) is treated matrix by
    matrix.
    """

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """A matrix of the set near `matrix` (the nearest one up to rounding), same shape, dtype and device."""

    def retract(self, matrix: Tensor) -> Tensor:
        """`project` for a matrix that was in the set before a step; a constraint may be quicker about it."""
        return self.project(matrix)

    def retract_(self, matrix: Tensor) -> None:
        """`retract` in place, of a large matrix without a second one of its size."""
        if type(self) in BUILT_IN and panels.is_large(matrix):
            self._each_large_(matrix)
        else:
            matrix.copy_(self.retract(matrix))

    def _each_large_(self, matrix: Tensor) -> Tensor:
        for w in panels.each(matrix):
            self._project_large_(w)
        return matrix

    def _project_large_(self, w: Tensor) -> None:
        """Project one large matrix on a CPU in place, at least as wide as high."""
        w.copy_(self.project(w))

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
        """A random matrix of the set, of shape (..., m, n); `_sample` draws it."""
        if len(shape) < 2:
            raise ConstraintError(f"a matrix needs at least two axes, got shape {shape}")
        drawn = self._sample(shape, partial(torch.randn, generator=generator, dtype=torch.float64, device=device))
        return drawn.to(dtype or torch.get_default_dtype())

    def _sample(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Tensor:
        """The projection of a Gaussian matrix."""
        return self.project(randn(*shape) / math.sqrt(max(shape[-2:])))


def _tolerance(matrix: Tensor, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return 1e-9 if matrix.dtype == torch.float64 else 1e-4 if matrix.dtype == torch.float32 else 2e-2


def _shrink(matrix: Tensor, radius: float) -> Tensor:
    """Divide by the certified bound where it exceeds the radius."""
    factor = (radius / certified_norm(matrix).clamp_min(radius)).to(matrix.dtype)
    return matrix * factor[..., None, None]


@dataclass(frozen=True)
class _Ball(Constraint):
    """Matrices of which some norm is at most `radius`."""

    radius: float = 1.0

    _order: ClassVar[Any]  # of the norm, as torch.linalg.matrix_norm names it

    def __post_init__(self) -> None:
        if not is_positive(self.radius):
            raise ConstraintError(f"a radius is a positive finite number, got {self.radius!r}")
        object.__setattr__(self, "radius", float(self.radius))

    def contains(self, matrix: Tensor, *, tolerance: float | None = None) -> bool:
        if not bool(matrix.isfinite().all()):
            return False
        norm = torch.linalg.matrix_norm(matrix.double(), ord=self._order)
        return bool((norm <= self.radius * (1 + _tolerance(matrix, tolerance))).all())


@dataclass(frozen=True)
class Spectral(_Ball):
    """Matrices of spectral norm at most `radius`.

    `project` clips the singular values at the radius (the nearest matrix in Frobenius norm):
    W ↦ U min(1, rΛ^(-1/2)) Uᵀ W with WWᵀ = UΛUᵀ, in float64, and then divides by the certified bound, so that
    `norm_bound(project(W)) ≤ radius` up to the slack of the weight's dtype.

    >>> Spectral().contains(Spectral().project(torch.randn(4, 6)))
    True

    Source: Higham (1988), the projection on a spectral-norm ball.
    """

    _order: ClassVar[Any] = 2

    def project(self, matrix: Tensor) -> Tensor:
        if panels.is_large(matrix):
            return self._each_large_(matrix.clone())
        w, scale = rescaled(matrix)
        clipped = applied(self._transform(gram_of(w), scale), w).mul_(scale)
        return _shrink(clipped, self.radius).to(matrix.dtype)

    def _transform(self, gram: Tensor, scale: Tensor) -> Tensor:
        """U min(1, rΛ^(-1/2)) Uᵀ of the Gram matrix of W/scale."""
        eigenvalues, vectors = torch.linalg.eigh(gram)
        norms = eigenvalues.clamp_min(0.0).sqrt() * scale[..., 0]
        shrink = self.radius / norms.clamp_min(self.radius)
        return (vectors * shrink[..., None, :]) @ vectors.mT

    def norm_bound(self, matrix: Tensor) -> Tensor:
        return certified_norm(matrix, guess=self.radius)

    def _project_large_(self, w: Tensor) -> None:
        panels.clip_(w, self.radius)
        panels.shrink_(w, float(certified_norm(w, guess=self.radius * panels.rounded(w))), self.radius)


@dataclass(frozen=True)
class Orthogonal(Constraint):
    """Matrices with orthonormal rows (m ≤ n) or columns (m > n): every singular value is 1.

    `project` keeps the singular vectors and sets every singular value to 1: the polar factor (WWᵀ)^(-1/2) W, the
    nearest orthogonal matrix. The root of the small Gram matrix comes from its eigenvalues on a CPU, and from
    Newton-Schulz (Björck) iterations on a GPU, where nothing synchronises. Singular values below 1e-4 of the largest
    may stay below 1: a rank-deficient matrix comes out with norm 1 at most, but `contains` is false.

    >>> w = Orthogonal().sample(3, 5, dtype=torch.float64)
    >>> torch.allclose(w @ w.T, torch.eye(3, dtype=torch.float64))
    True

    Source: Björck & Bowie (1971); Anil, Lucas & Grosse (2019), section 4.2; Jordan et al. (2024) for the quintic.
    """

    def project(self, matrix: Tensor) -> Tensor:
        if panels.is_large(matrix):
            return self._each_large_(matrix.clone())
        return self._polar(matrix, newton_schulz_root if matrix.is_cuda else eigen_root)

    def _project_large_(self, w: Tensor) -> None:
        panels.polar_(w)
        panels.shrink_(w, panels.rounded(w), 1.0)

    def retract(self, matrix: Tensor) -> Tensor:
        """`project`; on a GPU for a matrix that was orthogonal before a step, with most iterations in bfloat16.

        Singular values below a twentieth of the largest may stay below 1 and rise at the following steps. The norm is
        at most 1 as after `project`: the last steps are in float64, and `cannot_certify` looks at what came out.
        """
        low = norms.low_precision(matrix)
        return self.project(matrix) if low is None else self._polar(matrix, partial(warm_root, low=low))

    def _polar(self, matrix: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
        w, scale = rescaled(matrix)
        w = applied(root(gram_of(w)), w)
        step = gram_of(w).mul_(-0.5)
        step.diagonal(dim1=-2, dim2=-1).add_(1.5)  # one Björck step: what is above 1 by rounding falls below
        return applied(step, w).add_(0.0 * scale).to(matrix.dtype)

    def contains(self, matrix: Tensor, *, tolerance: float | None = None) -> bool:
        gram = gram_of(matrix)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return bool((torch.linalg.matrix_norm(gram - eye) <= _tolerance(matrix, tolerance) * len(eye)).all())

    def _sample(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Tensor:
        """A Haar-distributed orthogonal matrix: QR of a Gaussian one, signs fixed."""
        *batch, rows, columns = shape
        q, r = torch.linalg.qr(randn(*batch, max(rows, columns), min(rows, columns)))
        q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[..., None, :]
        return (q if rows > columns else q.mT).contiguous()


@dataclass(frozen=True)
class Frobenius(_Ball):
    """Matrices of Frobenius norm at most `radius`; for one row this is the Euclidean ball.

    ‖W‖₂ ≤ ‖W‖_F, with equality for rank one. `project` rescales: the nearest matrix of the ball.

    >>> Frobenius(2.0).project(torch.full((2, 2), 4.0)).norm().item()
    2.0
    """

    _order: ClassVar[Any] = "fro"

    def project(self, matrix: Tensor) -> Tensor:
        w, scale = rescaled(matrix)
        norm = torch.linalg.matrix_norm(w, keepdim=True) * scale
        return (matrix.double() * (self.radius / norm.clamp_min(self.radius))).to(matrix.dtype)

    def _project_large_(self, w: Tensor) -> None:
        panels.shrink_(w, panels.frobenius(w), self.radius)


BUILT_IN = (Spectral, Orthogonal, Frobenius)
"""Constraints that are known to treat a stack matrix by matrix."""


def is_positive(value: Any) -> bool:
    """Whether the value is a positive finite number (no bool), in float32 too.

    >>> is_positive(0.5), is_positive("1"), is_positive(True), is_positive(1e300)
    (True, False, False, False)
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and bool(0 < value <= torch.finfo(torch.float32).max)


def is_size(value: Any) -> bool:
    """Whether the value is a whole number (no bool) ≥ 1 that can be a size of a tensor.

    >>> is_size(3), is_size(0), is_size(3.0)
    (True, False, False)
    """
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    return integer and bool(0 < value < 2**31)


def check_positive(name: str, value: float) -> float:
    """`value` if it is a positive finite number, else a `ParameterError` that names it."""
    if not is_positive(value):
        raise ParameterError(f"{name} is a positive finite number, got {value!r}")
    return float(value)


def check_size(name: str, value: Any, *, pair: bool = False) -> None:
    """A `ParameterError` that names the value unless it is a size (`is_size`) or, with `pair`, a tuple of sizes."""
    sizes = value if pair and isinstance(value, tuple) else (value,)
    if not sizes or not all(map(is_size, sizes)):
        raise ParameterError(f"{name} is a positive whole number, got {value!r}")
