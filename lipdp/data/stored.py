"""Data sets whose inputs stay on disk: read a batch at a time, by the process that needs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lipdp.batches.loader import in_order
from lipdp.batches.records import NO_LABEL, finite, look
from lipdp.data.files import parsing
from lipdp.data.listed import Listed, listing
from lipdp.data.scaling import Bounding
from lipdp.data.split import Split, Task, require_images, resize
from lipdp.errors import DataError

IN_MEMORY = 4 * 2**30
"""Bytes of float32 up to which a stored set is read whole by what needs it whole."""

_BLOCK = 1 << 20  # labels at a time
_HEAD = 64  # records looked at when a set is opened


class Records(Protocol):
    """One part of a set on disk. Cheap to send to another process, which opens the files for itself."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Float32 inputs, images (n, C, H, W) in [0, 1], of `size` if given, tables (n, d) as they are; int64 labels.

        Raises:
            RecordError: one of the records can't be read, or they differ in shape. DataError: the file can't be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class Stored:
    """A data set that stays on disk: a `DataSplit` that holds no inputs.

    Each batch is read, scaled to [0, 1] if it is of bytes, resized and bounded when it is asked for, record by record
    and by public constants. No record stops that: entries that are NaN or infinite are 0, a label that is none has no
    loss, and a record that can't be read is the zero record (`lipdp.batches.records`).

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


# --------------------------------------------------------------------------------------------------------- npy folders


@dataclass(frozen=True)
class NpyRecords:
    """Inputs and labels in two memory-mapped `.npy` files.

    Attributes:
        x, y: the files. channels_last: whether images are (N, H, W, C). classes: of the labels, if they are listed.
    """

    x: Path
    y: Path
    channels_last: bool = False
    classes: Listed | None = None

    def __len__(self) -> int:
        return len(self._labels)

    @cached_property
    def _inputs(self) -> npt.NDArray[Any]:
        return map_npy(self.x)

    @cached_property
    def _labels(self) -> npt.NDArray[Any]:
        return map_npy(self.y)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # a mapped array is pickled whole

    def read(self, indices: Sequence[int], size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The records, converted."""
        picked = np.asarray(indices, dtype=np.int64)
        raw = np.asarray(self._inputs[picked])
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and then 0
            scale = np.float32(255 if raw.ndim > 2 and raw.dtype == np.uint8 else 1)
            x = finite(torch.from_numpy(np.divide(raw, scale, dtype=np.float32, casting="unsafe")))
        x = x.clamp(0, 1) if raw.ndim > 2 and raw.dtype.kind == "f" else x
        x = x[:, None] if x.dim() == 3 else x.movedim(-1, 1).contiguous() if self.channels_last else x
        return (x if size is None else resize(x, size)), torch.from_numpy(
            whole_labels(self._labels[picked], self.classes)
        )


def map_npy(path: Path) -> npt.NDArray[Any]:
    """An array on disk, read where it is looked at; DataError if the file is no whole `.npy` file."""
    with parsing(path, "write it with numpy.save, not pickled"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise DataError(f"{path} is an archive of arrays, not one; write it with numpy.save")
        return array


def open_npy(path: Path, *, owner: str | None = None, classes: Listed | None = None, name: str | None = None) -> Stored:
    """A folder with `train_x.npy`, `train_y.npy`, `test_x.npy` and `test_y.npy`, memory-mapped, inputs not read whole.

    Inputs are tables (N, d) of numbers or images (N, H, W), (N, C, H, W) or (N, H, W, C), of bytes or of floats in [0,
    1]. Which axis the channels are: `channels_last`.

    Guarantees: shapes, dtypes, counts and all labels are looked at, and 64 records of each part; nothing else is read.
    Of the training part two or more of the first 64 must be wrong to be refused; what one record holds stops nothing.

    Args:
        path: the folder.
        owner: read whose the records are from `train_OWNER.npy`, integers or text.
        classes: the public list of the labels, where they are not numbered 0, 1, 2, ….

    Raises:
        DataError: a file that is missing or not whole, or does not fit the others.
    """
    files = {key: path / f"{key}.npy" for key in ("train_x", "train_y", "test_x", "test_y")}
    absent = [file.name for file in files.values() if not file.is_file()]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}")
    train_x, test_x = map_npy(files["train_x"]), map_npy(files["test_x"])
    for key, array in (("train_x", train_x), ("test_x", test_x)):
        _check_inputs(files[key], array)
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DataError(f"{path}: train_x has inputs of shape {train_x.shape[1:]} but test_x {test_x.shape[1:]}")
    last = channels_last(str(files["train_x"]), train_x.shape)
    largest = max(
        largest_label(files[f"{part}_y"], map_npy(files[f"{part}_y"]), len(inputs), part == "train", classes)
        for part, inputs in (("train", train_x), ("test", test_x))
    )
    count = max(2, largest + 1)
    train, test = (NpyRecords(files[f"{part}_x"], files[f"{part}_y"], last, classes) for part in ("train", "test"))
    for key, array in (("train_x", train_x), ("test_x", test_x)):
        check_range(f"{files[key]}: the images", array)
    return Stored(
        name=name or str(path),
        train=train,
        test=test,
        input_shape=tuple(train.read([0])[0].shape[1:]),
        num_classes=count,
        task="binary" if count == 2 and train_x.ndim == 2 else "multiclass",
        train_owner=None if owner is None else _owners(path / f"train_{owner}.npy", count=len(train_x)),
    )


def _check_inputs(path: Path, array: npt.NDArray[Any]) -> None:
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise DataError(
            f"{path} has shape {array.shape}; give a table (N, d) or images (N, H, W), (N, C, H, W) or (N, H, W, C)"
        )
    images = array.ndim > 2
    fits = array.dtype.kind in "biuf" and array.dtype.itemsize <= 8
    if not fits or (images and array.dtype.kind != "f" and array.dtype != np.uint8):
        raise DataError(
            f"{path} has dtype {array.dtype}; write "
            + ("bytes (uint8), or floats in [0, 1]" if images else "integers or floats of at most 64 bits")
        )


def channels_last(what: str, shape: tuple[int, ...]) -> bool:
    """Whether images of this shape are (N, H, W, C), not (N, C, H, W): one of the two has 1, 3 or 4 entries, or else
    the fewest.

    Raises:
        DataError: it can't be told.

    >>> channels_last("x", (9, 32, 32, 3)), channels_last("x", (9, 32, 32, 12)), channels_last("x", (9, 12, 32, 32))
    (True, True, False)
    """
    if len(shape) != 4:
        return False
    _, first, height, last = shape
    usual = first in (1, 3, 4), last in (1, 3, 4)
    if usual[0] != usual[1]:
        return usual[1]
    if not usual[0] and first != last and min(first, last) < height:
        return last < first
    raise DataError(
        f"{what} has shape {shape}: the channels may be axis 1 or axis 3; write images wider than their channels"
    )


def check_range(what: str, images: npt.NDArray[Any]) -> None:
    """Refuse images of floats where two or more of the first 64 leave [0, 1]: they were not scaled. One is clipped."""
    if images.ndim > 2 and images.dtype.kind == "f":
        head = np.asarray(images[:_HEAD]).reshape(min(len(images), _HEAD), -1)
        if ((head < 0) | (head > 1)).any(axis=1).sum() > 1:
            raise DataError(f"{what} leave [0, 1]; store bytes, or divide by their public range")


def whole_labels(labels: npt.NDArray[Any], classes: Listed | None = None) -> npt.NDArray[np.int64]:
    """Labels as int64: their places in the list of classes, or as they are. `NO_LABEL` for what is not in the list, or
    no whole number from 0 to 65535.

    >>> whole_labels(np.array([2.0, -1.0, 0.5, np.nan])).clip(-1).tolist()
    [2, -1, -1, -1]
    >>> whole_labels(np.array(["yes", "?"]), Listed(["no", "yes"])).clip(-1).tolist()
    [1, -1]
    """
    if classes is not None:
        places = classes(labels.tolist())
        return np.where(places < 0, NO_LABEL, places)
    good = (labels >= 0) & (labels < 2**16) & (labels == np.floor(labels))
    whole = np.where(good, labels, 0).astype(np.int64)
    whole[~good] = NO_LABEL
    return whole


def largest_label(
    path: Path, labels: npt.NDArray[Any], count: int, private: bool, classes: Listed | None = None
) -> int:
    """The largest of `count` labels, which are whole numbers from 0 on, or of a list of classes.

    Args:
        private: of a training part, where a label that is none stops nothing, unless two or more of the first 64 are.

    Raises:
        DataError: they are not; or, of a test part, they seem to count from 1.
    """
    kinds = "biuf" if classes is None else "biufUSO"
    if labels.shape != (count,) or labels.dtype.kind not in kinds:
        raise DataError(
            f"{path} holds labels of shape {labels.shape} and dtype {labels.dtype} for {count} records; give one whole"
            f" number per record, or {_LIST}"
        )
    largest, found = 0, set[int]()
    missing = int((whole_labels(labels[:_HEAD], classes) < 0).sum()) - 1 if private else 0
    for start in range(0, count, _BLOCK):
        block = whole_labels(labels[start : start + _BLOCK], classes)
        largest = max(largest, int(block.max()))
        if not private:
            missing += int((block < 0).sum())
            found |= set(np.unique(block).tolist())
    if classes is not None:
        if missing > 0:
            raise DataError(f"{path} holds labels that are none of the classes {listing(classes.values)}")
        return len(classes.values) - 1
    if missing > 0:
        raise DataError(f"{path} holds labels that are not whole numbers 0, 1, 2, … (below 65536): {_LIST}")
    if largest > 1 and found == set(range(1, largest + 1)):
        raise DataError(
            f"{path} holds all of the labels 1 to {largest} and no 0. If they count from 1, give --classes"
            f" {_counted(1, largest)} (classes=); if class 0 is not in the test part, {_counted(0, largest)}"
        )
    return largest


def _counted(first: int, last: int) -> str:
    numbers = [str(number) for number in range(first, last + 1)]
    return ",".join(numbers if last < 12 else [*numbers[:3], "…", numbers[-1]])


_LIST = "the public list of the labels, in the order of their numbers: --classes no,yes (classes=)"


def _owners(path: Path, *, count: int) -> Tensor:
    return owner_ids(path, map_npy(path), count=count)


def owner_ids(path: Path, values: npt.NDArray[Any], *, count: int) -> Tensor:
    """(count,) int64, from 0 on: the same number for the same owner. Owners are named by whole numbers or by text.

    >>> owner_ids(Path("table"), np.array(["ann", "bo", "ann"]), count=3)
    tensor([0, 1, 0])
    """
    if values.shape != (count,) or values.dtype.kind not in "biuUS":
        raise DataError(
            f"{path} holds owners of shape {values.shape} and dtype {values.dtype} for {count} records; give one whole"
            " number or one text per record"
        )
    return torch.from_numpy(np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64))
