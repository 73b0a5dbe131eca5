"""Certified upper bounds of the norms of matrices, and roots of their Gram matrices; without power iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipdp import panels

_GRAM_SQUARINGS = 9  # the bound is loose by at most rank ** (1 / 2**11): 0.4 % at rank 1000
_TINY, _SMALLEST = 1e-300, 1e-100  # to divide by, and by its square
# Newton-Schulz polynomials s ↦ a s + b s³ + c s⁵ on the singular values: the quintic lifts small ones by 3.4 a step
# into [0.68, 1.21] (Jordan et al. 2024), the cubic then converges quadratically to 1.
_QUINTIC, _CUBIC = (3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)
_NEWTON_SCHULZ = (_QUINTIC,) * 8 + (_CUBIC,) * 6
_WARM, _FINISH = (_QUINTIC,) * 3 + (_CUBIC,) * 3, (_CUBIC,) * 4  # in low precision; in float64


def rescaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(W/c, c) in float64 with c the largest entry, so that nothing overflows or vanishes. `matrix`: (..., m, n).

    c is 1 for a matrix of zeros, and NaN or infinite when an entry is: whatever is multiplied by c then shows it.
    """
    largest = torch.linalg.vector_norm(matrix, ord=math.inf, dim=(-2, -1), keepdim=True).double()
    scale = torch.where(largest == 0, 1.0, largest)
    w = matrix.to(torch.float64, copy=True)  # the one copy: a wide matrix in float64 is most of a projection's memory
    return w.div_(scale).nan_to_num_(0.0, 0.0, 0.0), scale


def gram_of(w: Tensor) -> Tensor:
    """W Wᵀ or Wᵀ W, whichever is smaller. `w`: (..., m, n)."""
    return w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w


def applied(transform: Tensor, w: Tensor) -> Tensor:
    """The function of the Gram matrix that `transform` is, on the side of W where the Gram matrix was taken."""
    return transform @ w if w.shape[-2] <= w.shape[-1] else w @ transform


def _slack(matrix: Tensor) -> float:
    """Relative slack that covers the float64 rounding of a norm computed through a Gram matrix of this shape.

    |fl(WWᵀ) − WWᵀ| ≤ n ε |W||Wᵀ|, of norm at most n ε ‖W‖_F² ≤ n m ε ‖W‖₂²; the eigenvalues add a multiple of m ε, and
    a Cholesky factor of R² I − WWᵀ (m + 1) m ε R² / 2 (Rump 2006).
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


def gram_bound(gram: Tensor, scale: Tensor, squarings: int) -> Tensor:
    """The smaller of Gram iteration and √(1 + ‖I − c²G‖_F)/c, the second for the case that c W is nearly orthogonal."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    near_orthogonal = (1.0 + torch.linalg.matrix_norm(eye - scale * (scale * gram))).sqrt() / scale[..., 0, 0]
    return torch.minimum(_gram_iteration(gram, squarings), near_orthogonal)


def eigen_root(gram: Tensor) -> Tensor:
    """G^(-1/2) from the eigenvalues; those that are rounding errors are cut off."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    floor = eigenvalues[..., -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return (vectors / eigenvalues.clamp_min(floor).clamp_min(_TINY).sqrt()[..., None, :]) @ vectors.mT


def newton_schulz_root(gram: Tensor) -> Tensor:
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


def warm_root(gram: Tensor, low: torch.dtype) -> Tensor:
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


def low_precision(matrix: Tensor) -> torch.dtype | None:
    """What a retraction may iterate in: bfloat16 on a GPU that multiplies it, for weights of float32 at most."""
    if not matrix.is_cuda or matrix.dtype == torch.float64:
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(matrix.device) >= (8, 0) else torch.float32


def certified_norm(matrix: Tensor, *, squarings: int = _GRAM_SQUARINGS, guess: float = math.inf) -> Tensor:
    r"""Certified upper bound of the spectral norm, without a host-device synchronisation.

    On a CPU ‖W‖₂² is the largest eigenvalue of the smaller Gram matrix, computed in float64 by a backward stable
    method: exact up to the slack that is added. On a GPU, where an eigenvalue would synchronise, it is the smaller of
    two bounds that always hold. Gram iteration is loose by at most rank^(1/4p):

    ‖W‖₂ = ‖(WᵀW)^p‖₂^(1/2p) ≤ ‖(WᵀW)^p‖_F^(1/2p) with p = 2^k,

    and ‖W‖₂² = ‖WWᵀ‖₂ ≤ 1 + ‖I − WWᵀ‖_F is exact for an orthogonal W (for a tall W with WᵀW).

    Args:
        matrix: (..., m, n), any floating dtype; computed in float64.
        squarings: k.
        guess: what the norm may be, tried first for a large matrix.

    A large matrix on a CPU is taken in pieces (`lipdp.panels`): the second bound, of W divided by a scale, where it is
    within a thousandth, else the R of a Cholesky factor of R² I − WWᵀ (Rump 2006), a few thousandths above at most.

    Returns:
        float64 tensor of shape (...), an upper bound up to and including its own rounding error; NaN or infinite when
        an entry is.

    Source: Delattre, Barthélemy, Araujo & Allauzen (2023), theorem 2 (Gram iteration); Weyl's inequality.
    """
    if panels.is_large(matrix):
        norms = torch.tensor([panels.spectral(w, guess) for w in panels.each(matrix.detach())], dtype=torch.float64)
        return norms.view(matrix.shape[:-2]) * _slack(matrix)
    w, scale = rescaled(matrix)
    if min(w.shape[-2:]) == 1:  # one row or column: the Euclidean norm
        norm = torch.linalg.matrix_norm(w)
    elif w.is_cuda:
        norm = gram_bound(gram_of(w), scale, squarings)
    else:
        norm = torch.linalg.eigvalsh(gram_of(w))[..., -1].clamp_min(0.0).sqrt()
    return norm * scale[..., 0, 0] * _slack(matrix)


def vector_norm(vector: Tensor) -> Tensor:
    """Certified Euclidean norm of a tensor of any shape: float64 scalar, rounding included."""
    return torch.linalg.vector_norm(vector.double()) * (1.0 + 8 * vector.numel() * torch.finfo(torch.float64).eps)
