"""Which records of a data set are one record: by index, by object and by place in memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from lipdp.batches.inputs import Records
from lipdp.errors import EngineError

Group: TypeAlias = Sequence[int] | Tensor | np.ndarray


def check_copies(dataset: Any, group: Group | None = None) -> None:
    """Refuse a data set that holds a record several times: ε would be that of one copy, k copies have k ε.

    Looks at what `Origins` knows. Copies in memory of their own can't be told from records that are alike.

    >>> check_copies(torch.utils.data.Subset(TensorDataset(torch.zeros(5, 2), torch.zeros(5)), [0, 1, 1]))
    Traceback (most recent call last):
    lipdp.errors.EngineError: the data set holds one record at 1 and at 2: ε would be that of one copy. Give...
    """
    if Origins.knows(dataset) or _shares_memory(dataset):
        _refuse(Origins(dataset).rows, group, "Rows that overlap in memory (windows of a series) count as one record")


def check_index(table: Any, group: Group | None = None) -> None:
    """Refuse a pandas table with a label twice in its index, as after sampling with replacement."""
    if _is_of("pandas", "DataFrame", table) and (group is None or len(group) == len(table)):
        labels = table.index.factorize(use_na_sentinel=False)[0]
        _refuse(labels[:, None], group, "They have one label in the index; else reset_index(drop=True)")


def _refuse(origins: np.ndarray, group: Group | None, note: str) -> None:
    order = np.lexsort(origins.T)
    again = (origins[order[1:]] == origins[order[:-1]]).all(axis=1)
    if group is not None:
        ids = np.asarray(group.cpu() if isinstance(group, Tensor) else group)[order]
        again &= ids[1:] != ids[:-1]
    if again.any():
        place = int(again.argmax())
        raise EngineError(
            f"the data set holds one record at {order[place]} and at {order[place + 1]}: ε would be that of one copy."
            f" Give each record once, or pass group= with one owner for all copies of a record. {note}"
        )


class Origins:
    """Where the records of a data set come from.

    Looks through `Subset`, `ConcatDataset`, `StackDataset`, lists, Hugging Face's tables and a `TensorDataset`'s
    memory, in which rows that overlap are one.

    Attributes:
        rows: (N, k) numbers: the same where two records are one.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._known: dict[Any, int] = {}
        self._tables: dict[int, Any] = {}  # of Hugging Face, which do not change
        self._widths: dict[int, int] = {}
        self.rows = self._of(dataset, np.arange(len(dataset)))

    @staticmethod
    def knows(dataset: Any) -> bool:
        """Whether there is more to look at than an object and its indices."""
        known = (Subset, ConcatDataset, StackDataset, Records, list, tuple)
        return isinstance(dataset, known) or _is_of("datasets", "Dataset", dataset)

    def check(self, indices: np.ndarray) -> None:
        """Refuse records that come from elsewhere than at first."""
        if not np.array_equal(self._of(self._dataset, indices), self.rows[indices]):
            raise EngineError(
                "the data set has other records in its places than at make_private (were Subset.indices changed?): one"
                " could count several times, and which ones could follow from the records. Leave the data set as it is;"
                " batches are drawn afresh at every step"
            )

    def _of(self, dataset: Any, indices: np.ndarray) -> np.ndarray:
        if isinstance(dataset, Subset):
            held = dataset.indices
            whole = isinstance(held, (Tensor, np.ndarray)) or 8 * len(indices) > len(held)
            inner = np.asarray(held)[indices] if whole else np.asarray([held[i] for i in indices])
            if inner.dtype.kind in "iu" or not len(inner):
                inner = inner.astype(np.int64)
                return self._of(dataset.dataset, np.where(inner < 0, inner + length(dataset.dataset), inner))
            return self._numbered(dataset, [self._number((id(dataset), key)) for key in inner.tolist()])
        if isinstance(dataset, ConcatDataset):
            return self._concatenated(dataset, indices)
        if isinstance(dataset, Records):
            return self._of(dataset.dataset, indices)
        if isinstance(dataset, StackDataset):
            parts = dataset.datasets
            columns = parts.values() if isinstance(parts, dict) else parts
            return np.concatenate([self._of(column, indices) for column in columns], axis=1)
        if type(dataset) in (list, tuple):
            return self._numbered(None, [self._number(id(dataset[i])) for i in indices])
        if _is_of("datasets", "Dataset", dataset):
            return self._of_table(dataset, indices)
        if type(dataset) is TensorDataset and dataset.tensors[0].layout is torch.strided:
            x = dataset.tensors[0]
            step = 0 if _shares_memory(dataset) else x.stride(0) * x.element_size()
            if x.numel():
                return np.stack([np.full(len(indices), -2), x.data_ptr() + indices * step], axis=1)
        return self._numbered(dataset, indices)

    def _concatenated(self, dataset: ConcatDataset[Any], indices: np.ndarray) -> np.ndarray:
        ends = np.asarray(dataset.cumulative_sizes)
        part = np.searchsorted(ends, indices, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        pieces = {i: self._of(dataset.datasets[i], indices[part == i] - starts[i]) for i in np.unique(part)}
        if id(dataset) not in self._widths:
            ones = [self._of(part, np.zeros(1, np.int64)) for part in dataset.datasets if length(part)]
            self._widths[id(dataset)] = max((one.shape[1] for one in ones), default=0)
        width = self._widths[id(dataset)]
        rows = np.full((len(indices), width), -1)
        for i, piece in pieces.items():
            rows[part == i, : piece.shape[1]] = piece
        return rows

    def _of_table(self, dataset: Any, indices: np.ndarray) -> np.ndarray:
        """Of Hugging Face: rows of Arrow's buffers, which `select` and `concatenate_datasets` share."""
        if id(dataset) not in self._tables:
            picked = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
            chunks = dataset.data.column(0).chunks if dataset.data.num_columns else []
            addresses = [[b.address for b in chunk.buffers() if b is not None][:1] or [id(chunk)] for chunk in chunks]
            starts = np.cumsum([0, *map(len, chunks)])
            offsets = np.asarray([chunk.offset for chunk in chunks], dtype=np.int64)
            self._tables[id(dataset)] = picked, starts, offsets, np.asarray(addresses, dtype=np.int64).reshape(-1)
        picked, starts, offsets, addresses = self._tables[id(dataset)]
        places = indices if picked is None else picked[indices].astype(np.int64)
        chunk = np.searchsorted(starts[1:], places, side="right")
        return np.stack([addresses[chunk], places - starts[chunk] + offsets[chunk]], axis=1)

    def _numbered(self, dataset: Any, numbers: Any) -> np.ndarray:
        own = -3 if dataset is None else self._number(id(dataset))
        numbers = np.asarray(numbers, dtype=np.int64)
        return np.stack([np.full(len(numbers), own), numbers], axis=1)

    def _number(self, key: Any) -> int:
        return self._known.setdefault(key, len(self._known))


def _shares_memory(dataset: Any) -> bool:
    """Whether rows of a `TensorDataset`'s inputs overlap in memory: an expanded record, windows of one series."""
    if type(dataset) is not TensorDataset or dataset.tensors[0].layout is not torch.strided:
        return False
    x = dataset.tensors[0]
    if len(x) < 2 or not x.numel():
        return False
    step, inner = x.stride(0), [(s, n) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True) if s and n > 1]
    within = sum(s * (n - 1) for s, n in inner if s <= step)
    beyond = min((s for s, _ in inner if s > step), default=None)
    return step <= within or (beyond is not None and step * (len(x) - 1) + within >= beyond)


def roots(dataset: Any, indices: np.ndarray | None = None) -> list[tuple[Any, np.ndarray]]:
    """The data sets behind `Subset`, `ConcatDataset` and fields, and which of their records are meant."""
    indices = np.arange(len(dataset)) if indices is None else indices
    if isinstance(dataset, Subset):
        inner = np.asarray(dataset.indices)[indices]
        if inner.dtype.kind in "iu":
            return roots(dataset.dataset, np.where(inner < 0, inner + length(dataset.dataset), inner))
    if isinstance(dataset, Records):
        return [
            (Records(root, (dataset.fields[0], dataset.fields[1])), places)
            for root, places in roots(dataset.dataset, indices)
        ]
    if isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        part, starts = np.searchsorted(ends, indices, side="right"), np.concatenate([[0], ends[:-1]])
        return [one for i in np.unique(part) for one in roots(dataset.datasets[i], indices[part == i] - starts[i])]
    return [(dataset, indices)]


def length(dataset: Any) -> int:
    """Of a map-style data set."""
    if not hasattr(dataset, "__len__"):
        raise EngineError(
            f"{type(dataset).__name__} has no length: sampling needs a map-style dataset (e.g. a TensorDataset)"
        )
    return len(dataset)


def _is_of(module: str, name: str, dataset: Any) -> bool:
    """Whether it is an object of a library, which need not be there."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(dataset, kind)
