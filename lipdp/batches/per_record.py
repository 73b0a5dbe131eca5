"""A function of one record, applied to a batch record by record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipdp.batches.row_rules import tensors_in
from lipdp.batches.rows import BatchTensor, known_rows, plain, version_of
from lipdp.errors import EngineError


def per_record(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Apply `function` to one record after the other: for preparation that torch cannot follow.

    Row j of the result is function(x[j], …). What the function keeps of another record, or reads or writes outside, is
    refused.

    Args:
        function: of a record's parts, without the batch axis, to a tensor of one shape for all records.
        columns: tensors of the same rows, such as the inputs and the labels of a batch.

    Raises:
        EngineError: the columns are of different rows, or the function is not of one record alone.

    >>> per_record(lambda row: row / row.norm(), torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 1.0000]])
    """
    labels = {known_rows(c) for c in columns if isinstance(c, BatchTensor)}
    if len(labels) > 1 or None in labels or len({len(c) for c in columns}) > 1:
        raise EngineError("per_record takes tensors of the same rows of one batch: its inputs, labels or weights")
    bare = [plain(c) for c in columns]
    if not len(bare[0]):  # the shape of a result needs a record
        blank = function(*(torch.zeros(c.shape[1:], dtype=c.dtype, device=c.device) for c in bare))
        made = blank.new_empty(0, *blank.shape)
    else:
        made = torch.stack([_of_one(function, parts) for parts in zip(*bare, strict=True)])
    return BatchTensor.of(made, labels.pop()) if labels else made


class _Part(Tensor):
    """Of the record that `per_record` is at: may meet public tensors only, and not be written elsewhere."""

    record: object

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tensors_in([args, kwargs or {}])
        records = {id(t.record) for t in given if isinstance(t, _Part)}
        others = [t for t in given if not isinstance(t, _Part)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [version_of(t) for t in others]
            result = func(*args, **(kwargs or {}))
            written = [version_of(t) for t in others] != before
        if len(records) > 1 or written or any(isinstance(t, BatchTensor) for t in others):
            raise EngineError("per_record needs a function of one record; this one reads or writes other records")
        record = next(t.record for t in given if isinstance(t, _Part))
        for made in tensors_in(result):
            if type(made) in (Tensor, _Part):
                made.__class__, made.record = _Part, record  # type: ignore[attr-defined]
        return result

    def as_subclass(self, cls: Any) -> Any:
        """Itself."""
        return self


def _of_one(function: Callable[..., Tensor], parts: tuple[Tensor, ...]) -> Tensor:
    record = object()
    own = [Tensor.as_subclass(part, _Part) for part in parts]
    for part in own:
        part.record = record
    made = function(*own)
    if isinstance(made, BatchTensor) or (isinstance(made, _Part) and made.record is not record):
        raise EngineError("per_record needs a function of one record; this one returned values of other records")
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(made, Tensor)
