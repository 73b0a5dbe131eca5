"""Blocks of features: what is computed of an image before it is whitened, with filters from synthetic images alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lipdp.features.scattering import Scattering
from lipdp.features.synthetic import Draws

_PATCHES_OF_EACH = 8
_CONTRAST = 10.0
"""Added to the variance of a patch of pixels in 0..255."""

Arrays = Mapping[str, Tensor]


@dataclass(frozen=True)
class ScatteringBlock:
    """Scattering (J = 2, L = 8, order 2) of opponent channels, averaged over positions, half of it where flips count.

    The opponent channels are `(R + G + B)/3`, `.7 (R − G)` and `.7 (B − (R + G)/2)`. The mirror image turns the angle
    l into (6 − l) mod 8 and reverses the columns; with `flips` the sum over both is kept, `(z + z')/√2`, once for each
    pair. The transform is sampled every 4 pixels from pixel 0 on, hence off the axis of symmetry: with `flips` images
    are padded, so that it is sampled from pixel 2 on and a flip changes it little (the axis lies half a pixel away).

    Attributes:
        grid: positions per axis that are kept, at most as many as there are.
        flips: whether an image and its mirror image count as one.
    """

    grid: int
    flips: bool

    def fit(self, synthetic: Tensor, seed: int) -> dict[str, Tensor]:
        """What it keeps of the synthetic images: nothing, wavelets are fixed."""
        return {}

    def __call__(self, x: Tensor, fitted: Arrays) -> Tensor:
        """(n, C, H, W) to (n, C · 81 · grid²), or about half of that."""
        scattering = Scattering()
        x = opponent(x)
        z = scattering(F.pad(x, (2,) * 4, mode="reflect"))[:, :, 1:, 1:] if self.flips else scattering(x)
        if max(z.shape[2:]) > self.grid:
            z = F.adaptive_avg_pool2d(z, (min(z.shape[2], self.grid), min(z.shape[3], self.grid)))
        if not self.flips:
            return z.flatten(1)
        paths = z.shape[1] // x.shape[1]
        swap = torch.cat([mirrored_paths(scattering) + paths * channel for channel in range(x.shape[1])]).to(x.device)
        mirrored = z[:, swap].flip(3).flatten(1)
        places = torch.arange(mirrored.shape[1], device=x.device).reshape(z.shape[1:])
        partner = places[swap].flip(2).flatten()
        first = places.flatten() <= partner
        return ((z.flatten(1) + mirrored)[:, first]) / math.sqrt(2)


def opponent(x: Tensor) -> Tensor:
    """Luminance and two scaled opponent channels; grey images as they are.

    >>> opponent(torch.ones(1, 3, 1, 1)).flatten().tolist()
    [1.0, 0.0, 0.0]
    """
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return torch.stack(((red + green + blue) / 3, 0.7 * (red - green), 0.7 * (blue - (red + green) / 2)), 1)


def mirrored_paths(scattering: Scattering) -> Tensor:
    """For each path of kymatio's order, that of the mirror image: l ↦ (L − 2 − l) mod L for every angle."""
    scales, angles = range(scattering.J), range(scattering.L)
    first: list[tuple[int, ...]] = [(j, a) for j in scales for a in angles]
    second = [(j, a, k, b) for j in scales for a in angles for k in scales if k > j for b in angles]
    paths = [(), *first, *(second if scattering.order == 2 else [])]
    turned = [tuple(v if i % 2 == 0 else (scattering.L - 2 - v) % scattering.L for i, v in enumerate(p)) for p in paths]
    return torch.tensor([paths.index(path) for path in turned])


@dataclass(frozen=True)
class PatchBlock:
    """One layer of filters that are whitened synthetic patches.

    The image is averaged by `down`; each `patch × patch` window, every `stride` pixels, is brought to mean 0 and
    divided by √(var + 10) (pixels in 0..255). ZCA with the patches' covariance (of both directions, where flips count)
    plus 0.1 of its mean eigenvalue, then `filters` unit vectors: whitened patches, of those whose norm lies above half
    the median. With responses z of deviation s, relu(±z − s/2) is averaged over a grid. With `flips` each filter has
    its mirror image, and what the mirror image of the picture gives is added, so that flips change nothing where the
    stride divides (side − patch).

    Source: Coates & Ng (2012), Learning feature representations with K-means; (2011), The importance of encoding
    versus training with sparse coding and vector quantization.
    """

    down: int
    patch: int
    stride: int
    filters: int
    grid: int
    flips: bool

    def fit(self, synthetic: Tensor, seed: int) -> dict[str, Tensor]:
        """Filters (K, C, p, p), mirrored ones included, and half the deviation of each response (K,)."""
        draws = Draws(seed)
        patches = self._patches(draws, synthetic)
        mirrored = patches.flip(3) if self.flips else patches
        both = torch.cat((patches, mirrored)).flatten(1).double()
        covariance = both.T @ both / len(both)
        values, vectors = torch.linalg.eigh(covariance)
        whitening = vectors @ (values + 0.1 * values.mean()).rsqrt()[:, None].mul(vectors.T)
        chosen = patches[draws.below(len(patches), 4 * self.filters)].flatten(1).double() @ whitening
        norms = chosen.norm(dim=1)
        strong = chosen[norms > norms.median() / 2][: self.filters]
        rows = (strong / strong.norm(dim=1, keepdim=True)) @ whitening
        deviation = torch.einsum("kd,de,ke->k", rows, covariance, rows).sqrt()
        filters = rows.reshape(-1, *patches.shape[1:]).float()
        threshold = deviation.float() / 2
        if self.flips:
            filters, threshold = torch.cat((filters, filters.flip(3))), torch.cat((threshold, threshold))
        return {"filters": filters, "threshold": threshold}

    def _patches(self, draws: Draws, synthetic: Tensor) -> Tensor:
        """Normalised windows (m, C, p, p), some of each picture."""
        x, p = self._reduced(synthetic), self.patch
        n = len(x)
        found = []
        for _ in range(_PATCHES_OF_EACH):
            row, column = draws.below(x.shape[2] - p + 1, n), draws.below(x.shape[3] - p + 1, n)
            rows, columns = row[:, None] + torch.arange(p), column[:, None] + torch.arange(p)
            found.append(x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2))
        patches = torch.cat(found)
        centred = patches - patches.mean((1, 2, 3), keepdim=True)
        return centred / (centred.square().mean((1, 2, 3), keepdim=True) + _CONTRAST).sqrt()

    def _reduced(self, x: Tensor) -> Tensor:
        return 255 * (F.avg_pool2d(x, self.down) if self.down > 1 else x)

    def __call__(self, x: Tensor, fitted: Arrays) -> Tensor:
        """(n, C, H, W) to (n, 2 · filters · grid²)."""
        filters = fitted["filters"].to(x)
        x = self._reduced(x)
        x = x - x.mean((1, 2, 3), keepdim=True)  # changes nothing but the rounding of the variance
        mean = F.avg_pool2d(x.mean(1, keepdim=True), self.patch, self.stride)
        square = F.avg_pool2d(x.square().mean(1, keepdim=True), self.patch, self.stride)
        rate = ((square - mean.square()).clamp_min(0) + _CONTRAST).rsqrt()
        response = F.conv2d(x, filters, stride=self.stride)
        response = (response - mean * filters.sum((1, 2, 3)).reshape(1, -1, 1, 1)) * rate
        threshold = fitted["threshold"].to(x).reshape(1, -1, 1, 1)
        grid = (min(response.shape[2], self.grid), min(response.shape[3], self.grid))
        pooled = [F.adaptive_avg_pool2d(F.relu(part - threshold), grid) for part in (response, -response)]
        z = torch.stack(pooled, 1)
        if self.flips:
            z = z[:, :, : self.filters] + z[:, :, self.filters :].flip(4)
        return z.flatten(1)


Block: TypeAlias = ScatteringBlock | PatchBlock
"""A map of images (n, C, H, W) to (n, d) that treats each alone, once it is fitted to synthetic images."""
