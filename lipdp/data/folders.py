"""A folder of the user's as a data set, and what to take from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lipdp.data.hub import open_hub
from lipdp.data.stored import Stored, open_npy
from lipdp.errors import DataError, ParameterError


@dataclass(frozen=True)
class Columns:
    """Which columns of a file or folder to use, if lipdp cannot tell by itself.

    Attributes:
        input, label: columns, of a `datasets` folder. owner: array or column of whose the records are.
    """

    input: str | None = None
    label: str | None = None
    owner: str | None = None


@dataclass(frozen=True)
class Folder:
    """A set that stays on disk: `.npy` files, or what `datasets.DatasetDict.save_to_disk` writes."""

    path: Path
    columns: Columns = Columns()

    @property
    def needs_folder(self) -> bool:
        return not self.path.is_dir()

    def present(self, root: Path) -> bool:
        return (root / self.path).is_dir()

    def fetch(self, root: Path) -> None:
        raise DataError(f"{self.path} is not a data set that can be fetched: give the path of a folder that exists")

    def read(self, root: Path) -> Stored:
        folder, columns = root / self.path, self.columns
        if (folder / "dataset_dict.json").is_file():
            options = {"input": columns.input, "label": columns.label, "owner": columns.owner}
            return open_hub(folder, **options, name=str(self.path))
        if not any(folder.glob("t*_x.npy")):
            raise DataError(
                f"{folder} is no data set: give a folder with train_x.npy, train_y.npy, test_x.npy and test_y.npy, or"
                " one that datasets.DatasetDict.save_to_disk wrote, with splits train and test"
            )
        if columns.input is not None or columns.label is not None:
            raise ParameterError(
                f"{folder} holds .npy files, which have no columns to choose for the input or the label"
            )
        return open_npy(folder, owner=columns.owner, name=str(self.path))


def lies_in(root: Path | None, path: Path) -> bool:
    """Whether `path` in the folder `root` is a set that stays on disk."""
    return root is not None and any((root / path / file).is_file() for file in ("train_x.npy", "dataset_dict.json"))
