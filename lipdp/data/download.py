"""Fetching image sets from OpenML, when the user asks for it with `--download`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lipdp.errors import DataError


def cache_root() -> Path:
    """Folder for downloads and cached features: `$LIPDP_CACHE`, else `~/.cache/lipdp`."""
    return Path(os.environ.get("LIPDP_CACHE") or "~/.cache/lipdp").expanduser()


def fetch_images(openml_name: str, *, count: int, pixels: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Fetch one image set of bytes from OpenML with scikit-learn, checked before anything is kept.

    Args:
        openml_name: `mnist_784`, `Fashion-MNIST` or `CIFAR_10`, version 1.
        count, pixels: what the set must have: records and values per record; its labels are 0..9.

    Returns:
        Images (count, pixels) and labels (count,), in OpenML's order.
    """
    from sklearn import datasets  # heavy, and only here

    parser = "auto" if importlib.util.find_spec("pandas") else "liac-arff"
    home = str(cache_root() / "openml")
    try:
        answer: Any = datasets.fetch_openml(openml_name, version=1, as_frame=False, parser=parser, data_home=home)
        values, labels = np.asarray(answer.data), np.asarray(answer.target).astype(np.int64)
        with np.errstate(invalid="ignore"):
            images = values.astype(np.uint8)
    except Exception as error:  # the network, the server, the disk and the parser may all fail, each in its own way
        raise DataError(
            f"fetching {openml_name!r} from OpenML failed ({type(error).__name__}: {error}); check the network, or get "
            "the files elsewhere and pass --data-dir"
        ) from error
    if images.shape != (count, pixels) or labels.shape != (count,):
        raise DataError(
            f"OpenML sent {openml_name!r} with data {images.shape} and labels {labels.shape}, not ({count}, {pixels}) "
            f"and ({count},); delete {home} and try again"
        )
    if not np.array_equal(images, values) or labels.min() < 0 or labels.max() > 9:
        raise DataError(
            f"OpenML sent {openml_name!r} with pixels outside 0..255 or labels outside 0..9; delete {home} and try"
            " again"
        )
    return images, labels
