"""Features that keep margins: signed means and the norms of frequencies over neighbouring patches, 1-Lipschitz."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lipdp.constraints import is_size
from lipdp.errors import ParameterError, UnknownNameError
from lipdp.features import synthetic
from lipdp.features.cosine import cosines

_VERSION = 1
"""Of the map; raise it when the same options would give other numbers."""

_GREY = 0.5
_COUNT = 250
_BATCH = 250
_OPPONENT = ((1, 1, 1), (1, -1, 0), (-1, -1, 2))


@dataclass(frozen=True)
class Energies:
    r"""φ(x) = (ReLU(±m), ‖frequencies‖ over windows of patches) − what synthetic pictures have on average.

    1. Pixels minus ½; three channels are turned to luminance and two opponent colours by an orthogonal matrix.
    2. Padded by p − s zeros, cut into patches of p × p at stride s, the orthonormal cosine transform of each, times
       s/p. A pixel lies in at most (p/s)² patches, so norms grow by at most (s/p)(p/s) = 1.
    3. Of every channel's mean m (frequency 0) the pair ReLU(m), ReLU(−m), at every patch; of every other frequency the
       norm over windows of w × w patches that do not overlap.
    4. Minus the mean over synthetic pictures, which makes the features shorter and the sensitivity of a head smaller.

    **Lipschitz constant 1**, attained. Steps 1 and 4 are isometries up to a shift and step 2 is none but a contraction.
    In step 3 the parts are disjoint, |ReLU(a) − ReLU(b)|² + |ReLU(−a) − ReLU(−b)|² ≤ (a − b)² (equal for one sign; for
    two it is a² + b² ≤ (|a| + |b|)²), and a norm is 1-Lipschitz. Nothing is whitened: that would cost the margins.

    Guarantees: record by record; depends on its options and the shape alone.

    Attributes:
        pictures: synthetic ones: photographs, objects or handwriting.
        patch, stride: p and s, a divisor of p, in pixels.
        window: w, in patches.

    >>> Energies().output_shape((3, 32, 32))                         # 3 · (2 · 9² + 63 · 3²)
    (2187, 1, 1)

    Source: Tramèr & Boneh (2021), a private head on fixed features; Anil, Lucas & Grosse (2019), norms as pooling.
    """

    pictures: str = "photographs"
    patch: int = 8
    stride: int = 4
    window: int = 3

    name: ClassVar[str] = "energies"

    reach: ClassVar[float] = 0.18
    """A head clips features at this share of √(CHW), the norm of what separates black from white."""

    def __post_init__(self) -> None:
        if self.pictures not in synthetic.PICTURES:
            raise UnknownNameError("pictures", self.pictures, synthetic.PICTURES)
        for name in ("patch", "stride", "window"):
            if not is_size(getattr(self, name)):
                raise ParameterError(f"{name}={getattr(self, name)!r}: give a whole number of at least 1")
        if self.patch % self.stride:
            raise ParameterError(f"stride={self.stride} does not divide patch={self.patch}: give a divisor of it")

    def version(self) -> str:
        """What computes the map and its mean."""
        return f"lipdp {synthetic.VERSION}.{_VERSION}, torch {torch.__version__}"

    def lipschitz(self, input_shape: Sequence[int]) -> float:
        """1."""
        return 1.0

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int]:
        """(d, 1, 1)."""
        channels, *sides = input_shape
        if channels not in (1, 3):
            raise ParameterError(f"energies are features of images with 1 or 3 channels, not {channels}")
        patches = [(side + self.patch - 2 * self.stride) // self.stride + 1 for side in sides]
        windows = [math.ceil(number / self.window) for number in patches]
        of_channel = 2 * math.prod(patches) + (self.patch**2 - 1) * math.prod(windows)
        return channels * of_channel, 1, 1

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to (N, d, 1, 1)."""
        self.output_shape(x.shape[1:])
        return (self._raw(x) - _mean(self, tuple(x.shape[1:])).to(x))[:, :, None, None]

    def _raw(self, x: Tensor) -> Tensor:
        x = x - _GREY
        if x.shape[1] == 3:
            turn = F.normalize(torch.tensor(_OPPONENT, dtype=torch.float64), dim=1).to(x)
            x = torch.einsum("oc,nchw->nohw", turn, x)
        count, channels = x.shape[:2]
        basis = cosines(self.patch, self.patch)
        kernels = torch.einsum("ai,bj->abij", basis, basis).flatten(0, 1)[:, None] * (self.stride / self.patch)
        padded = F.pad(x, (self.patch - self.stride,) * 4)
        z = F.conv2d(padded, kernels.to(x).repeat(channels, 1, 1, 1), stride=self.stride, groups=channels)
        z = z.unflatten(1, (channels, self.patch**2))
        means = z[:, :, 0].flatten(1)
        norms = _norms(z[:, :, 1:].flatten(1, 2), self.window)
        return torch.cat((means.relu(), (-means).relu(), norms.reshape(count, -1)), 1)


def _norms(z: Tensor, size: int) -> Tensor:
    """The norm of (N, C, H, W) over windows of size × size that cover it without overlap."""
    z = F.pad(z, (0, -z.shape[3] % size, 0, -z.shape[2] % size))
    return torch.linalg.vector_norm(z.unflatten(3, (-1, size)).unflatten(2, (-1, size)), dim=(3, 5))


@lru_cache(maxsize=4)
@torch.no_grad()
def _mean(energies: Energies, shape: tuple[int, ...]) -> Tensor:
    """Over synthetic pictures, (d,) float64: a constant of the map, whatever it is."""
    pictures, _ = synthetic.PICTURES[energies.pictures](_COUNT, shape, 0)
    total = sum(energies._raw(batch.double()).sum(0) for batch in pictures.split(_BATCH))
    return torch.as_tensor(total) / len(pictures)
