r"""What one record can do to a run: move the sum by its own gradient, and nothing else. It can't stop the run.

An error at the step that draws a record tells that the record is there, and no account covers that. So reading is a
fixed map of each record by itself, with an answer for every record:

- an entry of the input that is NaN or infinite is 0 (`finite`);
- a record that can't be read, or has another shape than the others, is the zero input with no label (`NO_LABEL`);
- a target that is none has the loss 0 and the gradient 0 (`lipdp.losses.LipschitzLoss.knows`).

A gradient of norm ≤ Δ follows for every input and every target, so for these. How many records were mapped is shown and
stored nowhere. What shows the machine to be broken stops the run all the same (`is_of_the_machine`): what a record
holds can't cause it. If all of `_LOST` records or more in a batch can't be read, the machine is taken to be broken too.

Before the first step nothing is released. Then up to `LOOKED_AT` records are looked at (`look`), and two or more among
them that can't be read, or have another shape, are an error: the data set is wrong, not a record of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lipdp.batches.inputs import describe, finite
from lipdp.errors import DataError, LipdpError, RecordError

LOOKED_AT = 16
"""Records looked at before the first step."""

_LOST = 8


def no_label(dtype: torch.dtype) -> float | int | bool:
    """The target of a record that has none: NaN, or the whole number farthest from every label."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype is torch.bool:
        return False
    info = torch.iinfo(dtype)
    return info.min if info.min < 0 else info.max


NO_LABEL = int(no_label(torch.int64))


def finite_inputs(batch: Any) -> Any:
    """A collated batch with `finite` inputs: its first part, where it has several. Targets are left to the loss."""
    if isinstance(batch, (list, tuple)):
        parts = [_finite(part) if i == 0 else part for i, part in enumerate(batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return _finite(batch)


def _finite(part: Any) -> Any:
    if isinstance(part, Tensor):
        return finite(part)
    if isinstance(part, dict):
        return {key: _finite(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
        return type(part)(map(_finite, part))
    return part


# ------------------------------------------------------------------------------------------------------------ reading


def read(dataset: Dataset[Any], indices: Sequence[int]) -> Any:
    """Records of a map-style data set, at least one, collated, a row each; raises what the data set raises."""
    picked = list(indices)
    whole = getattr(dataset, "read_batch", None)  # what `default_collate` would make of them, at once
    many = getattr(dataset, "__getitems__", None)
    if callable(whole):
        batch = whole(picked)
    else:
        batch = default_collate(many(picked) if callable(many) else [dataset[index] for index in picked])
    counts: list[int] = []
    _shapes(batch, lambda tensor: counts.append(len(tensor) if tensor.ndim else 0))
    if set(counts) - {len(picked)}:  # what a record would be, or how often, nobody could tell
        raise RecordError(f"{type(dataset).__name__} gave {max(counts)} rows where {len(picked)} were asked for")
    return batch


def read_mapped(dataset: Dataset[Any], indices: Sequence[int], like: Any = None) -> Any:
    """`read`, where a record that can't be read, or is of another shape, is the zero record without a label.

    Args:
        like: a batch of the right shapes and dtypes; by default `pattern`.

    Raises:
        Whatever `is_of_the_machine`; the last error, where no record of `_LOST` or more can be read.
    """
    try:
        batch = read(dataset, indices)
        if like is None or _shapes(batch) == _shapes(like):
            return batch if like is None else _cast(batch, like)
    except Exception as error:
        if is_of_the_machine(error):
            raise
    like = pattern(dataset) if like is None else like
    found = {place: _read_one(dataset, index) for place, index in enumerate(indices)}
    fitting = {p: one for p, one in found.items() if not isinstance(one, Exception) and _shapes(one) == _shapes(like)}
    if not fitting and len(found) >= _LOST:
        errors = [one for one in found.values() if isinstance(one, Exception)]
        raise errors[-1] if errors else DataError(f"{len(found)} records in a row are of another shape than most")
    return _filled(like, fitting, len(found))


def _read_one(dataset: Dataset[Any], index: int) -> Any:
    """A batch of one record, or the error that it raises."""
    try:
        return read(dataset, [index])
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return error


def is_of_the_machine(error: Exception) -> bool:
    """Whether no record can cause it: the system refused (a disk, permissions, memory), or this library did.

    >>> is_of_the_machine(OSError(5, "Input/output error")), is_of_the_machine(OSError("image file is truncated"))
    (True, False)
    """
    if isinstance(error, RecordError):
        return False
    if isinstance(error, (LipdpError, MemoryError, torch.OutOfMemoryError)):
        return True
    return (isinstance(error, OSError) and error.errno is not None) or "can't allocate memory" in str(error)


def looked_at(count: int) -> list[int]:
    """The first four of `count` records, and others over the whole: `LOOKED_AT` at most.

    >>> looked_at(3), looked_at(1000)[:6]
    ([0, 1, 2], [0, 1, 2, 3, 90, 181])
    """
    first = min(4, count)
    rest = LOOKED_AT - first
    return sorted({*range(first), *(i * (count - 1) // (rest - 1) for i in range(rest) if count)})


def look(dataset: Dataset[Any]) -> list[Any]:
    """Batches of one record each, of those looked at before the first step: the commonest shape, one dtype.

    Raises:
        What the data set raises, or DataError: two or more can't be read, or have another shape; or all of them.
    """
    with torch.random.fork_rng(devices=[]):
        found = [_read_one(dataset, index) for index in looked_at(len(dataset))]  # type: ignore[arg-type]
    errors = [one for one in found if isinstance(one, Exception)]
    batches = [one for one in found if not isinstance(one, Exception)]
    if errors and (len(errors) > 1 or not batches):
        raise _explained(dataset, errors[0])
    shapes = Counter(map(_shapes, batches)).most_common()
    if sum(times for _, times in shapes[1:]) + len(errors) > 1:
        raise DataError(
            f"the records have different shapes (such as {_spelled(shapes[0][0])} and {_spelled(shapes[-1][0])}): bring"
            " all to one, by a map that looks at one record alone (a resize: --image-size; a crop, padding to a fixed"
            " size)"
        )
    batches = [batch for batch in batches if _shapes(batch) == shapes[0][0]]
    common = Counter(map(_dtypes, batches)).most_common(1)[0][0]
    like = next(batch for batch in batches if _dtypes(batch) == common)
    return [_cast(batch, like) for batch in batches]


def _explained(dataset: Dataset[Any], error: Exception) -> Exception:
    """The error of the data set itself; of a record that torch can't collate, what it is."""
    if not isinstance(error, TypeError):
        return error
    try:
        record = dataset[looked_at(len(dataset))[0]]  # type: ignore[arg-type]
    except Exception:
        return error
    return DataError(
        f"the dataset must hold (input, target) pairs of tensors, arrays or numbers; record 0 is {describe(record)}"
    )


def pattern(dataset: Dataset[Any]) -> Any:
    """A batch of one, of the commonest shape among the records looked at; raises an error where none can be read.

    One record, the first one too, does not decide the shape where the others are alike.
    """
    found = list(_looks(dataset))
    batches = [one for one in found if not isinstance(one, Exception)]
    if not batches:
        raise found[-1] if found else DataError("the data set has no records")
    common = Counter(map(_shapes, batches)).most_common(1)[0][0]
    return next(one for one in batches if _shapes(one) == common)


def _looks(dataset: Dataset[Any]) -> Iterator[Any]:
    for index in looked_at(len(dataset)):  # type: ignore[arg-type]
        yield _read_one(dataset, index)


# ------------------------------------------------------------------------------------------------------------- shapes


def _shapes(batch: Any, of: Callable[[Tensor], Any] = lambda tensor: tuple(tensor.shape[1:])) -> Any:
    """The shapes (or what `of` says) of a record's parts; hashable."""
    if isinstance(batch, Tensor):
        return of(batch)
    if isinstance(batch, Mapping):
        return "dict", tuple((key, _shapes(value, of)) for key, value in sorted(batch.items()))
    if isinstance(batch, (list, tuple)) and not any(isinstance(part, str) for part in batch):
        return "parts", *(_shapes(part, of) for part in batch)
    return type(batch).__name__


def _dtypes(batch: Any) -> Any:
    return _shapes(batch, lambda tensor: tensor.dtype)


def _spelled(shapes: Any) -> str:
    parts = shapes[1:] if isinstance(shapes, tuple) and shapes[:1] == ("parts",) else (shapes,)
    return ", ".join(map(str, parts))


def _cast(batch: Any, like: Any) -> Any:
    """The batch in the dtypes of `like`, which one record of another must not change for all."""
    if isinstance(batch, Tensor):
        return batch.to(like.dtype)
    if isinstance(batch, dict):
        return {key: _cast(value, like[key]) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(map(_cast, batch, like)) if len(batch) == len(like) else batch
    return batch


def filled_up(batch: Any, rows: int) -> Any:
    """A collated batch of (input, target, …) with zero records without a label after its own, `rows` in all.

    >>> x, y = filled_up((torch.ones(1, 2), torch.tensor([3])), 2)
    >>> x.tolist(), y[1] == NO_LABEL
    ([[1.0, 1.0], [0.0, 0.0]], tensor(True))
    """
    missing = rows - len(batch[0])
    return batch if not missing else _joined(batch, _filled(batch, {}, missing))


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {key: _joined(value, second[key]) for key, value in first.items()}
    return tuple(_joined(*parts) for parts in zip(first, second, strict=True))


def _filled(like: Any, found: Mapping[int, Any], count: int, *, target: bool = False) -> Any:
    """A batch of `count` records: those found in their places, zero records without a label elsewhere."""
    if isinstance(like, Tensor):
        rows = like.new_full((count, *like.shape[1:]), no_label(like.dtype) if target else 0)
        for place, one in found.items():
            rows[place] = one[0]
        return rows
    if isinstance(like, Mapping):
        return {
            key: _filled(value, {p: one[key] for p, one in found.items()}, count, target=target)
            for key, value in like.items()
        }
    if isinstance(like, (list, tuple)):
        return [
            _filled(part, {p: one[i] for p, one in found.items()}, count, target=target or i > 0)
            for i, part in enumerate(like)
        ]
    raise DataError(
        f"a record holds a {type(like).__name__}; records must be tensors, arrays or numbers to be trained on"
    )
