"""Data sets whose inputs stay on disk: read a batch at a time, by the process that needs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipdp.batches.reading import in_order
from lipdp.batches.records import look
from lipdp.data.scaling import Bounding
from lipdp.data.split import Split, Task, require_images
from lipdp.errors import DataError

IN_MEMORY = 4 * 2**30
"""Bytes of float32 up to which a stored set is read whole by what needs it whole."""


class Records(Protocol):
    """One part of a set on disk. Cheap to send to another process, which opens the files for itself."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Float32 inputs: images (n, C, H, W) in [0, 1], of `size` if given, tables (n, d) as is. Int64 labels."""
        ...


@dataclass(frozen=True, eq=False)
class Stored:
    """A data set that stays on disk: as `Split`, without the inputs.

    Each batch is read, scaled to [0, 1] if it is of bytes, resized and bounded when it is asked for, record by record
    and by public constants. No record stops that: entries that are NaN or infinite are 0, a label that is none has no
    loss, and a record that can't be read is the zero record.

    Attributes:
        name: what it was opened as.
        train, test: the records.
        input_shape: of one input as read, after resizing.
        num_classes, task, note, train_owner: as for `Split`.
        size: (height, width) that images are brought to; None leaves them.
        bounding: the public map of the inputs; None leaves them.
    """

    name: str
    train: Records
    test: Records
    input_shape: tuple[int, ...]
    num_classes: int
    task: Task
    note: str = ""
    train_owner: Tensor | None = None
    size: tuple[int, ...] | None = None
    bounding: Bounding | None = None

    @property
    def records(self) -> int:
        """N, the number of training records."""
        return len(self.train)

    def training_dataset(self, device: torch.device | str = "cpu") -> StoredDataset:
        """The training part, read in the process that asks; its batches are on the CPU whatever `device`."""
        return StoredDataset(self.train, size=self.size, bounding=self.bounding)

    def test_batches(self, size: int, *, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The test part in order, at most `size` records at a time, read by as many processes."""
        return in_order(StoredDataset(self.test, size=self.size, bounding=self.bounding), size, num_workers=num_workers)

    def test_part(self) -> tuple[Tensor, Tensor]:
        """All test inputs and labels; DataError beyond `IN_MEMORY`."""
        self._require_small(len(self.test), "the test part")
        x, y = zip(*self.test_batches(1024), strict=True)
        return torch.cat(x), torch.cat(y)

    def resized(self, size: Sequence[int]) -> Stored:
        """With images of `size` = (height, width)."""
        require_images(self.input_shape, f"image_size={tuple(size)}")
        return replace(self, size=tuple(size), input_shape=(self.input_shape[0], *size))

    def bounded(self, bounding: Bounding) -> Stored:
        """With this map over every batch that is read."""
        return replace(self, bounding=bounding)

    @property
    def is_small(self) -> bool:
        """Whether all of it takes at most `IN_MEMORY`."""
        return self._bytes(len(self.train) + len(self.test)) <= IN_MEMORY

    def in_memory(self) -> Split:
        """All of it read; DataError beyond `IN_MEMORY`, or where records looked at differ in shape."""
        self._require_small(len(self.train) + len(self.test), "the whole set")
        training = self.training_dataset()
        look(training)
        x, y = zip(*in_order(training, 1024), strict=True)
        parts = torch.cat(x), torch.cat(y), *self.test_part()
        return Split(self.name, *parts, self.num_classes, self.task, self.note, self.train_owner)

    def _bytes(self, records: int) -> int:
        return 4 * records * math.prod(self.input_shape)

    def _require_small(self, records: int, what: str) -> None:
        needed = self._bytes(records)
        if needed > IN_MEMORY:
            raise DataError(
                f"{self.name}: {what} takes {needed / 2**30:.1f} GiB of memory, and this command needs all of it at"
                " once; only `lipdp train` without --features reads batch by batch. Use a part of at most"
                f" {IN_MEMORY / 2**30:.0f} GiB"
            )


class StoredDataset(Dataset[tuple[Tensor, Tensor]]):
    """Map-style (input, label) records of one part of a `Stored` set; inputs resized and bounded."""

    def __init__(
        self, records: Records, *, size: Sequence[int] | None = None, bounding: Bounding | None = None
    ) -> None:
        self._records, self._size, self._bounding = records, size, bounding

    def __len__(self) -> int:
        return len(self._records)

    def read_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and labels of all `indices`, at least one."""
        x, y = self._records.read(indices, self._size)
        return (x if self._bounding is None else self._bounding(x)), y

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.read_batch([index])
        return x[0], y[0]


DataSplit: TypeAlias = Split | Stored
"""A data set with a private training part and a test part: `Split` in memory, `Stored` on disk.

What trains or evaluates asks for batches only, and so needs no branch on where the inputs are.
"""


def number_of_units(split: DataSplit) -> int:
    """The public N of the account: the number of owners if they are known, else of training records."""
    return split.records if split.train_owner is None else len(split.train_owner.unique())
