"""Features of images whose filters and whitening are taken of synthetic pictures: no record, no downloaded image."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lipdp.data.download import cache_root
from lipdp.errors import DataError, ParameterError, UnboundedError
from lipdp.features import synthetic
from lipdp.features.blocks import Block, PatchBlock, ScatteringBlock
from lipdp.features.scattering import Scattering
from lipdp.files import written_whole

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of the blocks and their whitening; raise it when the same spec would give other numbers."""

_RIDGE = 0.3
_BATCH = 250
Weighted = tuple[tuple[float, Block], ...]


@dataclass(frozen=True)
class Pictures:
    r"""Blocks u of an image, each whitened against nuisances, joined with weights w to norm 1.

    Of each block v(x): the signed square root of u, to norm 1, minus the mean over synthetic pictures, times L⁻¹, to
    norm 1, where LLᵀ = S + 0.3 (tr S / d) I and S is the second moment of differences between two views of the same
    synthetic picture. (L⁻¹ is (LLᵀ)^(−½) up to a rotation, which no dense head notices.) Directions that flips,
    rotations, light and noise move are shrunk. Then φ = (w_b v_b)_b / √Σ w_b².

    Images whose sides are 64 and more are first averaged to about 32, so that the cost stays bounded.

    Guarantees: record by record; depends on the seed and the shape alone, on no record. Norm 1 up to rounding, and
    `FeatureSpec` brings it to at most 1 as stored. No Lipschitz constant (the square root has none).

    Attributes:
        seed: public, of the synthetic pictures.
        pairs: how many of them, two views each.
        filters: of the finer layer of patches; the coarser has half as many in colour.
    """

    seed: int = 0
    pairs: int = 6000
    filters: int = 256

    name: ClassVar[str] = "photographs"

    def __post_init__(self) -> None:
        for name, least, most in (("seed", 0, 2**62), ("pairs", 2, 10**6), ("filters", 2, 4096)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ParameterError(f"{name}={value!r}: give a whole number from {least} to {most}")

    def blocks(self, input_shape: Sequence[int]) -> Weighted:
        """The blocks with their weights, for images of one shape."""
        colour = input_shape[0] > 1
        if colour:
            fine = PatchBlock(1, 6, 2, self.filters, 3, flips=True)
            coarse = PatchBlock(2, 6, 1, max(self.filters // 2, 1), 3, flips=True)
        else:
            fine = PatchBlock(1, 6, 2, self.filters // 2, 4, flips=True)
            coarse = PatchBlock(2, 5, 1, self.filters // 2, 4, flips=True)
        return (1.0, ScatteringBlock(4 if colour else 7, flips=True)), (1.0, fine), (0.7, coarse)

    def version(self) -> str:
        """What computes the map and its statistics."""
        return f"lipdp {synthetic.VERSION}.{_VERSION}, torch {torch.__version__}, {Scattering().version()}"

    def lipschitz(self, input_shape: Sequence[int]) -> float:
        """None that is finite: UnboundedError."""
        raise UnboundedError(
            f"{self.name} features have no Lipschitz constant (they take square roots): certify a run on pixels, or on"
            " scattering or dct features"
        )

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int]:
        """(d, 1, 1)."""
        return _dimension(self, tuple(input_shape)), 1, 1

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to (N, d, 1, 1)."""
        wide, x = x.dtype, _reduced(x.float())
        statistics = _statistics(self, tuple(x.shape[1:]))
        blocks = self.blocks(x.shape[1:])
        total = math.sqrt(sum(weight**2 for weight, _ in blocks))
        parts = []
        for index, (weight, block) in enumerate(blocks):
            kept = {k.partition("/")[2]: v for k, v in statistics.items() if k.startswith(f"{index}/")}
            z = _rooted(block(x, kept)) - kept["mean"].to(x)
            parts.append(F.normalize(_times_triangle(z, kept["whitening"].to(x)), dim=1) * (weight / total))
        return torch.cat(parts, 1)[:, :, None, None].to(wide)


@dataclass(frozen=True)
class Objects(Pictures):
    """`Pictures` whose synthetic images are things on black: for grey pictures of products."""

    name: ClassVar[str] = "objects"


@dataclass(frozen=True)
class Handwriting(Pictures):
    """`Pictures` whose synthetic images are pen strokes: scattering alone, and mirror images are other signs."""

    pairs: int = 4000

    name: ClassVar[str] = "handwriting"

    def blocks(self, input_shape: Sequence[int]) -> Weighted:
        """Scattering alone."""
        return ((1.0, ScatteringBlock(7, flips=False)),)


def _reduced(x: Tensor) -> Tensor:
    """Images averaged by a whole number to sides below 64, the centre of them where it does not divide."""
    if x.dim() != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 12:
        raise ParameterError(
            f"images of shape {tuple(x.shape[1:])}: these features are for (C, H, W) with C = 1 or 3, H and W ≥ 12"
        )
    factor = min(x.shape[2:]) // 32
    return F.avg_pool2d(x, factor) if factor > 1 else x


def _rooted(z: Tensor) -> Tensor:
    return F.normalize(z.sign() * z.abs().sqrt(), dim=1)


@lru_cache(maxsize=64)
def _dimension(pictures: Pictures, input_shape: tuple[int, ...]) -> int:
    """Of the features, from one black image: no statistics are needed."""
    x = _reduced(torch.zeros(1, *input_shape))
    channels, total = x.shape[1], 0
    for _, block in pictures.blocks(x.shape[1:]):
        blank: dict[str, Tensor] = {}
        if isinstance(block, PatchBlock):
            number = block.filters * (2 if block.flips else 1)
            blank = {
                "filters": torch.zeros(number, channels, block.patch, block.patch), "threshold": torch.zeros(number)
            }  # fmt: skip
        total += block(x, blank).shape[1]
    return total


def _times_triangle(z: Tensor, lower: Tensor) -> Tensor:
    """`z @ lower.T`, without the products by the zeros above the diagonal of large matrices."""
    size = len(lower)
    if size < 1024:
        return z @ lower.T
    half = size // 2
    top = _times_triangle(z[:, :half], lower[:half, :half])
    bottom = z[:, :half] @ lower[half:, :half].T + _times_triangle(z[:, half:], lower[half:, half:])
    return torch.cat((top, bottom), 1)


# ---------------------------------------------------------------------------------------------------------- statistics


@lru_cache(maxsize=2)
@torch.no_grad()
def _statistics(pictures: Pictures, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The filters, means and whitenings for images of one (reduced) shape, from the cache, else computed and kept."""
    key = {
        "pictures": [pictures.name, asdict(pictures)],
        "by": pictures.version(),
        "shape": shape,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_root() / "features" / f"statistics-{pictures.name}-{digest}.npz"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {name: torch.from_numpy(stored[name]) for name in stored.files}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        _log.warning("%s is damaged; it is computed again", path)
    _log.info("statistics of synthetic pictures for %s features: a few minutes, once", pictures.name)
    found = _fit(pictures, shape)
    try:
        with written_whole(path) as kept:
            np.savez(kept, allow_pickle=False, **{name: value.numpy() for name, value in found.items()})
    except OSError as error:
        raise DataError(f"the statistics cannot be kept in {path.parent} ({error}); set LIPDP_CACHE") from error
    return found


def _fit(pictures: Pictures, shape: tuple[int, ...]) -> dict[str, Tensor]:
    first, second = synthetic.PICTURES[pictures.name](pictures.pairs, shape, pictures.seed)
    found: dict[str, Tensor] = {}
    for index, (_, block) in enumerate(pictures.blocks(shape)):
        fitted = block.fit(first, pictures.seed + 1)
        mean, moment = _moments(block, fitted, first, second)
        ridge = _RIDGE * moment.trace() / len(moment)
        root = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
        del moment
        whitening = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=False)
        whitening = whitening / whitening.norm() * math.sqrt(len(whitening))  # of the order of 1, for float32
        for name, value in {**fitted, "mean": mean, "whitening": whitening}.items():
            found[f"{index}/{name}"] = value.float()
    return found


def _moments(block: Block, fitted: dict[str, Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) over both views, and the second moment (d, d) of their differences."""
    total, moment = torch.zeros(()), torch.zeros(())
    for a, b in zip(first.split(_BATCH), second.split(_BATCH), strict=True):
        views = _rooted(block(a, fitted)), _rooted(block(b, fitted))
        total = total + sum(view.double().sum(0) for view in views)
        change = views[0] - views[1]
        moment = moment + (change.T @ change).double()
    return total / (2 * len(first)), moment / len(first)
