"""The data sets lipdp knows: where each lies on disk, how it is read and checked, how it is fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.data.arrays import as_inputs, channels_last, check_range, check_shape
from lipdp.data.cifar import read_cifar_batch, write_cifar_batch
from lipdp.data.download import fetch_images
from lipdp.data.files import REMEDY, read_idx, read_npz, write_idx
from lipdp.data.folders import Columns, Folder, lies_in
from lipdp.data.labels import largest_label, owner_ids, whole_labels
from lipdp.data.listed import Listed
from lipdp.data.source import OwnSource, Source
from lipdp.data.split import Split, Task, split_off
from lipdp.data.table_files import SUFFIXES, TableFile
from lipdp.errors import DataError, ParameterError, UnknownNameError

Array = npt.NDArray[Any]

WHERE = (
    "pass --data-dir DIR (data_dir=...) or set LIPDP_DATA to a folder in the layout that torchvision and ADBench leave "
    "on disk, or pass --download (download=True) to fetch mnist, fashion-mnist or cifar10"
)


# ---------------------------------------------------------------------------------------------------- arrays checked


def _images(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Bytes to float32 in [0, 1], in one allocation."""
    return torch.from_numpy(np.divide(pixels, np.float32(255), dtype=np.float32))


def _inputs(what: str, array: Array) -> Tensor:
    check_shape(what, array.shape)
    check_range(what, array)
    return as_inputs(array, last=channels_last(what, array.shape))


# ---------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Digits(Source):
    """The digits embedded in scikit-learn."""

    needs_folder = False

    def read(self, root: Path) -> Split:
        from sklearn.datasets import load_digits  # heavy, and only here

        digits: Any = load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
        y = torch.from_numpy(digits.target.astype(np.int64))
        test = torch.arange(len(x)) % 5 == 0
        return Split("digits", x[~test], y[~test], x[test], y[test], 10, "multiclass")


@dataclass(frozen=True)
class _Idx(Source):
    """Four IDX files, as torchvision keeps them in `FOLDER/raw`."""

    name: str
    folder: str
    openml: str

    PARTS = (
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    )

    def _folders(self, root: Path) -> tuple[Path, ...]:
        return root / self.folder / "raw", root / self.folder, root / self.name, root

    def _absent(self, folder: Path) -> list[str]:
        return [file for part in self.PARTS for file in part if _plain_or_gzipped(folder / file) is None]

    def present(self, root: Path) -> bool:
        return any(not self._absent(folder) for folder in self._folders(root))

    def fetch(self, root: Path) -> None:
        images, labels = fetch_images(self.openml, count=70_000, pixels=784)
        for part, records in zip(self.PARTS, (slice(0, 60_000), slice(60_000, None)), strict=True):
            write_idx(root / self.folder / "raw" / part[0], images[records].reshape(-1, 28, 28))
            write_idx(root / self.folder / "raw" / part[1], labels[records].astype(np.uint8))

    def read(self, root: Path) -> Split:
        folders = self._folders(root)
        folder = min(folders, key=lambda candidate: len(self._absent(candidate)))  # the first of the most complete
        absent = self._absent(folder)
        if len(absent) == 4:
            raise DataError(f"{self.name}: {absent[0]}[.gz] is in none of {', '.join(map(str, folders))}; {WHERE}")
        if absent:
            raise DataError(f"{self.name}: {folder} lacks {', '.join(absent)} (or .gz); complete it, or {WHERE}")
        (train_x, train_y), (test_x, test_y) = (self._part(folder, *part) for part in self.PARTS)
        return Split(self.name, train_x, train_y, test_x, test_y, num_classes=10, task="multiclass")

    def _part(self, folder: Path, images: str, labels: str) -> tuple[Tensor, Tensor]:
        images_path, labels_path = (_plain_or_gzipped(folder / file) or folder / file for file in (images, labels))
        pixels, y = read_idx(images_path, (28, 28)), read_idx(labels_path, ())
        if len(y) != len(pixels):
            raise DataError(f"{labels_path} has shape {y.shape} for {len(pixels)} records; give one label per record")
        if y.max() > 9:
            raise DataError(f"{labels_path} holds labels that are not integers in 0..9; {REMEDY}")
        return _images(pixels[:, None]), torch.from_numpy(y.astype(np.int64))


def _plain_or_gzipped(path: Path) -> Path | None:
    return next(filter(Path.is_file, (path, path.with_name(f"{path.name}.gz"))), None)


@dataclass(frozen=True)
class _Cifar10(Source):
    """Five training batches and a test batch, as torchvision keeps them in `cifar-10-batches-py`."""

    FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

    def _folder(self, root: Path) -> Path:
        folder = root / "cifar-10-batches-py"
        return root if not folder.is_dir() and len(self._absent(root)) < len(self.FILES) else folder

    def _absent(self, folder: Path) -> list[str]:
        return [file for file in self.FILES if not (folder / file).is_file()]

    def present(self, root: Path) -> bool:
        return not self._absent(self._folder(root))

    def fetch(self, root: Path) -> None:
        images, labels = fetch_images("CIFAR_10", count=60_000, pixels=3072)
        for i, file in enumerate(self.FILES):
            part = slice(10_000 * i, 10_000 * (i + 1))
            write_cifar_batch(root / "cifar-10-batches-py" / file, images[part], labels[part])

    def read(self, root: Path) -> Split:
        folder = self._folder(root)
        absent = self._absent(folder)
        if absent:
            raise DataError(f"cifar10: {folder} lacks {', '.join(absent)}; complete it, or {WHERE}")
        batches = [read_cifar_batch(folder / file) for file in self.FILES]
        train_x = _images(np.concatenate([images for images, _ in batches[:-1]]))
        train_y = torch.from_numpy(np.concatenate([labels for _, labels in batches[:-1]]))
        test_x, test_y = _images(batches[-1][0]), torch.from_numpy(batches[-1][1])
        return Split("cifar10", train_x, train_y, test_x, test_y, num_classes=10, task="multiclass")


@dataclass(frozen=True)
class NpzFile(OwnSource):
    """Arrays X and y, optionally X_test and y_test, in one npz file; and whose the records of X are, under any name.

    `classes`: the public list of the labels, where they are not numbered 0, 1, 2, ….
    """

    owner: str | None = None
    classes: Listed | None = None

    def read(self, root: Path) -> Split:
        path = root / self.path
        named = () if self.owner is None else (self.owner,)
        arrays = read_npz(path, ("X", "y", *named), ("X_test", "y_test"), text=("y", "y_test", *named))
        if ("X_test" in arrays) != ("y_test" in arrays):
            raise DataError(f"{path} holds only one of X_test and y_test; give both or neither")
        x, y = _inputs(f"{path}: X", arrays["X"]), arrays["y"]
        largest = largest_label(path / "y", y, len(x), True, self.classes)
        owner = None if self.owner is None else owner_ids(path, arrays[self.owner], count=len(x))
        if "X_test" in arrays:
            test_x, test_y, labels = _inputs(f"{path}: X_test", arrays["X_test"]), arrays["y_test"], path / "y_test"
            if test_x.shape[1:] != x.shape[1:]:
                raise DataError(f"{path}: X has inputs of {tuple(x.shape[1:])} but X_test {tuple(test_x.shape[1:])}")
        else:
            whose = None if self.owner is None else arrays[self.owner]
            train, test = split_off(path, x.numpy(), whole_labels(y, self.classes), whose)
            x, y, test_x, test_y, labels = x[train], y[train], x[test], y[test], path / "y"
            owner = None if owner is None else owner[torch.from_numpy(train)]
        largest = max(largest, largest_label(labels, test_y, len(test_x), False, self.classes))
        classes = max(2, largest + 1)  # the set of labels is a public fact
        task: Task = "binary" if classes == 2 and x.ndim == 2 else "multiclass"
        places = [torch.from_numpy(whole_labels(part, self.classes)) for part in (y, test_y)]
        return Split(str(self.path), x, places[0], test_x, places[1], classes, task, train_owner=owner)


@dataclass(frozen=True)
class _AdBench(Source):
    """One table of ADBench, `NUMBER_NAME.npz`, asked for with or without its number."""

    table: str

    def _tables(self, root: Path) -> dict[str, Path]:
        folder = root / "adbench" if (root / "adbench").is_dir() else root
        return {path.stem: path for path in sorted(folder.glob("[0-9]*_*.npz"))}

    def _matches(self, stem: str) -> bool:
        name = re.sub(r"^\d+_", "", stem)
        return self.table.lower() in {alias.lower() for alias in (stem, name, name.split(".")[0])}

    def present(self, root: Path) -> bool:
        return any(map(self._matches, self._tables(root)))

    def fetch(self, root: Path) -> None:
        raise DataError(
            f"adbench/{self.table} cannot be fetched from here: copy the .npz files of ADBench's `Classical` folder "
            f"(https://github.com/Minqi824/ADBench) to {root / 'adbench'}"
        )

    def read(self, root: Path) -> Split:
        tables = self._tables(root)
        if not tables:
            raise DataError(f"adbench/{self.table}: no tables NUMBER_NAME.npz in {root / 'adbench'} or {root}; {WHERE}")
        found = [stem for stem in tables if self._matches(stem)]
        if len(found) != 1:
            raise UnknownNameError("ADBench table", self.table, found or tables)
        split = NpzFile(tables[found[0]]).read(root)
        if split.num_classes != 2 or len(split.input_shape) != 1:
            raise DataError(f"{tables[found[0]]} is not a table with labels 0 and 1; give it by its path")
        return replace(split, name=f"adbench/{found[0]}")


_SOURCES: dict[str, Source] = {
    "digits": Digits(),
    "mnist": _Idx("mnist", "MNIST", "mnist_784"),
    "fashion-mnist": _Idx("fashion-mnist", "FashionMNIST", "Fashion-MNIST"),
    "cifar10": _Cifar10(),
}


DATASETS = (*_SOURCES, "adbench/NAME", "FILE.npz", "FILE.csv", "FILE.parquet", "DIR")
"""The names `open_split` takes; the last five stand for a table's name, a file's path and a folder's."""


def source_of(name: str, columns: Columns, *, root: Path | None = None) -> Source:
    """The source of the data set `name`; a folder may be in `root`. UnknownNameError where there is none."""
    if not isinstance(name, str) or not name:
        raise UnknownNameError("data set", name, DATASETS)
    path = Path(name).expanduser()
    known = name in _SOURCES or name.startswith("adbench/")
    unnamed = columns.input is None and columns.label is None
    if not known and unnamed and path.suffix in SUFFIXES and columns.classes is None:
        return TableFile(path, columns.schema, columns.owner)
    if not known and unnamed and name.endswith(".npz") and columns.schema is None:
        return NpzFile(path, columns.owner, columns.listed)
    suffixed = path.suffix in (".npz", *SUFFIXES)
    if not known and not suffixed and (path.is_dir() or lies_in(root, path) or len(path.parts) > 1):
        return Folder(path, columns)
    if columns != Columns():
        raise ParameterError(f"{name} has no {' and no '.join(columns.given)} to choose: leave it out")
    if name in _SOURCES:
        return _SOURCES[name]
    if known:
        return _AdBench(name.removeprefix("adbench/").removesuffix(".npz"))
    raise UnknownNameError("data set", name, DATASETS)
