"""Arrays of inputs as files hold them: tables (N, d), or images of bytes or of floats in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.batches.records import finite
from lipdp.errors import DataError

HEAD = 64
"""Records looked at when a set is opened."""


def check_shape(what: str, shape: tuple[int, ...]) -> None:
    """Refuse what is neither a table nor images, or empty."""
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise DataError(
            f"{what} has shape {shape}; give a table (N, d) or images (N, H, W), (N, C, H, W) or (N, H, W, C), not"
            " empty"
        )


def channels_last(what: str, shape: tuple[int, ...]) -> bool:
    """Whether images of this shape are (N, H, W, C), not (N, C, H, W): one of the two has 1, 3 or 4 entries, or else
    the fewest.

    Raises:
        DataError: it can't be told.
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
    """Refuse images but of bytes where two or more of the first 64 leave [0, 1]: they were not scaled."""
    if images.ndim > 2 and images.dtype != np.uint8:
        head = np.asarray(images[:HEAD]).reshape(min(len(images), HEAD), -1)
        if ((head < 0) | (head > 1)).any(axis=1).sum() > 1:
            raise DataError(f"{what} leave [0, 1]; store bytes, or divide by their public range")


def as_inputs(array: npt.NDArray[Any], *, last: bool) -> Tensor:
    """Float32 tables (n, d) as they are, images (n, C, H, W) in [0, 1]; what is not finite is 0.

    >>> as_inputs(np.array([[[0, 51]]], dtype=np.uint8), last=False).tolist()
    [[[[0.0, 0.20000000298023224]]]]
    """
    images = array.ndim > 2
    scale = np.float32(255 if images and array.dtype == np.uint8 else 1)
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and then 0
        x = finite(torch.from_numpy(np.divide(array, scale, dtype=np.float32, casting="unsafe")))
    x = x.clamp(0, 1) if images else x
    return x[:, None] if x.dim() == 3 else x.movedim(-1, 1).contiguous() if last else x
