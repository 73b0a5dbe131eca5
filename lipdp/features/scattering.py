"""The fixed scattering transform of kymatio, with a certified Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.errors import ParameterError

Indices = npt.NDArray[np.int64]
Filter = tuple[float, npt.NDArray[np.floating[Any]], int]
"""(weight, frequency response on the grid, subsampling of the output along each axis)"""


def _kymatio() -> tuple[Any, Any]:
    """kymatio's 2-D torch transform and filter bank; its package root would pull in a 3-D module that scipy broke."""
    from kymatio.scattering2d.filter_bank import filter_bank
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

    return ScatteringTorch2D, filter_bank


@lru_cache(maxsize=8)
def _transform(scattering: Scattering, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Any:
    transform, _ = _kymatio()
    built = transform(J=scattering.J, shape=(height, width), L=scattering.L, max_order=scattering.order)
    return built.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Scattering:
    """Scattering coefficients `|…|x ⋆ ψ₁| ⋆ ψ₂| ⋆ φ`, sampled every 2^J pixels: fixed wavelets, nothing learnt.

    Guarantee: non-expansive, `‖Sx − Sx'‖ ≤ lipschitz · ‖x − x'‖` with the certified constant `lipschitz`.

    Attributes:
        J: log2 of the largest scale.
        L: number of angles.
        order: wavelet layers, 1 or 2.

    Source: Bruna and Mallat, Invariant scattering convolution networks, 2013; Andreux et al., Kymatio, 2020.
    """

    J: int = 2
    L: int = 8
    order: int = 2

    name: ClassVar[str] = "scattering"

    def __post_init__(self) -> None:
        if not (1 <= self.J <= 5 and 1 <= self.L <= 32 and self.order in (1, 2)):
            raise ParameterError(
                f"J={self.J}, L={self.L}, order={self.order}: give J in 1..5, L in 1..32, order 1 or 2"
            )

    def version(self) -> str:
        """What computes the map, so that cached features of another kymatio are not used."""
        return f"kymatio {metadata.version('kymatio')}"

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int]:
        """`(C·K, ⌊H/2^J⌋, ⌊W/2^J⌋)` with `K = 1 + JL + [order 2] J(J−1)L²/2` paths per channel."""
        channels, height, width = input_shape
        if min(height, width) < 2**self.J:
            raise ParameterError(f"images of {height} × {width} are smaller than 2^J = {2**self.J}; give a smaller J")
        paths = 1 + self.J * self.L + (self.order == 2) * self.J * (self.J - 1) // 2 * self.L**2
        return channels * paths, height // 2**self.J, width // 2**self.J

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to coefficients (N, C·K, H/2^J, W/2^J), channel by channel."""
        shape = self.output_shape(x.shape[1:])
        transform = _transform(self, x.shape[2], x.shape[3], x.dtype, x.device)
        coefficients: Tensor = transform(x.contiguous())
        return coefficients.reshape(len(x), *shape)

    def lipschitz(self, input_shape: Sequence[int]) -> float:
        """Certified constant: exact bounds of the linear layers, on the very filters in use, from last to first.

        For filters `h_i`, subsamplings `k_i`, weights `w_i`, let `β` be the least number such that
        `Σ w_i ‖↓k_i (h_i ⋆ u)‖² ≤ β ‖u‖²` for all u. Here `β` is `frame_bound`. Moduli, real parts and crops are
        1-Lipschitz, so with Δ the difference between two inputs,

            β₂(j) = β of φ at scale j;    β₁(n) = β of φ, and of the ψ_m above ψ_n with weights β₂(j_m);
            β₀ = β of φ, and of the ψ_n with weights β₁(n), on reflectively padded images (`padded_bound`)

        bound the squared gain of order 2, of the paths through ψ_n, and of the whole: `‖ΔSx‖² ≤ β₀ ‖Δx‖²`. For images
        of more than 1024 pixels β₀ is replaced by its value without padding times the largest number of times the
        padding repeats a pixel, which is about twice as large.

        Channels do not interact, so their number plays no part. 0.49 at 28 × 28 with the defaults. Rounding in the
        transform itself (relative 1e-6 in float32) is not included.
        """
        self.output_shape(input_shape)
        return _lipschitz(self, *input_shape[1:])


@lru_cache(maxsize=32)
def _lipschitz(scattering: Scattering, height: int, width: int) -> float:
    scales, coarsest = scattering.J, 2**scattering.J
    padded = [((side + coarsest) // coarsest + 1) * coarsest for side in (height, width)]
    bank = _kymatio()[1](*padded, scales, scattering.L)
    phi, psi = bank["phi"]["levels"], bank["psi"]
    last = [frame_bound([(1.0, phi[j], 2 ** (scales - j))]) for j in range(scales)]
    low_pass: Filter = (1.0, phi[0], coarsest)
    wavelets: list[Filter] = []
    for wavelet in psi:
        j = wavelet["j"]
        above: list[Filter] = [
            (last[w["j"]], w["levels"][j], 2 ** (w["j"] - j)) for w in psi if w["j"] > j and scattering.order == 2
        ]
        path = frame_bound([(1.0, phi[j], 2 ** (scales - j)), *above])
        wavelets.append((path, wavelet["levels"][0], 2**j))
    places = [_padding(side, total) for side, total in zip((height, width), padded, strict=True)]
    if height * width <= 1024:
        return math.sqrt(padded_bound(low_pass, wavelets, *places))
    return math.sqrt(frame_bound([low_pass, *wavelets]) * math.prod(int(np.bincount(place).max()) for place in places))


def _padding(side: int, padded: int) -> Indices:
    """The pixels that kymatio's reflective padding of `side` pixels to `padded` reads, in order."""
    before = (padded - side) // 2
    return np.pad(np.arange(side), (before, padded - side - before), mode="reflect")


def padded_bound(low_pass: Filter, wavelets: Sequence[Filter], rows: Indices, columns: Indices) -> float:
    """The least β as in `frame_bound`, for real images whose padding reads the pixels `rows` × `columns` of them.

    Of the low-pass output, as in kymatio, the outermost samples are cropped. The form is built on the pixels one by
    one, and its largest eigenvalue taken.
    """
    height, width = rows.max() + 1, columns.max() + 1
    pixels = np.eye(height * width).reshape(-1, height, width)
    spectra = np.fft.fft2(pixels[:, rows][:, :, columns])

    def form(weight: float, response: npt.NDArray[np.floating[Any]], k: int, crop: slice) -> npt.NDArray[np.float64]:
        outputs = np.fft.ifft2(spectra * response)[:, ::k, ::k][:, crop, crop].reshape(height * width, -1)
        return weight * (outputs.real @ outputs.real.T + outputs.imag @ outputs.imag.T)

    total = form(*low_pass, slice(1, -1))
    unsubsampled = sum((w * response.astype(np.float64) ** 2 for w, response, k in wavelets if k == 1), np.zeros(1))
    total += form(1.0, np.sqrt(unsubsampled), 1, slice(None))  # those without ↓ together: only |h|² counts
    for weight, response, k in (wavelet for wavelet in wavelets if wavelet[2] > 1):
        total += form(weight, response, k, slice(None))
    return float(np.linalg.eigvalsh(total)[-1])


def frame_bound(filters: Sequence[Filter]) -> float:
    """The least β with `Σ w ‖↓k (h ⋆ u)‖² ≤ β ‖u‖²` for all u on the periodic grid, for weights w and subsamplings k.

    In frequency, ↓k averages the k² frequencies that alias, those that differ by a multiple of side/k on either axis,
    on a grid with k² times fewer points: `‖↓k (h ⋆ u)‖² = (1/k²) Σ |Σ_alias ĥ û|² / MN` where `‖u‖² = Σ |û|² / MN`.
    The form splits into blocks over the frequencies that alias at the largest k (each k divides it); β is the largest
    eigenvalue of any block.
    """
    largest = max(k for _, _, k in filters)
    rows, columns = (side // largest for side in filters[0][1].shape)
    index = np.arange(largest)
    form = np.zeros((rows, columns, largest**2, largest**2))
    for weight, response, k in filters:
        grid = response.astype(np.float64).reshape(largest, rows, largest, columns)
        block = grid.transpose(1, 3, 0, 2).reshape(rows, columns, largest**2)
        alias = (index[:, None] - index[None, :]) % (largest // k) == 0
        form += weight / k**2 * np.kron(alias, alias) * block[..., :, None] * block[..., None, :]
    return float(np.linalg.eigvalsh(form).max())
