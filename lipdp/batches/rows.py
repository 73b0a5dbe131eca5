"""Tensors that know which records of a batch their rows are, whatever the training script does to them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lipdp.batches.row_rules import KEEPS_STATISTICS, Rows, rows_kept, tensors_in


class BatchTensor(Tensor):
    r"""A tensor of a private batch: an ordinary tensor that also knows its `rows`.

    One record may move the sum of gradients by Δ only where every row that enters the model is computed from one
    record. So what a script does to a batch is followed, operation by operation:

    - what works entry by entry or sample by sample keeps the rows (casts, moves, arithmetic with numbers and other
      tensors, reshaping, crops, flips, convolutions, reductions over other axes than the first);
    - a slice of the first axis, `split` and `chunk` are the rows they take;
    - everything else makes `rows` None: one record may be in several rows (`x[indices]`, `torch.cat`), or a row hold
      several records (`x - x.mean(0)`). The numbers are the same; only a private step on them is refused.

    A tensor that is not of a batch counts as public. A gradient by a batch (`torch.autograd.grad`, `x.grad`) has the
    rows of the batch: an attack whose own loss mixes records is not seen. Nor is what a script reads as numbers
    (`.item()`, `.numpy()`, `len(x)`) and computes with: such numbers count as public.

    Attributes:
        rows: of which batch, and which of its rows; None where they may be mixed.

    Source: ours; tracking of information flow, operation by operation (Denning 1976), with the rows of a batch as
    labels.
    """

    rows: Rows | None

    def as_subclass(self, cls: Any) -> Any:
        """Itself: to leave the class would be to lose the rows."""
        return self

    def __format__(self, spec: str) -> str:
        return format(plain(self), spec)

    def __copy__(self) -> BatchTensor:
        return BatchTensor.of(plain(self), self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchTensor:
        memo[id(self)] = made = BatchTensor.of(plain(self).detach().clone(), self.rows)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).detach().__reduce_ex__(protocol)  # a file holds numbers, not batches

    @classmethod
    def of(cls, tensor: Tensor, rows: Rows | None) -> BatchTensor:
        """The same tensor, with its rows."""
        made = Tensor.as_subclass(tensor, cls)
        made.rows = rows
        return made

    @classmethod
    @_disable_dynamo
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # what is asked below of a tensor is not followed in its turn
            return func(*args, **kwargs or {}) if func in _FACTS else _followed(func, args, kwargs or {})


_FACTS = frozenset(
    [Tensor.__len__, Tensor.dim, Tensor.size, Tensor.numel]
    + [getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_leaf")]
)
"""What returns no tensor and writes none."""


def _followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation, with its rows; what it writes loses them, or has others."""
    given = tensors_in([args, kwargs])
    raw = getattr(func, "__name__", "")
    name = _name(func, raw)
    before = [version_of(t) for t in given]
    result = func(*args, **kwargs)
    written = [t for t, version in zip(given, before, strict=True) if version_of(t) != version]
    if name in KEEPS_STATISTICS:  # written without a new version
        written += [t for t in given if type(t) is Tensor]
    if raw == "__set__" and given[1:]:  # x.data = y
        overwrite(args[0], None)
        return result
    if name == "setitem":
        overwrite(args[0], _rows_after_setitem(*args))
        return result
    if not isinstance(result, (Tensor, tuple, list)) or isinstance(result, torch.Size) or name == "tolist":
        for target in written:
            overwrite(target, None)
        return result
    rows = _rows_of(name, args, kwargs, result, given)
    changed = args[0] if (raw.endswith("_") and not raw.endswith("__")) or raw.startswith("__i") else None
    own = next((t for t in (changed, kwargs.get("out"), *written) if isinstance(t, Tensor) and t is result), None)
    for target in written:
        if own is None or _storage(target) is not _storage(own):
            overwrite(target, None)
    if own is None:
        return labelled(result, rows)
    overwrite(own, rows[0] if isinstance(rows, list) else rows)
    return own


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its rows; autograd still leads back to it."""
    if not isinstance(tensor, BatchTensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(tensor, Tensor)


def known_rows(tensor: Tensor) -> Rows | None:
    """Which rows of a batch a tensor holds; None where it is of none, or may mix them."""
    return tensor.rows if isinstance(tensor, BatchTensor) and not _written(tensor) else None


def of_batches(tensors: Iterable[Tensor]) -> bool:
    """Whether anything of a batch was written to one of these."""
    return any(isinstance(t, BatchTensor) or _written(t) is not None for t in tensors)


# --- memory -----------------------------------------------------------------------------------------------------------

_MIXED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Memory that was overwritten by what is of a batch; True where its rows may be mixed: in whatever view it is seen."""


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, or inside torch.func
            return None


def _written(tensor: Tensor) -> bool | None:
    """Whether what was written there may mix rows; None where nothing of a batch was."""
    storage = _storage(tensor)
    return True if storage is None else _MIXED.get(storage)


def version_of(tensor: Tensor) -> int:
    """A number that changes when the tensor is written."""
    return -1 if tensor.is_inference() else tensor._version


def _name(func: Any, raw: str) -> str:
    """Of a function, method, operator or property, without underscores: `add` for `add_`, `iadd` for `__iadd__`."""
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", "") if raw in ("__get__", "__set__") else raw.strip("_")


def _rows_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, given: list[Tensor]) -> Any:
    """The rows of a result: one label for a tensor, one each for several; None where they may be mixed."""
    if name == "grad" and len(args) > 1:  # torch.autograd.grad: of every input
        inputs = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        return [known_rows(t) for t in inputs]
    batches = [t for t in given if isinstance(t, BatchTensor)]
    rows = known_rows(batches[0])
    if rows is None or any(known_rows(t) != rows for t in batches):
        return None
    if any(_written(t) is not None for t in given if not isinstance(t, BatchTensor)):
        return None  # written to from a batch, through another view
    return rows_kept(name, rows, args, kwargs, result, batches)


def _rows_after_setitem(target: Tensor, index: Any, value: Any) -> Rows | None:
    """What is written to the same places of every row, or where its own entries say, keeps the rows."""
    rows = known_rows(target)
    if rows is None or (isinstance(value, Tensor) and (isinstance(value, BatchTensor) or _written(value) is not None)):
        return None
    if isinstance(index, BatchTensor):
        number = value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, (int, float, complex))
        return rows if number and index.dtype is torch.bool and known_rows(index) == rows else None
    first = index[0] if isinstance(index, tuple) and index else None
    whole = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
    return rows if whole and not any(isinstance(t, BatchTensor) for t in tensors_in(index)) else None


# --- labelling -------------------------------------------------------------------------------------------------------


def overwrite(tensor: Tensor, rows: Rows | None) -> None:
    """Label a tensor that was changed in place: an ordinary one becomes one of a batch, as does its memory."""
    storage = _storage(tensor)
    if storage is not None:
        _MIXED[storage] = _MIXED.get(storage, False) or rows is None
    with torch._C.DisableTorchFunctionSubclass():
        base = tensor._base
    for changed in (tensor, base):
        if type(changed) is Tensor:
            changed.__class__ = BatchTensor
            changed.rows = None  # type: ignore[attr-defined]
    if isinstance(tensor, BatchTensor):  # not a Parameter: what is added to weights is found by the engine
        tensor.rows = rows


def labelled(result: Any, rows: Any) -> Any:
    """Tensors with their rows; where `rows` is a list, one label for each of several."""
    if isinstance(result, Tensor):
        label = rows[0] if isinstance(rows, list) else rows
        if isinstance(result, BatchTensor) and result.rows == label:
            return result  # a cast to what it was
        return BatchTensor.of(result, label) if type(result) in (Tensor, BatchTensor) else result
    if isinstance(result, (tuple, list)):
        labels = rows if isinstance(rows, list) else [rows] * len(result)
        made = [labelled(t, r) for t, r in zip(result, labels, strict=True)]
        if isinstance(result, list):
            return made
        return type(result)(*made) if hasattr(result, "_fields") else type(result)(made)
    if isinstance(result, MutableMapping):
        named = copy(result)
        named.update({key: labelled(value, rows) for key, value in result.items()})
        return named
    return result
