"""Folders of Hugging Face `datasets`, as `DatasetDict.save_to_disk` writes them: images decoded where they are read."""

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

from lipdp.batches.records import pattern
from lipdp.data.files import parsing
from lipdp.data.images import decoded, usual_mode
from lipdp.data.labels import largest_label, owner_ids, whole_labels
from lipdp.data.listed import Listed
from lipdp.data.stored import Stored, StoredDataset
from lipdp.errors import DataError, ParameterError, RecordError

_KINDS = {"Image": "image", "ClassLabel": "class", "List": "list", "LargeList": "list", "Sequence": "list"}
_REMEDY = "write the folder with DatasetDict.save_to_disk"


@dataclass(frozen=True)
class HubRecords:
    """One part of a saved `datasets` folder; its Arrow files are memory-mapped.

    Images are decoded from the bytes in the folder: a record that names a file or an address instead is none, for it
    could name any.
    """

    path: Path
    x: str
    y: str
    mode: str | None
    classes: Listed | None = None

    @cached_property
    def _table(self) -> Any:
        return open_part(self.path).select_columns([self.x, self.y]).with_format("arrow" if self.mode else "numpy")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        return len(self._table)

    def read(self, indices: Sequence[int], size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The records, decoded."""
        rows = list(map(int, indices))
        with parsing(self.path, _REMEDY):
            return self._numbers(rows) if self.mode is None else self._images(rows, size)

    def _images(self, rows: list[int], size: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        batch = self._table[rows]
        names = [f"{self.path}, record {row}" for row in rows]
        stored = zip(names, batch.column(self.x).to_pylist(), strict=True)
        encoded = ((where, _content(where, one)) for where, one in stored)
        images = decoded(self.path, rows, encoded, self.mode or "RGB", size)
        return images, self._labels(batch.column(self.y).to_numpy())

    def _numbers(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        batch = self._table[rows]
        x = np.asarray(batch[self.x])
        if x.dtype.kind not in "biuf" or x.ndim != 2:
            raise RecordError(f"{self.path}: the records in {self.x!r} are not lists of numbers of one length")
        with np.errstate(over="ignore"):
            return torch.from_numpy(x.astype(np.float32)), self._labels(batch[self.y])

    def _labels(self, values: Any) -> Tensor:
        return torch.from_numpy(whole_labels(np.asarray(values), self.classes))


def _content(where: str, stored: Any) -> bytes:
    content = stored.get("bytes") if isinstance(stored, dict) else None
    if not content:
        raise RecordError(f"{where} holds no image's bytes; {_REMEDY}, which puts them in")
    return bytes(content)


def open_part(path: Path) -> Any:
    """A `datasets.Dataset` on disk, not read."""
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ParameterError(f'{path} needs Hugging Face datasets ({error}): pip install "lipdp[hf]"') from error
    with parsing(path, _REMEDY):
        try:
            part = load_from_disk(str(path), keep_in_memory=False)
        except FileNotFoundError as error:
            raise DataError(f"{path} is not whole ({error}); {_REMEDY}") from error
        part.data.table.validate(full=True)  # Arrow does not look where offsets point, and would read there
        return part


def open_hub(
    path: Path,
    *,
    input: str | None = None,
    label: str | None = None,
    owner: str | None = None,
    classes: Listed | None = None,
    name: str | None = None,
) -> Stored:
    """A `datasets` folder with splits `train` and `test`; labels are read, of the inputs a first one that can be.

    The input is the one column of images, else the one column of lists of numbers; the label the one `ClassLabel`, else
    the one column of integers that is not named. `input`, `label` say otherwise. Images come as grey or RGB, whichever
    most of those looked at are.
    """
    absent = [part for part in ("train", "test") if not (path / part / "state.json").is_file()]
    if absent:
        found = sorted(folder.parent.name for folder in path.glob("*/state.json"))
        raise DataError(
            f"{path} lacks the split {' and '.join(absent)} (it holds {', '.join(found) or 'none'}); {_REMEDY}"
        )
    train, test = open_part(path / "train"), open_part(path / "test")
    if train.features != test.features:
        raise DataError(f"{path}: train and test have other columns")
    columns = train.features
    x = _column(path, columns, input, "input", ("image", "list"))
    others = {name: column for name, column in columns.items() if label or name != owner}
    y = _column(path, others, label, "label", ("class", "integer"))
    if classes is None and _kind(columns[y]) not in ("class", "integer"):
        raise DataError(
            f"{path}: the labels in {y!r} are {columns[y]}, not whole numbers; choose a --label-column, or list the"
            " labels: --classes no,yes (classes=)"
        )
    if not len(train) or not len(test):
        raise DataError(f"{path}: train has {len(train)} records and test {len(test)}; both must have some")
    parts = ((train, True), (test, False))
    largest = max(largest_label(path / y, _values(part, y), len(part), own, classes) for part, own in parts)
    count = largest + 1 if classes else max(2, largest + 1, getattr(columns[y], "num_classes", 0))
    mode = _usual_mode(path / "train", train, x) if _kind(columns[x]) == "image" else None
    records = HubRecords(path / "train", x, y, mode, classes)
    return Stored(
        name=name or str(path),
        train=records,
        test=HubRecords(path / "test", x, y, mode, classes),
        input_shape=tuple(pattern(StoredDataset(records))[0].shape[1:]),
        num_classes=count,
        task="binary" if count == 2 and mode is None else "multiclass",
        train_owner=None if owner is None else _owners(path, train, owner),
    )


def _column(path: Path, columns: Any, given: str | None, what: str, kinds: Sequence[str]) -> str:
    """The column given, else the only one of the first kind that there is."""
    if given is not None:
        if given not in columns:
            raise DataError(f"{path} has no column {given!r}; it has {', '.join(columns)}")
        return given
    for kind in kinds:
        found = [name for name, column in columns.items() if _kind(column) == kind]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise DataError(f"{path}: which column is the {what}? Give --{what}-column, one of {', '.join(columns)}")


def _kind(column: Any) -> str:
    """What a column holds, as far as it may be an input or a label."""
    name = type(column).__name__
    if name == "Value" and column.dtype.lstrip("u").startswith("int"):
        return "integer"
    return _KINDS.get(name, "")


def _values(part: Any, column: str) -> npt.NDArray[Any]:
    return np.asarray(part.select_columns([column]).with_format("arrow")[:].column(0).to_numpy())  # a null is NaN


def _owners(path: Path, train: Any, owner: str) -> Tensor:
    if owner not in train.features:
        raise DataError(f"{path} has no column {owner!r}; it has {', '.join(train.features)}")
    values = _values(train, owner)
    if values.dtype.kind == "f" or any(value is None for value in values):
        raise DataError(f"records of {path} have no {owner!r}; fill it in, or drop them")
    return owner_ids(path / owner, values.astype(str) if values.dtype == object else values, count=len(train))


def _usual_mode(path: Path, part: Any, column: str) -> str:
    inputs = part.select_columns([column]).with_format("arrow")

    def content(row: int) -> bytes:
        return _content(f"{path}, record {row}", inputs[row : row + 1].column(0)[0].as_py())

    return usual_mode(path, len(part), content)
