r"""Random views of images, drawn for each record by itself while it is read: they cost no privacy.

Why the account does not see them. A step's guarantee asks one thing of each record: that its gradient is no longer than
Δ. The bounds of `lipdp.sensitivity` hold for *every* input, since the model begins by projecting it on the ball of its
public input bound; so they hold for whatever view is drawn. The views of different records are drawn independently of
each other and of the noise, so fix those of all records in advance: what remains is the subsampled Gaussian mechanism,
which is (ε, δ)-DP with the same ε whatever was fixed, and so is the mixture over the draws. With K views in one record
its loss is their mean, whose gradient is the mean of K gradients no longer than Δ: no longer than Δ either.

Views are made of inputs that are bounded already, and never lengthen them: ‖a(x)‖ ≤ ‖x‖. A flip permutes pixels. A
crop of the image padded with zeros holds each pixel at most once, and zeros. So a norm that is a fact of the bounded
inputs (unit-norm records, say) stays one.

Mixing two records (mix-up, cut-mix) is another matter: a record's gradient would depend on its neighbour. Not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipdp.batches.records import pattern, read
from lipdp.data.split import require_images
from lipdp.errors import ParameterError, UnknownNameError


class Augment(Protocol):
    """A random map of images, record by record, that never lengthens one; it draws from torch's CPU generator."""

    def __call__(self, x: Tensor) -> Tensor:
        """A fresh view of each image of `x`, (batch, C, H, W), in the same shape."""
        ...


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right with probability ½."""

    def __call__(self, x: Tensor) -> Tensor:
        mirrored = torch.rand(len(x)) < 0.5
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


@dataclass(frozen=True)
class Crop:
    """A window of the image's own size at a uniform place of the image with a border of zeros around it."""

    padding: int = 4

    def __post_init__(self) -> None:
        if type(self.padding) is not int or self.padding < 1:
            raise ParameterError(f"padding={self.padding!r}: a whole number of pixels of at least 1")

    def __call__(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        padded = torch.nn.functional.pad(x, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2, count))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, (batch, C, places, places, H, W)
        return windows[torch.arange(count), :, top, left]


@dataclass(frozen=True)
class Chain:
    """One map after another."""

    maps: tuple[Augment, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for augment in self.maps:
            x = augment(x)
        return x


AUGMENTS: dict[str, Augment] = {"crop": Crop(), "flip": Flip(), "crop-flip": Chain((Crop(), Flip()))}


def augment(name: str) -> Augment:
    """A map by name: `crop` (padding 4), `flip`, `crop-flip`.

    Raises:
        UnknownNameError: none of them.

    >>> augment("flip")
    Flip()
    """
    if not isinstance(name, str) or name not in AUGMENTS:
        raise UnknownNameError("augmentation", name, AUGMENTS)
    return AUGMENTS[name]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """A data set of images that gives a fresh random view of a record each time it is read, or K of them.

    Args:
        dataset: map-style, of (input (C, H, W), label) records on the CPU.
        augment: the random map.
        views: K; with K > 1 an input is (K, C, H, W), all of one record.

    Raises:
        ParameterError: K < 1, or inputs that are not images.

    >>> data = torch.utils.data.TensorDataset(torch.ones(5, 3, 8, 8), torch.arange(5))
    >>> x, y = Augmented(data, augment("crop-flip"), views=4)[2]
    >>> x.shape, int(y)
    (torch.Size([4, 3, 8, 8]), 2)

    Source: De et al. (2022), "Unlocking high-accuracy differentially private image classification through scale", for K
    views of one record in one gradient.
    """

    def __init__(self, dataset: Dataset[Any], augment: Augment, *, views: int = 1) -> None:
        if type(views) is not int or views < 1:
            raise ParameterError(f"views={views!r}: a whole number of views of at least 1")
        require_images(pattern(dataset)[0].shape[1:], "augmentation")
        self._dataset, self._augment, self._views = dataset, augment, views

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def read_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Views and labels of all `indices`, at least one."""
        x, y = read(self._dataset, indices)
        if self._views == 1:
            return self._augment(x), y
        views = self._augment(x.repeat_interleave(self._views, 0))
        return views.unflatten(0, (len(x), self._views)), y

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.read_batch([index])
        return x[0], y[0]
