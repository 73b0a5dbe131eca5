"""Randomness from a cipher, and Gaussian noise whose low bits tell nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lipdp.noise.cipher import ChaChaSource
from lipdp.noise.gaussian import Draw, GaussianNoise, groups, normals_from_words_

_DRAWS = 4  # normals summed for one; a power of 4, so that dividing by √_DRAWS is exact
_GRID_BITS = 10
_CPU_BLOCK, _BLOCK = 1 << 14, 1 << 22  # normals at a time


class SecureGaussianNoise(GaussianNoise):
    """`GaussianNoise` for an adversary who sees every bit of every step.

    The maths: ``z = (z₁ + z₂ + z₃ + z₄)/2``, four normals of four Box–Muller pairs made of 105 ChaCha20 bits each, is
    N(0, 1). The block's sum of gradients and ``s z`` are added in float64 and rounded to the nearest multiple of
    ``g = 2^(⌊log₂ s⌋ − 10)``, between s/2048 and s/1024. Then the result is rounded to the dtype of the gradient.

    Defended:
    - *finding the generator's state from its output*: there is none; a step's words are a cipher's, under a fresh key.
    - *the low bits of a floating-point sum* (Mironov 2012), which show the lattice on which gradient and noise were
      added. What is released is a multiple of g, which depends on s alone, so on weights already public; all multiples
      in reach occur whatever the gradient. Rounding is post-processing of the sum. (The variance grows by g²/12, a
      ten-millionth.)
    - *values that the sampler cannot produce* (Holohan & Braghin 2021; Jin et al. 2022): one Box–Muller pair can be
      solved for its uniforms, so a difference that no uniforms give excludes a neighbour. Four pairs have 420 bits
      behind one value of which some 14 are shown.

    Not defended, or not proved:
    - There is no proof for finite arithmetic: before the rounding, float64 shifts the border of a cell by ``2⁻⁵³ |v|``
      for a sum of v, which changes the cell's probability by a relative ``2⁻⁴¹ |v|/s``, 1e-12 where v is of the size of
      the noise, and its tails end at 17 σ. A discrete Gaussian (Canonne, Kamath & Steinke 2020) has the proof.
    - *timing* (Jin et al. 2022): there is no rejection and no branch on a draw, but nothing promises that `log` and
      `cos` take the same time for all arguments, and the time of a step tells the size of its Poisson batch.
    - *the gradients' own rounding*: their sums over the batch are in float32; the bounds have a slack for it, not a
      proof for every order of summation.
    - *the machine*: who reads the process's memory, or the checkpoint of an unfinished run, knows the noise to come.

    Args:
        seed: reproducible noise, **not private**, for tests; None seeds from the operating system.
        device: where the tensors live.

    Raises:
        ParameterError: the package `cryptography` is not installed.

    >>> noise, gradient = SecureGaussianNoise(seed=0), torch.zeros(3)
    >>> noise.add_([gradient], torch.tensor([0.5]))
    >>> bool((gradient != 0).all()), bool((gradient * 2048 == (gradient * 2048).round()).all())
    (True, True)

    Source: Mironov (2012); Holohan & Braghin (2021), "Secure random sampling in differential privacy"; Jin et al.
    (2022), "Are we there yet? Timing and floating-point attacks on differential privacy systems".
    """

    def __init__(self, seed: int | None = None, *, device: torch.device | str = "cpu") -> None:
        super().__init__(source=ChaChaSource(seed, device=device))

    def _add(self, tensors: Sequence[Tensor], stds: Tensor, draw: Draw) -> None:
        grids = (stds / torch.frexp(stds)[0] * 2.0 ** -(1 + _GRID_BITS)).unbind()  # s = f 2^e with ½ ≤ f < 1: exact
        scales = stds.unbind()
        for index, chunk in chain.from_iterable(groups(tensors)):
            std, grid = scales[index], grids[index]
            noisy = draw(chunk.numel(), torch.float64).view(chunk.shape).mul_(std).add_(chunk)
            chunk.copy_(torch.where(std > 0, noisy.div_(grid).round_().mul_(grid), chunk))

    def normal(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(count,) fresh standard normals, made in float64."""
        drawn = torch.empty(count, dtype=torch.float64, device=self.source.device)
        for block in drawn.split(_CPU_BLOCK if drawn.is_cpu else _BLOCK):
            even = len(block) + len(block) % 2
            total = torch.zeros(even, dtype=torch.float64, device=block.device)
            for _ in range(_DRAWS):  # separate calls: never two normals of one pair in a sum
                total += normals_from_words_(self.source.words(even), dtype=torch.float64)
            torch.mul(total[: len(block)], _DRAWS**-0.5, out=block)
        return drawn.to(dtype)
