r"""Gaussian noise that is correlated over b steps, so that much of it cancels in the sum of the steps.

**Mechanism.** Step t sums S_t = Σ_i ∇ℓ_i over its batch and has public s_t (D,) with ‖∇ℓ_i / s_t‖ ≤ 1/σ for every unit
i (record or owner), parameter by parameter: the allocation's Σ_l Δ_l²/s_l² = 1/σ². Released is S_t + s_t w_t, with
w = C⁻¹z, z_t ~ N(0, I) fresh, C lower triangular and Toeplitz: C_{t,t−j} = c_j for 0 ≤ j < b, else 0, and Σ c_j² = 1.
So w_t = (z_t − c_1 w_{t−1} − … − c_{b−1} w_{t−b+1}) / c_0.

**Claim.** If every unit is dealt to one of b groups, independently of data and of all other units, and batch t takes
each unit of group t mod b with probability p = b q, by a coin of its own, and no other unit, then any T consecutive
steps are, under *add or remove one*, at most ⌈T/b⌉ adaptive compositions of the Gaussian mechanism of noise multiplier
σ on Poisson subsamples of rate p.

**Proof.** Let x_t = S_t / s_t, which s_t and the weights make of the history alone, and fix the dealing, the same for
both neighbours. The weights, hence Δ_t, s_t and x_t, are functions of y_1 … y_{t−1}, where y_t = x_t + w_t is what is
released but for the public factor. C is invertible and triangular, so (y_1 … y_t) and (v_1 … v_t), v = C y = C x + z,
tell the same, step by step. Let the unit in question be of the group that steps at t_1 < t_2 = t_1 + b < … Between
t_k and t_{k+1} − 1 its part in v is B_k (c_0 u, …, c_{b−1} u), with one coin B_k and u = ∇ℓ/s at t_k: its other
parts, b steps away, are out of the reach of C. u depends on what was before t_k; what others add to v_t depends on
v_1 … v_{t−1} and on their own coins. Given those coins and all before t_k, subtracting it is a bijection of v_{t_k} …
v_{t_{k+1}−1}, the same with and without the unit, and leaves B_k (c_0 u, …, c_{b−1} u) + z: one Gaussian mechanism of
length ‖c‖ ‖u‖ ≤ 1/σ that is there with probability p. That holds for every value of the others' coins, so for their
mixture (the hockey-stick divergence is convex), and adaptively for k = 1, 2, …; T consecutive steps meet at most
⌈T/b⌉ of them. The first t_1 − 1 do not hold the unit at all. It holds for every dealing, so for their mixture. ∎

**What it needs**, where it is seen to. *Rows and batches in step*: row t of C belongs to batch t, whether batches were
given up or not. `add_` is told the batch and refuses any but the next; `skip_` draws the rows of batches given up (that
is releasing y_t and not showing it), and the account counts them. *The same dealing at every resume*: it is in the
sampler's state, and so is a digest of some records, since another order of the data would be another dealing. *The same
parameters at every step*. *One continuation of a checkpoint*, as for any noise. *No second run in one account*: ⌈·⌉ of
the sum is less than the sum of ⌈·⌉. Steps that lost their checkpoint can't be taken again: their noise would follow the
same w.

**C** is the square root of the matrix of prefix sums, c_j ∝ binom(2j, j) 4^{−j}, cut to b bands. A C with the least
error of prefix sums at T steps is better by 4 to 12 % (b = 2 … 16, T = 200, 1000; measured), but has to know T and a
workload, and its w_t are 2 to 7 times as large as z_t. These are 1.3 to 1.6 times; c falls, so zeros of Σ c_j x^j lie
outside the unit circle (Eneström–Kakeya) and rounding errors in w die out. The banded *inverse* square root has no
such account: its C is full.

**Secrecy.** w_{t−1} … w_{t−b+1} are needed for the next step. Whoever has them can subtract the noise of those b − 1
steps, which a `Ratchet` alone would forget. They are in the state until the last batch, then no more.

Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", theorem 4 (amplification); Denisov et
al. (2022), theorem 2.1 (adaptive inputs); Kalinin & Lampert (2024), "Banded square root matrix factorization"; Kalinin,
McKenna, Upadhyay & Lampert (2025), "Back to square roots", for the inverse.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipdp.errors import CheckpointError, EngineError
from lipdp.noise.gaussian import DRAW, GaussianNoise


def coefficients(bands: int) -> tuple[float, ...]:
    """c_0 > c_1 > … > c_{b−1} > 0 with Σ c_j² = 1; rounded so that the sum is at most 1.

    >>> [round(c, 4) for c in coefficients(2)]
    [0.8944, 0.4472]
    """
    roots = [1.0]
    for j in range(1, bands):
        roots.append(roots[-1] * (2 * j - 1) / (2 * j))
    norm = math.hypot(*roots) * (1.0 if bands == 1 else 1.0 + 1e-12)
    return tuple(root / norm for root in roots)


def accumulation(bands: int) -> float:
    """The noise that many steps add up to, over that of as many independent draws: 1/Σ c_j, as C⁻¹ makes it.

    >>> round(accumulation(2), 4), accumulation(1)
    (0.7454, 1.0)
    """
    return 1.0 / sum(coefficients(bands))


class Whitened:
    """v = C y, row by row: in it the noise is z again, for rows y = x + w of what was released, divided by s_t.

    >>> whitened = Whitened(coefficients(2))
    >>> [round(float(whitened(torch.tensor(row))), 4) for row in (1.0, 0.0, 0.0)]
    [0.8944, 0.4472, 0.0]
    """

    def __init__(self, coefficients: Sequence[float]) -> None:
        self._coefficients, self._recent = coefficients, deque[Tensor](maxlen=len(coefficients))

    def __call__(self, row: Tensor) -> Tensor:
        """Row t of v, from row t of y."""
        self._recent.appendleft(row)
        terms = zip(self._coefficients, self._recent, strict=False)
        return sum((c * past for c, past in terms), torch.zeros_like(row))


class BandedNoise:
    """Adds s_t w_t, w = C⁻¹z, to the sums of step t = 1, 2, …: see the module for what that is and why it is private.

    Args:
        noise: of which the z_t are drawn.
        bands: b ≥ 2.

    Attributes:
        row: the t of the last step; 0 before the first.

    >>> noise, total = BandedNoise(GaussianNoise(seed=0), 4), torch.zeros(3)
    >>> for row in range(1, 101):
    ...     noise.add_([total], torch.ones(1), row=row)
    >>> bool(total.norm() < 3 * math.sqrt(100)), noise.row  # as much as 100 independent draws: 17
    (True, 100)
    """

    def __init__(self, noise: GaussianNoise, bands: int) -> None:
        self.noise, self.coefficients, self.row = noise, coefficients(bands), 0
        self._recent: Tensor | None = None  # (b − 1, d), w_s in row s mod (b − 1)
        self._done = self._size = 0  # of the entries of a row
        self._loaded = ""

    def add_(self, tensors: Sequence[Tensor], stds: Tensor, *, row: int) -> None:
        """Row t of s w to the tensors, in place.

        Args:
            tensors, stds: as for `GaussianNoise.add_`; the tensors of the same sizes in all rows.
            row: t; one more than the last.
        """
        if self.row and row != self.row + 1:
            raise EngineError(
                f"step {row} follows step {self.row}: the batch between them was neither used nor skipped"
                " (engine.skip_batch)"
            )
        self._begin(row, sum(t.numel() for t in tensors))
        self.noise.add_(tensors, stds, draw=self._draw)
        self._end(row)

    def skip_(self, row: int) -> None:
        """Draw the rows up to t without using them, those before the first step excepted."""
        while self._recent is not None and self.row < row:
            self._begin(self.row + 1, self._size)
            for start in range(0, self._size, DRAW):
                self._draw(min(DRAW, self._size - start), self._recent.dtype)
            self._end(self.row + 1)

    def _begin(self, row: int, size: int) -> None:
        if self._done:
            raise EngineError(
                "the last step was interrupted while its noise was drawn, and later noise depends on it: go on from the"
                " last checkpoint, in a new engine"
            )
        if self._recent is not None and size != self._size:
            raise EngineError(
                f"the correlated noise so far is for {self._size} weights, this step trains {size}: train the same"
                " weights at every step"
            )
        self.row, self._size = row - 1, size

    def _end(self, row: int) -> None:
        self.row, self._done = row, 0

    def _draw(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next `count` entries of w_t, t = row + 1."""
        start, self._done = self._done, self._done + count
        drawn = self.noise.normal(count, dtype)
        first, *others = self.coefficients
        if self._recent is None:
            self._recent = torch.zeros(len(others), self._size, dtype=dtype, device=drawn.device)
        recent = self._recent[:, start : self._done]
        row = self.row + 1
        for lag, c in enumerate(others, start=1):
            drawn.sub_(recent[(row - lag) % len(others)], alpha=c)
        recent[row % len(others)] = drawn.div_(first)
        return drawn

    @property
    def mark(self) -> list[Any]:
        """What tells whether two processes are at the same row of the same noise."""
        return [self.row, self._loaded]

    def state_dict(self, *, over: bool = False) -> dict[str, Any]:
        """The row and, unless no batch is to come, w_{t−1} … as text. As secret as the data: see the module."""
        self._begin(self.row + 1, self._size)  # refuses where a row was interrupted
        if over or self._recent is None:
            return {"row": self.row, "dtype": "", "recent": ""}
        raw = self._recent.cpu().numpy().tobytes()
        return {
            "row": self.row,
            "dtype": str(self._recent.dtype).removeprefix("torch."),
            "recent": base64.b64encode(raw).decode(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit. Raises CheckpointError for what is no state."""
        try:
            row, raw = int(state["row"]), base64.b64decode(state["recent"], validate=True)
            recent = None
            if raw:
                flat = np.frombuffer(raw, np.dtype(state["dtype"]))
                recent = torch.from_numpy(flat.reshape(len(self.coefficients) - 1, -1).copy())
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not the state of correlated noise: {error!r}") from error
        self.row, self._done, self._size = row, 0, 0 if recent is None else recent.shape[1]
        self._recent = None if recent is None else recent.to(self.noise.source.device)
        self._loaded = hashlib.blake2b(raw, digest_size=16).hexdigest()
