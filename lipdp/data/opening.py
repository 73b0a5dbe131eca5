"""Data sets from the standard on-disk formats, split into train and test by rules that never look at the data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path

import numpy as np
import torch

from lipdp.data.download import cache_root
from lipdp.data.files import axes_of
from lipdp.data.folders import Columns
from lipdp.data.scaling import Bounding, Clip, Rescale, SignedLog
from lipdp.data.sources import WHERE, source_of
from lipdp.data.split import Split
from lipdp.data.stored import DataSplit
from lipdp.data.table_files import SUFFIXES
from lipdp.errors import DataError, ParameterError


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> Split:
    """Load a data set by name, with a split into train and test that does not depend on the data's values.

    `open_split`, and everything read; a set that stays on disk only where it is small enough for that.

    >>> split = load("digits")
    >>> split.input_shape, len(split.train_x), len(split.test_x), split.num_classes, split.task
    ((1, 8, 8), 1437, 360, 10, 'multiclass')
    """
    return open_split(name, data_dir=data_dir, download=download).in_memory()


def open_split(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    columns: Columns | None = None,
    image_size: Sequence[int] | None = None,
) -> DataSplit:
    """Read a data set by name, or open one that stays on disk, with a split in which one record more moves no other.

    `digits`: the 1797 images of 8 × 8 pixels embedded in scikit-learn, divided by 16; every fifth record (index
    0, 5, 10, …) is for test. `mnist`, `fashion-mnist`, `cifar10`: the published split. `adbench/NAME` and any `.npz`
    without `X_test`, `y_test`: about a fifth is for test, each record by a hash of its own content; no stratification,
    since that would read the labels of others.

    Guarantees: what is returned is whole, finite and consistent, or an error says which file is not. ε protects the
    records of the training part, given the split; it says nothing about the test part.

    Args:
        name: `digits`, `mnist`, `fashion-mnist`, `cifar10`, `adbench/NAME` (`11_donors`, or `donors`), or the path of
            an `.npz` file with numeric arrays `X` and `y`, and optionally `X_test` and `y_test`. There `X` is a table
            (N, d), or images (N, H, W) or (N, C, H, W) as bytes or as floats in [0, 1]; the set of labels is public.
            Or a `.csv`, `.tsv` or `.parquet` file, with `columns=Columns(schema=...)`. Or a folder, which is not read
            but mapped: `train_x.npy`, `train_y.npy`, `test_x.npy`, `test_y.npy` (see `open_npy`), images in
            `train/CLASS` and `test/CLASS`, or what `datasets.DatasetDict.save_to_disk` writes (`open_hub`).
        data_dir: where to look; by default `$LIPDP_DATA`. It holds `MNIST/raw/*-ubyte[.gz]`,
            `FashionMNIST/raw/*-ubyte[.gz]`, `cifar-10-batches-py/*`, `adbench/*.npz`, or the files themselves.
        download: if the files are absent, fetch them from OpenML into that layout (images only), under `data_dir`,
            else `$LIPDP_DATA`, else `$LIPDP_CACHE/data`. CIFAR-10 then has OpenML's order: its first 50 000 records
            are taken for training.
        columns: what to take of a folder or file, and what is public of it.
        image_size: (height, width), a public choice: what images are brought to.

    Raises:
        UnknownNameError: no such data set or table; the message lists those there are.
        DataError: a missing, truncated or corrupt file, or a failing download.
        ParameterError: columns or an image size where there are none.

    >>> open_split("digits", image_size=(4, 4)).input_shape
    (1, 4, 4)
    """
    split = _read(name, data_dir, download, columns or Columns())
    return split if image_size is None else split.resized(image_size)


def is_table(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether a file or folder is known to hold a table: by its kind, or the header of its inputs alone.

    >>> is_table("digits"), is_table("my.csv")
    (False, True)
    """
    if not isinstance(name, str):
        return False
    if name.endswith(SUFFIXES):
        return True
    given = data_dir or os.environ.get("LIPDP_DATA") or ""
    roots = [Path(), *([Path(given).expanduser()] if isinstance(given, (str, os.PathLike)) else [])]
    found = next((path for root in roots if (path := root / Path(name).expanduser()).exists()), Path(name))
    if found.suffix == ".npz":
        return axes_of(found, "X") == 2
    return axes_of(found / "train_x.npy") == 2 or any((found / f"train{suffix}").is_file() for suffix in SUFFIXES)


def _read(name: str, data_dir: str | os.PathLike[str] | None, download: bool, columns: Columns) -> DataSplit:
    given = data_dir or os.environ.get("LIPDP_DATA")
    if given is not None and not isinstance(given, (str, os.PathLike)):
        raise ParameterError(f"data_dir={given!r}: the path of a folder is needed")
    root = Path(given).expanduser() if given else cache_root() / "data"
    source = source_of(name, columns, root=root)
    if not source.needs_folder:
        return source.read(Path())
    if download and not source.present(root):
        source.fetch(root)
    if not root.is_dir():
        if Path(name).suffix in (".npz", *SUFFIXES):
            raise DataError(f"{name} does not exist; give the path of a file that does")
        raise DataError(
            f"{name!r} was not found: " + (f"{root} is not a folder" if given else "no folder was given") + f"; {WHERE}"
        )
    return source.read(root)


# --------------------------------------------------------------------------------------------------- splits derived


def split_validation(split: Split, *, fraction: float = 0.1, seed: int = 0) -> Split:
    """Hold a validation part out of the training part. It takes the place of the test part.

    The `round(fraction · N)` records that come first in a pseudo-random order of the indices fixed by `seed`. Choosing
    hyper-parameters on it keeps the test part unseen, but looks at private records, which ε does not cover.

    Raises:
        ParameterError: a fraction that leaves either part empty.

    >>> part = split_validation(load("digits"), fraction=0.2)
    >>> len(part.train_x), len(part.test_x)
    (1150, 287)
    """
    count = len(split.train_x)
    size = round(fraction * count) if isinstance(fraction, Real) and 0 < fraction < 1 else 0
    if not 0 < size < count:
        raise ParameterError(
            f"a validation part of {fraction} of {count} records: give a number in (0, 1) that leaves both parts some"
        )
    if not isinstance(seed, int) or seed < 0:
        raise ParameterError(f"seed={seed!r}: a whole number of at least 0 is needed")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    held, kept = order[:size].sort().values, order[size:].sort().values
    x, y = split.train_x, split.train_y
    owner = None if split.train_owner is None else split.train_owner[kept]
    return replace(split, train_x=x[kept], train_y=y[kept], test_x=x[held], test_y=y[held], train_owner=owner)


def bound_inputs(split: Split, bounding: Bounding) -> Split:
    """Apply one fixed, data-independent map to the inputs of both parts.

    >>> bound_inputs(load("digits"), Rescale(0.0, 1.0)).train_x.min().item()
    -1.0
    """
    return split.bounded(bounding)


_BINARY_TABLES = ("adbench/8_celeba",)


def default_bounding(split: DataSplit) -> Bounding:
    """The default map. It depends on the kind of input and on the name, never on a value.

    Images: `Clip(0, 1)`, their natural range. Tables: `SignedLog()`, which copes with features of unknown and
    differing scales, except CelebA, whose attributes are 0 or 1 by definition: `Rescale(0, 1)`. The constants were
    chosen once, on the public ADBench tables.

    >>> default_bounding(load("digits"))
    Clip(lower=0.0, upper=1.0)
    """
    if len(split.input_shape) > 1:
        return Clip(0.0, 1.0)
    return Rescale(0.0, 1.0) if split.name in _BINARY_TABLES else SignedLog()
