"""Labels and owners as files hold them: whole numbers, or values of a public list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.batches.records import NO_LABEL
from lipdp.data.arrays import HEAD
from lipdp.data.listed import Listed, listing
from lipdp.errors import DataError

_BLOCK = 1 << 20  # labels at a time
_LIST = "the public list of the labels, in the order of their numbers: --classes no,yes (classes=)"


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
    """
    kinds = "biuf" if classes is None else "biufUSO"
    if labels.shape != (count,) or labels.dtype.kind not in kinds:
        raise DataError(
            f"{path} holds labels of shape {labels.shape} and dtype {labels.dtype} for {count} records; give one whole"
            f" number per record, or {_LIST}"
        )
    largest, found = 0, set[int]()
    missing = int((whole_labels(labels[:HEAD], classes) < 0).sum()) - 1 if private else 0
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
