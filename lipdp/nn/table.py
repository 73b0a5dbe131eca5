"""Features of a table's columns: a piecewise linear map of each, then random Fourier features of unit norm."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from lipdp.constraints import check_positive, is_size
from lipdp.errors import ParameterError
from lipdp.nn.gates import ValueClip

BINS = 128
"""Intervals of equal width that a column's range is cut in."""

_CONSTANT, _WAVES = 0.3, 0.8
NORM_FLOOR = 0.8
"""Below the norm of all features, which is at least √(0.3² + 0.8²) = 0.854."""


class TableFeatures(nn.Module):
    r"""k columns to 1 + k + 2m numbers: φ(x) = (0.3, u/√(3k), 0.8 (cos Wᵀu, sin Wᵀu)/√m), u_j = f_j(x_j).

    f_j is continuous and linear on each of 128 intervals of equal width of [−limit, limit]; what lies outside counts as
    the nearer end, NaN as 0. It is kept in buffers, so that a fitted map is saved and loaded with the weights. Nothing
    here is trained.

    The maths: with U ≥ |f_j|, ‖φ‖² = 0.3² + ‖u‖²/(3k) + 0.8² lies in [0.73, 0.73 + U²/3]. As sin² + cos² = 1, the
    derivative J of φ in u has JᵀJ = I/(3k) + (0.8²/m) W Wᵀ for every u, so ‖J‖² = 1/(3k) + (0.8²/m) ‖W‖₂² exactly, and
    φ is ‖J‖ max|f'|-Lipschitz in x.

    Args:
        columns: k.
        waves: m, an even number. Half the frequencies are N(0, 4/k) on all columns, half N(0, 9/s) on s = 1 or 2.
        limit: of the inputs' range.
        seed: of the frequencies, which are public.
    Shapes:
        input (N, k), output (N, 1 + k + 2m).

    >>> TableFeatures(3)(torch.zeros(2, 3)).shape
    torch.Size([2, 404])

    Source: Rahimi & Recht (2007), "Random features for large-scale kernel machines".
    """

    limit: Tensor
    values: Tensor
    frequencies: Tensor

    def __init__(self, columns: int, *, waves: int = 200, limit: float = 6.0, seed: int = 0) -> None:
        super().__init__()
        if not (is_size(columns) and is_size(waves) and waves % 2 == 0):
            raise ParameterError(
                f"columns={columns!r}, waves={waves!r}: whole numbers are needed, an even one of waves"
            )
        self.columns, self.waves = columns, waves
        self.register_buffer("limit", torch.tensor(check_positive("limit", limit)))
        self.register_buffer("values", torch.empty(columns, BINS + 1))
        self.register_buffer("frequencies", _frequencies(columns, waves, seed))
        self.set_(limit, self.edges().expand(columns, -1))  # f(x) = x

    @property
    def out_features(self) -> int:
        """1 + k + 2m."""
        return 1 + self.columns + 2 * self.waves

    @torch.no_grad()
    def set_(self, limit: float, values: Tensor) -> None:
        """Take a range and the f_j: (k, 129), their values at the ends of the intervals, finite.

        Raises:
            ParameterError: not such values.
        """
        if values.shape != self.values.shape or not bool(values.isfinite().all()):
            raise ParameterError(
                f"values of shape {tuple(values.shape)}: finite ones {tuple(self.values.shape)} are needed"
            )
        self.limit.fill_(check_positive("limit", limit))
        self.values.copy_(values)

    def edges(self) -> Tensor:
        """(129,) float64, the ends of the intervals."""
        return torch.linspace(-1, 1, BINS + 1, dtype=torch.float64, device=self.values.device) * self.limit.double()

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of every entry, the interval it lies in (0 … 127) and how far from the interval's lower end (0 … 1)."""
        inside = torch.nan_to_num(x, nan=0.0, posinf=math.inf, neginf=-math.inf) / self.limit
        at = (inside.clamp(-1, 1) + 1) * (BINS / 2)
        index = at.detach().floor().clamp(max=BINS - 1)
        return index.long(), at - index

    def forward(self, input: Tensor) -> Tensor:
        index, share = self.place(input)
        flat = index + torch.arange(self.columns, device=index.device) * (BINS + 1)
        table = self.values.flatten()
        low = table[flat]
        u = low + share * (table[flat + 1] - low)
        waves = u @ self.frequencies
        scale = _WAVES / math.sqrt(self.waves)
        constant = torch.full_like(u[:, :1], _CONSTANT)
        return torch.cat((constant, u / math.sqrt(3 * self.columns), waves.cos() * scale, waves.sin() * scale), dim=1)

    @torch.no_grad()
    def value_bound(self) -> Tensor:
        """() float64, at least ‖φ(x)‖ for every x."""
        largest = self.values.double().abs().amax()
        return (_CONSTANT**2 + _WAVES**2 + largest.square() / 3).sqrt()

    @torch.no_grad()
    def lipschitz(self) -> Tensor:
        """() float64, a Lipschitz constant of φ."""
        slope = self.values.double().diff(dim=1).abs().amax() * (BINS / 2) / self.limit.double()
        spread = torch.linalg.matrix_norm(self.frequencies.double(), 2) * (1 + 1e-9)
        return slope * (1 / (3 * self.columns) + _WAVES**2 / self.waves * spread.square()).sqrt()

    def extra_repr(self) -> str:
        return f"columns={self.columns}, waves={self.waves}"


def unit_norm() -> ValueClip:
    """Scales every row of features to norm 1: all of them lie outside the ball that is projected on."""
    return ValueClip(NORM_FLOOR, radius=1.0)


def _frequencies(columns: int, waves: int, seed: int) -> Tensor:
    """(k, m)."""
    generator = np.random.default_rng(seed)
    half = waves // 2
    dense = generator.standard_normal((columns, half)) * (2 / math.sqrt(columns))
    sparse = np.zeros((columns, half))
    for wave in range(half):
        chosen = generator.choice(columns, size=min(columns, 1 + wave % 2), replace=False)
        sparse[chosen, wave] = generator.standard_normal(len(chosen)) * (3 / math.sqrt(len(chosen)))
    return torch.from_numpy(np.concatenate((dense, sparse), axis=1)).float()
