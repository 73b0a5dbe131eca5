"""What reading many records at once must be: each is read as it would be without the others."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from lipdp.batches.coins import coins
from lipdp.batches.records import read
from lipdp.errors import EngineError

_ROUNDING = 1e-4  # of the largest entry of a record


def check_reading(dataset: Any) -> None:
    """Refuse a data set whose `__getitems__` or `read_batch` lets records of a batch change each other.

    Twice, some records are read alone and together, and must be the same but for rounding. Records that are random
    views can't be compared so: together, they draw in another order. Of these the first is read beside some others and
    beside different ones, from the same seeds, and must be the same. What a data set draws from a generator of its own
    does not repeat, and is not compared.

    >>> class Standardised(torch.utils.data.TensorDataset):
    ...     def __getitems__(self, indices):
    ...         x, y = self.tensors[0][indices], self.tensors[1][indices]
    ...         return list(zip(x - x.mean(0), y))
    >>> check_reading(Standardised(torch.randn(9, 3), torch.zeros(9)))
    Traceback (most recent call last):
    lipdp.errors.EngineError: Standardised reads a record otherwise beside others than alone: ...
    """
    if not _reads_together(dataset):
        return
    chosen = np.random.default_rng(0)
    for seed in range(2):
        picked = sorted(chosen.permutation(len(dataset))[:9].tolist())  # a reader that sorts leaves the first in front
        if len(picked) > 1 and _differs(dataset, picked, seed):
            raise EngineError(
                f"{type(dataset).__name__} reads a record otherwise beside others than alone: one record would change"
                " others, which no bound covers. Its __getitems__ (a transform of Hugging Face's set_transform) or"
                " read_batch must treat each record by itself, without a mean, a rank or a place in the batch"
            )


def _reads_together(dataset: Any) -> bool:
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None)) or callable(getattr(dataset, "read_batch", None))


def _differs(dataset: Any, picked: list[int], seed: int) -> bool:
    """Whether the records picked show that one changes another."""
    found = [_rows(dataset, [index], seed) for index in picked]
    alone = [one for one in found if one is not None]
    together = _rows(dataset, picked, seed)
    if together is None or len(alone) < len(picked):
        return False  # a record can't be read: then they are read one by one
    if not any(one.moved for one in [together, *alone]):
        again = [_rows(dataset, [index], seed) for index in picked]
        repeated = all(map(_Rows.equals, alone, again)) and together.equals(_rows(dataset, picked, seed))
        return repeated and not all(one.equals(together.at(i)) for i, one in enumerate(alone))
    middle = (len(picked) + 1) // 2
    first, others, different = picked[:1], picked[1:middle], picked[middle:]
    before, after = _rows(dataset, first + others, seed), _rows(dataset, first + different[: len(others)], seed)
    if before is None or after is None or not others or not before.equals(_rows(dataset, first + others, seed)):
        return False
    return not before.at(0).equals(after.at(0))


class _Rows:
    """Records as they were read.

    Attributes:
        moved: whether a generator moved on the way.
    """

    def __init__(self, tensors: list[Tensor], *, moved: bool) -> None:
        self._tensors, self.moved = tensors, moved

    def at(self, place: int) -> _Rows:
        return _Rows([t[place : place + 1] for t in self._tensors], moved=self.moved)

    def equals(self, other: _Rows | None) -> bool:
        if other is None or len(self._tensors) != len(other._tensors):
            return False
        return all(map(_near, self._tensors, other._tensors))


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    largest = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=_ROUNDING * largest, equal_nan=True)


def _rows(dataset: Any, indices: list[int], seed: int) -> _Rows | None:
    """The records, read from a seed; None where that is an error. All generators stay as they were."""
    with coins(seed):
        before = _states()
        try:
            return _Rows(_flat(read(dataset, indices)), moved=_states() != before)
        except Exception:  # which record it was is told to nobody: see `records`
            return None


def _states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return numpy[1].tobytes(), numpy[2:], random.getstate(), torch.get_rng_state().numpy().tobytes()


def _flat(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = batch.values()
    return [tensor for part in batch for tensor in _flat(part)] if not isinstance(batch, (str, bytes)) else []
