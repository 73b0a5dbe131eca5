"""Fixed, data-independent feature maps as a stage of the data pipeline: computed once, kept on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lipdp.constraints import is_positive, is_size
from lipdp.data import Split
from lipdp.data.download import cache_root
from lipdp.errors import ParameterError, UnknownNameError, check_known
from lipdp.features import synthetic
from lipdp.features.cache import kept
from lipdp.features.cosine import Dct
from lipdp.features.energies import Energies
from lipdp.features.frozen import Frozen
from lipdp.features.pictures import Handwriting, Objects, Pictures
from lipdp.features.scattering import Scattering

Progress = Callable[[int, int], object]
"""Called as progress(records done, records in all)."""


class FeatureMap(Protocol):
    """A fixed map of images, frozen and comparable, that treats each record alone."""

    name: ClassVar[str]

    def version(self) -> str:
        """What computes the map; it enters the cache's key."""
        ...

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int]:
        """Shape (channels, height, width) of one output, for one input of shape (C, H, W)."""
        ...

    def lipschitz(self, input_shape: Sequence[int]) -> float:
        """Certified constant of the map on one input."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to (N, *output_shape)."""
        ...


FEATURES: dict[str, type[Pictures] | type[Scattering] | type[Dct] | type[Energies] | type[Frozen]] = {
    "photographs": Pictures, "objects": Objects, "handwriting": Handwriting, "scattering": Scattering, "dct": Dct,
    "energies": Energies, "frozen": Frozen,
}  # fmt: skip

_OF_PICTURES = {"unit_norm": True, "dtype": "float16"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "frozen": {"unit_norm": True},
    "scattering": {"group_norm": 27, "unit_norm": True},
    **dict.fromkeys(synthetic.PICTURES, _OF_PICTURES),
}


_NORMALISATION = ("group_norm", "unit_norm", "eps", "dtype")

NORM_FLOOR = 1e-12
"""With `unit_norm` features are divided by max(‖z‖, this)."""


@dataclass(frozen=True)
class FeatureSpec:
    """A feature map, its per-sample normalisation and the type it is stored in; `features` builds one by name.

    `spec(x)`: the map; then, with `group_norm = g`, each sample's channels in g consecutive groups, each group (all
    its channels and positions) brought to mean 0 and variance 1, `(z − μ)/√(var + eps)`, statistics of that sample
    alone; then flattening; then, with `unit_norm`, `z / ‖z‖` (zero stays zero).

    Attributes:
        map: the feature map.
        group_norm: number of groups, a divisor of the map's channels; None for no group normalisation.
        unit_norm: whether each sample is scaled to norm 1.
        eps: what keeps the group normalisation finite, > 0.
        dtype: `float32`, or `float16`, which halves the cache; cast each batch back before the model.
    """

    map: FeatureMap
    group_norm: int | None = None
    unit_norm: bool = False
    eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.group_norm is not None and not is_size(self.group_norm):
            raise ParameterError(f"group_norm={self.group_norm!r}: give a number of groups ≥ 1, or None")
        if not is_positive(self.eps):
            raise ParameterError(f"eps={self.eps!r}: give a finite number > 0")
        if not isinstance(self.dtype, str) or self.dtype not in ("float32", "float16"):
            raise ParameterError(f"dtype={self.dtype!r}: give float32 or float16")

    def to_json(self) -> dict[str, Any]:
        """A flat dict of plain values; `features(**d)` gives the spec back.

        >>> spec = features("dct", keep=8)
        >>> features(**spec.to_json()) == spec
        True
        """
        options = {key: getattr(self, key) for key in _NORMALISATION}
        return {"name": self.map.name, **asdict(self.map), **options}  # type: ignore[call-overload]

    @property
    def key(self) -> tuple[str, dict[str, Any]]:
        """What the cache keeps features by: the map's name; the spec, and what computes it."""
        return self.map.name, {"spec": self.to_json(), "by": self.map.version()}

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int]:
        """`(d,)`: the number of features of one input of shape (C, H, W); ParameterError if it does not fit."""
        if len(input_shape) != 3:
            raise ParameterError(
                f"{self.map.name} features are for images (C, H, W), not for inputs of shape {tuple(input_shape)}"
            )
        shape = self.map.output_shape(input_shape)
        if self.group_norm is not None and shape[0] % self.group_norm:
            divisors = [n for n in range(1, shape[0] + 1) if shape[0] % n == 0]
            raise ParameterError(
                f"group_norm={self.group_norm} does not divide {shape[0]} channels: give one of {divisors}"
            )
        return (math.prod(shape),)

    def lipschitz(self, input_shape: Sequence[int]) -> float:
        """Certified constant of the whole stage; infinite with a normalisation, which has only local constants."""
        return math.inf if self.group_norm or self.unit_norm else self.map.lipschitz(input_shape)

    def norm_bound(self, input_shape: Sequence[int]) -> float:
        """Bound on the norm of one output for images in [0, 1], in exact arithmetic.

        1 with `unit_norm`; `√d` with `group_norm` (each group has mean square var/(var + eps) < 1); else
        `lipschitz · √(CHW)`: the maps send 0 to 0, or the grey image to at most √(CHW)/2 (`Energies`).
        """
        if self.unit_norm:
            return 1.0
        if self.group_norm:
            return math.sqrt(*self.output_shape(input_shape))
        return self.map.lipschitz(input_shape) * math.sqrt(math.prod(input_shape))

    def input_bound(self, input_shape: Sequence[int]) -> float:
        """Where a model on the features clips them if it is not told: `norm_bound`, less for `Energies` of images."""
        return self.norm_bound(input_shape) * (self.map.reach if isinstance(self.map, Energies) else 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to features (N, d) of `dtype`."""
        self.output_shape(x.shape[1:])
        z = self.map(x)
        if self.group_norm:
            z = F.group_norm(z, self.group_norm, eps=self.eps)
        z = z.flatten(1)
        if self.unit_norm:
            z = F.normalize(z.double(), dim=1, eps=NORM_FLOOR) * (1 - self._margin())
        return z.to(getattr(torch, self.dtype))

    def _margin(self) -> float:
        """What a unit vector is shortened by, so that rounding to `dtype` never brings its norm above 1.

        Rounding moves an entry by at most half the spacing, ε/2 of itself, and numbers below the smallest normal one
        by a quarter of ε times that: (1 − ε)(1 + ε/2) + √d · 2⁻²⁵ ≤ 1 in float16 for d < 10⁸. In float32 2⁻²⁰ also
        covers a norm that is summed in float32.
        """
        return max(float(torch.finfo(getattr(torch, self.dtype)).eps), 2.0**-20)


def features(name: str, **options: Any) -> FeatureSpec:
    """Build a feature stage by name, with the defaults that work well for a linear head.

    `photographs`, `objects`, `handwriting`: blocks whose filters and whitening are taken of synthetic pictures
    (`Pictures`), `unit_norm=True`, `dtype="float16"`. `scattering`: J = 2, L = 8, order 2, `group_norm=27`,
    `unit_norm=True`. `dct`: all frequencies, `energies`: `Energies`, no normalisation.

    Args:
        name: of the map, or `module:function`, which returns a frozen torch module (`Frozen`), with `unit_norm=True`.
        options: of the map (`seed`, `pairs`, `filters`; `J`, `L`, `order`; `keep`; `pictures`, `patch`, `stride`,
            `window`) and of `FeatureSpec` (`group_norm`, `unit_norm`, `eps`, `dtype`).

    Raises:
        UnknownNameError: no such map; the message lists them.
        ParameterError: an unknown option, or a value outside its range.

    >>> features("scattering").output_shape((1, 28, 28))
    (3969,)

    Source: group normalisation of scattering features for private training is due to Tramèr and Boneh, Differentially
    private learning needs better features (or much more data), 2021.
    """
    if isinstance(name, str) and ":" in name:
        name, options = Frozen.name, {**options, "source": name}
    if not isinstance(name, str) or name not in FEATURES:
        raise UnknownNameError("feature map", name, [*(n for n in FEATURES if n != Frozen.name), "module:function"])
    kind = FEATURES[name]
    if kind is Frozen and not (options.get("unit_norm", True) or options.get("group_norm")):
        raise ParameterError("nothing bounds the features of a frozen module: leave unit_norm on, or give group_norm")
    known = [field.name for field in fields(kind)]
    of_map = {key: value for key, value in options.items() if key in known}
    of_spec = {key: value for key, value in options.items() if key not in known}
    check_known(f"features {name!r}", options, (*known, *_NORMALISATION))
    return FeatureSpec(kind(**of_map), **{**_DEFAULTS.get(name, {}), **of_spec})


def apply(
    split: Split,
    spec: FeatureSpec,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Split:
    """Replace the images of a split by their features, computed batch by batch once and then read from disk.

    The result is memory-mapped: it takes disk, and memory only as it is read. A cached file is used only if its
    checksum, shape and key agree; else it is computed again, from the last batch on that an interrupted computation
    left. The key is a digest of the images' bytes and shape, of
    the spec and of the version of what computes the map. The cache holds features of private records: protect it as
    you protect the data (files are created readable by their owner alone).

    Args:
        split: images (N, C, H, W), float32; entries that are NaN or infinite count as 0.
        spec: from `features`.
        cache_dir: folder for the cache; by default `$LIPDP_CACHE/features`, else `~/.cache/lipdp/features`.
        progress: called as `progress(done, total)` in records of train and test, after each batch or cached file.

    Returns:
        The split with inputs (N, d) of `spec.dtype`; labels and the rest unchanged.

    Raises:
        ParameterError: inputs that are not images, or images or options the map cannot take.
        DataError: the cache cannot be written; the message says where it was tried.
    """
    folder = Path(cache_dir).expanduser() if cache_dir is not None else cache_root() / "features"
    total = len(split.train_x) + len(split.test_x)

    reported = 0

    def report(done: int) -> None:
        nonlocal reported
        if progress is not None and done > reported:  # a batch and its file may end at the same record
            reported = done
            progress(done, total)

    train_x = kept(split.train_x, spec, folder, report)
    test_x = kept(split.test_x, spec, folder, lambda done: report(len(train_x) + done))
    return replace(split, train_x=train_x, test_x=test_x)
