"""A folder of the user's as a data set, and what to take from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lipdp.data.hub import open_hub
from lipdp.data.imagefolder import is_image_folder, open_image_folder
from lipdp.data.listed import Listed
from lipdp.data.npy import open_npy
from lipdp.data.schema import Schema
from lipdp.data.source import OwnSource
from lipdp.data.stored import DataSplit
from lipdp.data.table_files import SUFFIXES, TableFile
from lipdp.errors import DataError, ParameterError

_ARRAYS, _TABLES, _IMAGES = ".npy files", "tables", "folders of images"


@dataclass(frozen=True)
class Columns:
    """Which columns of a file or folder to use, and what is public of them, if lipdp cannot tell by itself.

    Attributes:
        input, label: columns, of a `datasets` folder. owner: array or column of whose the records are.
        classes: the public list of the labels, where they are not numbered 0, 1, 2, …; a label's number is its place.
        schema: of the columns of a table in a CSV or Parquet file.
    """

    input: str | None = None
    label: str | None = None
    owner: str | None = None
    classes: Sequence[Any] | None = None
    schema: Schema | None = None

    @property
    def listed(self) -> Listed | None:
        """The classes, if they are listed."""
        return None if self.classes is None else Listed(self.classes, "classes")

    @property
    def given(self) -> list[str]:
        """The options that were given."""
        options = {"input": "--input-column", "label": "--label-column", "owner": "--owner-column"}
        names = (field.name for field in fields(self) if getattr(self, field.name) is not None)
        return [options.get(name, f"--{name}") for name in names]


@dataclass(frozen=True)
class Folder(OwnSource):
    """A set of the user's own: `.npy` files, tables, images by class, or what `datasets.DatasetDict.save_to_disk`
    writes."""

    columns: Columns = Columns()

    def read(self, root: Path) -> DataSplit:
        folder, columns = root / self.path, self.columns
        held = _held(folder)
        if held is None:
            raise DataError(
                f"{folder} is no data set: give a folder with train_x.npy, train_y.npy, test_x.npy and test_y.npy; with"
                " train.csv and test.csv (or .parquet); with images in train/CLASS and test/CLASS; or one that"
                " datasets.DatasetDict.save_to_disk wrote, with splits train and test"
            )
        takes, kind = held
        further = [name for name in columns.given if name not in takes]
        if further:
            raise ParameterError(f"{folder} holds {kind}, which have no {' and no '.join(further)} to choose")
        name = str(self.path)
        if kind == _TABLES:
            return TableFile(self.path, columns.schema, columns.owner).read(root)
        if kind == _IMAGES:
            listed = columns.listed
            return open_image_folder(folder, classes=None if listed is None else listed.values, name=name)
        if kind == _ARRAYS:
            return open_npy(folder, owner=columns.owner, classes=columns.listed, name=name)
        names: dict[str, Any] = {"input": columns.input, "label": columns.label, "owner": columns.owner}
        return open_hub(folder, **names, classes=columns.listed, name=name)


def _held(folder: Path) -> tuple[tuple[str, ...], str] | None:
    """The options that say more of a folder, and what it holds; None where that is no data set."""
    if (folder / "dataset_dict.json").is_file():
        return ("--input-column", "--label-column", "--owner-column", "--classes"), "datasets"
    if any(folder.glob("t*_x.npy")):
        return ("--owner-column", "--classes"), _ARRAYS
    if any((folder / f"train{suffix}").is_file() for suffix in SUFFIXES):
        return ("--owner-column", "--schema"), _TABLES
    return (("--classes",), _IMAGES) if is_image_folder(folder) else None


def lies_in(root: Path | None, path: Path) -> bool:
    """Whether `path` in the folder `root` is a set of the user's own."""
    return root is not None and (root / path).is_dir() and _held(root / path) is not None
