"""The orthonormal cosine transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lipdp.constraints import is_size
from lipdp.errors import ParameterError


@dataclass(frozen=True)
class Dct:
    """Orthonormal two-dimensional discrete cosine transform (DCT-II) of each channel: `Y = D_H X D_Wᵀ`.

    `D_n[k, i] = c_k cos(π (i + ½) k / n)`, `c_0 = √(1/n)`, else `√(2/n)`, so `D Dᵀ = I` and norms are kept; the low
    frequencies alone are a projection. Lipschitz constant 1 either way.

    Attributes:
        keep: keep the `keep × keep` lowest frequencies (all where the image is smaller); None keeps all.

    >>> Dct(keep=8).output_shape((3, 32, 32))
    (3, 8, 8)
    """

    keep: int | None = None

    name: ClassVar[str] = "dct"

    def __post_init__(self) -> None:
        if self.keep is not None and not is_size(self.keep):
            raise ParameterError(f"keep={self.keep!r}: give the number of frequencies per axis, at least 1, or None")

    def version(self) -> str:
        """What computes the map: this library."""
        return "lipdp"

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int]:
        """(C, min(H, keep), min(W, keep))."""
        channels, height, width = input_shape
        return channels, min(height, self.keep or height), min(width, self.keep or width)

    def lipschitz(self, input_shape: Sequence[int]) -> float:
        """1: an orthogonal map, or a projection of it."""
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to frequencies (N, C, H', W')."""
        _, rows, columns = self.output_shape(x.shape[1:])
        left, right = (cosines(n, k).to(x) for n, k in ((x.shape[2], rows), (x.shape[3], columns)))
        return left @ x @ right.T


def cosines(size: int, rows: int) -> Tensor:
    """The first `rows` rows of the orthonormal DCT-II matrix of `size`, float64."""
    k = torch.arange(rows, dtype=torch.float64)[:, None]
    i = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * (i + 0.5) * k / size)
    matrix[0] /= math.sqrt(2)
    return matrix
