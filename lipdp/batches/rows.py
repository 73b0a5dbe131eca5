"""Tensors that know which records of a batch their rows are, whatever the training script does to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lipdp.errors import EngineError


@dataclass(frozen=True)
class Rows:
    """Row j of a tensor was computed from row `start + j` of one batch, and from nothing else of it.

    Attributes:
        batch: whatever identifies the batch.
        start, stop: the rows, of those the batch has.
    """

    batch: Any
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Rows:
        """Rows `start` up to `stop` of these."""
        return Rows(self.batch, self.start + start, self.start + stop)


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

    >>> x = BatchTensor.of(torch.arange(6.0).view(3, 2), Rows("a batch", 0, 3))
    >>> (x[1:] / 255).rows, (x - x.mean(0)).rows, (x - x.mean(1, keepdim=True)).rows
    (Rows(batch='a batch', start=1, stop=3), None, Rows(batch='a batch', start=0, stop=3))

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
        kwargs = kwargs or {}
        given = _tensors([args, kwargs])
        raw = getattr(func, "__name__", "")
        name = _name(func, raw)
        with torch._C.DisableTorchFunctionSubclass():
            before = [_version(t) for t in given]
            result = func(*args, **kwargs)
            written = [t for t, version in zip(given, before, strict=True) if _version(t) != version]
        if name in _KEEPS_STATISTICS:  # written without a new version
            written += [t for t in given if type(t) is Tensor]
        if raw == "__set__" and given[1:]:  # x.data = y
            _overwrite(args[0], None)
            return result
        if name == "setitem":
            _overwrite(args[0], _rows_after_setitem(*args))
            return result
        if not isinstance(result, (Tensor, tuple, list)) or isinstance(result, torch.Size) or name == "tolist":
            for target in written:
                _overwrite(target, None)
            return result
        rows = _rows_of(name, args, kwargs, result)
        changed = args[0] if (raw.endswith("_") and not raw.endswith("__")) or raw.startswith("__i") else None
        own = next((t for t in (changed, kwargs.get("out"), *written) if isinstance(t, Tensor) and t is result), None)
        for target in written:
            if own is None or _storage(target) is not _storage(own):
                _overwrite(target, None)
        if own is None:
            return _labelled(result, rows)
        _overwrite(own, rows[0] if isinstance(rows, list) else rows)
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


def per_record(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Apply `function` to one record after the other: for preparation that torch cannot follow.

    Row j of the result is function(x[j], …). What the function keeps of another record, or reads or writes outside, is
    refused.

    Args:
        function: of a record's parts, without the batch axis, to a tensor of one shape for all records.
        columns: tensors of the same rows, such as the inputs and the labels of a batch.

    Raises:
        EngineError: the columns are of different rows, or the function is not of one record alone.

    >>> x = BatchTensor.of(torch.arange(6.0).view(3, 2), Rows("a batch", 0, 3))
    >>> per_record(lambda row: row / row.norm(), x).rows
    Rows(batch='a batch', start=0, stop=3)
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
        given = _tensors([args, kwargs or {}])
        records = {id(t.record) for t in given if isinstance(t, _Part)}
        others = [t for t in given if not isinstance(t, _Part)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [_version(t) for t in others]
            result = func(*args, **(kwargs or {}))
            written = [_version(t) for t in others] != before
        if len(records) > 1 or written or any(isinstance(t, BatchTensor) for t in others):
            raise EngineError("per_record needs a function of one record; this one reads or writes other records")
        record = next(t.record for t in given if isinstance(t, _Part))
        for made in _tensors(result):
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


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


# --- which rows a result has -----------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ENTRYWISE = _words(
    """
    add sub mul div truediv radd rsub rmul rdiv rtruediv iadd isub imul idiv itruediv true_divide floor_divide
    floordiv rfloordiv subtract multiply divide remainder mod fmod pow rpow ipow neg negative positive pos abs
    absolute sign sgn exp expm1 exp2 log log1p log2 log10 sqrt rsqrt square sin cos tan sinh cosh tanh asin acos
    atan atan2 sigmoid logit erf relu relu6 leaky_relu elu selu gelu silu softplus softsign hardtanh hardsigmoid
    hardswish clamp clip clamp_min clamp_max round floor ceil trunc frac reciprocal eq ne lt le gt ge
    logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor and or xor
    invert rand ror where maximum minimum fmax fmin lerp addcmul addcdiv nan_to_num isnan isinf isfinite
    masked_fill copy copysign hypot heaviside to float double half bfloat16 long int short bool byte type type_as
    contiguous clone detach requires_grad cpu cuda pin_memory data grad real dropout bernoulli zeros_like
    ones_like full_like empty_like rand_like randn_like zero fill normal uniform retain_grad alias as_subclass
    threshold polygamma digamma lgamma deg2rad rad2deg angle conj
    """
)
_ON_SAMPLES = _words(
    """
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d interpolate upsample one_hot
    grid_sample
    """
)
_LEAST_AXES = {
    "conv1d": 3,
    "conv2d": 4,
    "conv3d": 5,
    "linear": 2,
    "matmul": 2,
    "mT": 3,
    "pixel_shuffle": 4,
    "pixel_unshuffle": 4,
    "unfold": 4,
}
_VIEWS = _words("view reshape flatten unflatten view_as reshape_as squeeze unsqueeze")
_OVER_AXES: dict[str, tuple[int, Any]] = {  # where the axes stand among the arguments, and their default
    **dict.fromkeys(
        _words("mean sum amax amin std var prod any all logsumexp softmax log_softmax max min argmax"), (1, 0)
    ),
    **dict.fromkeys(
        _words("argmin cumsum cumprod sort argsort median flip softmin var_mean std_mean index_select"), (1, 0)
    ),
    **dict.fromkeys(_words("norm linalg_norm linalg_vector_norm roll rot90 topk kthvalue diff"), (2, 0)),
    "normalize": (2, 1),
}
_KEEPS_STATISTICS = _words("batch_norm instance_norm native_batch_norm")
_REPEATS = _words("expand expand_as broadcast_to repeat tile")
_JOINS = _words("cat concat concatenate stack")
_SWAPS = _words("transpose swapaxes swapdims movedim moveaxis")
_PARTS = _words("split chunk tensor_split split_with_sizes unsafe_chunk unsafe_split narrow")


def _name(func: Any, raw: str) -> str:
    """Of a function, method, operator or property, without underscores: `add` for `add_`, `iadd` for `__iadd__`."""
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", "") if raw in ("__get__", "__set__") else raw.strip("_")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in _tensors(part)]
    return [t for part in value.values() for t in _tensors(part)] if isinstance(value, dict) else []


def _rows_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The rows of a result: one label for a tensor, one each for several; None where they may be mixed."""
    first: Any = args[0] if args else None
    if name == "grad" and len(args) > 1:  # torch.autograd.grad: of every input
        inputs = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        return [known_rows(t) for t in inputs]
    given = _tensors([args, kwargs])
    batches = [t for t in given if isinstance(t, BatchTensor)]
    rows = known_rows(batches[0])
    if rows is None or any(known_rows(t) != rows for t in batches):
        return None
    if any(_written(t) is not None for t in given if not isinstance(t, BatchTensor)):
        return None  # written to from a batch, through another view
    own = isinstance(first, BatchTensor) and len(batches) == 1
    if name in _ENTRYWISE:
        aligned = isinstance(result, Tensor) and all(t.dim() == result.dim() for t in batches)
        return rows if aligned and len(result) == len(rows) else None
    if name == "getitem" and args[1] is batches[0] and len(batches) == 1:  # a public table, by the labels
        return rows if not args[1].is_floating_point() and args[1].dtype is not torch.bool else None
    if name in _JOINS:
        (axis,) = _axes([kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))], result.dim())
        return rows if axis > 0 and len({t.dim() for t in batches}) == 1 and len(result) == len(rows) else None
    if not own:
        return None
    if name == "getitem":
        label = _rows_of_slice(rows, args[1], first.dim())
        return label if label is not None and result.dim() and len(result) == len(label) else None
    if name in _PARTS:
        return _rows_of_parts(name, rows, args, kwargs, result)
    axes = _axes(args[1:], first.dim())
    keeps = (
        name in _ON_SAMPLES
        or name in _VIEWS
        or (name in _REPEATS and result.dim() == first.dim())
        or (first.dim() >= _LEAST_AXES.get(name, math.inf) and all(t.dim() <= first.dim() for t in given))
        or (name in _OVER_AXES and _spares_the_batch(name, args, kwargs))
        or (name == "pad" and len(args[1] if len(args) > 1 else kwargs["pad"]) < 2 * first.dim())
        or (name == "embedding" and not first.is_floating_point() and given[-1].is_floating_point())
        or (name == "layer_norm" and len(args[1] if len(args) > 1 else kwargs["normalized_shape"]) < first.dim())
        or (name == "permute" and axes[:1] == [0])
        or (name in _SWAPS and len(axes) > 1 and min(axes) > 0)
    )
    sizes = {len(t) if t.dim() else -1 for t in _tensors(result)}
    return [rows] * len(_tensors(result)) if keeps and sizes == {len(rows)} else None


def _axes(given: Sequence[Any], ndim: int) -> list[int]:
    """Counted from 0; -1 for what is no whole number, and may be any axis."""
    flat = [a for part in given for a in (part if isinstance(part, (tuple, list)) else [part])]
    return [a % max(ndim, 1) if type(a) is int else -1 for a in flat]


def _spares_the_batch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the axes named are others than the first."""
    place, default = _OVER_AXES[name]
    given = next((kwargs[key] for key in ("dim", "dims", "axis") if key in kwargs), None)
    if given is None:
        given = (args[place:] if name == "flip" else args[place : place + 1]) or (default,)
    flat = _axes(given if isinstance(given, (tuple, list)) else (given,), args[0].dim())
    return bool(flat) and min(flat) > 0


def _rows_of_slice(rows: Rows, index: Any, ndim: int) -> Rows | None:
    """`x[a:b, …]`: the rows a to b. An index, a mask or a step of the first axis may repeat or reorder records."""
    first = index[0] if isinstance(index, tuple) and index else index
    others = index[1:] if isinstance(index, tuple) else ()
    if not _stays_in_place(others):
        return None
    if first is Ellipsis:
        return rows if sum(i is not None for i in others) < ndim else None
    if not isinstance(first, slice) or first.step not in (None, 1):
        return None
    start, stop, _ = first.indices(len(rows))
    return rows.part(start, max(start, stop))


def _stays_in_place(others: tuple[Any, ...]) -> bool:
    """Indices of the further axes that leave the first the first: of several picks torch moves the axes in front."""
    simple = [i is None or i is Ellipsis or isinstance(i, slice) or type(i) is int for i in others]
    if all(simple):
        return True
    picks = [i for i in others if not isinstance(i, slice)]  # channels in another order, a public mask
    return len(picks) == 1 and (
        type(picks[0]) is Tensor or (isinstance(picks[0], list) and all(type(i) is int for i in picks[0]))
    )


def _rows_of_parts(name: str, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    if name == "narrow":
        axis, start = (kwargs.get(k, args[i] if len(args) > i else 0) for i, k in ((1, "dim"), (2, "start")))
        start = int(start) % max(len(rows), 1) if int(start) < 0 else int(start)
        return rows if axis % args[0].dim() else rows.part(start, start + len(result))
    axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if axis % args[0].dim():
        return [rows] * len(result)
    ends = [0]
    for part in result:
        ends.append(ends[-1] + len(part))
    if ends[-1] != len(rows):  # tensor_split at places that are not in order
        return None
    return [rows.part(start, stop) for start, stop in pairwise(ends)]


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
    return rows if whole and not any(isinstance(t, BatchTensor) for t in _tensors(index)) else None


# --- labelling -------------------------------------------------------------------------------------------------------


def _overwrite(tensor: Tensor, rows: Rows | None) -> None:
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


def _labelled(result: Any, rows: Any) -> Any:
    if isinstance(result, Tensor):
        label = rows[0] if isinstance(rows, list) else rows
        if isinstance(result, BatchTensor) and result.rows == label:
            return result  # a cast to what it was
        return BatchTensor.of(result, label) if type(result) in (Tensor, BatchTensor) else result
    if isinstance(result, (tuple, list)):
        labels = rows if isinstance(rows, list) else [rows] * len(result)
        made = [_labelled(t, r) for t, r in zip(result, labels, strict=True)]
        return made if isinstance(result, list) else type(result)(made)
    return result
