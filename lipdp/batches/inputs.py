"""What a model is fed with, and what people bring: records as pairs, inputs in the model's dtype, tokens it knows."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lipdp.errors import DataError, EngineError, ParameterError, outside

Field: TypeAlias = "str | int | Sequence[str | int]"
Fields: TypeAlias = "tuple[Field, Field]"


def finite(x: Tensor) -> Tensor:
    """Entries that are NaN or infinite as 0; the others bit for bit as they are, and `x` itself where all are.

    >>> finite(torch.tensor([1.5, float("nan"), -float("inf")]))
    tensor([1.5000, 0.0000, 0.0000])
    """
    if not (x.is_floating_point() or x.is_complex()):
        return x
    looks = x.is_cpu and x.is_floating_point() and x.numel() > 0 and not torch.compiler.is_compiling()
    if looks and bool(torch.stack(x.aminmax()).isfinite().all()):
        return x  # a look at the extremes costs a tenth of the map
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class InputKind:
    """The inputs that a model takes: a fixed map of each entry, with an answer for every one.

    Attributes:
        dtype: of the model's parameters, or int64 for tokens.
        vocabulary: how many tokens it knows; others are token 0. None for numbers.

    >>> InputKind(torch.float32)(torch.tensor([1, 255], dtype=torch.uint8))
    tensor([  1., 255.])
    >>> InputKind(torch.int64, 5)(torch.tensor([4, 5, -1], dtype=torch.int32))
    tensor([4, 0, 0])
    """

    dtype: torch.dtype
    vocabulary: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.vocabulary is None:
            cast = x.to(self.dtype)
            return finite(cast) if _narrows(x, self.dtype) else cast
        known = (x >= 0) & (x < self.vocabulary)
        return torch.where(known, x, torch.zeros_like(x)).to(self.dtype)

    def of(self, batch: Any) -> Any:
        """A collated batch with its input as the model takes it."""
        if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
            return self(batch[0]), *batch[1:]
        return batch


def _narrows(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a finite number can become infinite: 1e300 in float32."""
    return x.is_floating_point() and torch.finfo(x.dtype).max > torch.finfo(dtype).max


class Records(Dataset[Any]):
    """(input, target) of records that hold more, or name their parts.

    >>> Records([{"a": 1.0, "b": 2.0, "y": 0}], (("a", "b"), "y"))[0]
    (tensor([1., 2.]), 0)
    """

    def __init__(self, dataset: Any, fields: Fields) -> None:
        if not isinstance(fields, (tuple, list)) or len(fields) != 2:
            raise ParameterError(f"fields={fields!r}: two are needed, input and target, such as ('image', 'label')")
        self.dataset, self.fields = dataset, tuple(fields)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        record = self.dataset[index]
        return _taken(record, self.fields[0]), _taken(record, self.fields[1])


def _taken(record: Any, field: Any) -> Any:
    if isinstance(field, (tuple, list)):
        return torch.stack([torch.as_tensor(_taken(record, part), dtype=torch.float32) for part in field])
    value = record[field]
    return torch.as_tensor(value) if isinstance(value, list) else value


def as_records(dataset: Any, fields: Fields | None = None) -> Any:
    """What people bring as a data set, as a map-style data set of (input, target) records.

    A `DataLoader` gives its data set; a pair of arrays is a `TensorDataset`; of tables (pandas, structured arrays) and
    of records with names (dicts, Hugging Face's `datasets`) or with more than two parts, `fields` names input and
    target. Others stay as they are.

    >>> table = np.array([(0.5, 1.5, 1)], dtype=[("a", "f4"), ("b", "f4"), ("y", "i8")])
    >>> as_records(table, (("a", "b"), "y")).tensors
    (tensor([[0.5000, 1.5000]]), tensor([1]))
    """
    if isinstance(dataset, DataLoader):
        if dataset.collate_fn is not default_collate:
            raise EngineError(
                "dataset= was given a DataLoader with a collate_fn of its own, which could mix records: batches are"
                " collated by torch's default. Prepare records in the data set, and give that"
            )
        warnings.warn(
            "make_private takes the data set of the DataLoader: its sampler, batch size and collate_fn are not used,"
            " because batches are drawn as the account says",
            UserWarning,
            stacklevel=outside(),
        )
        dataset = dataset.dataset
    columns = _columns(dataset)
    if columns is not None:
        return _of_table(dataset, columns, fields)
    arrays = isinstance(dataset, (tuple, list)) and len(dataset) == 2 and fields is None
    if arrays and _columns(dataset[0]) is not None:
        raise DataError(
            "the data set is a pair whose first part is a table: give numbers, (X.to_numpy(), y.to_numpy()), or one"
            " table and fields=(columns of the input, column of the target)"
        )
    if arrays and all(isinstance(part, (Tensor, np.ndarray)) and part.ndim for part in dataset):
        text = next((part for part in dataset if isinstance(part, np.ndarray) and part.dtype.kind not in "biufc"), None)
        if text is not None:
            raise DataError(
                f"an array of the pair has the type {text.dtype}: numbers are needed. Number labels that are text by a"
                " public list: [labels.index(text) for text in y]"
            )
        pair = [torch.as_tensor(part) for part in dataset]
        if len(pair[0]) == len(pair[1]):
            return TensorDataset(*pair)
    return dataset if fields is None or isinstance(dataset, Records) else Records(dataset, fields)


def _columns(dataset: Any) -> list[str] | None:
    """The columns of a table in memory: of pandas, or a structured array."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(dataset, pandas.DataFrame):
        return [str(name) for name in dataset.columns]
    return list(dataset.dtype.names) if isinstance(dataset, np.ndarray) and dataset.dtype.names else None


def _of_table(table: Any, columns: list[str], fields: Fields | None) -> TensorDataset:
    if fields is None:
        raise DataError(
            f"the data set is a table with the columns {', '.join(columns[:8])}: say which are the input and which the"
            f" target, fields=({tuple(columns[:-1])!r}, {columns[-1]!r})"
        )
    names = [part if isinstance(part, (tuple, list)) else [part] for part in Records(table, fields).fields]
    missing = [str(name) for part in names for name in part if name not in columns]
    if missing:
        raise DataError(f"the table has no column {missing[0]!r}; its columns are {', '.join(columns)}")
    try:
        inputs = np.stack([np.asarray(table[name], dtype=np.float32) for name in names[0]], axis=1)
    except ValueError as error:
        raise DataError(
            f"a column of the input holds no numbers: {error}. Number its values by a public list"
        ) from None
    target = np.array(table[names[1][0]])
    if target.dtype.kind not in "biuf":
        raise DataError(f"the target column {names[1][0]!r} holds no numbers; number its values by a public list")
    return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(target))


def describe(record: Any) -> str:
    """What a record is, in words, and how to make a pair of tensors of it.

    >>> describe({"image": torch.zeros(2), "label": 1})
    "a dict of 'image' (Tensor (2,)), 'label' (int). Pass fields=('image', 'label')"
    """
    if isinstance(record, Mapping):
        parts = ", ".join(f"{key!r} ({_kind(value)})" for key, value in record.items())
        keys = list(record)
        example = f"fields=({keys[0]!r}, {keys[-1]!r})" if len(keys) > 1 else "fields=(INPUT, TARGET)"
        return f"a dict of {parts}. Pass {example}"
    if not isinstance(record, (tuple, list)):
        return f"{_kind(record)}, where a pair (input, target) is needed"
    parts = ", ".join(map(_kind, record))
    if len(record) != 2:
        return f"({parts}). Pass fields=(0, 1), the places of input and target"
    return f"({parts}). {_advice(record)}"


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    name = type(value).__name__
    if isinstance(value, str):
        return "a text"
    return f"{name} {tuple(shape)}" if shape is not None and len(shape) else name


def _advice(record: Sequence[Any]) -> str:
    if type(record[0]).__module__.startswith("PIL."):
        ready = importlib.util.find_spec("torchvision") is not None
        how = "transform=torchvision.transforms.ToTensor()" if ready else "torch.from_numpy(np.array(image))"
        return f"Make a tensor of the image: {how}"
    if isinstance(record[0], str):
        return "Make a tensor of numbers of the text, by a public list of words: examples/text.py"
    if isinstance(record[1], str):
        return "Number the labels by a public list: labels.index(text)"
    return "Make tensors, arrays or numbers of both"
