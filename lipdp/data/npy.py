"""Folders of `.npy` files: memory-mapped, read a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.data.arrays import as_inputs, channels_last, check_range, check_shape
from lipdp.data.files import parsing
from lipdp.data.labels import largest_label, owner_ids, whole_labels
from lipdp.data.listed import Listed
from lipdp.data.split import resize
from lipdp.data.stored import Stored
from lipdp.errors import DataError


@dataclass(frozen=True)
class NpyRecords:
    """Inputs and labels in two memory-mapped `.npy` files."""

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
        x = as_inputs(np.asarray(self._inputs[picked]), last=self.channels_last)
        y = torch.from_numpy(whole_labels(self._labels[picked], self.classes))
        return (x if size is None else resize(x, size)), y


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
    """
    files = {key: path / f"{key}.npy" for key in ("train_x", "train_y", "test_x", "test_y")}
    absent = [file.name for file in files.values() if not file.is_file()]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}")
    inputs = {part: map_npy(files[f"{part}_x"]) for part in ("train", "test")}
    for part, array in inputs.items():
        _check_inputs(files[f"{part}_x"], array)
    train_x, test_x = inputs.values()
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DataError(f"{path}: train_x has inputs of shape {train_x.shape[1:]} but test_x {test_x.shape[1:]}")
    last = channels_last(str(files["train_x"]), train_x.shape)
    largest = 1
    for part, array in inputs.items():
        labels = files[f"{part}_y"]
        largest = max(largest, largest_label(labels, map_npy(labels), len(array), part == "train", classes))
        check_range(f"{files[f'{part}_x']}: the images", array)
    train, test = (NpyRecords(files[f"{part}_x"], files[f"{part}_y"], last, classes) for part in inputs)
    owners = path / f"train_{owner}.npy"
    return Stored(
        name=name or str(path),
        train=train,
        test=test,
        input_shape=tuple(train.read([0])[0].shape[1:]),
        num_classes=largest + 1,
        task="binary" if largest == 1 and train_x.ndim == 2 else "multiclass",
        train_owner=None if owner is None else owner_ids(owners, map_npy(owners), count=len(train_x)),
    )


def _check_inputs(path: Path, array: npt.NDArray[Any]) -> None:
    check_shape(str(path), array.shape)
    images = array.ndim > 2
    fits = array.dtype.kind in "biuf" and array.dtype.itemsize <= 8
    if not fits or (images and array.dtype.kind != "f" and array.dtype != np.uint8):
        raise DataError(
            f"{path} has dtype {array.dtype}; write "
            + ("bytes (uint8), or floats in [0, 1]" if images else "integers or floats of at most 64 bits")
        )
