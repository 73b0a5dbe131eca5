r"""Norms and polar factors of one large matrix on a CPU, piece by piece: no second matrix of its size is made.

A matrix W is (m, n) with m ≤ n here; what is symmetric, such as W Wᵀ, is held as panels: rows [i, i + b) of its lower
triangle, columns [0, i + b), half of m² numbers altogether.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

LARGE, WIDE = 1 << 20, 512
"""Entries of a matrix, or its smaller size, from which on it is taken in pieces."""

_PIECE = 1 << 20  # entries of a piece
_NEAR = 2e-3  # ‖I − WWᵀ/c²‖_F up to which the bound from it, loose by half of it, is taken
_STEPS = 12  # of the polar iteration at most: each lifts a small singular value by 3


def is_large(matrix: Tensor) -> bool:
    """Whether matrices of this stack are taken in pieces: on a CPU, where reading a number waits for nothing."""
    small, large = sorted(matrix.shape[-2:])
    return not matrix.is_cuda and (small >= WIDE or small * large >= LARGE)


def each(matrix: Tensor) -> list[Tensor]:
    """Views of the matrices of a stack, each with at least as many columns as rows."""
    view = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    return [view[index] for index in itertools.product(*map(range, matrix.shape[:-2]))]


def _in_float(w: Tensor) -> Tensor:
    """In its own dtype, float32 at least."""
    return w if w.dtype.itemsize >= 4 else w.float()


def spacing(w: Tensor) -> float:
    """Of numbers at 1, in the dtype of W, float32 at least."""
    return torch.finfo(w.dtype if w.dtype.itemsize >= 4 else torch.float32).eps


def rounded(w: Tensor) -> float:
    """What a norm of 1 may have become in a projection: a few spacings an entry, of independent signs."""
    return 1 + 4 * math.sqrt(len(w)) * spacing(w)


def largest_entry(w: Tensor) -> float:
    """In absolute value; 1 for zeros, NaN or infinite where an entry is."""
    largest = float(torch.linalg.vector_norm(w, ord=math.inf))
    return largest if largest != 0 else 1.0


def gram(w: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """(W/scale)(W/scale)ᵀ as panels."""
    rows = max(128, -(-len(w) // 16))
    ends = [min(start + rows, len(w)) for start in range(0, len(w), rows)]
    panels = [torch.zeros((end - 1) % rows + 1, end, dtype=dtype, device=w.device) for end in ends]
    for columns in _in_columns(w):
        piece = columns.to(dtype, copy=True).div_(scale)
        for panel, end in zip(panels, ends, strict=True):
            panel.addmm_(piece[end - len(panel) : end], piece[:end].mT)
    return panels


def frobenius(w: Tensor) -> float:
    """‖W‖_F, in float64."""
    scale = largest_entry(w)
    pieces = [rows.to(torch.float64, copy=True).div_(scale).square_().sum() for rows in _blocks(w)]
    return scale * math.sqrt(float(torch.stack(pieces).sum()))


def near_orthogonal(w: Tensor) -> float | None:
    """c √(1 + ‖I − WWᵀ/c²‖_F) ≥ ‖W‖₂ (Weyl) up to rounding, with c² the mean of the rows' squared norms.

    None where it is not within a thousandth of c, or an entry is not finite. In float64, b rows against b at a time.
    """
    c, blocks, square = frobenius(w) / math.sqrt(len(w)), _blocks(w), 0.0
    if not 0 < c < math.inf:
        return None
    for i, block in enumerate(blocks):
        own = block.double() / c
        for other in blocks[:i]:
            square += 2 * float((own @ (other.double() / c).mT).square_().sum())
        product = own @ own.mT
        product.diagonal().sub_(1.0)
        square += float(product.square_().sum())
        if not square <= _NEAR**2:
            return None
    return c * math.sqrt(1 + math.sqrt(square))


def _blocks(w: Tensor) -> tuple[Tensor, ...]:
    return w.split(max(1, _PIECE // w.shape[1]))


def _in_columns(w: Tensor) -> tuple[Tensor, ...]:
    return w.split(max(1, _PIECE // len(w)), dim=1)


# --- the norm ---------------------------------------------------------------------------------------------------------


def spectral(w: Tensor, guess: float = math.inf) -> float:
    """At least ‖W‖₂ up to rounding, and within a few thousandths of it where the estimate is.

    The first R, of a few upwards from an estimate, for which R² I − WWᵀ is seen to be positive semidefinite; or ‖W‖_F,
    where that is less. A guess at R is tried where it is near the estimate. A bad estimate costs time, or makes the
    bound looser.
    """
    scale, largest = largest_entry(w), frobenius(w)
    if not 0 < largest < math.inf:
        return largest
    smallest, square, residual = _estimate(w, scale, steps=40, tolerance=_NEAR / 4)
    if smallest > 0.99 * square and (near := near_orthogonal(w)) is not None:
        return near
    square = max(square, (largest / scale) ** 2 / len(w))
    step = max(residual, 100 * spacing(w) * square)
    near = guess / scale
    if 0.999 * square < near * near < 1.001 * square + step and is_within(w, guess):
        return guess
    while (limit := scale * math.sqrt(square + step)) < largest:
        if is_within(w, limit):
            return limit
        step *= 4
    return largest


def is_within(w: Tensor, limit: float) -> bool:
    """Whether limit² I − WWᵀ has a Cholesky factor in float64, which proves ‖W‖₂ ≤ limit up to its rounding error."""
    scale = largest_entry(w)
    if not scale < math.inf:
        return False
    panels, reach = gram(w, scale, torch.float64), limit / scale
    for panel in panels:
        _parts(panel.neg_())[1].diagonal().add_(reach * reach)
    return _factor_(panels)


def _estimate(w: Tensor, scale: float, *, steps: int, tolerance: float) -> tuple[float, float, float]:
    """(θ₁, θ, r) of Lanczos steps on WWᵀ/scale²: extreme Ritz values, the residual of θ. Not bounds: where to begin."""
    exact = _in_float(w)
    x = torch.arange(1, len(w) + 1, dtype=exact.dtype, device=w.device).sin_()
    x, before = x / torch.linalg.vector_norm(x), torch.zeros_like(x)
    matrix = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
    lowest = highest = residual = 0.0
    for step in range(min(steps, len(w))):
        y = exact @ (exact.mT @ x / scale) / scale - float(matrix[step, step - 1]) * before
        along = float(x @ y)
        y -= along * x
        beyond = float(torch.linalg.vector_norm(y))
        matrix[step, step], matrix[step, step + 1], matrix[step + 1, step] = along, beyond, beyond
        values, vectors = torch.linalg.eigh(matrix[: step + 1, : step + 1])
        lowest, highest, residual = float(values[0]), float(values[-1]), beyond * abs(float(vectors[-1, -1]))
        if not residual > tolerance * highest:
            break
        x, before = y / beyond, x
    return lowest, highest, residual


# --- projections ------------------------------------------------------------------------------------------------------


def shrink_(w: Tensor, norm: float, radius: float) -> None:
    """Bring ‖W‖₂ from `norm` at most to the radius at most, rounding to float32 or float64 included."""
    if not norm <= radius:  # rounding moves W by u √m ‖W‖₂ at most, too much to make up for in less than float32
        eps = spacing(w) if w.dtype.itemsize >= 4 else 0.0
        w.mul_(radius / (norm * (1 + eps * math.sqrt(len(w)))))


def clip_(w: Tensor, radius: float) -> None:
    """Bring singular values above the radius down to it, in the dtype of W, float32 at least.

    W ← W − U (1 − r/s) Uᵀ W over the eigenvectors U of WWᵀ with s > r; memory: some five times m² numbers.
    """
    exact, scale = _in_float(w), largest_entry(w)
    whole = torch.zeros(len(w), len(w), dtype=exact.dtype, device=w.device)
    for panel in gram(exact, scale, exact.dtype):
        whole[panel.shape[1] - len(panel) : panel.shape[1], : panel.shape[1]] = panel.nan_to_num_(0.0, 0.0, 0.0)
    squares, vectors = torch.linalg.eigh(whole)
    del whole
    norms = squares.clamp_min_(0.0).sqrt_() * scale
    share, vectors = (1 - radius / norms[norms > radius])[:, None], vectors[:, norms > radius]
    for columns in _in_columns(w):
        columns.sub_(vectors @ (share * (vectors.mT @ columns.to(exact.dtype))))


def polar_(w: Tensor) -> None:
    """W ← (WWᵀ)^(-1/2) W in place, in the dtype of W, float32 at least; memory: half of m² numbers.

    Every step maps a singular value s to s (a + b s²)/(1 + c s²), with the a, b, c that bring [l, 1] nearest to 1: an
    error e near 1 becomes some e³/4. Where they lie is estimated. Singular values below 1e-5 of the largest may stay
    below 1. The norm is 1 up to rounding.

    Source: Nakatsukasa, Bai & Gygi (2010), "Optimizing Halley's iteration for computing the matrix polar
    decomposition"; with Cholesky factors: Nakatsukasa & Higham (2013), section 5.
    """
    exact, largest = _in_float(w), largest_entry(w)
    if not 1e-3 < largest < 1e3:
        exact.div_(largest)
    for _ in range(_STEPS if largest < math.inf else 0):
        smallest, square, _ = _estimate(exact, 1.0, steps=16, tolerance=spacing(w))
        low = max(0.1, math.sqrt(max(smallest, 0.0) / square)) if square > 0 else 1.0
        a, b, c = _weights(low)
        _step_(exact, a, b, c, square or 1.0)
        if not 1 - low * (a + b * low**2) / (1 + c * low**2) > 16 * spacing(w):
            break
    if exact is not w:
        w.copy_(exact)


def _step_(w: Tensor, a: float, b: float, c: float, square: float) -> None:
    """W ← X (aI + bG)(I + cG)⁻¹ with X = W/√square and G = XXᵀ."""
    panels = gram(w, math.sqrt(square), w.dtype)
    for panel in panels:
        _parts(panel.mul_(c))[1].diagonal().add_(1.0)
    _factor_(panels)
    for panel in panels:
        own = _parts(panel)[1]
        own.copy_(torch.linalg.solve_triangular(own, torch.eye(len(own), dtype=w.dtype), upper=False))
    for columns in _in_columns(w):
        solved = _solved(panels, columns)
        columns.mul_(b / c / math.sqrt(square)).add_(solved, alpha=(a - b / c) / math.sqrt(square))


def _weights(low: float) -> tuple[float, float, float]:
    """a, b, c of the step from [l, 1]."""
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d))) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


# --- Cholesky factors -------------------------------------------------------------------------------------------------


def _parts(panel: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the block on the diagonal, and that block."""
    first = panel.shape[1] - len(panel)
    return panel[:, :first], panel[:, first:]


def _factor_(panels: list[Tensor]) -> bool:
    """A ← L with A = LLᵀ, and true; false as soon as it is seen that there is none."""
    for number, panel in enumerate(panels):
        for above in panels[:number]:
            left, own = _parts(above)
            block = panel[:, left.shape[1] : above.shape[1]]
            block.addmm_(panel[:, : left.shape[1]], left.mT, alpha=-1)
            block.copy_(torch.linalg.solve_triangular(own.mT, block, upper=True, left=False))
        left, own = _parts(panel)
        factor, info = torch.linalg.cholesky_ex(own.addmm_(left, left.mT, alpha=-1))
        if info:
            return False
        own.copy_(factor)
    return True


def _solved(panels: list[Tensor], x: Tensor) -> Tensor:
    """(LLᵀ)⁻¹ x with the blocks on the diagonal of L inverted; `x`: (m, k)."""
    x = x.clone(memory_format=torch.contiguous_format)
    blocks = x.split([len(panel) for panel in panels])
    for panel, block in zip(panels, blocks, strict=True):
        left, own = _parts(panel)
        block.copy_(own @ block.addmm_(left, x[: left.shape[1]], alpha=-1))
    for panel, block in reversed(list(zip(panels, blocks, strict=True))):
        left, own = _parts(panel)
        block.copy_(own.mT @ block)
        x[: left.shape[1]].addmm_(left.mT, block, alpha=-1)
    return x
