"""Which rows of a batch the result of an operation has: a rule for every operation that does not mix records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Row j of a tensor was computed from row `start + j` of one batch, and from nothing else of it."""

    batch: Any
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Rows:
        """Rows `start` up to `stop` of these."""
        return Rows(self.batch, self.start + start, self.start + stop)


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
KEEPS_STATISTICS = _words("batch_norm instance_norm native_batch_norm")
_REPEATS = _words("expand expand_as broadcast_to repeat tile")
_JOINS = _words("cat concat concatenate stack")
_SWAPS = _words("transpose swapaxes swapdims movedim moveaxis")
_PARTS = _words("split chunk tensor_split split_with_sizes unsafe_chunk unsafe_split narrow")


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list, dict)):
            found += tensors_in(part)
    return found


def rows_kept(
    name: str, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, batches: Sequence[Tensor]
) -> Any:
    """The rows of a result of the tensors `batches`, all of the rows `rows`, and of public ones; None where mixed."""
    first: Any = args[0] if args else None
    own = len(batches) == 1 and first is batches[0]
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
    axes, given = _axes(args[1:], first.dim()), tensors_in([args, kwargs])
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
    sizes = {len(t) if t.dim() else -1 for t in tensors_in(result)}
    return [rows] * len(tensors_in(result)) if keeps and sizes == {len(rows)} else None


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
