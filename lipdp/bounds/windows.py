"""How often an entry is looked at: by the windows of a convolution or a pooling, by padding, by upsampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lipdp.errors import UnsupportedLayerError


def sides(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each axis, given one for all or one each.

    >>> sides(3, 2), sides((1, 2), 2)
    ((3, 3), (1, 2))
    """
    return (value,) * axes if isinstance(value, int) else tuple(value)[:axes]


def source(place: int, size: int, mode: str) -> int | None:
    """Which of the `size` entries of an axis padding shows at `place` (0 is the first entry); None for a constant.

    >>> [source(-2, 5, mode) for mode in ("constant", "circular", "reflect", "replicate")]
    [None, 3, 2, 0]
    """
    if 0 <= place < size:
        return place
    if mode in ("zeros", "constant"):
        return None
    if mode == "circular":
        return place % size
    if mode == "reflect":
        return -place if place < 0 else 2 * (size - 1) - place
    if mode == "replicate":
        return 0 if place < 0 else size - 1
    raise UnsupportedLayerError(
        f"no bound for padding of mode {mode!r}: there are zeros, circular, reflect and replicate"
    )


@lru_cache(maxsize=4096)
def most_visits(windows: int, kernel: int, stride: int, before: int, size: int, mode: str, dilation: int) -> int:
    """The most times that any entry of an axis of `size` is looked at by `windows` windows, counted.

    Window i looks at the places i·stride − before + t·dilation, t < kernel.
    """
    starts = range(-before, -before + windows * stride, stride)
    seen = (source(start + tap * dilation, size, mode) for start in starts for tap in range(kernel))
    return max(Counter(entry for entry in seen if entry is not None).values(), default=0)


def axis_overlap(
    size: int, kernel: int, stride: int, pad_left: int, pad_right: int, *, mode: str = "zeros", dilation: int = 1
) -> int:
    """The most windows that any entry of an axis lies in, counted.

    At most ⌈k/s⌉ for zero padding without dilation, fewer when the axis has fewer windows. Padding that shows an entry
    twice within the reach of a kernel exceeds ⌈k/s⌉, as dilation can, which is why it is counted and not assumed.
    """
    windows = (size + pad_left + pad_right - dilation * (kernel - 1) - 1) // stride + 1
    return most_visits(windows, kernel, stride, pad_left, size, mode, dilation)


@lru_cache(maxsize=4096)
def most_copies(size: int, before: int, after: int, mode: str) -> int:
    """The most copies of any entry in a padded axis (negative padding crops).

    >>> most_copies(4, 2, 0, "reflect"), most_copies(4, 2, 1, "replicate"), most_copies(4, 2, 2, "constant")
    (2, 3, 1)
    """
    return most_visits(size + before + after, 1, 1, before, size, mode, 1)


def whole(numbers: Any) -> bool:
    """Whether a number, or every one of several, is a whole number of at least 1."""
    given = numbers if isinstance(numbers, (tuple, list)) else (numbers,)
    return all(isinstance(n, (int, float)) and n >= 1 and n == int(n) for n in given)
