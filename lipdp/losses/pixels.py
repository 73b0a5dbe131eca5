"""A loss of labels at every position of a sample: segmentation, sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipdp.constraints import check_size
from lipdp.errors import LossError
from lipdp.losses.base import LipschitzLoss, OfLabels


class PerPixel(LipschitzLoss):
    """(1/P) Σ_p ℓ(z_p, y_p) over the P positions of a sample; constant L/√P for ℓ of constant L.

    The gradient has P blocks of norm at most L/P. Positions whose label ℓ ignores count in P, which is public.

    Args:
        loss: ℓ, of class labels.
        positions: P; the constant holds for exactly so many.
    Shapes:
        logits (N, C, *positions), target (N, *positions) of whole numbers.

    >>> lipdp.losses.PerPixel(lipdp.losses.TauCrossEntropy(), 64).lipschitz == 2 ** 0.5 / 8
    True
    """

    def __init__(self, loss: OfLabels, positions: int) -> None:
        super().__init__()
        if not isinstance(loss, OfLabels):
            raise LossError(f"PerPixel takes a loss of class labels, got {type(loss).__name__}")
        check_size("positions", positions)
        self.loss, self.positions = loss, int(positions)
        self.lipschitz = loss.lipschitz / math.sqrt(self.positions)

    def knows(self, logits: Tensor, target: Tensor) -> Tensor:
        """Samples all of whose labels ℓ knows."""
        if not self._fits(logits, target):
            return torch.ones(len(target), dtype=torch.bool, device=target.device)  # for `forward` to refuse
        return self.loss.knows(*self._rows(logits, target)).reshape(len(target), -1).all(1)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if not self._fits(logits, target):
            given = [", ".join(["N", *map(str, t.shape[1:])]) for t in (logits, target)]
            raise LossError(
                f"PerPixel takes logits (N, C, …) and whole numbers (N, …) as labels of {self.positions} positions, got"
                f" ({given[0]}) and ({given[1]}) {target.dtype}"
            )
        values: Tensor = self.loss(*self._rows(logits, target))
        return values.reshape(len(target), self.positions).mean(1)

    def _fits(self, logits: Tensor, target: Tensor) -> bool:
        same = logits.dim() > 2 and logits.shape[2:] == target.shape[1:] and not target.is_floating_point()
        return same and math.prod(target.shape[1:]) == self.positions

    def _rows(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits.movedim(1, -1).reshape(-1, logits.shape[1]), target.reshape(-1)

    def extra_repr(self) -> str:
        return f"positions={self.positions}"
