"""What a release tells of one record: the likelihood ratio of the claimed mechanism, record in over record out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lipdp.noise.banded import coefficients


def log_likelihood(along: Tensor, square: Tensor, rate: float) -> Tensor:
    """log(1 − p + p·e^{⟨v, a⟩ − ‖a‖²/2}), for v with unit noise and a record that adds a with probability p.

    Args:
        along, square: ⟨v, a⟩ and ‖a‖².
        rate: p.
    """
    exponent = along - square / 2
    if rate == 1.0:
        return exponent
    terms = torch.stack([torch.full_like(exponent, np.log1p(-rate)), exponent + np.log(rate)])
    return torch.logsumexp(terms, 0)


class Likelihood:
    """That of the uses of m records in a run, added up as the rows of v = C y come in (`Whitened`).

    A record of group g may be used in rows t = g, g + b, … A use by a is (c_0 a, …, c_{b−1} a) in rows t … t + b − 1 of
    v, under one coin, and no other use of that record is there. With one band this is one step, c_0 = 1.

    Args:
        groups: (m,) of the records, from 0; known to the adversary, for the account holds for every dealing.
        bands: b.
        rate: p of a use: b q.
    """

    def __init__(self, groups: Tensor, bands: int, rate: float) -> None:
        self.groups, self.rate, self._row = groups.long(), rate, 0
        self._c = torch.tensor(coefficients(bands), dtype=torch.float64)
        self._along, self._square, self._total = torch.zeros(3, len(groups), dtype=torch.float64)

    @property
    def begins(self) -> Tensor:
        """(m,) bool: whose use begins in the coming row."""
        return (self._row - self.groups) % len(self._c) == 0

    @property
    def weights(self) -> Tensor:
        """(m,): c_j in the coming row for the last use, begun j rows before; 0 before the first one."""
        return self._c[(self._row - self.groups) % len(self._c)] * (self.groups <= self._row)

    def add(self, along: Tensor, square: Tensor) -> None:
        """Take in row v: (m,) ⟨v, a⟩ and ‖a‖² of the last use of every record."""
        begins, weights = self.begins, self.weights
        self._total = torch.where(begins, self.total, self._total)
        self._along = torch.where(begins, 0.0, self._along) + weights * along
        self._square = torch.where(begins, 0.0, self._square) + weights.square() * square
        self._row += 1

    @property
    def total(self) -> Tensor:
        """(m,) of all uses so far."""
        return self._total + log_likelihood(self._along, self._square, self.rate)
