"""Sets of matrices a layer's weight is kept in, each with a *certified* upper bound of the operator norm.

Power iteration under-estimates a norm and is never used here. `norm_bound` looks at the matrix as it is, so a layer's
bound holds whether or not the weight has been projected; the constraint only keeps the product of the norms small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from lipdp import panels
from lipdp.errors import ConstraintError, ParameterError

_GRAM_SQUARINGS = 9  # the bound is loose by at most rank ** (1 / 2**11): 0.4 % at rank 1000
_TINY, _SMALLEST = 1e-300, 1e-100  # to divide by, and by its square
# Newton-Schulz polynomials s ↦ a s + b s³ + c s⁵ on the singular values: the quintic lifts small ones by 3.4 a step
# into [0.68, 1.21] (Jordan et al. 2024), the cubic then converges quadratically to 1.
_QUINTIC, _CUBIC = (3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)
_NEWTON_SCHULZ = (_QUINTIC,) * 8 + (_CUBIC,) * 6
_WARM, _FINISH = (_QUINTIC,) * 3 + (_CUBIC,) * 3, (_CUBIC,) * 4  # in low precision; in float64


def _rescaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(W/c, c) in float64 with c the largest entry, so that nothing overflows or vanishes. `matrix`: (..., m, n).

    c is 1 for a matrix of zeros, and NaN or infinite when an entry is: whatever is multiplied by c then shows it.
    """
    largest = torch.linalg.vector_norm(matrix, ord=math.inf, dim=(-2, -1), keepdim=True).double()
    scale = torch.where(largest == 0, 1.0, largest)
    w = matrix.to(torch.float64, copy=True)  # the one copy: a wide matrix in float64 is most of a projection's memory
    return w.div_(scale).nan_to_num_(0.0, 0.0, 0.0), scale


def _gram(w: Tensor) -> Tensor:
    """W Wᵀ or Wᵀ W, whichever is smaller. `w`: (..., m, n)."""
    return w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w


def _apply(transform: Tensor, w: Tensor) -> Tensor:
    """The function of the Gram matrix that `transform` is, on the side of W where the Gram matrix was taken."""
    return transform @ w if w.shape[-2] <= w.shape[-1] else w @ transform


def _slack(matrix: Tensor) -> float:
    """Relative slack that covers the float64 rounding of a norm computed through a Gram matrix of this shape.

    |fl(WWᵀ) − WWᵀ| ≤ n ε |W||Wᵀ|, of norm at most n ε ‖W‖_F² ≤ n m ε ‖W‖₂²; the eigenvalues add a multiple of m ε.
    """
    rows, columns = matrix.shape[-2:]
    return 1.0 + 8 * max(rows * columns, 1) * torch.finfo(torch.float64).eps


def _gram_iteration(gram: Tensor, squarings: int) -> Tensor:
    """‖(WᵀW)^(2^k)‖_F ^ (1 / 2^(k+1)), with the exponents kept apart so that nothing overflows: no sync on a GPU."""
    log_scale = torch.zeros(gram.shape[:-2], dtype=torch.float64, device=gram.device)
    for _ in range(squarings):
        norm = torch.linalg.matrix_norm(gram).clamp_min(_TINY)
        gram = gram / norm[..., None, None]
        gram = gram @ gram
        log_scale = 2 * (log_scale + norm.log())
    return ((torch.linalg.matrix_norm(gram).log() + log_scale) / 2 ** (squarings + 1)).exp()


def _gram_bound(gram: Tensor, scale: Tensor, squarings: int) -> Tensor:
    """The smaller of Gram iteration and √(1 + ‖I − c²G‖_F)/c, the second for the case that c W is nearly orthogonal."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    near_orthogonal = (1.0 + torch.linalg.matrix_norm(eye - scale * (scale * gram))).sqrt() / scale[..., 0, 0]
    return torch.minimum(_gram_iteration(gram, squarings), near_orthogonal)


def _eigen_root(gram: Tensor) -> Tensor:
    """G^(-1/2) from the eigenvalues; those that are rounding errors are cut off."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    floor = eigenvalues[..., -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return (vectors / eigenvalues.clamp_min(floor).clamp_min(_TINY).sqrt()[..., None, :]) @ vectors.mT


def _newton_schulz_root(gram: Tensor) -> Tensor:
    """G^(-1/2) by matrix products alone: every iterate is a polynomial of G, so the iteration runs on G."""
    norm = _gram_iteration(gram, 3).clamp_min(_SMALLEST)[..., None, None]  # an upper bound of the norm of W
    return _polynomials(gram / norm**2, _NEWTON_SCHULZ) / norm


def _polynomials(gram: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """P with P² G → I: Newton-Schulz steps on the Gram matrix G, of norm at most 1.2 or so; in the dtype of G."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = eye.expand_as(gram)
    for linear, cubic, quintic in coefficients:
        step = linear * eye + cubic * gram
        if quintic:
            step = step + quintic * (gram @ gram)
        root = step @ root
        gram = step @ gram @ step
    return root


def _warm_root(gram: Tensor, low: torch.dtype) -> Tensor:
    """G^(-1/2), most of the iterations in low precision and the last ones in float64.

    Rounding G to `low` may take an eigenvalue near 0 below it, where the iteration would run away. So the low precision
    looks at G + μI with μ above the rounding error, which leaves singular values s at s/√(s² + μ) < 1, and the float64
    steps bring those that are not small to 1. What comes out of the low precision is made symmetric: for W = PU, with P
    the root of WWᵀ, and an error E, symmetric too, the polar factor of (P⁻¹ + E)PU differs from U by the antisymmetric
    half of EP, ½[E, P − I]. So the rounding error in the direction is E times how far W is from orthogonal: nothing
    where nothing had to be done.
    """
    size = gram.shape[-1]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    norm = _gram_iteration(gram, 3).clamp_min(_SMALLEST)[..., None, None]
    gram = gram / norm**2
    shift = torch.finfo(low).eps * math.sqrt(size)
    root = _polynomials(((gram + shift * eye) / (1 + shift)).to(low), _WARM).to(gram.dtype)
    root = (root + root.mT) / 2
    gram = root @ gram @ root.mT
    excess = (_gram_iteration(gram, 3) / 1.2).clamp_min(1.0)[..., None, None]  # whatever was rounded, it converges
    return _polynomials(gram / excess**2, _FINISH) @ root / (excess * norm)


def _low_precision(matrix: Tensor) -> torch.dtype | None:
    """What a retraction may iterate in: bfloat16 on a GPU that multiplies it, for weights of float32 at most."""
    if not matrix.is_cuda or matrix.dtype == torch.float64:
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(matrix.device) >= (8, 0) else torch.float32


def certified_norm(matrix: Tensor, *, squarings: int = _GRAM_SQUARINGS) -> Tensor:
    r"""Certified upper bound of the spectral norm, without a host-device synchronisation.

    On a CPU ‖W‖₂² is the largest eigenvalue of the smaller Gram matrix, computed in float64 by a backward stable
    method: exact up to the slack that is added. On a GPU, where an eigenvalue would synchronise, it is the smaller of
    two bounds that always hold. Gram iteration is loose by at most rank^(1/4p):

    ‖W‖₂ = ‖(WᵀW)^p‖₂^(1/2p) ≤ ‖(WᵀW)^p‖_F^(1/2p) with p = 2^k,

    and ‖W‖₂² = ‖WWᵀ‖₂ ≤ 1 + ‖I − WWᵀ‖_F is exact for an orthogonal W (for a tall W with WᵀW).

    Args:
        matrix: (..., m, n), any floating dtype; computed in float64.
        squarings: k.

    A large matrix on a CPU is taken in pieces (`lipdp.panels`): the second bound, of W divided by a scale, where it is
    within a thousandth, else the eigenvalue.

    Returns:
        float64 tensor of shape (...), an upper bound up to and including its own rounding error; NaN or infinite when
        an entry is.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> 3.0 <= certified_norm(w).item() < 3.0001
    True

    Source: Delattre, Barthélemy, Araujo & Allauzen (2023), theorem 2 (Gram iteration); Weyl's inequality.
    """
    if panels.is_large(matrix):
        norms = torch.tensor([_large_norm(w) for w in panels.each(matrix.detach())], dtype=torch.float64)
        return norms.view(matrix.shape[:-2]) * _slack(matrix)
    w, scale = _rescaled(matrix)
    if min(w.shape[-2:]) == 1:  # one row or column: the Euclidean norm
        norm = torch.linalg.matrix_norm(w)
    elif w.is_cuda:
        norm = _gram_bound(_gram(w), scale, squarings)
    else:
        norm = torch.linalg.eigvalsh(_gram(w))[..., -1].clamp_min(0.0).sqrt()
    return norm * scale[..., 0, 0] * _slack(matrix)


def _large_norm(w: Tensor) -> float:
    """‖W‖₂ of one large wide matrix on a CPU, up to rounding from above."""
    near = panels.near_orthogonal(w)
    if near is not None:
        return near
    scale = panels.largest_entry(w)
    gram = panels.gram(w, scale).nan_to_num_(0.0, 0.0, 0.0)
    return scale * math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))


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
        w, scale = _rescaled(matrix)
        clipped = _apply(self._transform(_gram(w), scale), w).mul_(scale)
        return _shrink(clipped, self.radius).to(matrix.dtype)

    def _transform(self, gram: Tensor, scale: Tensor) -> Tensor:
        """U min(1, rΛ^(-1/2)) Uᵀ of the Gram matrix of W/scale."""
        eigenvalues, vectors = torch.linalg.eigh(gram)
        norms = eigenvalues.clamp_min(0.0).sqrt() * scale[..., 0]
        shrink = self.radius / norms.clamp_min(self.radius)
        return (vectors * shrink[..., None, :]) @ vectors.mT

    def _project_large_(self, w: Tensor) -> None:
        scale = panels.largest_entry(w)
        gram = panels.gram(w, scale).nan_to_num_(0.0, 0.0, 0.0)
        panels.multiply_(self._transform(gram, w.new_full((1, 1), scale, dtype=torch.float64)), w)
        panels.shrink_(w, float(certified_norm(w)), self.radius)


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
        return self._polar(matrix, _newton_schulz_root if matrix.is_cuda else _eigen_root)

    def _project_large_(self, w: Tensor) -> None:
        panels.polar_(w)
        panels.shrink_(w, float(certified_norm(w)), 1.0)

    def retract(self, matrix: Tensor) -> Tensor:
        """`project`; on a GPU for a matrix that was orthogonal before a step, with most iterations in bfloat16.

        Singular values below a twentieth of the largest may stay below 1 and rise at the following steps. The norm is
        at most 1 as after `project`: the last steps are in float64, and `cannot_certify` looks at what came out.
        """
        low = _low_precision(matrix)
        return self.project(matrix) if low is None else self._polar(matrix, partial(_warm_root, low=low))

    def _polar(self, matrix: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
        w, scale = _rescaled(matrix)
        w = _apply(root(_gram(w)), w)
        step = _gram(w).mul_(-0.5)
        step.diagonal(dim1=-2, dim2=-1).add_(1.5)  # one Björck step: what is above 1 by rounding falls below
        return _apply(step, w).add_(0.0 * scale).to(matrix.dtype)

    def contains(self, matrix: Tensor, *, tolerance: float | None = None) -> bool:
        gram = _gram(matrix)
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
        w, scale = _rescaled(matrix)
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


def vector_norm(vector: Tensor) -> Tensor:
    """Certified Euclidean norm of a tensor of any shape: float64 scalar, rounding included.

    >>> vector_norm(torch.tensor([3.0, 4.0])).item() >= 5.0
    True
    """
    return torch.linalg.vector_norm(vector.double()) * (1.0 + 8 * vector.numel() * torch.finfo(torch.float64).eps)
