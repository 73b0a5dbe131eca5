"""What is computed from weights alone, before it meets the input: W.t(), W + B A, a row of a table, a view.

For c = h(θ) with ‖∂h/∂θ‖₂ ≤ L, a cotangent of norm G at c gives ‖∇_θ‖ ≤ L G.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from lipdp.errors import UnsupportedOperationError
from lipdp.norms import certified_norm

Gains = Callable[[Sequence[Tensor], Tensor, Sequence[Any]], "list[float | Tensor]"]
"""From the tensors that go in, the tensor that comes out and all arguments: L in each of the tensors."""

_GAINS: dict[Hashable, Gains] = {}


def _gains(*targets: Hashable) -> Callable[[Gains], Gains]:
    def register(function: Gains) -> Gains:
        _GAINS.update(dict.fromkeys(targets, function))
        return function

    return register


@_gains(
    *(torch.t, torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, getattr),
    *("t", "transpose", "permute", "view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "clone"),
    *("expand", "repeat", torch.swapaxes, "swapaxes", "movedim", torch.movedim),
)
def _copied(sources: Sequence[Tensor], out: Tensor, args: Sequence[Any]) -> list[float | Tensor]:
    """Entries at other places, each at most k times: √k; of views of all entries k = |out|/|in|."""
    parts = [part for a in args[1:] for part in (a if isinstance(a, (tuple, list)) else (a,))]
    plain = all(isinstance(part, int) or part in ("T", "mT") for part in parts)
    if not plain:
        raise ValueError
    return [math.sqrt(max(1.0, out.numel() / sources[0].numel()))]


@_gains(operator.getitem)
def _picked(sources: Sequence[Tensor], out: Tensor, args: Sequence[Any]) -> list[float | Tensor]:
    """Entries by whole numbers and slices, each at most once: 1. A list may name a row twice: it is refused."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(isinstance(part, (int, slice, type(None), type(Ellipsis))) for part in index):
        raise ValueError
    return [1.0]


@_gains(operator.mul, torch.mul, "mul")
def _scaled(sources: Sequence[Tensor], out: Tensor, args: Sequence[Any]) -> list[float | Tensor]:
    """c W: |c|."""
    numbers = [float(a) for a in args if isinstance(a, (int, float))]
    if len(sources) != 1 or len(numbers) != 1 or len(args) != 2:
        raise ValueError
    return [abs(numbers[0])]


@_gains(operator.truediv, torch.div, "div")
def _divided(sources: Sequence[Tensor], out: Tensor, args: Sequence[Any]) -> list[float | Tensor]:
    """W/c: 1/|c|."""
    if len(args) != 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], (int, float)) or not args[1]:
        raise ValueError
    return [1.0 / abs(float(args[1]))]


@_gains(operator.add, torch.add, "add", operator.sub, torch.sub, "sub")
def _summed(sources: Sequence[Tensor], out: Tensor, args: Sequence[Any]) -> list[float | Tensor]:
    """a ± b: 1, √k where an entry is repeated k times."""
    if len(args) != 2 or not all(isinstance(a, (int, float, Tensor)) for a in args):
        raise ValueError
    return [math.sqrt(out.numel() / source.numel()) for source in sources]


@_gains(operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
def _product(sources: Sequence[Tensor], out: Tensor, args: Sequence[Any]) -> list[float | Tensor]:
    """B A: ‖G Aᵀ‖ ≤ ‖A‖₂ G and ‖Bᵀ G‖ ≤ ‖B‖₂ G."""
    if len(sources) != 2 or any(source.dim() != 2 for source in sources):
        raise ValueError
    return [certified_norm(sources[1].detach()), certified_norm(sources[0].detach())]


@_gains(F.embedding)
def _rows(sources: Sequence[Tensor], out: Tensor, args: Sequence[Any]) -> list[float | Tensor]:
    """Rows of a table (positions): √k for a row that is there k times."""
    tokens = sources[0]
    if any(argument not in (None, False) for argument in args[3:]) or tokens.is_floating_point():
        raise ValueError
    return [0.0, most_alike(tokens).sqrt()]


def most_alike(tokens: Tensor) -> Tensor:
    """() how often the commonest of the tokens is there, at least 1."""
    return torch.bincount(tokens.flatten().long()).max().double().clamp_min(1.0)


def gains_of(node: fx.Node, args: Sequence[Any], out: Tensor) -> list[float | Tensor]:
    """L in each tensor that the node takes, in the order of `args`."""
    function = _GAINS.get(node.target)
    sources = [argument for argument in args if isinstance(argument, Tensor)]
    try:
        if function is None or node.op == "call_module" or set(node.kwargs) - {"dim", "dim0", "dim1"}:
            raise ValueError
        return function(sources, out, args)
    except ValueError:
        raise UnsupportedOperationError(
            f"node '{node.name}' computes with trainable parameters before they meet the input; no rule bounds their"
            " gradients through that (there are transposes, views, sums, multiples and products of two matrices). Store"
            " the result as the parameter, or register a rule for the module around it"
        ) from None
