"""Data-independent maps that bring the inputs into a public range: scaled by public constants, never by the data.

A minimum, a maximum, a mean or a quantile read off the private data is a release that ε does not count. So each map
here is fixed before the data are seen. All of them act entry by entry, hence record by record, and take an entry that
is NaN or infinite for 0: an error would tell that the record is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import signature
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lipdp.batches.records import finite
from lipdp.errors import ParameterError, UnknownNameError, check_known

Constants: TypeAlias = float | tuple[float, ...]
"""One public number, or one per feature (per channel, for images): along axis 1 of the inputs."""


class Bounding(Protocol):
    """A fixed map of the inputs, entry by entry, with its public constants."""

    @property
    def lipschitz(self) -> float:
        """Constant of the map: a certified radius r after it is a radius r / lipschitz before it."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` of shape (batch, features or channels, ...)."""
        ...


_LARGEST = torch.finfo(torch.float32).max


def _numbers(constants: Constants) -> tuple[float, ...]:
    return constants if isinstance(constants, tuple) else (constants,)


def _along_axis_1(constants: Constants, x: Tensor) -> Tensor:
    numbers = _numbers(constants)
    if x.dim() < 2 or len(numbers) not in (1, x.shape[1]):
        raise ParameterError(
            f"{len(numbers)} constants for inputs of shape {tuple(x.shape)}: give one, or one per feature"
        )
    return torch.tensor(numbers, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 2))


def _intervals(lower: Constants, upper: Constants) -> list[tuple[float, float]]:
    low, high = _numbers(lower), _numbers(upper)
    size = max(len(low), len(high))
    low, high = (low * size if len(low) == 1 else low), (high * size if len(high) == 1 else high)
    if len(low) != len(high) or not all(-_LARGEST <= a < b <= _LARGEST for a, b in zip(low, high, strict=True)):
        raise ParameterError(f"lower={lower} and upper={upper}: give finite lower < upper, one of each per feature")
    return list(zip(low, high, strict=True))


@dataclass(frozen=True)
class _Interval:
    """Public bounds lower < upper: numbers, or one for each feature."""

    lower: Constants = 0.0
    upper: Constants = 1.0

    def __post_init__(self) -> None:
        _intervals(self.lower, self.upper)

    def clipped(self, x: Tensor) -> Tensor:
        """Every entry of `x`, (batch, features or channels, ...), moved into its interval."""
        low, high = _along_axis_1(self.lower, x), _along_axis_1(self.upper, x)
        if low.numel() == high.numel() == 1:
            return torch.clamp(finite(x), low.item(), high.item())  # of numbers: twice as fast
        return torch.clamp(finite(x), low, high)


@dataclass(frozen=True)
class Clip(_Interval):
    """`y = min(max(x, lower), upper)`, a projection: 1-Lipschitz. The default for images, with [0, 1].

    >>> Clip(0.0, (1.0, 2.0))(torch.tensor([[-3.0, 0.5], [0.2, 9.0]]))
    tensor([[0.0000, 0.5000],
            [0.2000, 2.0000]])
    """

    @property
    def lipschitz(self) -> float:
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.clipped(x)


@dataclass(frozen=True)
class Rescale(_Interval):
    """Clip to the public interval [lower, upper], then map it affinely onto [−1, 1].

    `y = 2 (clip(x) − lower) / (upper − lower) − 1`, Lipschitz with constant `2 / min(upper − lower)`.
    For features with a range known beforehand: ages in [0, 120], attributes in {0, 1}.

    >>> Rescale(0.0, 120.0)(torch.tensor([[30.0], [500.0]])).flatten().tolist()
    [-0.5, 1.0]
    """

    @property
    def lipschitz(self) -> float:
        return 2.0 / min(b - a for a, b in _intervals(self.lower, self.upper))

    def __call__(self, x: Tensor) -> Tensor:
        low, high = _along_axis_1(self.lower, x), _along_axis_1(self.upper, x)
        return 2 * (self.clipped(x) - low) / (high - low) - 1


@dataclass(frozen=True)
class Tanh:
    """`y = tanh(x / scale)`: monotone, values in [−1, 1], Lipschitz with constant 1/scale.

    For features without a public range that are already centred, with `scale` a public guess of their spread.

    >>> Tanh(scale=2.0)(torch.tensor([[0.0, 1e6]])).tolist()
    [[0.0, 1.0]]
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ParameterError(f"scale={self.scale}: give a finite number > 0")

    @property
    def lipschitz(self) -> float:
        return 1.0 / self.scale

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(finite(x) / self.scale)


@dataclass(frozen=True)
class SignedLog:
    """Signed logarithm, then a clip: for features of unknown and differing scales. The default for tables.

    `y = clip(sign(x) log(1 + |x|/scale) / log(1 + 1/scale), −limit, limit)`: odd, monotone, 0 ↦ 0, ±1 ↦ ±1. The slope
    is largest at 0, so the map is Lipschitz with constant `1 / (scale · log(1 + 1/scale))`.
    At the default scale 1/10, limit 6 is reached at |x| = 1.8e5.

    >>> SignedLog()(torch.tensor([[0.0, 1.0, -1.0, 1e30]])).tolist()
    [[0.0, 1.0, -1.0, 6.0]]
    """

    scale: float = 0.1
    limit: float = 6.0

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and 0 < self.limit < math.inf):
            raise ParameterError(f"scale={self.scale}, limit={self.limit}: give finite numbers > 0")

    @property
    def lipschitz(self) -> float:
        return 1.0 / (self.scale * math.log1p(1 / self.scale))

    def __call__(self, x: Tensor) -> Tensor:
        x = finite(x)
        squashed = torch.log1p(x.abs() / self.scale) / math.log1p(1 / self.scale)
        return squashed.clamp(max=self.limit) * x.sign()  # ONNX has no copysign

    def inverse(self, y: Tensor) -> Tensor:
        """The input that is mapped to `y`, where |y| ≤ limit.

        >>> SignedLog().inverse(torch.tensor([0.0, 1.0, -1.0])).round(decimals=5).tolist()
        [0.0, 1.0, -1.0]
        """
        return torch.copysign(self.scale * torch.expm1(y.abs() * math.log1p(1 / self.scale)), y)


@dataclass(frozen=True)
class Standardise:
    """`y = (x − mean) / std` with public constants, Lipschitz with constant `1 / min std`.

    >>> Standardise(mean=(0.5, 0.0), std=(0.25, 2.0))(torch.tensor([[1.0, 1.0]])).tolist()
    [[2.0, 0.5]]
    """

    mean: Constants = 0.0
    std: Constants = 1.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, _numbers(self.mean))) or not all(0 < s < math.inf for s in _numbers(self.std)):
            raise ParameterError(f"mean={self.mean}, std={self.std}: give finite numbers, std > 0")

    @property
    def lipschitz(self) -> float:
        return 1.0 / min(_numbers(self.std))

    def __call__(self, x: Tensor) -> Tensor:
        return (finite(x) - _along_axis_1(self.mean, x)) / _along_axis_1(self.std, x)


_STANDARDISATION = {
    "mnist": Standardise(mean=0.1307, std=0.3081),
    "fashion-mnist": Standardise(mean=0.2860, std=0.3530),
    "cifar10": Standardise(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
}


def public_standardisation(name: str) -> Standardise:
    """The well-known mean and standard deviation of the data set `name`, as public constants.

    They are written in this file and stay the same whatever files are loaded, so using them releases nothing about
    *your* records. (They were once computed on the standard training sets; on those very sets, calling them public
    rests on their having been published long before.)

    Args:
        name: `mnist`, `fashion-mnist` or `cifar10`.

    Raises:
        UnknownNameError: no constants were published for `name`.

    >>> public_standardisation("mnist")
    Standardise(mean=0.1307, std=0.3081)
    """
    try:
        return _STANDARDISATION[name]
    except KeyError:
        raise UnknownNameError("published standardisation", name, _STANDARDISATION) from None


BOUNDINGS: dict[str, type[Bounding]] = {
    "clip": Clip,
    "rescale": Rescale,
    "tanh": Tanh,
    "signed-log": SignedLog,
    "standardise": Standardise,
}


def bounding(name: str, **constants: Constants) -> Bounding:
    """Build a map by name, `clip`, `rescale`, `tanh`, `signed-log` or `standardise`, with its public constants.

    Raises:
        UnknownNameError: `name` is none of them.
        ParameterError: a constant the map does not have, or one outside its range.

    >>> bounding("tanh", scale=3.0)
    Tanh(scale=3.0)
    """
    if not isinstance(name, str) or name not in BOUNDINGS:
        raise UnknownNameError("bounding", name, BOUNDINGS)
    check_known(f"bounding {name!r}", constants, signature(BOUNDINGS[name]).parameters)
    try:
        return BOUNDINGS[name](**constants)
    except (TypeError, OverflowError) as error:
        raise ParameterError(f"bounding {name!r}: {error}") from error
