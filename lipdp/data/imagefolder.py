"""Folders of images, a folder for each class: `train/CLASS/*.png` and `test/CLASS/*.png`, or `CLASS/*.png` alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.batches.records import pattern
from lipdp.data.images import decoded, usual_mode
from lipdp.data.listed import listing
from lipdp.data.split import held_out
from lipdp.data.stored import Stored, StoredDataset
from lipdp.errors import DataError

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_TESTS = ("test", "val", "valid", "validation")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """One part of a folder: each image is decoded where it is read."""

    path: Path
    files: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]
    mode: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int], size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The records, decoded."""
        rows = list(map(int, indices))
        files = (self.path / str(self.files[row]) for row in rows)
        images = decoded(self.path, rows, ((str(file), file.read_bytes()) for file in files), self.mode, size)
        return images, torch.from_numpy(self.labels[rows])


def is_image_folder(path: Path) -> bool:
    """Whether a folder, or its part `train`, has folders with images; the first image that is found decides."""
    return any(_classes(part) for part in (path / "train", path))


def open_image_folder(path: Path, *, classes: Sequence[str] | None = None, name: str | None = None) -> Stored:
    """A folder of images, not read whole: the names of the files are looked at, and a few images.

    Classes are the names of the folders in their order, or a public list. Without a part for test, about a fifth of the
    images, by a hash of their names, is for test. Images come as grey or RGB, whichever most of those looked at are.
    """
    divided = bool(_classes(path / "train"))
    train = path / "train" if divided else path
    known = list(map(str, classes or _classes(train)))
    files, labels = _listed(train, known)
    if divided:
        found = [path / part for part in _TESTS if (path / part).is_dir()]
        if not found:
            raise DataError(f"{path} has a folder train and none of {', '.join(_TESTS)}; one is needed")
        parts = [(train, files, labels), (found[0], *_listed(found[0], known))]
    else:
        tested = held_out(map(os.fsencode, files))
        parts = [(path, files[part], labels[part]) for part in (~tested, tested)]
    for folder, held, _ in parts:
        if not len(held):
            raise DataError(f"{folder} holds too few images to train and test on")
    mode = usual_mode(train, len(parts[0][1]), lambda row: (train / str(parts[0][1][row])).read_bytes())
    records, test = (ImageFiles(*part, mode) for part in parts)
    return Stored(
        name=name or str(path),
        train=records,
        test=test,
        input_shape=tuple(pattern(StoredDataset(records))[0].shape[1:]),
        num_classes=max(2, len(known)),
        task="multiclass",
    )


def _classes(folder: Path) -> list[str]:
    """The names of the folders with images, in their order."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [name for name in names if next(_images(folder / name), None) is not None]


def _images(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where) / n for n in sorted(names) if n.lower().endswith(_ENDINGS) and not n.startswith("."))


def _listed(folder: Path, classes: Sequence[str]) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """The files of a part, class by class, and their labels."""
    further = sorted(set(_classes(folder)) - set(classes))
    if further:
        raise DataError(
            f"{folder} has the folders {listing(further)}, which are none of the classes {listing(classes)}"
        )
    found = [[str(file.relative_to(folder)) for file in _images(folder / name)] for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    return np.array([file for files in found for file in files], dtype=str), labels.astype(np.int64)
