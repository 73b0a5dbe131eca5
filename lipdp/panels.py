r"""Norms and polar factors of one large matrix on a CPU, piece by piece: no second matrix of its size is made.

A matrix W is (m, n) with m ≤ n here; what is symmetric, such as W Wᵀ, is held as panels: rows [i, i + b) of its lower
triangle, columns [0, i + b), half of m² numbers altogether.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

LARGE = 1 << 20
"""Entries of a matrix from which on it is taken in pieces."""

_PIECE = 1 << 20  # entries of a piece
_NEAR = 2e-3  # ‖I − WWᵀ/c²‖_F up to which the bound from it, loose by half of it, is taken
_STEPS = 40  # Björck steps at most: each lifts a small singular value by 1.5


def is_large(matrix: Tensor) -> bool:
    """Whether matrices of this stack are taken in pieces: on a CPU, where reading a number waits for nothing."""
    return not matrix.is_cuda and matrix.shape[-1] * matrix.shape[-2] >= LARGE


def each(matrix: Tensor) -> list[Tensor]:
    """Views of the matrices of a stack, each with at least as many columns as rows."""
    view = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    return [view[index] for index in itertools.product(*map(range, matrix.shape[:-2]))]


def largest_entry(w: Tensor) -> float:
    """In absolute value; 1 for zeros, NaN or infinite where an entry is."""
    largest = float(torch.linalg.vector_norm(w, ord=math.inf))
    return largest if largest != 0 else 1.0


def gram(w: Tensor, scale: float) -> Tensor:
    """(W/scale)(W/scale)ᵀ in float64, (m, m)."""
    found = torch.zeros(len(w), len(w), dtype=torch.float64, device=w.device)
    for columns in w.split(max(1, _PIECE // len(w)), dim=1):
        piece = columns.to(torch.float64, copy=True).div_(scale)
        found.addmm_(piece, piece.mT)
    return found


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


def multiply_(transform: Tensor, w: Tensor) -> None:
    """W ← T W with a product in float64, some columns at a time; `transform`: (m, m)."""
    for columns in w.split(max(1, _PIECE // len(w)), dim=1):
        columns.copy_(transform @ columns.double())


def shrink_(w: Tensor, norm: float, radius: float) -> None:
    """Bring ‖W‖₂ from `norm` at most to the radius at most, rounding to float32 or float64 included."""
    if not norm <= radius:  # rounding moves W by u √m ‖W‖₂ at most, too much to make up for in less than float32
        eps = torch.finfo(w.dtype).eps if w.dtype.itemsize >= 4 else 0.0
        w.mul_(radius / (norm * (1 + eps * math.sqrt(len(w)))))


def polar_(w: Tensor) -> None:
    """W ← (WWᵀ)^(-1/2) W in place, by Björck steps in the dtype of W, float32 at least; memory: half of m² numbers.

    Singular values below 1e-5 of the largest may stay below 1. The norm is 1 up to rounding.
    """
    exact = w if w.dtype.itemsize >= 4 else w.float()
    largest = largest_entry(exact)
    if not 1e-3 < largest < 1e3:
        exact.div_(largest)
    for step in range(_STEPS):
        panels = _gram_panels(exact)
        if step == 0 and not 0.5 < (norm := math.sqrt(_largest_eigenvalue(panels, len(w)))) < 1.5:
            exact.mul_(1.2 / norm)  # a step converges below √3
            panels = [panel.mul_((1.2 / norm) ** 2) for panel in panels]
        apart = _distance(panels)
        for panel in panels:
            panel.mul_(-0.5).diagonal(panel.shape[1] - len(panel)).add_(1.5)
        _apply_(panels, exact)
        if not apart > math.sqrt(torch.finfo(exact.dtype).eps):  # what is left is ¾ of its square; NaN stays NaN
            break
    if exact is not w:
        w.copy_(exact)


def _gram_panels(w: Tensor) -> list[Tensor]:
    rows = max(128, -(-len(w) // 16))
    return [w[i : i + rows] @ w[: i + rows].mT for i in range(0, len(w), rows)]


def _distance(panels: list[Tensor]) -> float:
    """‖I − G‖_F."""
    square = 0.0
    for panel in panels:
        rows, columns = panel.shape
        own = panel[:, columns - rows :]
        square += 2 * float(torch.linalg.vector_norm(panel[:, : columns - rows])) ** 2
        square += float(torch.linalg.matrix_norm(own - torch.eye(rows, dtype=own.dtype))) ** 2
    return math.sqrt(square)


def _times(panels: list[Tensor], x: Tensor) -> Tensor:
    """S x for the symmetric S of the panels; `x`: (m, k)."""
    out = torch.zeros_like(x)
    for panel in panels:
        rows, columns = panel.shape
        first = columns - rows
        out[first:columns].addmm_(panel, x[:columns])
        out[:first].addmm_(panel[:, :first].mT, x[first:columns])
    return out


def _apply_(panels: list[Tensor], w: Tensor) -> None:
    """W ← S W, some columns at a time."""
    for columns in w.split(max(1, _PIECE // len(w)), dim=1):
        columns.copy_(_times(panels, columns.contiguous()))


def _largest_eigenvalue(panels: list[Tensor], size: int) -> float:
    """By power iteration, from below and within a few per cent: good enough to choose a scale, and for nothing else."""
    x, found = torch.ones(size, 4, dtype=panels[0].dtype), 1.0
    x[1::2, 1], x[::3, 2], x[::5, 3] = -1.0, -1.0, -1.0
    for _ in range(20):
        x = _times(panels, x)
        found = float(torch.linalg.vector_norm(x, dim=0).max())
        if not 0 < found < math.inf:
            return 1.0
        x = x / torch.linalg.vector_norm(x, dim=0).clamp_min(1e-30)
    return found
