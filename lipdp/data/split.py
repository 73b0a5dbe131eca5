"""A data set in memory, cut in two: what training, evaluation and the account need of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lipdp.batches.records import NO_LABEL
from lipdp.data.scaling import Bounding
from lipdp.errors import DataError, ParameterError

Task = Literal["multiclass", "binary"]


@dataclass(frozen=True, eq=False)
class Split:
    """A data set in memory, with a private training part and a test part.

    Attributes:
        name: what it was loaded as, e.g. `mnist` or `adbench/11_donors`.
        train_x, test_x: float32; images (N, C, H, W) in [0, 1], tables (N, d) as they are on disk.
        train_y, test_y: int64 (N,), in 0..num_classes − 1.
        num_classes: the number of classes, a public fact.
        task: `multiclass` (report accuracy) or `binary` (a table with two classes: report AUROC).
        note: what a reader of figures must know, e.g. "JPEG copy"; the readers leave it empty.
        train_owner: int64 (N,), whose each training record is; None where that was not asked for.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    task: Task
    note: str = ""
    train_owner: Tensor | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, e.g. (1, 28, 28) or (d,)."""
        return tuple(self.train_x.shape[1:])

    @property
    def records(self) -> int:
        """N, the number of training records."""
        return len(self.train_x)

    def training_dataset(self, device: torch.device | str = "cpu") -> TensorDataset:
        """Map-style, of N records (input, label), on `device` and indexed there."""
        return TensorDataset(self.train_x.to(device), self.train_y.to(device))

    def test_batches(self, size: int, *, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The test part in order, at most `size` records at a time."""
        yield from zip(self.test_x.split(size), self.test_y.split(size), strict=True)

    def test_part(self) -> tuple[Tensor, Tensor]:
        """All test inputs and labels."""
        return self.test_x, self.test_y

    def resized(self, size: Sequence[int]) -> Split:
        """With images of `size` = (height, width), a public choice; ParameterError for a table."""
        require_images(self.input_shape, f"image_size={tuple(size)}")
        return replace(self, train_x=resize(self.train_x, size), test_x=resize(self.test_x, size))

    def bounded(self, bounding: Bounding) -> Split:
        """With one fixed, data-independent map over the inputs of both parts, record by record."""
        return replace(self, train_x=bounding(self.train_x), test_x=bounding(self.test_x))

    @property
    def is_small(self) -> bool:
        """Whether `in_memory` reads it."""
        return True

    def in_memory(self) -> Split:
        """Itself."""
        return self


def held_out(contents: Iterable[bytes]) -> npt.NDArray[np.bool_]:
    """Which records are for test, a fifth of them in expectation: a public hash of what a record holds says so.

    Of records that hold the same, the k-th is hashed with k. So a data set with one record more, wherever it stands,
    has the same records on either side, and one more on one of them: ε for the training part holds for the whole.

    >>> held_out([b"a", b"b", b"b", b"c"]).tolist()
    [False, False, False, False]
    """
    seen: Counter[bytes] = Counter()
    sides = []
    for content in contents:
        digest = hashlib.blake2b(content, digest_size=16, key=b"lipdp: test part").digest()
        copy = seen[digest].to_bytes(8, "little")
        seen[digest] += 1
        sides.append(int.from_bytes(hashlib.blake2b(copy, digest_size=8, key=digest).digest(), "little") < 2**64 // 5)
    return np.array(sides, dtype=bool)


def split_off(
    path: Path, x: npt.NDArray[Any], labels: npt.NDArray[np.int64], owners: npt.NDArray[Any] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices for train and test, by `held_out`. What has no label is for training, where it stops nothing.

    Args:
        x, labels, owners: (N, …) inputs, `NO_LABEL` or a class, and the owner as the file names it, if there is one.

    Raises:
        DataError: a side has none.
    """
    whose = (b"" if owners is None else str(owners[i]).encode() for i in range(len(x)))
    held = held_out(row.tobytes() + label.tobytes() + owner for row, label, owner in zip(x, labels, whose, strict=True))
    held &= labels != NO_LABEL
    if held.all() or not held.any():
        raise DataError(
            f"{path} holds {len(x)} records, too few to split in train and test by a hash of what they hold; give the"
            " test part yourself"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def require_images(input_shape: Sequence[int], setting: str) -> None:
    """ParameterError where the inputs are not images (C, H, W)."""
    if len(input_shape) != 3:
        raise ParameterError(f"{setting} is for images (C, H, W), not for inputs of shape {tuple(input_shape)}")


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Images brought to a public size, each by itself.

    Bilinear with antialiasing: every new pixel is a weighted mean of the image's own, with weights ≥ 0 of sum 1, so
    values stay in the range that they were in (up to rounding, which the bounding that follows takes away).
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return torch.nn.functional.interpolate(x, tuple(size), mode="bilinear", antialias=True, align_corners=False)
